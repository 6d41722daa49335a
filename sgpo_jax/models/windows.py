"""Attention of layers that slide: a token sees the last `window` tokens of its segment, itself included.

Where some layers slide and others do not, both are in the program, and each layer runs one of them. Outside TPUs, whose
kernel takes windows, plain products compute a row in blocks of `window` queries, one key head at a time. So no array
[T,T] is held, but one of [T, 2 window] for the query heads of a key head.

Axis key: as in `attention`; G = H / K, W window, C blocks of a row.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sgpo_jax.models import attention, cache_pages
from sgpo_jax.models.attention_heads import whole_rows
from sgpo_jax.models.attention_plain import FILL
from sgpo_jax.models.cache_codes import operand, scaled
from sgpo_jax.models.cache_pages import Kept, Paged
from sgpo_jax.sharding import HEADS, ROWS, constrain, context_ways, fit_spec, per_device, platform

EITHER = "sliding_or_not"  # name of the scope of the choice, by which `plan` knows how many layers take which branch


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, window: int | None, sliding: Any
) -> jax.Array:
    """Computes `attention.attend`, and in a layer that slides only over the last `window` tokens.

    Args:
      query, key, value, segments: as in `attention.attend`.
      window: W; None where no layer slides.
      sliding: whether this layer slides: True or False, or a traced `[]` bool.
    """
    query, key, value = whole_rows(query, key, value)
    if window is None or sliding is False or segments.shape[1] <= window:
        out = attention.attend(query, key, value, segments)
    else:
        local: Any = attend_in_blocks
        if platform() == "tpu":
            from sgpo_jax.models import attention_tpu

            local = attention_tpu.attend
        out = _one_of(sliding, partial(local, window=window), attention.attend, query, key, value, segments)
    return out if context_ways() == 1 else constrain(out, ROWS, None, HEADS)


def attend_cache(
    query: jax.Array, keys: Kept, values: Kept, layer: Any, lengths: jax.Array, window: int | None,
    sliding: Any, each: int = 1,
) -> jax.Array:  # fmt: skip
    """Computes `attention.attend_cache`, and in a layer that slides only over the last `window` tokens of a row.

    Args:
      query, keys, values, layer, lengths, each: as in `attention.attend_cache`.
      window, sliding: as in `attend`.
    """
    if window is None or sliding is False or keys.shape[3] <= window:
        return attention.attend_cache(query, keys, values, layer, lengths, each)
    local, whole = partial(attend_cache_end, window=window, each=each), partial(attention.attend_cache, each=each)
    return _one_of(sliding, local, whole, query, keys, values, layer, lengths)


def _one_of(sliding: Any, local: Any, whole: Any, *arguments: Any) -> jax.Array:
    if sliding is True:
        return local(*arguments)
    with jax.named_scope(EITHER):
        return jax.lax.cond(sliding, local, whole, *arguments)


def attend_in_blocks(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, window: int) -> jax.Array:
    """Computes the attention of a sliding layer: W queries see the keys of their block and of the block before."""
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    rows, heads_of = fit_spec((batch, kv_heads), (ROWS, HEADS))
    by_head, by_row = P(heads_of, rows, None, None, None), P(rows, None)
    padding = -length % window
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) for x in (query, key, value))
    segments = jnp.pad(segments, ((0, 0), (0, padding)))

    def local(query, key, value, segments):
        one_head = jax.checkpoint(partial(_attend_head, segments=segments, window=window))
        return jax.lax.map(lambda parts: one_head(*parts), (query, key[..., None, :], value[..., None, :]))

    run = per_device(local, (by_head, P(heads_of, rows, None, None), P(heads_of, rows, None, None), by_row), by_head)
    out = run(jnp.moveaxis(query, 2, 0), jnp.moveaxis(key, 2, 0), jnp.moveaxis(value, 2, 0), segments)
    return jnp.moveaxis(out, 0, 2)[:, :length].reshape(batch, length, heads * size)


def _attend_head(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, window: int) -> jax.Array:
    """Computes one key head: query `[B,CW,G,N]`, key and value `[B,CW,1,N]`, segments `[B,CW]`."""

    def blocks(x):
        return x.reshape(x.shape[0], -1, window, *x.shape[2:])

    def with_the_one_before(x):
        x = blocks(x)
        return jnp.concatenate([jnp.pad(x, ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)))[:, :-1], x], axis=2)

    place, at = jnp.arange(2 * window), window + jnp.arange(window)[:, None]
    theirs, own = with_the_one_before(segments)[:, :, None], blocks(segments)[..., None]
    visible = (place <= at) & (place > at - window) & (theirs == own) & (theirs != 0)  # [B,C,W,2W]
    key, value = (with_the_one_before(x)[..., 0, :] for x in (key, value))
    scores = jnp.einsum("bctgn,bcsn->bcgts", blocks(query), key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, :, None], scores * query.shape[-1] ** -0.5, FILL)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bcgts,bcsn->bctgn", weights, value).reshape(query.shape)


def attend_cache_end(
    query: jax.Array, keys: Kept, values: Kept, layer: Any, lengths: jax.Array, window: int, each: int = 1
) -> jax.Array:
    """Computes the attention of a new token to the last `window` tokens in its cache, which it copies out."""
    batch, heads, size = query.shape
    slots, width = keys.shape[3:]
    query = jnp.pad(query, ((0, 0), (0, 0), (0, width - size)))
    ends = jnp.minimum(lengths, slots)

    def local(query, keys, values, layer, ends):
        starts = jnp.maximum(ends - window, 0)

        def read(cache, layer, each, starts):  # [K,L,R,S,N] -> [B,K,W,N]; the cache may have more rows than B
            def of_row(row, start):
                origin = jnp.int32(0), layer, row, start, jnp.int32(0)
                return jax.lax.dynamic_slice(cache, origin, (len(cache), 1, 1, window, cache.shape[-1]))[:, 0, 0]

            return jax.vmap(of_row)(jnp.arange(len(query), dtype=jnp.int32) // each, starts)

        def last(stored):
            if not isinstance(stored, Paged):
                return jax.tree.map(lambda x: read(x, layer, each, starts), stored)
            pages = cache_pages.around(stored, layer, starts, window)
            return jax.tree.map(lambda x: read(x, jnp.int32(0), 1, starts % stored.pool.shape[3]), pages)

        grouped, key = query.reshape(len(query), keys.shape[0], -1, width), last(keys)
        scores = jnp.einsum("bkgn,bksn->bkgs", grouped, operand(key, query.dtype), preferred_element_type=jnp.float32)
        visible = jnp.arange(window) < (ends - starts)[:, None, None, None]
        weights = jax.nn.softmax(jnp.where(visible, scaled(scores, key) * size**-0.5, FILL), axis=-1)
        value = last(values)
        weights = scaled(weights, value).astype(query.dtype)
        return jnp.einsum("bkgs,bksn->bkgn", weights, operand(value, query.dtype)).reshape(query.shape)

    rows, tensor, cache = cache_pages.layout(keys, batch)
    by_head = P(rows, tensor, None)
    run = per_device(local, (by_head, cache, cache, P(), P(rows)), by_head)
    out = run(query, keys, values, jnp.asarray(layer, jnp.int32), ends.astype(jnp.int32))
    return out[..., :size].reshape(batch, heads * size)
