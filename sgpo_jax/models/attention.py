"""Computes grouped-query attention: over rows of packed sequences, and over the cache in a decoding step.

TPUs and GPUs run Pallas kernels of JAX under `shard_map`, which hold no array [T,T]. Each platform's are in a module
that is imported where they run. Plain products serve everything else, and every cache that a kernel does not take.

Axis key: B batch, T tokens, S cache length, H query heads, K key/value heads, N head size, L layers.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from sgpo_jax.models import cache_pages
from sgpo_jax.models.attention_plain import attend_cache_partial, attend_cache_plain, attend_plain
from sgpo_jax.models.cache_codes import Stored, encode
from sgpo_jax.models.cache_pages import Kept, Paged
from sgpo_jax.sharding import platform


def attend(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Computes causal attention within segments; the softmax is in float32.

    Args:
      query: `[B,T,H,N]`.
      key, value: `[B,T,K,N]`.
      segments: `[B,T]` int32. A token sees itself and the earlier tokens of its segment. 0 is padding, whose outputs
        mean nothing.

    Returns:
      `[B,T,H*N]`.
    """
    kernels = _kernels()
    return (kernels.attend if kernels else attend_plain)(query, key, value, segments)


def attend_cache(
    query: jax.Array, keys: Kept, values: Kept, layer: Any, lengths: jax.Array, each: int = 1
) -> jax.Array:
    """Computes the attention of the new tokens of each row to the tokens in its cache, up to themselves.

    Args:
      query: `[B*J,H,N]`, the J new tokens of a row one after the other.
      keys, values: `[K,L,B,S,N]` or codes of that shape, S and N by `cache_shape`; or in pages.
      layer: `[]` int32, index of the layer.
      lengths: `[B*J]` int32, tokens of its row's cache that a new one sees, at least 1; more than S means S.
      each: J.

    Returns:
      `[B*J,H*N]`.
    """
    kernels = _kernels()
    if kernels and kernels.takes(keys):
        return kernels.attend_cache(query, keys, values, layer, lengths, each)
    # The number of parts to read is not static: accelerators and meshes would have to synchronize in every layer.
    one_cpu = platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    implementation = attend_cache_partial if one_cpu else attend_cache_plain
    if each == 1:
        return implementation(query, keys, values, layer, lengths)
    # Tokens of a row read one cache: they become further query heads of its key heads.
    count, heads, size = query.shape
    kv_heads = keys.shape[0]
    group, shape = heads // kv_heads, (count // each, each, kv_heads, heads // kv_heads, size)
    merged = query.reshape(shape).swapaxes(1, 2).reshape(count // each, each * heads, size)
    seen = jnp.repeat(lengths.reshape(-1, each), group, axis=1)
    out = implementation(merged, keys, values, layer, seen)
    return out.reshape(count // each, kv_heads, each, group * size).swapaxes(1, 2).reshape(count, heads * size)


def fill(cache: Stored, new: jax.Array, layer: Any) -> Stored:
    """Returns an empty `cache` `[K,L,B,S,N]` with `new` `[B,T,K,N]` in its first T slots."""

    def write(part, new):
        return jax.lax.dynamic_update_slice(part, new.transpose(2, 0, 1, 3)[:, None], (0, layer, 0, 0, 0))

    return jax.tree.map(write, cache, encode(new, cache))


def append(cache: Kept, new: jax.Array, layer: Any, slots: jax.Array, each: int = 1) -> Kept:
    """Returns `cache` `[K,L,B,S,N]` with `new` `[B*J,K,N]`, J = `each` of a row, written to the slots `[B*J]`.

    What has a slot past the end of the cache is not written, nor what has one without a page. On GPUs a cache without
    pages may have more rows than B: here and in `attend_cache` the first ones of each device are meant.
    """
    stored: Stored = cache.pool if isinstance(cache, Paged) else cache
    write: Callable = partial(cache_pages.append, cache.table) if isinstance(cache, Paged) else _append

    def write_all(part, new):
        if each == 1:
            return write(part, new, layer, slots)
        for i in range(each):
            one, slot = (x.reshape(-1, each, *x.shape[1:])[:, i] for x in (new, slots))
            part = write(part, one, layer, slot)
        return part

    written = jax.tree.map(write_all, stored, encode(new, stored))
    return cache._replace(pool=written) if isinstance(cache, Paged) else written


def _append(cache: jax.Array, new: jax.Array, layer: Any, slots: jax.Array) -> jax.Array:
    if platform() == "gpu":
        from sgpo_jax.models import attention_gpu

        return attention_gpu.append(cache, new, layer, slots)
    # Written out so that K and B are batch dimensions of the scatter. Then the partitioner sees that rows are
    # independent, and the compiler writes in place instead of laying out the cache anew.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(1, 3), scatter_dims_to_operand_dims=(1, 3),
        operand_batching_dims=(0, 2), scatter_indices_batching_dims=(0, 1),
    )  # fmt: skip
    indices = jnp.stack([jnp.full_like(slots, layer), slots], axis=-1)
    indices = jnp.broadcast_to(indices, (len(cache), *indices.shape))
    return jax.lax.scatter(cache, indices, new.swapaxes(0, 1), numbers, unique_indices=True, mode="drop")


def cache_shape(slots: int, size: int) -> tuple[int, int]:
    """Returns (S, N) of a cache for `slots` tokens and heads of `size`; S and N may be larger, as a kernel requires."""
    kernels = _kernels()
    return kernels.cache_shape(slots, size) if kernels else (slots, size)


def _kernels() -> ModuleType | None:
    """Returns the module with the kernels of the platform, and imports no other platform's."""
    if platform() == "tpu":
        from sgpo_jax.models import attention_tpu

        return attention_tpu
    if platform() == "gpu":
        from sgpo_jax.models import attention_gpu

        return attention_gpu
    return None
