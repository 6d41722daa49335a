"""Attention on TPUs: the splash kernel and the paged kernel of JAX, under `shard_map`.

Axis key: B batch, T tokens, S cache length, H query heads, K key/value heads, N head size, L layers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as paged_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec as P

from sgpo_jax.models import cache_pages
from sgpo_jax.models.attention_plain import SAVED
from sgpo_jax.models.cache_pages import Paged
from sgpo_jax.sharding import HEADS, ROWS, fit_spec, per_device

LANES = 128  # both kernels take lengths in multiples of this; paged attention takes such head sizes only
SPLASH_BLOCK = 512  # queries and keys of a splash block
PAGES_PER_BLOCK = 4  # pages of LANES tokens that paged attention reads at once


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, interpret: bool = False,
    window: int | None = None,
) -> jax.Array:  # fmt: skip
    """Computes `attention.attend` with the splash kernel, which skips blocks above the diagonal.

    With a window a token sees the last `window` tokens only, and blocks before them are skipped too. `interpret` runs
    the kernel anywhere.
    """
    batch, length, heads, size = query.shape
    block = min(SPLASH_BLOCK, -(-length // LANES) * LANES)
    padding = -length % block
    # The kernel does not scale the scores. Scaling the query rounds once more, in the query's type.
    query = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (query, key, value))
    segments = jnp.pad(segments, ((0, 0), (0, padding)))

    def local(query, key, value, segments):
        kernel = _splash_kernel(query.shape[1], length + padding, block, interpret, window)
        ids = splash_attention_kernel.SegmentIds(segments, segments)
        return jax.vmap(kernel)(query, key, value, ids)

    rows, heads_of = fit_spec((batch, key.shape[1]), (ROWS, HEADS))
    by_head, by_row = P(rows, heads_of, None, None), P(rows, None)
    out = per_device(local, (by_head, by_head, by_head, by_row), by_head)(query, key, value, segments)
    return out.swapaxes(1, 2)[:, :length].reshape(batch, length, heads * size)


def cache_shape(slots: int, size: int) -> tuple[int, int]:
    """Returns (S, N) of a cache: S is a whole number of pages."""
    return -(-slots // LANES) * LANES, size


def takes(cache: jax.Array | Paged) -> bool:
    """Returns whether `attend_cache` takes a cache `[K,L,B,S,N]`, whose pages have a multiple of LANES tokens."""
    return cache.shape[-1] % LANES == 0 and cache.shape[-2] % LANES == 0


def tokens_at_once(rows: int, kv_heads: int, slots: int, page: int = 0) -> int:
    """Returns how many tokens of a row one round of the loop of `attend_cache` reads, with any rows and heads.

    With a pool of pages of `page` tokens these are PAGES_PER_BLOCK.
    """
    return PAGES_PER_BLOCK * page if page else math.gcd(slots // LANES, PAGES_PER_BLOCK) * LANES


def reads(each: int) -> int:
    """Returns how often `attend_cache` reads the cache of a row for `each` new tokens."""
    return each


def attend_cache(
    query: jax.Array, keys: jax.Array | Paged, values: jax.Array | Paged, layer: Any, lengths: jax.Array, each: int = 1
) -> jax.Array:
    """Computes `attention.attend_cache` with the paged kernel, which reads for a query the pages in use.

    All layers share one page pool.
    """
    batch, heads, size = query.shape
    slots = keys.shape[3]
    query = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
    lengths = jnp.minimum(lengths, slots)

    def local(query, keys, values, layer, lengths):
        if isinstance(keys, Paged):
            table = cache_pages.places(keys)
            table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % PAGES_PER_BLOCK)))  # which no length reaches
            keys, values = keys.pool, values.pool
            table, page = layer * keys.shape[2] + jnp.repeat(table, each, axis=0), keys.shape[3]
        else:
            page, pages, rows = LANES, slots // LANES, len(query) // each
            # The rows of a layer are contiguous, so only the start of the page table depends on the layer.
            table = (layer * rows + jnp.arange(len(query))[:, None] // each) * pages + jnp.arange(pages)
        pool = (keys.shape[0], -1, page, size)
        return paged_attention_kernel(
            query, keys.reshape(pool), values.reshape(pool), lengths, table.astype(jnp.int32),
            pages_per_compute_block=math.gcd(table.shape[1], PAGES_PER_BLOCK),
        )  # fmt: skip

    rows, tensor, cache = cache_pages.layout(keys, batch)
    by_head = P(rows, tensor, None)
    run = per_device(local, (by_head, cache, cache, P(), P(rows)), by_head)
    return run(query, keys, values, jnp.asarray(layer, jnp.int32), lengths).reshape(batch, heads * size)


def _splash_kernel(heads: int, length: int, block: int, interpret: bool, window: int | None) -> Callable:
    shape = length, length
    causal = splash_attention_mask.CausalMask(shape)
    # A local mask has the numbers of keys before and after the query's own.
    seen = causal if window is None else splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    mask = splash_attention_mask.MultiHeadMask([seen] * heads)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=SAVED, interpret=interpret
    )
