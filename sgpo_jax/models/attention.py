"""Computes grouped-query attention: over rows of packed sequences, and over the cache in a decoding step.

TPUs and GPUs run Pallas kernels of JAX under `shard_map`, which hold no array [T,T]. Each platform's are in a module
that is imported where they run. Plain products serve everything else, and every cache that a kernel does not take.

Where the context axis of the mesh splits the tokens of a row, an all-to-all gives each device the whole row of some of
its heads, and another one takes their outputs back to the tokens: arXiv 2309.14509.

Axis key: B batch, T tokens, S cache length, H query heads, K key/value heads, N head size, L layers.
"""

import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sgpo_jax.sharding import HEADS, ROWS, axis_ways, constrain, context_ways, platform

PARTS = 4  # a CPU reads the cache in this many parts and skips those that no row has reached

SAVED = "attention"  # checkpoint name of the outputs, which rematerialization can save

FILL = -1e30  # finite, so that a padding query, which sees no key, gives no NaN


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


def check_heads(heads: int, mesh: Mesh) -> None:
    """Checks that a mesh whose context axis splits the tokens of rows divides the query heads of a model.

    Raises:
      ValueError: it does not.
    """
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    if context > 1 and heads % (context * tensor):
        raise ValueError(
            f"config.mesh.context={context}: must divide, times mesh.tensor={tensor}, the model's {heads} query heads"
        )


def whole_rows(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
    """Splits heads over the tensor and the context axis instead of tokens over the latter, if there is one.

    Args:
      query: `[B,T,H,N]`.
      key, value: `[B,T,K,N]`. Their heads are repeated where the axes do not divide them.
    """
    if context_ways() == 1:
        return query, key, value
    by_token = (divisible(x, query.shape[2]) for x in (query, key, value))
    # Without the first layout, the partitioner exchanges what it computes them from, in float32.
    by_token = (constrain(x, ROWS, "context", "tensor", None) for x in by_token)
    return tuple(constrain(x, ROWS, None, HEADS, None) for x in by_token)


def divisible(x: jax.Array, heads: int) -> jax.Array:
    """Repeats the key heads of x `[B,T,K,N]` as often as the mesh needs to divide them, if H allows it."""
    ways = axis_ways(jax.sharding.get_abstract_mesh(), HEADS)
    repeats = ways // math.gcd(ways, x.shape[2])
    return jnp.repeat(x, repeats, axis=2) if heads % (x.shape[2] * repeats) == 0 else x


def attend_cache(
    query: jax.Array, keys: jax.Array, values: jax.Array, layer: Any, lengths: jax.Array, each: int = 1
) -> jax.Array:
    """Computes the attention of the new tokens of each row to the tokens in its cache, up to themselves.

    Args:
      query: `[B*J,H,N]`, the J new tokens of a row one after the other.
      keys, values: `[K,L,B,S,N]`, S and N by `cache_shape`.
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
    group, shape = heads // len(keys), (count // each, each, len(keys), heads // len(keys), size)
    merged = query.reshape(shape).swapaxes(1, 2).reshape(count // each, each * heads, size)
    seen = jnp.repeat(lengths.reshape(-1, each), group, axis=1)
    out = implementation(merged, keys, values, layer, seen)
    return out.reshape(count // each, len(keys), each, group * size).swapaxes(1, 2).reshape(count, heads * size)


def append(cache: jax.Array, new: jax.Array, layer: Any, slots: jax.Array, each: int = 1) -> jax.Array:
    """Returns `cache` `[K,L,B,S,N]` with `new` `[B*J,K,N]`, J = `each` of a row, written to the slots `[B*J]`.

    What has a slot past the end of the cache is not written. On GPUs the cache may have more rows than B: here and in
    `attend_cache` the first ones of each device are meant.
    """
    if each > 1:
        for i in range(each):
            one, slot = (x.reshape(-1, each, *x.shape[1:])[:, i] for x in (new, slots))
            cache = append(cache, one, layer, slot)
        return cache
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


def attend_plain(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Computes `attend` with plain products, which hold all scores `[B,H,T,T]` at once."""
    batch, length, heads, size = query.shape
    query = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    scores = jnp.einsum("btkgn,bskn->bkgts", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(_visible(segments)[:, None, None], scores * size**-0.5, FILL)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskn->btkgn", weights, value).reshape(batch, length, heads * size)


def attend_cache_plain(
    query: jax.Array, keys: jax.Array, values: jax.Array, layer: Any, lengths: jax.Array
) -> jax.Array:
    """Computes `attend_cache` for a token of each row with plain products, which read every slot.

    `lengths` may be `[B,H/K]`: the query heads of a key head then see different numbers of tokens.
    """
    batch, heads, size = query.shape
    key, value = keys[:, layer], values[:, layer]
    query = query.reshape(batch, len(key), heads // len(key), size)
    scores = jnp.einsum("bkgn,kbsn->kbgs", query, key, preferred_element_type=jnp.float32)
    visible = jnp.arange(key.shape[2]) < jnp.expand_dims(lengths, (*range(lengths.ndim, 3),))
    weights = jax.nn.softmax(jnp.where(visible, scores * size**-0.5, FILL), axis=-1).astype(value.dtype)
    return jnp.einsum("kbgs,kbsn->bkgn", weights, value).reshape(batch, heads * size)


def attend_cache_partial(
    query: jax.Array, keys: jax.Array, values: jax.Array, layer: Any, lengths: jax.Array
) -> jax.Array:
    """Computes `attend_cache_plain` over the parts of the cache that the longest row has reached."""
    edges = sorted({-(-keys.shape[3] * (part + 1) // PARTS) for part in range(PARTS)})

    def read(slots):
        return lambda: attend_cache_plain(query, keys[:, :, :, :slots], values[:, :, :, :slots], layer, lengths)

    return jax.lax.switch(jnp.searchsorted(jnp.array(edges[:-1]), lengths.max()), [read(edge) for edge in edges])


def _visible(segments: jax.Array) -> jax.Array:
    """Returns which keys each query sees, `[B,T,T]` bool, from the segments `[B,T]`.

    Causality goes by the slot in the row, which is right for packed sequences too.
    """
    order = jnp.arange(segments.shape[1])
    return (order <= order[:, None]) & (segments[:, None, :] == segments[:, :, None]) & (segments[:, None, :] != 0)
