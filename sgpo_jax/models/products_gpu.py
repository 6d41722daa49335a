"""Products of few rows with one layer's kernels out of their stacks, on GPUs: a Pallas kernel that Triton compiles.

Decoding reads every weight for a few rows, so it takes as long as reading them. XLA first copies a layer's weights out
of the stack, and so moves them three times. Here they are read where they lie, and kernels that multiply the same rows
lie side by side.

Axis key: B rows, D features of a row, F features of a product, L layers.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P

from sgpo_jax.models.attention_gpu import LEAST, power_of_two
from sgpo_jax.sharding import BATCH, dividing, fit_spec, per_device, spec_for

Group = tuple[str, ...]  # names of kernels that multiply the same rows
GROUPS: tuple[Group, ...] = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
ROWS, COLUMNS, TERMS = 128, 64, 64  # most of a block: rows, columns, and terms of a sum that are read at once
STAGES = 4  # blocks that are read ahead
PROGRAMS = 264  # two for each multiprocessor of an H100
LEAST_BLOCKS = 4  # of TERMS in a part of a sum


def stacks(layers: dict[str, Any], split: tuple[str, ...]) -> dict[Group, jax.Array]:
    """Returns the kernels of all layers, those that multiply the same rows side by side.

    Args:
      layers: name -> {"kernel": `[L,D,F]`}, split over devices by the axes `split`; see `decoder.decode`.
      split: the axes.

    Returns:
      names of the kernels -> `[L,D,F]`, F being the sum of theirs. A device has the columns that it has of each of
      them. Kernels of other types or sizes than `product` takes are left out.
    """
    kernels = {name: leaves["kernel"] for name, leaves in layers.items() if "kernel" in leaves}
    found = {}
    for group in GROUPS:
        chosen = [kernels[name] for name in group if name in kernels and _takes(name, kernels[name], split)]
        if len(chosen) == len(group):
            specs = [_spec(name, kernel.shape[1:], split) for name, kernel in zip(group, chosen, strict=True)]
            inner, outer = specs[0][0], min((columns for _, columns in specs), key=len)
            part = P(None, inner, outer)
            join = per_device(lambda *kernels: jnp.concatenate(kernels, axis=2), (part,) * len(chosen), part)
            found[group] = join(*chosen)
    return found


def _takes(name: str, kernel: jax.Array, split: tuple[str, ...]) -> bool:
    """Returns whether `product` takes a device's part of a kernel `[L,D,F]`."""
    mesh, sizes = jax.sharding.get_abstract_mesh(), kernel.shape[1:]
    ways = [math.prod(mesh.shape[axis] for axis in axes) for axes in _spec(name, sizes, split)]
    return kernel.dtype.itemsize == 2 and not any(size // n % LEAST for size, n in zip(sizes, ways, strict=True))


def _spec(name: str, shape: tuple[int, ...], split: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the axes that split D of a kernel `[D,F]`, and those that split F."""
    if jax.sharding.get_abstract_mesh().empty:
        return (), ()
    spec = spec_for(f"layers/{name}/kernel", (1, *shape))[1:]
    inner, outer = (dividing(n, split) if axis == "tensor" else () for n, axis in zip(shape, spec, strict=True))
    return inner, outer


def products(
    x: jax.Array, names: Group, widths: Sequence[int], stack: jax.Array, layer: Any, split: tuple[str, ...]
) -> list[jax.Array]:
    """Multiplies rows by the kernels of a layer that stand side by side.

    Args:
      x: `[B,D]`.
      names, stack: of the kernels, and themselves, from `stacks`.
      widths: F of each of them.
      layer: `[]` int32, index of the layer.
      split: axes of the mesh that split the weights. The others split the rows.

    Returns:
      `[B,F]` for each kernel, of the type of x.
    """
    specs = [_spec(name, (x.shape[1], width), split) for name, width in zip(names, widths, strict=True)]
    inner, outer = specs[0][0], min((columns for _, columns in specs), key=len)
    (by_row,) = fit_spec(x.shape[:1], (tuple(axis for axis in BATCH if axis not in split),))

    def local(x, stack, layer):
        out = product(x, stack, layer)
        out = jax.lax.psum(out, inner) if inner else out
        ways = sum(widths) // out.shape[1]
        return jnp.split(out, np.cumsum([width // ways for width in widths])[:-1].tolist(), axis=1)

    run = per_device(local, (P(by_row, inner), P(None, inner, outer), P()), [P(by_row, outer)] * len(names))
    return run(x, stack, jnp.asarray(layer, jnp.int32))


def product(x: jax.Array, stack: jax.Array, layer: jax.Array, interpret: bool = False) -> jax.Array:
    """Multiplies x `[B,D]` by a layer's kernel out of `[L,D,F]` on one device, summing in float32, to `[B,F]`.

    `interpret` runs it anywhere.
    """
    (rows, depth), width = x.shape, stack.shape[2]
    row_block = min(ROWS, power_of_two(rows))
    terms, columns = _block(depth, TERMS), _block(width, COLUMNS)
    blocks = pl.cdiv(rows, row_block), width // columns
    parts = _parts(depth // terms, math.prod(blocks))
    out_type = x.dtype if parts == 1 else jnp.float32
    out = pl.pallas_call(
        partial(_kernel, rows, depth // terms // parts, terms),
        jax.ShapeDtypeStruct((parts, rows, width), out_type),
        grid=(*blocks, parts),
        in_specs=[pl.BlockSpec(), pl.BlockSpec((row_block, depth), lambda row, *_: (row, 0)), pl.BlockSpec()],
        out_specs=pl.BlockSpec((None, row_block, columns), lambda row, column, part: (part, row, column)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=STAGES), interpret=interpret,
        name="layer_product",
    )(layer.reshape(1), x, stack)  # fmt: skip
    return out[0] if parts == 1 else out.sum(axis=0).astype(x.dtype)


def _kernel(rows, blocks, size, layer, x, stack, out):
    """Computes a block of rows and columns, summed over one part of the terms: `blocks` of this size."""
    row, column, part = (pl.program_id(axis) for axis in range(3))
    real = (row * x.shape[0] + jnp.arange(x.shape[0]) < rows)[:, None]
    width = out.shape[1]
    columns = pl.ds(pl.multiple_of(column * width, width), width)

    def add(block, total):
        terms = pl.ds(pl.multiple_of((part * blocks + block) * size, size), size)
        left = triton.load(x.at[:, terms], mask=real, other=0.0)
        return total + triton.dot(left, stack[layer[0], terms, columns])

    total = jax.lax.fori_loop(0, blocks, add, jnp.zeros(out.shape, jnp.float32))
    triton.store(out, total.astype(out.dtype), mask=real)


def _parts(blocks: int, programs: int) -> int:
    """Returns into how many parts sums over `blocks` are split, of which `programs` there are without: a divisor."""
    most = max(1, min(PROGRAMS // programs, blocks // LEAST_BLOCKS))
    return max(parts for parts in range(1, most + 1) if blocks % parts == 0)


def _block(size: int, most: int) -> int:
    """Returns the greatest power of two that divides `size` and is at most `most`."""
    return min(size & -size, most)
