"""Products of few rows with one layer's kernels out of their stacks, on GPUs: a Pallas kernel that Triton compiles.

Decoding reads every weight for a few rows, so it takes as long as reading them. XLA first copies a layer's weights out
of the stack, and so moves them three times. Here they are read where they lie.

Axis key: B rows, D features of a row, F features of a product, L layers, S parts of a sum.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P

from sgpo_jax.sharding import dividing, fit_spec, per_device, spec_for

LEAST = 16  # rows and columns of the smallest matrix that Triton multiplies
ROWS, COLUMNS, TERMS = 128, 64, 64  # most of a block: rows, columns, and terms of a sum that are read at once
STAGES = 4  # blocks that are read ahead
PROGRAMS = 264  # as many as keep every part of a card busy
LEAST_BLOCKS = 4  # of TERMS in a part of a sum


def takes(stack: jax.Array) -> bool:
    """Returns whether `products` takes a stack `[L,D,F]`."""
    return stack.dtype.itemsize == 2 and not any(size % LEAST for size in stack.shape[1:])


def products(
    x: jax.Array, stacks: dict[str, jax.Array], layer: Any, rows: tuple[str, ...], split: tuple[str, ...]
) -> list[jax.Array]:
    """Multiplies rows by kernels of a layer.

    Args:
      x: `[B,D]`.
      stacks: name of the kernel -> `[L,D,F]` of the type of x, with its own F.
      layer: `[]` int32, index of the layer.
      rows, split: axes of the mesh that split rows, and weights; see `decoder.decode`.

    Returns:
      `[B,F]` for each stack.
    """
    specs = [spec_for(f"layers/{name}/kernel", stack.shape) for name, stack in stacks.items()]
    inner = dividing(x.shape[1], split) if specs[0][1] == "tensor" else ()  # all of them are split by D, or by F
    outer = [() if inner else dividing(stack.shape[2], split) for stack in stacks.values()]
    (by_row,) = fit_spec(x.shape[:1], (rows,))

    def local(x, stacks, layer):
        outs = local_products(x, stacks, layer)
        return [jax.lax.psum(out, inner) for out in outs] if inner else outs

    in_specs = P(by_row, inner), [P(None, inner, columns) for columns in outer], P()
    run = per_device(local, in_specs, [P(by_row, columns) for columns in outer])
    return run(x, list(stacks.values()), jnp.asarray(layer, jnp.int32))


def local_products(x: jax.Array, stacks: Sequence[jax.Array], layer: Any, interpret: bool = False) -> list[jax.Array]:
    """Computes `products` on one device, in one pass over the rows; sums are in float32. `interpret` runs it anywhere.
    """
    rows, depth = x.shape
    row_block = min(ROWS, 1 << (max(rows, LEAST) - 1).bit_length())
    term_block = _block(depth, TERMS)
    blocks = [_block(stack.shape[2], COLUMNS) for stack in stacks]
    counts = [stack.shape[2] // block for stack, block in zip(stacks, blocks, strict=True)]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    grid = pl.cdiv(rows, row_block), sum(counts), _parts(depth // term_block, sum(counts) * pl.cdiv(rows, row_block))

    def out_spec(first, count, block):
        # A program writes to one of the products. Of the others it has a block that another program writes.
        def place(row, number, part):
            return part, row, jnp.clip(number - first, 0, count - 1)

        return pl.BlockSpec((None, row_block, block), place)

    out_type = x.dtype if grid[2] == 1 else jnp.float32
    sums = pl.pallas_call(
        partial(_kernel, rows, depth // term_block // grid[2], term_block, firsts),
        [jax.ShapeDtypeStruct((grid[2], rows, stack.shape[2]), out_type) for stack in stacks],
        grid=grid,
        in_specs=[pl.BlockSpec(), pl.BlockSpec((row_block, depth), lambda row, *_: (row, 0))]
        + [pl.BlockSpec()] * len(stacks),
        out_specs=[out_spec(*spec) for spec in zip(firsts, counts, blocks, strict=True)],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=STAGES), interpret=interpret,
        name="layer_products",
    )(layer.reshape(1), x, *stacks)  # fmt: skip
    return [out[0] if grid[2] == 1 else out.sum(axis=0).astype(x.dtype) for out in sums]


def _kernel(rows, blocks, term_block, firsts, layer, x, *stacks_and_outs):
    """Computes one block of columns of one of the products, summed over one part of the terms."""
    row, number, part = (pl.program_id(axis) for axis in range(3))
    real = (row * x.shape[0] + jnp.arange(x.shape[0]) < rows)[:, None]

    def product(stack, out, first):
        width = out.shape[1]
        columns = pl.ds(pl.multiple_of((number - first) * width, width), width)

        def add(block, total):
            terms = pl.ds(pl.multiple_of((part * blocks + block) * term_block, term_block), term_block)
            left = triton.load(x.at[:, terms], mask=real, other=0.0)
            return total + triton.dot(left, stack[layer[0], terms, columns])

        total = jax.lax.fori_loop(0, blocks, add, jnp.zeros(out.shape, jnp.float32))
        triton.store(out, total.astype(out.dtype), mask=real)

    count = len(firsts)
    branches = [
        partial(product, *refs) for refs in zip(stacks_and_outs[:count], stacks_and_outs[count:], firsts, strict=True)
    ]
    jax.lax.switch(sum(jnp.int32(number >= first) for first in firsts[1:]) if count > 1 else 0, branches)


def _parts(blocks: int, programs: int) -> int:
    """Returns into how many parts sums over `blocks` are split, of which `programs` there are without: a divisor."""
    most = max(1, min(PROGRAMS // programs, blocks // LEAST_BLOCKS))
    return max(parts for parts in range(1, most + 1) if blocks % parts == 0)


def _block(size: int, most: int) -> int:
    """Returns the greatest power of two that divides `size` and is at most `most`."""
    return min(size & -size, most)
