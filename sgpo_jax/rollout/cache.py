"""Moves rows between caches: prompts into slots, and slots to fewer slots.

Axis key: W shards of the rows, B prompts of a shard, R slots of a shard, P prompt length. In a cache: K key/value
heads, L layers, S length, N head size.
"""

import jax
import jax.numpy as jnp

from sgpo_jax import models
from sgpo_jax.sharding import BATCH, constrain


def insert(cache: models.Cache, prompts: models.Cache, refilled: jax.Array, prompt: jax.Array) -> models.Cache:
    """Copies prompt `prompt` `[W,R]` of the shard into the cache of every slot in `refilled` `[W,R]`."""
    shards = len(refilled)
    refilled_first = jnp.argsort(~refilled, axis=1, stable=True)

    def copy(i, caches):
        slot = refilled_first[:, i]
        chosen, due = (jnp.take_along_axis(x, slot[:, None], axis=1)[:, 0] for x in (prompt, refilled))
        slot = jnp.where(due, slot, refilled.shape[1])
        sources = prompts["key"], prompts["value"]
        return jax.tree.map(lambda slots, source: copy_row(slots, source, slot, chosen), caches, sources)

    # One slot of each shard at a time, because most slots keep their response.
    count = refilled.sum(axis=1).max()
    keys, values = jax.lax.fori_loop(0, count, copy, (cache["key"], cache["value"]))
    prompt_lengths = jnp.take_along_axis(prompts["length"].reshape(shards, -1), prompt, axis=1)
    lengths = jnp.where(refilled, prompt_lengths, cache["length"].reshape(refilled.shape))
    return {"key": keys, "value": values, "length": lengths.reshape(-1)}


def copy_row(target: jax.Array, source: jax.Array, row: jax.Array, source_row: jax.Array) -> jax.Array:
    """Copies a row of each shard's part of a cache to the beginning of a row of another cache.

    Args:
      target: `[K,L,W*R,S,N]`.
      source: `[K,L,W*B,P,N]`, P at most S.
      row: `[W]` index within the shard; R or more copies nothing.
      source_row: `[W]` index within the shard, below B.
    """
    # The shards are a batch dimension of gather and scatter where they stand. `jax.vmap` would move them to the front
    # and back; XLA for GPUs up to jaxlib 0.10.2 folds these transposes into a scatter that it then refuses.
    from_row = jax.lax.GatherDimensionNumbers(
        offset_dims=(0, 1, 3, 4), collapsed_slice_dims=(3,), start_index_map=(3,),
        operand_batching_dims=(2,), start_indices_batching_dims=(0,),
    )  # fmt: skip
    to_row = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 1, 3, 4), inserted_window_dims=(3,), scatter_dims_to_operand_dims=(3,),
        operand_batching_dims=(2,), scatter_indices_batching_dims=(0,),
    )  # fmt: skip

    def by_shard(cache):
        return cache.reshape(*cache.shape[:2], len(row), cache.shape[2] // len(row), *cache.shape[3:])

    heads, layers, _, length, size = source.shape
    window = (heads, layers, 1, 1, length, size)
    copied = jax.lax.gather(by_shard(source), source_row[:, None], from_row, window, mode="promise_in_bounds")
    written = jax.lax.scatter(by_shard(target), row[:, None], copied, to_row, unique_indices=True, mode="drop")
    return written.reshape(target.shape)


def in_pages(cache: models.Cache, shards: int, page: int, count: int) -> models.Cache:
    """Returns a cache as the first pages of a pool: keys and values `[K,L,W*B,F*page,N]` become `[K,L,W*count,page,N]`.

    Args:
      cache: of the prompts.
      shards: W.
      page: tokens of a page, which divide those of a row.
      count: pages of a shard's part of the pool.
    """

    def pool(rows):
        heads, layers, batch, length, size = rows.shape
        parts = rows.reshape(heads, layers, shards, batch // shards * (length // page), page, size)
        parts = jnp.pad(parts, [(0, count - parts.shape[3]) if axis == 3 else (0, 0) for axis in range(6)])
        return parts.reshape(heads, layers, shards * count, page, size)

    return cache | {name: jax.tree.map(pool, cache[name]) for name in ("key", "value")}


def copy_pages(cache: models.Cache, source: jax.Array, target: jax.Array, due: jax.Array) -> models.Cache:
    """Copies page `source` to page `target` of the shard, `[W,R]` of a pool, where it is due `[W,R]`."""
    first = jnp.argsort(~due, axis=1, stable=True)
    pages = jax.tree.leaves(cache["key"])[0].shape[2] // len(due)

    def copy(i, caches):
        slot = first[:, i, None]
        from_page, to_page, wanted = (jnp.take_along_axis(x, slot, axis=1)[:, 0] for x in (source, target, due))
        row = jnp.where(wanted, to_page, pages)
        return jax.tree.map(lambda pool: copy_row(pool, pool, row, from_page), caches)

    both = cache["key"], cache["value"]
    keys, values = jax.lax.fori_loop(0, due.sum(axis=1).max(), copy, both)
    return cache | {"key": keys, "value": values}


def constrain_cache(cache: models.Cache) -> models.Cache:
    """Splits heads over the tensor axis, and rows over the other axes."""
    layout = ("tensor", None, BATCH, None, None)
    both = {name: cache[name] for name in ("key", "value")}
    return {**cache, **jax.tree.map(lambda x: constrain(x, *layout), both)}
