"""Reads checkpoint tensors into arrays on a mesh, and writes such arrays to safetensors files, a block at a time.

A host holds the parts of its own devices and a few blocks, however large a tensor or the whole model is.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sgpo_jax.models.param_mapping import Slot, Tensor
from sgpo_jax.runtime.files import replacing

BLOCK = 2**20  # elements; a block has whole rows, at least one
_ALIGNMENT = 64  # bytes; on CPU, a buffer that begins at a multiple of this becomes an array without a copy
_CODES = {"float32": "F32", "bfloat16": "BF16"}  # safetensors' names


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    open: Callable[[], Any]  # returns an object that a tuple of slices indexes, such as an array


def read(
    shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding, tensors: Mapping[Slot, StoredTensor]
) -> jax.Array:
    """Reads one leaf of the parameter tree. A process reads the parts of its own devices.

    Args:
      shape: shape of the whole leaf.
      dtype: type of the array; the tensors are cast to it.
      sharding: sharding of the array, which leaves the layer axis whole.
      tensors: the tensors that make up the leaf.
    """
    indices = sharding.devices_indices_map(shape)
    places = {
        device: tuple(s.indices(size)[:2] for s, size in zip(indices[device], shape, strict=True))
        for device in sharding.addressable_devices
    }
    # Devices with the same part share its buffer.
    parts = {bounds: _empty([stop - start for start, stop in bounds], dtype) for bounds in places.values()}
    for slot, tensor in tensors.items():
        stored = tensor.open()
        for bounds, part in parts.items():
            if not all(start <= i < stop for i, (start, stop) in zip(slot.at, bounds, strict=False)):
                continue  # on other devices
            part = part[tuple(i - start for i, (start, _) in zip(slot.at, bounds, strict=False))]
            bounds = bounds[len(slot.at) :]
            if slot.transposed:
                part, bounds = part.T, bounds[::-1]
            (first, _), *others = bounds
            first += slot.first
            columns = [slice(*ends) for ends in others]
            size = _rows(part.shape)
            for row in range(0, len(part), size):
                block = part[row : row + size]
                block[...] = stored[(slice(first + row, first + row + len(block)), *columns)]
    arrays = [jax.device_put(parts[bounds], device) for device, bounds in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, jax.block_until_ready(arrays), dtype=dtype)


def equal(left: StoredTensor, right: StoredTensor) -> bool:
    """Returns whether two tensors hold the same numbers."""
    if left.shape != right.shape:
        return False
    left_array, right_array, size = left.open(), right.open(), _rows(left.shape)
    rows = [(slice(row, row + size),) for row in range(0, left.shape[0], size)]
    return all(np.array_equal(left_array[block], right_array[block]) for block in rows)


def blocks(leaves: Mapping[str, jax.Array], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields the blocks that make up the tensors: (name, first row, rows), in the checkpoint's orientation.

    Every block is gathered from the devices of all processes, so every process must take all of them.

    Args:
      leaves: arrays by path, each with a NamedSharding that leaves the layer axis whole.
      tensors: places of the tensors, by name.
    """
    for name, slot in ((name, slot) for name, tensor in tensors.items() for slot in tensor.slots):
        leaf = leaves[slot.path]
        axis = leaf.ndim - (1 if slot.transposed else len(slot.shape))
        starts, sizes = np.zeros(leaf.ndim, np.int32), list(leaf.sharding.shard_shape(leaf.shape))
        owner = tuple(i // size for i, size in zip(slot.at, sizes, strict=False))  # among the parts of each axis
        for dim, i in enumerate(slot.at):
            starts[dim], sizes[dim] = i % sizes[dim], 1
        device_rows = sizes[axis]
        count = slot.shape[0] // device_rows
        size = sizes[axis] = _rows((device_rows, count, *slot.shape[1:]))
        for row in range(0, device_rows, size):
            row = starts[axis] = min(row, device_rows - size)  # the last block may repeat rows: all have one shape
            block = _gathered(leaf, starts, sizes=tuple(sizes), sharding=leaf.sharding)
            whole = np.asarray(block.addressable_data(0)).view(leaf.dtype)
            whole = whole[owner]
            whole = whole.T if slot.transposed else whole
            for i in range(count):
                yield name, slot.first + i * device_rows + row, whole[i * size : (i + 1) * size]


@partial(jax.jit, static_argnames=("sizes", "sharding"))
def _gathered(leaf: jax.Array, starts: np.ndarray, *, sizes: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Returns the bits of one block of every device's part, joined and whole on every device."""

    def gather(part, starts):
        # Bits, because a CPU would copy and send bfloat16 as float32, which changes some NaNs.
        bits = jax.lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}")
        block = jax.lax.dynamic_slice(bits, starts, sizes)
        for dim, axes in enumerate(sharding.spec):
            if axes is not None:
                block = jax.lax.all_gather(block, axes, axis=dim, tiled=True)
        return block

    return jax.shard_map(
        gather, mesh=sharding.mesh, in_specs=(sharding.spec, P()), out_specs=P(), check_vma=False
    )(leaf, starts)  # fmt: skip


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, np.dtype],
    rows: Iterable[tuple[str, int, np.ndarray]],
) -> None:
    """Writes a safetensors file, whole or not at all, with the same bytes as safetensors' own `save_file`.

    Args:
      path: path of the file.
      tensors: places of its tensors, by name, in their order in the file.
      dtypes: types of the tensors in the file, float32 or bfloat16, by path.
      rows: blocks as `blocks` yields them, in any order.

    Raises:
      OSError: the file cannot be written; the message names it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        dtype = dtypes[tensor.slots[0].path]
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype.name], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, row, block in rows:
                tensor, begin = tensors[name], header[name]["data_offsets"][0]
                data = np.ascontiguousarray(block, dtypes[tensor.slots[0].path])
                file.seek(8 + len(text) + begin + row * math.prod(tensor.shape[1:]) * data.itemsize)
                file.write(data.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _rows(shape: tuple[int, ...]) -> int:
    """Returns the number of rows in a block of an array of this shape."""
    return min(shape[0], max(1, BLOCK // math.prod(shape[1:])))


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
