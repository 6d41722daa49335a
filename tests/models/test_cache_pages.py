"""A cache in pages: attention and what is written are those of the same cache without pages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpo_jax import sharding
from sgpo_jax.models import attention, windows
from sgpo_jax.models.cache_codes import empty, encode
from sgpo_jax.models.cache_pages import Paged

SHARDS, ROWS, LAYERS, KV_HEADS = 2, 3, 2, 2


def in_pages(cache, rng, page, spare=2):
    """A cache `[K,L,B,S,N]` whose pages are anywhere in their shard's part of a pool that has more of them."""
    most = cache.shape[3] // page
    total = ROWS * most + spare
    table = np.stack([rng.permutation(total)[: ROWS * most].reshape(ROWS, most) for _ in range(SHARDS)])

    def scatter(rows):
        pool = rng.normal(size=(*rows.shape[:2], SHARDS, total, page, rows.shape[4])).astype(rows.dtype)
        for w, r, c in np.ndindex(table.shape):
            pool[:, :, w, table[w, r, c]] = rows[:, :, w * ROWS + r, c * page : (c + 1) * page]
        return pool.reshape(*rows.shape[:2], -1, page, rows.shape[4])

    return Paged(jax.tree.map(scatter, jax.device_get(cache)), table.astype(np.int32))


def out_of_pages(paged):
    """The cache without pages."""

    def gather(pool):
        parts = pool.reshape(*pool.shape[:2], SHARDS, -1, *pool.shape[3:])
        rows = [parts[:, :, w, paged.table[w, r]] for w in range(SHARDS) for r in range(ROWS)]
        return np.stack(rows, axis=2).reshape(*pool.shape[:2], SHARDS * ROWS, -1, pool.shape[4])

    return jax.tree.map(gather, jax.device_get(paged.pool))


def caches(rng, slots, size, dtype):
    shape = KV_HEADS, LAYERS, SHARDS * ROWS, slots, size
    return [jax.device_get(encode(rng.normal(size=shape).astype(np.float32), empty((1,), dtype))) for _ in range(2)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_of_pages_is_that_of_rows(dtype, each, window):
    rng = np.random.default_rng(each)
    keys, values = caches(rng, 16, 8, dtype)
    query = rng.normal(size=(SHARDS * ROWS * each, 4, 8)).astype(np.float32)
    lengths = (np.array([1, 4, 7, 10, 12, 13])[:, None] + np.arange(each)).reshape(-1).astype(np.int32)
    attend = jax.jit(partial(windows.attend_cache, window=window, sliding=True, each=each))
    expected = attend(query, keys, values, 1, lengths)
    for page in (2, 4):
        np.testing.assert_array_equal(
            attend(query, in_pages(keys, rng, page), in_pages(values, rng, page), 1, lengths), expected
        )
    with jax.set_mesh(sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])):
        got = attend(query, in_pages(keys, rng, 4), in_pages(values, rng, 4), 1, lengths)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("each", [1, 3])
def test_tokens_are_written_to_the_pages_of_their_rows_alone(dtype, each):
    rng = np.random.default_rng(0)
    cache = caches(rng, 16, 8, dtype)[0]
    new = rng.normal(size=(SHARDS * ROWS * each, KV_HEADS, 8)).astype(np.float32)
    slots = (np.array([0, 3, 7, 8, 11, 14])[:, None] + np.arange(each)).reshape(-1).astype(np.int32)
    expected = attention.append(cache, new, 1, slots, each)
    paged = in_pages(cache, rng, 4)
    got = jax.jit(partial(attention.append, each=each))(paged, new, 1, slots)
    jax.tree.map(np.testing.assert_array_equal, out_of_pages(got), jax.device_get(expected))
    # A row without a page writes nothing, nor does any to a page that no row has.
    total = paged.pool.shape[2] // SHARDS
    nowhere = paged._replace(table=np.full_like(paged.table, total))
    got = attention.append(nowhere, new, 1, slots, each)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got.pool), paged.pool)
