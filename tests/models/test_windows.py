"""Attention of sliding layers: blocks, the kernel of TPUs in interpret mode and decoding, against one dense formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpo_jax import sharding
from sgpo_jax.models import attention, attention_tpu, windows

RNG = np.random.default_rng(0)


def inputs(batch, length, heads, kv_heads, size):
    """query, key, value, and segments: two packed sequences and padding at the end of each row."""
    shapes = (heads, kv_heads, kv_heads)
    arrays = [RNG.normal(size=(batch, length, count, size)).astype(np.float32) for count in shapes]
    first, last = np.sort(RNG.integers(1, length, (2, batch, 1)), axis=0)
    slots = np.arange(length)
    return *arrays, np.where(slots < last, 1 + (slots >= first), 0).astype(np.int32)


def dense(query, key, value, segments, window):
    """The formula with all scores `[B,K,G,T,T]`."""
    batch, length, heads, size = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, size)
    scores = jnp.einsum("btkgn,bskn->bkgts", query, key) / size**0.5
    back = np.arange(length)[:, None] - np.arange(length)
    seen = (back >= 0) & (back < window) & (segments[:, :, None] == segments[:, None]) & (segments[:, None] != 0)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30))
    return jnp.einsum("bkgts,bskn->btkgn", weights, value).reshape(batch, length, heads * size)


def outcome(attend, arguments):
    """(real outputs, gradients of query, key and value)."""
    *arrays, segments = arguments
    weight = np.random.default_rng(1).normal(size=(*segments.shape, 1)) * (segments != 0)[..., None]

    def loss(query, key, value):
        out = attend(query, key, value, segments)
        return (out * weight).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(out)[segments != 0], *gradients]


def assert_dense(attend, arguments, window):
    expected = outcome(partial(dense, window=window), arguments)
    for got, wanted, tolerance in zip(outcome(attend, arguments), expected, (2e-5, 2e-4, 2e-4, 2e-4), strict=True):
        np.testing.assert_allclose(got, wanted, atol=tolerance)


@pytest.mark.parametrize(("length", "window"), [(13, 4), (12, 5), (9, 1), (8, 7), (30, 3)])
def test_blocks_and_their_gradient_are_those_of_dense_attention(length, window):
    assert_dense(partial(windows.attend_in_blocks, window=window), inputs(3, length, 6, 2, 8), window)


@pytest.mark.parametrize(("length", "window"), [(300, 100), (1100, 600)])  # one block, and three
def test_the_kernel_of_tpus_with_a_window(length, window):
    attend = partial(attention_tpu.attend, window=window, interpret=True)
    assert_dense(attend, inputs(1, length, 2, 1, 128), window)


def cached(rows, slots, heads, kv_heads, size, width):
    query = RNG.normal(size=(rows, heads, size)).astype(np.float32)
    keys, values = RNG.normal(size=(2, kv_heads, 3, rows + 1, slots, width)).astype(np.float32)
    return query, *(np.where(np.arange(width) < size, cache, 0) for cache in (keys, values))


def last_of_dense(query, keys, values, layer, lengths, window):
    """`dense` for the last token of each row of the cache, whose further rows and features are not in use."""
    rows, _, size = query.shape
    slots = keys.shape[3]
    key, value = (np.moveaxis(cache[:, layer, :rows, :, :size], 0, 2) for cache in (keys, values))
    segments = (np.arange(slots) < lengths[:, None]).astype(np.int32)
    repeated = np.repeat(query[:, None], slots, axis=1)
    out = dense(repeated, key, value, segments, window)
    return out[np.arange(rows), np.minimum(lengths, slots) - 1]


@pytest.mark.parametrize(("window", "width"), [(1, 8), (5, 8), (19, 16)])
def test_decoding_sees_the_end_of_each_row_of_its_layer(window, width):
    arguments = cached(6, 20, 6, 2, 8, width)
    lengths = np.array([1, 4, 5, 6, 20, 23], np.int32)  # more than the slots means all of them
    got = jax.jit(partial(windows.attend_cache_end, window=window))(*arguments, 1, lengths)
    np.testing.assert_allclose(got, last_of_dense(*arguments, 1, lengths, window), atol=1e-5)


@pytest.mark.parametrize("tensor", [1, 2, 4])  # 4 does not divide the key heads
def test_on_a_mesh_that_splits_rows_and_heads(tensor):
    mesh = sharding.make_mesh(2, 1, tensor, jax.devices()[: 2 * tensor])
    arguments = inputs(4, 14, 8, 2, 8)
    query, keys, values = cached(4, 20, 8, 2, 8, 8)
    cache = query, keys[:, :, :4], values[:, :, :4]
    lengths = np.array([3, 20, 9, 1], np.int32)
    with jax.set_mesh(mesh):
        assert_dense(partial(windows.attend_in_blocks, window=4), arguments, 4)
        got = jax.jit(partial(windows.attend_cache_end, window=4))(*cache, 2, lengths)
    np.testing.assert_allclose(got, last_of_dense(*cache, 2, lengths, 4), atol=1e-5)


@pytest.mark.parametrize("sliding", [True, False])
def test_a_layer_slides_or_does_not(sliding):
    """Also where the choice is traced; a row or a cache within the window has no choice."""
    arguments = inputs(2, 12, 4, 2, 8)
    query, keys, values = cached(2, 20, 4, 2, 8, 8)
    cache, lengths = (query, keys[:, :, :2], values[:, :, :2]), np.array([20, 7], np.int32)
    real, window = arguments[-1] != 0, 5 if sliding else 12
    got = jax.jit(windows.attend, static_argnums=4)(*arguments, 5, sliding)
    np.testing.assert_allclose(got[real], dense(*arguments, window)[real], atol=1e-5)
    decoded = jax.jit(windows.attend_cache, static_argnums=5)(*cache, 1, lengths, 5, sliding)
    np.testing.assert_allclose(decoded, last_of_dense(*cache, 1, lengths, 5 if sliding else 20), atol=1e-5)
    assert "cond" not in str(jax.make_jaxpr(windows.attend, static_argnums=4)(*arguments, 12, jnp.array(sliding)))
    text = str(jax.make_jaxpr(windows.attend, static_argnums=(4, 5))(*arguments, 5, True))
    assert "cond" not in text and "12,12]" not in text


def test_tpus_use_their_kernel(monkeypatch):
    called = []
    monkeypatch.setattr(windows, "platform", lambda: "tpu")
    monkeypatch.setattr(attention_tpu, "attend", lambda *_, window: called.append(window))
    windows.attend(*inputs(1, 8, 2, 2, 8), 5, True)
    monkeypatch.setattr(attention, "attend", lambda *_: called.append("whole"))
    windows.attend(*inputs(1, 8, 2, 2, 8), 8, True)
    windows.attend(*inputs(1, 8, 2, 2, 8), None, True)
    assert called == [5, "whole", "whole"]
