"""Attention on GPUs: Pallas kernels of JAX that Triton compiles, under `shard_map`.

They take every type and head size on every card from Ampere on, and need no workspace. docs/models.md says why these.

Axis key: B batch, T tokens, S cache length, H query heads, K key/value heads, G = H / K, N head size, L layers, R rows
of the cache, of which the first B are in use.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha
from jax.sharding import PartitionSpec as P

from sgpo_jax.models import cache_pages
from sgpo_jax.models.attention_heads import divisible
from sgpo_jax.models.cache_codes import operand, scaled
from sgpo_jax.models.cache_pages import Kept, Paged
from sgpo_jax.sharding import BATCH, HEADS, ROWS, exact_products, fit_spec, per_device

LEAST = 16  # rows and columns of the smallest matrix that Triton multiplies
BLOCK, BLOCK_BYTES = 128, 2**15  # most queries, or keys, of a block, and most bytes
PAGE = 64  # tokens of a row's cache that a program reads at once
AHEAD = 3 * 2**15  # most bytes of keys and values that it reads ahead
PROGRAMS = 1024  # about eight for each multiprocessor of an H100
LEAST_PAGES = 4  # of a part, in a full cache
FILL = -1e30  # score of what is not seen


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, interpret: bool = False
) -> jax.Array:
    """Computes `attention.attend` with JAX's flash attention; `interpret` runs it anywhere."""
    batch, length, heads, size = query.shape
    key, value = (divisible(x, heads) for x in (key, value))
    kv_heads = key.shape[2]
    block = min(BLOCK, power_of_two(length))
    padding = (0, 0), (0, -length % block), (0, 0), (0, max(LEAST - size, 0))
    query, key, value = (jnp.pad(x, padding) for x in (query, key, value))
    query = query.reshape(*query.shape[:2], kv_heads, heads // kv_heads, query.shape[-1])  # [B,T,K,G,N]
    segments = jnp.pad(segments, padding[:2])

    def local(query, key, value, segments):
        # The kernel has as many key heads as query heads. Mapped over G, it reads the same keys G times from one place.
        flash = partial(_flash, size**-0.5, interpret)
        return jax.vmap(flash, in_axes=(3, None, None, None), out_axes=3)(query, key, value, segments)

    rows, heads_of = fit_spec((batch, kv_heads), (ROWS, HEADS))
    by_head, by_group = P(rows, None, heads_of, None), P(rows, None, heads_of, None, None)
    run = per_device(local, (by_group, by_head, by_head, P(rows, None)), by_group)
    return run(query, key, value, segments)[:, :length, ..., :size].reshape(batch, length, heads * size)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(scale: float, interpret: bool, query: Any, key: Any, value: Any, segments: Any) -> jax.Array:
    """Computes causal attention within segments of `[B,T,K,N]`, in the precision of the type."""
    return _flash_forward(scale, interpret, query, key, value, segments)[0]


def _flash_forward(scale, interpret, query, key, value, segments):
    def kernel(query, key, value):
        sizes = _block_sizes(query)
        return mha(query, key, value, segments, scale, causal=True, block_sizes=sizes, interpret=interpret)

    with exact_products(query.dtype):  # here and below, because the kernel's backward pass is traced there
        return jax.vjp(kernel, query, key, value)


def _flash_backward(scale, interpret, backward, gradient):
    with exact_products(gradient.dtype):
        return *backward(gradient), None


_flash.defvjp(_flash_forward, _flash_backward)


def _block_sizes(query: jax.Array) -> BlockSizes:
    """Returns sizes for `[B,T,K,N]` whose blocks fit into the shared memory of an A100."""
    row = power_of_two(query.shape[-1]) * query.dtype.itemsize
    forward = min(BLOCK, BLOCK_BYTES // row, query.shape[1])
    backward = max(forward // 2, LEAST)  # it keeps twice as many sums in registers
    return BlockSizes(forward, forward, backward, backward, backward, backward)


def cache_shape(slots: int, size: int) -> tuple[int, int]:
    """Returns (S, N) of a cache: S is a whole number of pages, N a power of two."""
    return -(-slots // PAGE) * PAGE, power_of_two(size)


def takes(cache: Kept) -> bool:
    """Returns whether `attend_cache` takes a cache `[K,L,R,S,N]`, or a pool `[K,L,R,D,N]` of pages."""
    shape = (cache.pool if isinstance(cache, Paged) else cache).shape[-2:]
    return shape == cache_shape(*shape)


def tokens_at_once(rows: int, kv_heads: int, slots: int, page: int = 0) -> int:
    """Returns how many tokens of a row one round of the loop of `attend_cache` reads: PAGE of each part.

    The rows and heads are those of a device. The pages of a pool change nothing.
    """
    return PAGE * _parts(rows * kv_heads, slots)


def reads(each: int) -> int:
    """Returns how often `attend_cache` reads the cache of a row for `each` new tokens."""
    return 1


def append(cache: jax.Array, new: jax.Array, layer: Any, slots: jax.Array) -> jax.Array:
    """Computes `attention.append` for the first B of each device's rows."""

    def local(cache, new, layer, slots):
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(0, 2), inserted_window_dims=(1, 2, 3), scatter_dims_to_operand_dims=(1, 2, 3)
        )
        indices = jnp.stack([jnp.full_like(slots, layer), jnp.arange(len(slots)), slots], axis=-1)
        return jax.lax.scatter(cache, indices, new.swapaxes(0, 1), numbers, unique_indices=True, mode="drop")

    rows, tensor = fit_spec((len(slots), len(cache)), (BATCH, "tensor"))
    specs = P(tensor, None, rows), P(rows, tensor), P(), P(rows)
    return per_device(local, specs, specs[0])(cache, new, jnp.asarray(layer, jnp.int32), slots)


def attend_cache(
    query: jax.Array,
    keys: Kept,
    values: Kept,
    layer: Any,
    lengths: jax.Array,
    each: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """Computes `attention.attend_cache`; `interpret` runs it anywhere.

    A program of the kernel reads one part of a row's tokens for all query heads of a key head, of all new tokens. The
    parts of a row are equal, however long it is: with fixed parts of the cache, most of the card would wait for the few
    that are full.
    """
    batch, heads, size = query.shape
    kv_heads, _, _, slots, width = keys.shape
    query = query.reshape(batch, kv_heads, heads // kv_heads, size)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, width - size)))

    def local(query, keys, values, layer, lengths):
        count, kv_heads, per_token, width = query.shape
        rows, group = count // each, each * per_token
        query = query.reshape(rows, each, kv_heads, per_token, width).swapaxes(1, 2).reshape(rows, -1, group, width)
        lengths = lengths.reshape(rows, each)
        seen = jnp.repeat(lengths, per_token, axis=1)  # tokens that each query head sees
        seen = jnp.pad(seen, ((0, 0), (0, power_of_two(group) - group)))
        parts, table = _parts(rows * kv_heads, slots), None
        if isinstance(keys, Paged):
            table, keys, values = cache_pages.places(keys), keys.pool, values.pool
        by_head = pl.BlockSpec((None, None, power_of_two(group), width), lambda row, head, part: (row, head, 0, 0))
        out = pl.BlockSpec((None, None, None, *by_head.block_shape[2:]), lambda *program: (*program, 0, 0))
        sums = pl.BlockSpec(out.block_shape[:-1], lambda *program: (*program, 0))
        shapes = [jax.ShapeDtypeStruct((rows, kv_heads, parts, group, *n), jnp.float32) for n in ((width,), (), ())]
        by_query = pl.BlockSpec((None, seen.shape[1]), lambda row, head, part: (row, 0))
        arrays = (keys, values, layer), (lengths, table)
        before, after = (jax.tree.map(lambda _: pl.BlockSpec(), tree) for tree in arrays)
        stages = min(max(AHEAD // (2 * PAGE * width * keys.dtype.itemsize), 1), 3)
        kernel = pl.pallas_call(
            partial(_decode_kernel, group, size**-0.5), shapes, grid=(rows, kv_heads, parts),
            in_specs=[by_head, *before, by_query, *after], out_specs=[out, sums, sums], interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=stages), name="decode_attention",
        )  # fmt: skip
        with exact_products(query.dtype):
            out, most, total = kernel(query, keys, values, layer, seen, lengths.max(axis=1), table)
        share = jnp.exp(most - most.max(axis=2, keepdims=True))
        out = (out * share[..., None]).sum(axis=2) / (total * share).sum(axis=2)[..., None]
        out = out.reshape(rows, kv_heads, each, per_token, width).swapaxes(1, 2)
        return out.reshape(count, kv_heads, per_token, width).astype(query.dtype)

    rows, tensor, cache = cache_pages.layout(keys, batch)
    by_head = P(rows, tensor, None, None)
    run = per_device(local, (by_head, cache, cache, P(), P(rows)), by_head)
    layer, lengths = jnp.asarray(layer, jnp.int32).reshape(1), jnp.minimum(lengths, slots)
    return run(query, keys, values, layer, lengths)[..., :size].reshape(batch, heads * size)


def _decode_kernel(group, scale, query, keys, values, layer, seen, lengths, table, out, most, total):
    """Attends to one part of a row: its outputs `[G,N]`, not divided by `total`, the greatest score, and `total`.

    G are the query heads of all new tokens of the row; `seen` `[G]` are the tokens that each of them sees.

    Where there is a table, a row's tokens are in its pages, of which each has one of PAGE tokens or several.
    """
    row, head, part = (pl.program_id(axis) for axis in range(3))
    length = lengths[row]
    pages = pl.cdiv(pl.cdiv(length, PAGE), pl.num_programs(2))  # of a part
    first, end = part * pages * PAGE, jnp.minimum((part + 1) * pages * PAGE, length)
    real = jnp.arange(query.shape[0]) < group  # a product has more rows than there are query heads
    q, sees = triton.load(query, mask=real[:, None], other=0.0), seen[...]

    def page(i, carry):
        result, highest, weight = carry
        start = pl.multiple_of(first + i * PAGE, PAGE)
        at = (head, layer[0], row, pl.ds(start, PAGE), slice(None))
        if table is not None:
            size = jax.tree.leaves(keys)[0].shape[3]
            at = (*at[:2], table[row, start // size], pl.ds(pl.multiple_of(start % size, PAGE), PAGE), slice(None))
        key = jax.tree.map(lambda ref: ref[at], keys)
        scores = scaled(triton.dot(q, operand(key, q.dtype), trans_b=True), key) * scale
        place = start + jnp.arange(PAGE)
        scores = jnp.where((place < end) & (place < sees[:, None]), scores, FILL)
        higher = jnp.maximum(highest, scores.max(axis=1))
        shrink, exponentials = jnp.exp(highest - higher), jnp.exp(scores - higher[:, None])
        result, value = result * shrink[:, None], jax.tree.map(lambda ref: ref[at], values)
        result = result + triton.dot(scaled(exponentials, value).astype(q.dtype), operand(value, q.dtype))
        return result, higher, weight * shrink + exponentials.sum(axis=1)

    zeros = jnp.zeros(query.shape[0], jnp.float32)
    start = jnp.zeros(query.shape, jnp.float32), zeros + FILL, zeros
    result, highest, weight = jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(end - first, 0), PAGE), page, start)
    triton.store(out, result, mask=real[:, None])
    triton.store(most, highest, mask=real)
    triton.store(total, weight, mask=real)


def _parts(rows: int, slots: int) -> int:
    """Returns into how many parts the tokens of each of `rows` rows and heads are split."""
    return max(1, min(PROGRAMS // rows, slots // (LEAST_PAGES * PAGE)))


def power_of_two(size: int) -> int:
    """Returns the least power of two that is at least `size` and LEAST."""
    return 1 << (max(size, LEAST) - 1).bit_length()
