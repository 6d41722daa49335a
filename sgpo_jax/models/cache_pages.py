"""Pages of a cache: rows share one pool of them, and a table says which pages have the tokens of a row.

Axis key: as in `attention`; W shards of the rows, R rows of a shard, M pages of a shard's part of the pool, C most
pages of a row, D tokens of a page.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sgpo_jax.models.cache_codes import Stored
from sgpo_jax.sharding import BATCH, fit_spec


class Paged(NamedTuple):
    """Keys or values in pages."""

    pool: Stored  # [K,L,W*M,D,N]
    table: jax.Array  # [W,R,C] int32, the pages of a row within its shard's part; M where it has none

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[K,L,W*R,C*D,N]` of the cache that it stands for."""
        (kv_heads, layers, _, page, size), (shards, rows, most) = self.pool.shape, self.table.shape
        return kv_heads, layers, shards * rows, most * page, size

    @property
    def dtype(self) -> Any:
        return self.pool.dtype


Kept = Stored | Paged  # keys or values, in pages or not


def paged(cache: dict[str, Any], table: jax.Array) -> dict[str, Any]:
    """Returns a cache whose keys and values are pools as one with pages `[W,R,C]`."""
    return cache | {name: Paged(cache[name], table) for name in ("key", "value")}


def bare(cache: dict[str, Any]) -> dict[str, Any]:
    """Returns a cache with pages without its tables."""
    return cache | {name: cache[name].pool for name in ("key", "value")}


def first(stored: Kept, slots: int) -> Kept:
    """Returns the first tokens of each row, as many as `slots`; with pages, all of the last one."""
    if isinstance(stored, Paged):
        return stored._replace(table=stored.table[..., : -(-slots // stored.pool.shape[3])])
    return jax.tree.map(lambda x: x[:, :, :, :slots], stored)


def of_layer(stored: Kept, layer: Any) -> Stored:
    """Returns the keys or values of a layer `[K,B,S,N]`; those of pages are copied out, and what no page has is any."""
    if not isinstance(stored, Paged):
        return jax.tree.map(lambda x: x[:, layer], stored)
    # The shards are a batch dimension, as in `rollout.cache.copy_row`.
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(0, 4, 5), collapsed_slice_dims=(1, 3), start_index_map=(1, 3),
        operand_batching_dims=(2,), start_indices_batching_dims=(0,),
    )  # fmt: skip
    table = stored.table
    indices = jnp.stack([jnp.full_like(table, layer), table], axis=-1)

    def copy(pool):
        parts = _by_shard(pool, len(table))
        window = (len(pool), 1, 1, 1, *pool.shape[3:])
        rows = jax.lax.gather(parts, indices, numbers, window, mode="clip")  # [K,W,R,C,D,N]
        return rows.reshape(len(pool), table.shape[0] * table.shape[1], -1, pool.shape[4])

    return jax.tree.map(copy, stored.pool)


def places(stored: Paged) -> jax.Array:
    """Returns the pages `[W*R,C]` of each row in the whole pool; one that a row does not have is any."""
    shards, _, most = stored.table.shape
    total = stored.pool.shape[2] // shards
    pages = jnp.minimum(stored.table, total - 1) + total * jnp.arange(shards)[:, None, None]
    return pages.reshape(-1, most).astype(jnp.int32)


def around(stored: Paged, layer: Any, starts: jax.Array, window: int) -> Stored:
    """Returns the pages of `window` tokens of each new token's row, `[K,1,B*J,S,N]` of S slots.

    Args:
      stored: keys or values.
      layer: index of the layer.
      starts: `[B*J]` slot of the first of the tokens; in what is returned, its slot is the rest by the page's tokens.
      window: number of tokens.
    """
    page, (shards, rows, most) = stored.pool.shape[3], stored.table.shape
    columns = starts.reshape(shards, -1, 1) // page + jnp.arange(-(-(window - 1) // page) + 1)
    table = jnp.repeat(stored.table, columns.shape[1] // rows, axis=1)
    table = jnp.take_along_axis(table, jnp.minimum(columns, most - 1), axis=2)
    return jax.tree.map(lambda x: x[:, None], of_layer(stored._replace(table=table), layer))


def layout(stored: Kept, rows: int) -> tuple[Any, Any, Any]:
    """Returns the axes of the mesh that split rows, those that split key heads, and the layout of keys or values."""
    count = len(stored.table) if isinstance(stored, Paged) else rows
    by_row, by_head = fit_spec((count, stored.shape[0]), (BATCH, "tensor"))
    spec: Any = P(by_head, None, by_row, None, None)
    table: Any = P(by_row)
    return by_row, by_head, Paged(spec, table) if isinstance(stored, Paged) else spec


def append(table: jax.Array, pool: jax.Array, new: jax.Array, layer: Any, slots: jax.Array) -> jax.Array:
    """Returns a pool `[K,L,W*M,D,N]` with `new` `[W*R,K,N]` in the slots `[W*R]` of the rows that have a page there."""
    # K and W are batch dimensions, as K and B are where a cache has no pages.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(3,), inserted_window_dims=(1, 3, 4), scatter_dims_to_operand_dims=(1, 3, 4),
        operand_batching_dims=(0, 2), scatter_indices_batching_dims=(0, 1),
    )  # fmt: skip
    (shards, rows, _), (kv_heads, _, pages, tokens, _) = table.shape, pool.shape
    slots = slots.reshape(shards, rows)
    page = jnp.take_along_axis(table, slots[..., None] // tokens, axis=2, mode="fill", fill_value=pages // shards)
    indices = jnp.stack([jnp.full_like(slots, layer), page[..., 0], slots % tokens], axis=-1)
    indices = jnp.broadcast_to(indices, (kv_heads, *indices.shape))
    new = new.swapaxes(0, 1).reshape(kv_heads, shards, rows, -1)  # a head may be narrower than a kernel's
    parts = _by_shard(pool, shards)
    return jax.lax.scatter(parts, indices, new, numbers, unique_indices=True, mode="drop").reshape(pool.shape)


def _by_shard(pool: jax.Array, shards: int) -> jax.Array:
    return pool.reshape(*pool.shape[:2], shards, -1, *pool.shape[3:])
