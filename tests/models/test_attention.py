"""The kernels of TPUs and GPUs in interpret mode, against the plain paths and float64 numpy."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sgpo_jax import output_head, sharding
from sgpo_jax.models import attention, attention_gpu, attention_heads, attention_tpu
from sgpo_jax.models.attention_plain import attend_cache_partial, attend_cache_plain, attend_plain

RNG = np.random.default_rng(0)
BFLOAT16 = 0.02  # the paged kernel rounds its operands, of size 1 to 4, to bfloat16; another token or layer is off by 1

splash, flash = (partial(kernels.attend, interpret=True) for kernels in (attention_tpu, attention_gpu))
gpu_cache = partial(attention_gpu.attend_cache, interpret=True)


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
    got = np.asarray(attend_plain(query, key, value, segments))
    real = segments != 0
    np.testing.assert_allclose(got[real], reference(query, key, value, segments)[real], atol=1e-5)
    assert np.isfinite(got).all()


def outcome(attend, arguments, dtype=np.float32):
    """(real outputs, gradients of query, key and value), in float32."""
    *arrays, segments = arguments
    _, length, heads, size = arrays[0].shape
    weight = np.random.default_rng(1).normal(size=(len(segments), length, heads * size)) * (segments != 0)[..., None]

    def loss(query, key, value):
        out = attend(query, key, value, segments).astype(jnp.float32)
        return (out * weight).sum(), out

    arrays = [jnp.asarray(x, dtype) for x in arrays]
    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return np.asarray(out)[segments != 0], [np.asarray(x, np.float32) for x in gradients]


def assert_same_outcome(attend, arguments, value=2e-5, gradient=2e-4, **more):
    out, gradients = outcome(attend, arguments, **more)
    expected, expected_gradients = outcome(attend_plain, arguments)
    np.testing.assert_allclose(out, expected, atol=value)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=gradient)


@pytest.mark.parametrize(("length", "heads", "kv_heads", "size"), [(128, 2, 2, 64), (300, 6, 2, 128)])
def test_splash_and_its_gradient_are_those_of_plain_attention(length, heads, kv_heads, size):
    assert_same_outcome(splash, inputs(2, length, heads, kv_heads, size))


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "size"),
    [(128, 2, 2, 64), (131, 6, 2, 96), (33, 3, 3, 256), (257, 4, 1, 128), (7, 4, 2, 8)],
)
def test_the_kernel_of_gpus_and_its_gradient_are_those_of_plain_attention(length, heads, kv_heads, size):
    assert_same_outcome(flash, inputs(2, length, heads, kv_heads, size))


def test_the_kernel_of_gpus_in_bfloat16():
    # Operands and outputs of size 1 to 4 are rounded to 8 bits.
    assert_same_outcome(flash, inputs(2, 100, 6, 2, 64), value=0.04, gradient=0.2, dtype=jnp.bfloat16)


@pytest.mark.parametrize(("dtype", "precise"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_gpus_multiply_float32_as_float32(monkeypatch, dtype, precise):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    *arrays, segments = inputs(1, 32, 2, 1, 16)
    query, keys, values = cached(2, 64, 2, 1, 16)

    def loss(arrays, query, keys, values):
        decoded = gpu_cache(query, keys, values, 1, np.array([3, 60], np.int32))
        return flash(*arrays, segments).sum() + output_head.product(decoded, decoded.T).sum()

    casted = jax.tree.map(lambda x: jnp.asarray(x, dtype), (arrays, query, keys, values))
    text = str(jax.make_jaxpr(jax.grad(loss))(*casted))
    assert text.count("dot_general[") >= 2 + 5 + 2 + 1  # forward, backward, decoding, head
    assert text.count("(Precision.HIGHEST, Precision.HIGHEST)") == text.count("dot_general[") * precise


def cached(batch, slots, heads, kv_heads, size, layers=3):
    query = RNG.normal(size=(batch, heads, size)).astype(np.float32)
    keys, values = (RNG.normal(size=(kv_heads, layers, batch, slots, size)).astype(np.float32) for _ in range(2))
    return query, keys, values


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (14, 2)])
def test_paged_attention_reads_the_tokens_of_its_layer_and_row(heads, kv_heads):
    query, keys, values = cached(3, 256, heads, kv_heads, 128)
    lengths = np.array([1, 130, 256], np.int32)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(attention_tpu.attend_cache)(query, keys, values, 1, lengths)
    np.testing.assert_allclose(got, attend_cache_plain(query, keys, values, 1, lengths), atol=BFLOAT16)
    row = reference(
        np.repeat(query[1][None, None], 130, axis=1), *(x[:, 1, 1, :130].swapaxes(0, 1)[None] for x in (keys, values)),
        np.ones((1, 130), np.int32),
    )  # fmt: skip
    np.testing.assert_allclose(got[1], row[0, -1], atol=BFLOAT16)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "slots"), [(4, 4, 64, 64), (14, 2, 128, 192), (3, 1, 24, 2048), (2, 2, 96, 128)]
)
def test_the_kernel_of_gpus_reads_the_tokens_of_its_layer_and_row(heads, kv_heads, size, slots):
    query, keys, values = cached(4, slots, heads, kv_heads, size)
    lengths = np.array([1, slots // 2 + 1, slots + 3], np.int32)
    expected = attend_cache_plain(query[:3], keys[:, :, :3], values[:, :, :3], 1, lengths)
    # The cache is as wide as the kernel needs, and has a row more than there are queries.
    wide = attention_gpu.cache_shape(slots, size)
    assert wide == (slots, max(16, 2 ** (size - 1).bit_length()))
    keys, values = (np.pad(x, [(0, 0)] * 4 + [(0, wide[1] - size)]) for x in (keys, values))
    assert attention_gpu.takes(keys)
    assert attention_gpu.tokens_at_once(3, kv_heads, slots) == 64 * max(1, slots // 256)  # with several parts, or one
    # What no row has reached is not read: it would spread from there.
    values[:, :, 0, 64:] = values[:, :, 3] = np.nan
    got = jax.jit(gpu_cache)(query[:3], keys, values, 1, lengths)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("how", ["plain", "partial", "gpu", "tpu"])
def test_several_new_tokens_of_a_row_see_the_cache_up_to_themselves(monkeypatch, how):
    each, size = 3, 128 if how == "tpu" else 16
    _, keys, values = cached(2, 128, 4, 2, size)
    query = RNG.normal(size=(2 * each, 4, size)).astype(np.float32)
    lengths = np.array([5, 6, 7, 127, 128, 129], np.int32)  # the last one is past the end
    expected = [
        attend_cache_plain(query[[i]], keys[:, :, [i // each]], values[:, :, [i // each]], 1, lengths[[i]])[0]
        for i in range(2 * each)
    ]
    if how in ("gpu", "tpu"):
        monkeypatch.setattr(attention, "platform", lambda: how)
        monkeypatch.setattr(attention_gpu, "attend_cache", gpu_cache)
    elif how == "plain":
        monkeypatch.setattr(attention, "attend_cache_partial", attend_cache_plain)
    # A function of its own, or the first platform's program would serve all.
    with pltpu.force_tpu_interpret_mode() if how == "tpu" else contextlib.nullcontext():
        got = jax.jit(lambda *arrays: attention.attend_cache(*arrays, 1, lengths, each))(query, keys, values)
    np.testing.assert_allclose(got, expected, atol=BFLOAT16 if how == "tpu" else 1e-5)


def test_several_new_tokens_of_a_row_are_appended_and_none_past_the_end():
    _, keys, _ = cached(2, 8, 4, 2, 16)
    new, slots = RNG.normal(size=(6, 2, 16)).astype(np.float32), np.array([2, 3, 4, 6, 7, 8], np.int32)
    expected = keys.copy()
    for i, slot in enumerate(slots[:5]):
        expected[:, 1, i // 3, slot] = new[i]
    np.testing.assert_array_equal(attention.append(keys, new, 1, slots, 3), expected)


@pytest.mark.parametrize(("slots", "length"), [(1, 64), (1000, 1024), (2049, 2112), (17407, 17408)])
def test_a_cache_of_gpus_is_whole_pages(slots, length):
    assert attention_gpu.cache_shape(slots, 128) == (length, 128)


@pytest.mark.parametrize("slots", [1, 3, 8, 90])
def test_a_cpu_reads_the_part_of_the_cache_that_a_row_has_reached(slots):
    query, keys, values = cached(2, slots, 4, 2, 8)
    read = jax.jit(attend_cache_partial)
    quarters = np.ceil(np.arange(1, 5) * slots / 4)
    for longest in range(1, slots + 2):
        lengths = np.array([1, longest], np.int32)
        expected = attend_cache_plain(query, keys, values, 1, lengths)
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
        packed = jax.jit(splash)(*arguments)
        decoded = jax.jit(attention_tpu.attend_cache)(query, keys, values, 2, lengths)
    real = arguments[-1] != 0
    np.testing.assert_allclose(np.asarray(packed)[real], attend_plain(*arguments)[real], atol=2e-5)
    np.testing.assert_allclose(decoded, attend_cache_plain(query, keys, values, 2, lengths), atol=BFLOAT16)


@pytest.mark.parametrize(("tensor", "heads", "kv_heads"), [(2, 4, 2), (4, 12, 2), (2, 9, 3)])
def test_kernels_of_gpus_on_a_mesh(tensor, heads, kv_heads):
    """The tensor axis divides the key heads, or multiples of them, or no heads."""
    mesh = sharding.make_mesh(1, 2, tensor, jax.devices()[: 2 * tensor])
    arguments = inputs(2, 40, heads, kv_heads, 16)
    query, keys, values = cached(4, 64, heads, kv_heads, 16)
    lengths = np.array([3, 64, 50, 1], np.int32)
    expected = attend_cache_plain(query, keys, values, 2, lengths)
    with jax.set_mesh(mesh):
        assert_same_outcome(flash, arguments)
        np.testing.assert_allclose(jax.jit(gpu_cache)(query, keys, values, 2, lengths), expected, atol=1e-5)
        new = query[:, :kv_heads]
        got = jax.jit(attention_gpu.append)(keys, new, 1, lengths - 1)
    np.testing.assert_array_equal(got, attention.append(keys, new, 1, lengths - 1))


@pytest.mark.parametrize("kernel", [splash, flash])
def test_kernels_have_whole_rows_where_the_context_axis_splits_tokens(kernel):
    """Four devices, each with one of four query heads, and so one of two key heads."""
    arguments = inputs(2, 128, 4, 2, 128)

    def attend(query, key, value, segments):
        return kernel(*attention_heads.whole_rows(query, key, value), segments)

    with jax.set_mesh(sharding.make_mesh(1, 1, 2, jax.devices()[:4], context=2)):
        assert_same_outcome(attend, arguments)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_platform_of_the_mesh_chooses(monkeypatch, platform):
    called = []
    monkeypatch.setattr(attention, "platform", lambda: platform)
    for name in ("attend_plain", "attend_cache_plain", "attend_cache_partial"):
        monkeypatch.setattr(attention, name, lambda *_, name=name: called.append(name))
    for kernels in (attention_tpu, attention_gpu):
        for name in ("attend", "attend_cache", "append"):
            monkeypatch.setattr(kernels, name, lambda *_, name=(kernels, name): called.append(name), raising=False)
    own = {"tpu": attention_tpu, "gpu": attention_gpu}.get(platform)
    query, keys, values = cached(1, 128, 2, 2, 128)
    attention.attend(*inputs(1, 8, 2, 2, 128))
    attention.attend_cache(query, keys, values, 0, np.array([3], np.int32))
    expected = ["attend_plain", "attend_cache_partial"] if own is None else [(own, "attend"), (own, "attend_cache")]
    assert called == expected
    # The paged kernel of TPUs takes no other head size, that of GPUs no other length.
    shape = (1, 128, 2, 2, 64) if platform == "tpu" else (1, 100, 2, 2, 128)
    attention.attend_cache(*cached(*shape), 0, np.array([3], np.int32))
    assert called[-1] == ("attend_cache_partial" if platform == "cpu" else "attend_cache_plain")
    with jax.set_mesh(sharding.make_mesh(1, 2, 1, jax.devices()[:2])):
        attention.attend_cache(*cached(2, *shape[1:]), 0, np.array([3, 4], np.int32))
    assert called[-1] == "attend_cache_plain"
    assert attention.cache_shape(129, 96) == {"cpu": (129, 96), "gpu": (192, 128), "tpu": (256, 96)}[platform]
    attention.append(keys, query, 0, np.array([3], np.int32))
    assert (called[-1] == (attention_gpu, "append")) == (platform == "gpu")


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
