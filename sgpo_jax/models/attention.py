"""Computes grouped-query attention: over rows of packed sequences, and over the cache in a decoding step.

TPUs run JAX's Pallas kernels (splash attention, paged attention) under `shard_map`, GPUs run cuDNN's attention. Plain
products serve everything else, and every shape that a kernel does not take. No kernel holds the scores [T,T].

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

from sgpo_jax.sharding import BATCH, fit_spec, platform

LANES = 128  # both TPU kernels take lengths in multiples of this; paged attention takes such head sizes only
SPLASH_BLOCK = 512  # queries and keys of a splash block
PAGES_PER_BLOCK = 4  # pages of LANES tokens that paged attention reads at once
PARTS = 4  # a CPU reads the cache in this many parts and skips those that no row has reached

SAVED = "attention"  # checkpoint name of the outputs, which rematerialization can save

_FILL = -1e30  # finite, so that a padding query, which sees no key, gives no NaN


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
    implementation = {"tpu": attend_splash, "gpu": attend_cudnn}.get(platform(), attend_plain)
    return implementation(query, key, value, segments)


def attend_cache(query: jax.Array, keys: jax.Array, values: jax.Array, layer: Any, lengths: jax.Array) -> jax.Array:
    """Computes the attention of one new token of each row to the tokens in its cache, the new one included.

    Args:
      query: `[B,H,N]`.
      keys, values: `[K,L,B,S,N]`.
      layer: `[]` int32, index of the layer.
      lengths: `[B]` int32, tokens in each row's cache, at least 1; more than S means S.

    Returns:
      `[B,H*N]`.
    """
    if platform() == "tpu" and query.shape[-1] % LANES == 0 and keys.shape[3] % LANES == 0:
        return attend_cache_paged(query, keys, values, layer, lengths)
    # The number of parts to read is not static: accelerators and meshes would have to synchronize in every layer.
    one_cpu = platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    implementation = attend_cache_partial if one_cpu else attend_cache_plain
    return implementation(query, keys, values, layer, lengths)


def append(cache: jax.Array, new: jax.Array, layer: Any, slots: jax.Array) -> jax.Array:
    """Returns `cache` `[K,L,B,S,N]` with `new` `[B,K,N]` written to slot `slots[b]` of each row.

    A row whose slot lies past the end of the cache is left as it is.
    """
    # Written out so that K and B are batch dimensions of the scatter. Then the partitioner sees that rows are
    # independent, and the compiler writes in place instead of laying out the cache anew.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(1, 3), scatter_dims_to_operand_dims=(1, 3),
        operand_batching_dims=(0, 2), scatter_indices_batching_dims=(0, 1),
    )  # fmt: skip
    indices = jnp.stack([jnp.full_like(slots, layer), slots], axis=-1)
    indices = jnp.broadcast_to(indices, (len(cache), *indices.shape))
    return jax.lax.scatter(cache, indices, new.swapaxes(0, 1), numbers, unique_indices=True, mode="drop")


def cache_length(slots: int) -> int:
    """Returns S, at least `slots` tokens: on TPU a whole number of pages, as the kernel requires."""
    return -(-slots // LANES) * LANES if platform() == "tpu" else slots


def attend_plain(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Computes `attend` with plain products, which hold all scores `[B,H,T,T]` at once."""
    batch, length, heads, size = query.shape
    query = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    scores = jnp.einsum("btkgn,bskn->bkgts", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(_visible(segments)[:, None, None], scores * size**-0.5, _FILL)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskn->btkgn", weights, value).reshape(batch, length, heads * size)


def attend_cache_plain(
    query: jax.Array, keys: jax.Array, values: jax.Array, layer: Any, lengths: jax.Array
) -> jax.Array:
    """Computes `attend_cache` with plain products, which read every slot."""
    batch, heads, size = query.shape
    key, value = keys[:, layer], values[:, layer]
    query = query.reshape(batch, len(key), heads // len(key), size)
    scores = jnp.einsum("bkgn,kbsn->kbgs", query, key, preferred_element_type=jnp.float32)
    visible = jnp.arange(key.shape[2]) < lengths[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores * size**-0.5, _FILL), axis=-1).astype(value.dtype)
    return jnp.einsum("kbgs,kbsn->bkgn", weights, value).reshape(batch, heads * size)


def attend_cache_partial(
    query: jax.Array, keys: jax.Array, values: jax.Array, layer: Any, lengths: jax.Array
) -> jax.Array:
    """Computes `attend_cache_plain` over the parts of the cache that the longest row has reached."""
    edges = sorted({-(-keys.shape[3] * (part + 1) // PARTS) for part in range(PARTS)})

    def read(slots):
        return lambda: attend_cache_plain(query, keys[:, :, :, :slots], values[:, :, :, :slots], layer, lengths)

    return jax.lax.switch(jnp.searchsorted(jnp.array(edges[:-1]), lengths.max()), [read(edge) for edge in edges])


def attend_cudnn(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Computes `attend` with cuDNN, which holds no scores but takes the segments as a mask `[B,1,T,T]`."""
    batch, length, heads, size = query.shape
    # cuDNN's kernels are for 16-bit types and head sizes up to 128.
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and size % 8 == 0 and size <= LANES
    out = jax.nn.dot_product_attention(
        query, key, value, mask=_visible(segments)[:, None], implementation="cudnn" if fits else "xla"
    )
    return out.reshape(batch, length, heads * size)


def attend_splash(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, interpret: bool = False
) -> jax.Array:
    """Computes `attend` with the splash kernel, which skips blocks above the diagonal; `interpret` runs it anywhere."""
    batch, length, heads, size = query.shape
    block = min(SPLASH_BLOCK, -(-length // LANES) * LANES)
    padding = -length % block
    # The kernel does not scale the scores. Scaling the query rounds once more, in the query's type.
    query = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (query, key, value))
    segments = jnp.pad(segments, ((0, 0), (0, padding)))

    def local(query, key, value, segments):
        kernel = _splash_kernel(query.shape[1], length + padding, block, interpret)
        ids = splash_attention_kernel.SegmentIds(segments, segments)
        return jax.vmap(kernel)(query, key, value, ids)

    rows, tensor = fit_spec((batch, key.shape[1]), (BATCH, "tensor"))
    by_head, by_row = P(rows, tensor, None, None), P(rows, None)
    out = _per_device(local, (by_head, by_head, by_head, by_row), by_head)(query, key, value, segments)
    return out.swapaxes(1, 2)[:, :length].reshape(batch, length, heads * size)


def attend_cache_paged(
    query: jax.Array, keys: jax.Array, values: jax.Array, layer: Any, lengths: jax.Array
) -> jax.Array:
    """Computes `attend_cache` with the paged kernel, which reads the pages in use; all layers share one page pool."""
    batch, heads, size = query.shape
    kv_heads, layers, _, slots, _ = keys.shape
    pages = slots // LANES
    query = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
    lengths = jnp.minimum(lengths, slots)

    def local(query, keys, values, layer, lengths):
        pool = (keys.shape[0], -1, LANES, size)
        rows = len(query)
        # The rows of a layer are contiguous, so only the start of the page table depends on the layer.
        table = (layer * rows + jnp.arange(rows)[:, None]) * pages + jnp.arange(pages)
        return paged_attention_kernel(
            query, keys.reshape(pool), values.reshape(pool), lengths, table.astype(jnp.int32),
            pages_per_compute_block=math.gcd(pages, PAGES_PER_BLOCK),
        )  # fmt: skip

    rows, tensor = fit_spec((batch, kv_heads), (BATCH, "tensor"))
    by_head, cache = P(rows, tensor, None), P(tensor, None, rows, None, None)
    run = _per_device(local, (by_head, cache, cache, P(), P(rows)), by_head)
    return run(query, keys, values, jnp.asarray(layer, jnp.int32), lengths).reshape(batch, heads * size)


def _visible(segments: jax.Array) -> jax.Array:
    """Returns which keys each query sees, `[B,T,T]` bool, from the segments `[B,T]`.

    Causality goes by the slot in the row, which is right for packed sequences too.
    """
    order = jnp.arange(segments.shape[1])
    return (order <= order[:, None]) & (segments[:, None, :] == segments[:, :, None]) & (segments[:, None, :] != 0)


def _splash_kernel(heads: int, length: int, block: int, interpret: bool) -> Callable:
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=SAVED, interpret=interpret
    )


def _per_device(local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Returns a function that runs `local` on each device's part, because the partitioner cannot split a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
