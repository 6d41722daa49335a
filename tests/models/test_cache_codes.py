"""A cache in 8 bits: the error of its codes, and the attention that reads them, against float64 numpy."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sgpo_jax import sharding
from sgpo_jax.models import attention, attention_gpu, cache_codes, init_cache, windows
from sgpo_jax.models.attention_plain import attend_cache_plain
from sgpo_jax.models.cache_codes import Codes

RNG = np.random.default_rng(0)
LIKE = Codes(np.zeros((1, 4), np.int8), np.zeros((1, 1), np.float32))


@settings(max_examples=30)
@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(-2.0**100, 2.0**100, width=32)))
def test_a_code_is_at_most_half_a_scale_off(exact):
    found = jax.tree.map(np.asarray, cache_codes.encode(exact, LIKE))
    assert found.codes.dtype == np.int8 and found.scale.dtype == np.float32 and found.scale.shape == (3, 1)
    assert (np.abs(found.codes.astype(int)) <= cache_codes.MOST).all() and (found.scale > 0).all()
    apart = np.abs(found.codes * found.scale.astype(np.float64) - exact)
    assert (apart <= 0.50001 * found.scale).all()
    # The scale is no larger than it has to be: the largest number has the greatest code.
    seen = np.abs(exact).max(axis=1) > 2.0**-100
    assert (np.abs(found.codes[seen]).max(axis=1) == cache_codes.MOST).all()


def test_what_is_stored_as_numbers_stays_and_what_is_not_finite_is_seen():
    new = jnp.array([[1.0, np.nan, 2.0, 3.0], [1.0, np.inf, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert cache_codes.encode(new, new) is new
    found = cache_codes.encode(new, LIKE)
    finite = np.isfinite(found.codes * np.asarray(found.scale)).all(axis=1)
    assert finite.tolist() == [False, False, True] and not np.asarray(found.codes[2]).any()


def cached(batch, slots, heads, kv_heads, size, each=1, layers=3):
    """query, keys and values as codes, and the same as float64 numbers."""
    query = RNG.normal(size=(batch * each, heads, size)).astype(np.float32)
    # Tokens of very different sizes, so that a scale that is left out, or another token's, shows.
    exact = RNG.normal(size=(2, kv_heads, layers, batch, slots, size)) * RNG.uniform(0.2, 2.0, (batch, slots, 1))
    codes = [cache_codes.encode(jnp.asarray(x, jnp.float32), LIKE) for x in exact]
    return query, *codes, *(np.asarray(x.codes, np.float64) * np.asarray(x.scale, np.float64) for x in codes)


def reference(query, keys, values, layer, lengths, each=1, window=None):
    """float64 numbers, one head of one new token at a time."""
    out = np.zeros(query.shape)
    for row, head in np.ndindex(query.shape[:2]):
        of = head // (query.shape[1] // len(keys)), layer, row // each
        end = min(lengths[row], keys.shape[3])
        seen = slice(0 if window is None else max(end - window, 0), end)
        scores = keys[*of, seen] @ query[row, head] / query.shape[2] ** 0.5
        weight = np.exp(scores - scores.max())
        out[row, head] = weight @ values[*of, seen] / weight.sum()
    return out.reshape(len(query), -1)


@pytest.mark.parametrize("how", ["partial", "plain", "sliding", "gpu"])
@pytest.mark.parametrize("each", [1, 3])
def test_attention_reads_the_codes_and_scales_of_its_tokens(monkeypatch, how, each):
    query, keys, values, *numbers = cached(2, 192, 6, 2, 16, each)
    lengths = np.array([[1], [150]]) + np.arange(each)
    if how == "gpu":
        monkeypatch.setattr(attention, "platform", lambda: "gpu")
        monkeypatch.setattr(attention_gpu, "attend_cache", partial(attention_gpu.attend_cache, interpret=True))
    elif how == "plain":
        monkeypatch.setattr(attention, "attend_cache_partial", attend_cache_plain)
    window = 5 if how == "sliding" else None
    lengths = lengths.reshape(-1).astype(np.int32)
    got = jax.jit(lambda *stored: windows.attend_cache(query, *stored, 1, lengths, window, True, each))(keys, values)
    np.testing.assert_allclose(got, reference(query, *numbers, 1, lengths, each, window), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_of_gpus_reads_what_plain_products_read(dtype):
    """A padded head, several parts of a row, and rows of the cache that are not in use; on a mesh of rows and heads."""
    query, keys, values, *_ = cached(4, 1024, 4, 2, 24, layers=2)
    lengths = np.array([1, 900, 1024, 2000], np.int32)
    query = jnp.asarray(query, dtype)
    expected = attend_cache_plain(query, keys, values, 1, lengths)
    wide = [Codes(jnp.pad(x.codes, [(0, 0)] * 4 + [(0, 8)]), x.scale) for x in (keys, values)]
    assert attention_gpu.takes(wide[0])
    for mesh in (None, sharding.make_mesh(1, 2, 2, jax.devices()[:4])):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            got = jax.jit(partial(attention_gpu.attend_cache, interpret=True))(query, *wide, 1, lengths)
        np.testing.assert_allclose(
            got.astype(np.float32), expected.astype(np.float32), atol=1e-5 if dtype == jnp.float32 else 0.03
        )


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_tokens_are_written_as_codes(monkeypatch, platform):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    cache = Codes(jnp.zeros((2, 3, 2, 6, 16), jnp.int8), jnp.zeros((2, 3, 2, 6, 1)))
    prompt, new = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 4, 2, 16), (4, 2, 16)))
    filled = attention.fill(cache, prompt, 1)
    slots = np.array([4, 5, 1, 2], np.int32)
    got = attention.append(filled, new, 1, slots, 2)
    for name, size in (("codes", 16), ("scale", 1)):
        expected = np.zeros((2, 3, 2, 6, size))
        expected[:, 1, :, :4] = np.asarray(getattr(cache_codes.encode(prompt, LIKE), name)).transpose(2, 0, 1, 3)
        for i, slot in enumerate(slots):
            expected[:, 1, i // 2, slot] = getattr(cache_codes.encode(new, LIKE), name)[i]
        np.testing.assert_array_equal(getattr(got, name), expected)


def test_tpus_refuse_codes_by_the_name_of_the_field(monkeypatch, tiny):
    monkeypatch.setattr(cache_codes, "platform", lambda: "tpu")
    assert init_cache(tiny, 1, 4, jnp.bfloat16)["key"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"config.rl.rollout_cache='int8': must be '' on TPUs"):
        init_cache(tiny, 1, 4, jnp.int8)


def test_bytes_of_a_token():
    assert [cache_codes.token_bytes(128, dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.int8)] == [512, 256, 132]
