"""Attention by plain products, which every device can compute and with which kernels are compared.

Axis key: B batch, T tokens, S cache length, H query heads, K key/value heads, N head size, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sgpo_jax.models import cache_pages
from sgpo_jax.models.cache_codes import operand, scaled
from sgpo_jax.models.cache_pages import Kept

PARTS = 4  # a CPU reads the cache in this many parts and skips those that no row has reached

SAVED = "attention"  # checkpoint name of the outputs, which rematerialization can save

FILL = -1e30  # finite, so that a padding query, which sees no key, gives no NaN


def attend_plain(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Computes `attend` with plain products, which hold all scores `[B,H,T,T]` at once."""
    batch, length, heads, size = query.shape
    query = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    scores = jnp.einsum("btkgn,bskn->bkgts", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(_visible(segments)[:, None, None], scores * size**-0.5, FILL)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskn->btkgn", weights, value).reshape(batch, length, heads * size)


def attend_cache_plain(query: jax.Array, keys: Kept, values: Kept, layer: Any, lengths: jax.Array) -> jax.Array:
    """Computes `attend_cache` for a token of each row with plain products, which read every slot.

    `lengths` may be `[B,H/K]`: the query heads of a key head then see different numbers of tokens.
    """
    batch, heads, size = query.shape
    key, value = (cache_pages.of_layer(stored, layer) for stored in (keys, values))
    query = query.reshape(batch, key.shape[0], heads // key.shape[0], size)
    scores = jnp.einsum("bkgn,kbsn->kbgs", query, operand(key, query.dtype), preferred_element_type=jnp.float32)
    visible = jnp.arange(key.shape[2]) < jnp.expand_dims(lengths, (*range(lengths.ndim, 3),))
    weights = jax.nn.softmax(jnp.where(visible, scaled(scores, key) * size**-0.5, FILL), axis=-1)
    weights = scaled(weights, value).astype(query.dtype)
    return jnp.einsum("kbgs,kbsn->bkgn", weights, operand(value, query.dtype)).reshape(batch, heads * size)


def attend_cache_partial(query: jax.Array, keys: Kept, values: Kept, layer: Any, lengths: jax.Array) -> jax.Array:
    """Computes `attend_cache_plain` over the parts of the cache that the longest row has reached."""
    edges = sorted({-(-keys.shape[3] * (part + 1) // PARTS) for part in range(PARTS)})

    def read(slots):
        def attend():
            first = (cache_pages.first(stored, slots) for stored in (keys, values))
            return attend_cache_plain(query, *first, layer, lengths)

        return attend

    return jax.lax.switch(jnp.searchsorted(jnp.array(edges[:-1]), lengths.max()), [read(edge) for edge in edges])


def _visible(segments: jax.Array) -> jax.Array:
    """Returns which keys each query sees, `[B,T,T]` bool, from the segments `[B,T]`.

    Causality goes by the slot in the row, which is right for packed sequences too.
    """
    order = jnp.arange(segments.shape[1])
    return (order <= order[:, None]) & (segments[:, None, :] == segments[:, :, None]) & (segments[:, None, :] != 0)
