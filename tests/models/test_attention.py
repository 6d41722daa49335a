"""The TPU kernels in interpret mode, and cuDNN's arguments, against the plain paths and float64 numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sgpo_jax import sharding
from sgpo_jax.models import attention

RNG = np.random.default_rng(0)
BFLOAT16 = 0.02  # the paged kernel rounds its operands, of size 1 to 4, to bfloat16; another token or layer is off by 1

interpreted = partial(attention.attend_splash, interpret=True)


def inputs(batch, length, heads, kv_heads, size):
    """query, key, value, and segments: two or three packed sequences and padding at the end of each row."""
    shapes = (heads, kv_heads, kv_heads)
    arrays = [RNG.normal(size=(batch, length, count, size)).astype(np.float32) for count in shapes]
    edges = np.sort(RNG.integers(1, length, (batch, 3)), axis=1)
    segments = 1 + (np.arange(length) >= edges[:, :1]).astype(np.int32) + (np.arange(length) >= edges[:, 1:2])
    return *arrays, np.where(np.arange(length) < edges[:, 2:], segments, 0).astype(np.int32)


def reference(query, key, value, segments):
    """float64, one head and one query at a time."""
    batch, length, heads, size = query.shape
    out = np.zeros(query.shape)
    for b, t, h in np.ndindex(batch, length, heads):
        seen = (np.arange(length) <= t) & (segments[b] == segments[b, t]) & (segments[b] != 0)
        if seen.any():
            k, v = (x[b, seen, h // (heads // x.shape[2])].astype(np.float64) for x in (key, value))
            weight = np.exp(k @ query[b, t, h] / size**0.5)
            out[b, t, h] = weight @ v / weight.sum()
    return out.reshape(batch, length, heads * size)


def test_plain_attention_is_causal_within_segments():
    query, key, value, segments = inputs(2, 13, 6, 2, 8)
    got = np.asarray(attention.attend_plain(query, key, value, segments))
    real = segments != 0
    np.testing.assert_allclose(got[real], reference(query, key, value, segments)[real], atol=1e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize(("length", "heads", "kv_heads", "size"), [(128, 2, 2, 64), (300, 6, 2, 128)])
def test_splash_and_its_gradient_are_those_of_plain_attention(length, heads, kv_heads, size):
    arguments = inputs(2, length, heads, kv_heads, size)
    segments = arguments[-1]
    weight = RNG.normal(size=(2, length, heads * size)) * (segments != 0)[..., None]

    def outcome(attend):
        def loss(query, key, value):
            out = attend(query, key, value, segments)
            return (out * weight).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments[:3])

    gradients, out = outcome(interpreted)
    expected_gradients, expected = outcome(attention.attend_plain)
    real = segments != 0
    np.testing.assert_allclose(out[real], expected[real], atol=2e-5)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-4)


def cached(batch, slots, heads, kv_heads, size, layers=3):
    query = RNG.normal(size=(batch, heads, size)).astype(np.float32)
    keys, values = (RNG.normal(size=(kv_heads, layers, batch, slots, size)).astype(np.float32) for _ in range(2))
    return query, keys, values


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (14, 2)])
def test_paged_attention_reads_the_tokens_of_its_layer_and_row(heads, kv_heads):
    query, keys, values = cached(3, 256, heads, kv_heads, 128)
    lengths = np.array([1, 130, 256], np.int32)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(attention.attend_cache_paged)(query, keys, values, 1, lengths)
    np.testing.assert_allclose(got, attention.attend_cache_plain(query, keys, values, 1, lengths), atol=BFLOAT16)
    row = reference(
        np.repeat(query[1][None, None], 130, axis=1), *(x[:, 1, 1, :130].swapaxes(0, 1)[None] for x in (keys, values)),
        np.ones((1, 130), np.int32),
    )  # fmt: skip
    np.testing.assert_allclose(got[1], row[0, -1], atol=BFLOAT16)


@pytest.mark.parametrize("slots", [1, 3, 8, 90])
def test_a_cpu_reads_the_part_of_the_cache_that_a_row_has_reached(slots):
    query, keys, values = cached(2, slots, 4, 2, 8)
    read = jax.jit(attention.attend_cache_partial)
    quarters = np.ceil(np.arange(1, 5) * slots / 4)
    for longest in range(1, slots + 2):
        lengths = np.array([1, longest], np.int32)
        expected = attention.attend_cache_plain(query, keys, values, 1, lengths)
        np.testing.assert_allclose(read(query, keys, values, 1, lengths), expected, rtol=1e-6, atol=1e-6)
        # It would spread from a slot that is read, whatever its weight.
        unread = np.arange(slots)[:, None] >= quarters[quarters >= min(longest, slots)].min()
        got = read(query, keys, np.where(unread, np.nan, values), 1, lengths)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_kernels_on_a_mesh_that_splits_rows_and_heads():
    mesh = sharding.make_mesh(1, 2, 2, jax.devices()[:4])
    arguments = inputs(2, 128, 4, 2, 128)
    query, keys, values = cached(4, 128, 4, 2, 128)
    lengths = np.array([3, 128, 90, 1], np.int32)
    with pltpu.force_tpu_interpret_mode(), jax.set_mesh(mesh):
        packed = jax.jit(interpreted)(*arguments)
        decoded = jax.jit(attention.attend_cache_paged)(query, keys, values, 2, lengths)
    real = arguments[-1] != 0
    np.testing.assert_allclose(np.asarray(packed)[real], attention.attend_plain(*arguments)[real], atol=2e-5)
    np.testing.assert_allclose(decoded, attention.attend_cache_plain(query, keys, values, 2, lengths), atol=BFLOAT16)


def test_the_arguments_of_cudnn_mean_what_plain_attention_does():
    arguments = inputs(2, 40, 6, 2, 16)  # float32, for which XLA takes the place of cuDNN
    real = arguments[-1] != 0
    np.testing.assert_allclose(
        np.asarray(attention.attend_cudnn(*arguments))[real], attention.attend_plain(*arguments)[real], atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "size", "chosen"), [("bfloat16", 64, "cudnn"), ("float32", 64, "xla")])
def test_cudnn_is_asked_for_where_it_has_a_kernel(monkeypatch, dtype, size, chosen):
    asked = []
    plain = jax.nn.dot_product_attention

    def record(*arguments, implementation, **more):
        asked.append(implementation)
        return plain(*arguments, **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    *arrays, segments = inputs(1, 8, 4, 2, size)
    attention.attend_cudnn(*(jnp.asarray(x, dtype) for x in arrays), segments)
    assert asked == [chosen]


@pytest.mark.parametrize(
    ("platform", "packed", "decoded"),
    [
        ("cpu", "attend_plain", "attend_cache_partial"),
        ("gpu", "attend_cudnn", "attend_cache_plain"),
        ("tpu", "attend_splash", "attend_cache_paged"),
    ],
)
def test_the_platform_of_the_mesh_chooses(monkeypatch, platform, packed, decoded):
    called = []
    monkeypatch.setattr(attention, "platform", lambda: platform)
    implementations = ("attend_plain", "attend_cudnn", "attend_splash")
    cache_implementations = ("attend_cache_plain", "attend_cache_partial", "attend_cache_paged")
    for name in implementations + cache_implementations:
        monkeypatch.setattr(attention, name, lambda *_, name=name: called.append(name))
    attention.attend(*inputs(1, 8, 2, 2, 128))
    attention.attend_cache(*cached(1, 128, 2, 2, 128), 0, np.array([3], np.int32))
    assert called == [packed, decoded]
    # A head size that the paged kernel does not take.
    attention.attend_cache(*cached(1, 128, 2, 2, 64), 0, np.array([3], np.int32))
    assert called[-1] == ("attend_cache_partial" if platform == "cpu" else "attend_cache_plain")
    with jax.set_mesh(sharding.make_mesh(1, 2, 1, jax.devices()[:2])):
        attention.attend_cache(*cached(2, 128, 2, 2, 64), 0, np.array([3, 4], np.int32))
    assert called[-1] == "attend_cache_plain"
    assert attention.cache_length(129) == (256 if platform == "tpu" else 129)


def test_append_writes_one_slot_of_each_row_and_layer():
    _, keys, _ = cached(4, 5, 2, 2, 3)
    new = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    slots = np.array([0, 4, 5, 2], np.int32)  # the third row has no such slot
    got = jax.jit(attention.append)(keys, new, 1, slots)
    expected = keys.copy()
    for row, slot in enumerate(slots):
        if slot < 5:
            expected[:, 1, row, slot] = new[row]
    np.testing.assert_array_equal(got, expected)
