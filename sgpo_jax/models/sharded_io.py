"""Tensors of a checkpoint into arrays on a mesh, and such arrays into safetensors files, a block at a time.

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

from sgpo_jax.models.param_mapping import Slot

BLOCK = 2**20  # elements; a block has whole rows, at least one
_ALIGNED = 64  # bytes; on CPU, a buffer that begins at a multiple becomes an array without a copy
_CODES = {"float32": "F32", "bfloat16": "BF16"}  # in the words of safetensors


class Stored(NamedTuple):
    """A tensor of a checkpoint that was not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    open: Callable[[], Any]  # gives what is to be indexed with a tuple of slices


def read(
    shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding, tensors: Mapping[Slot, Stored]
) -> jax.Array:
    """One leaf of the parameter tree; of its tensors, the parts of this process's devices are read.

    Args:
      shape: of the whole leaf.
      dtype: of the array, to which the tensors are cast.
      sharding: of the array; it leaves the layer axis whole.
      tensors: all that make up the leaf.
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
            if slot.layer is not None:
                part, bounds = part[slot.layer], bounds[1:]
            if slot.transposed:
                part, bounds = part.T, bounds[::-1]
            (first, _), *others = bounds
            columns = [slice(*ends) for ends in others]
            size = _rows(part.shape)
            for row in range(0, len(part), size):
                block = part[row : row + size]
                block[...] = stored[(slice(first + row, first + row + len(block)), *columns)]
    arrays = [jax.device_put(parts[bounds], device) for device, bounds in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, jax.block_until_ready(arrays), dtype=dtype)


def equal(left: Stored, right: Stored) -> bool:
    """Whether two tensors hold the same numbers."""
    if left.shape != right.shape:
        return False
    one, other, size = left.open(), right.open(), _rows(left.shape)
    rows = [(slice(row, row + size),) for row in range(0, left.shape[0], size)]
    return all(np.array_equal(one[part], other[part]) for part in rows)


def blocks(leaves: Mapping[str, jax.Array], slots: Mapping[str, Slot]) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name, first row, rows) of the blocks that make up the tensors, in the checkpoint's orientation.

    They are gathered from the devices of all processes: each gets all of them, and has to take all of them.

    Args:
      leaves: by path, each with a NamedSharding that leaves the layer axis whole.
      slots: of the tensors, by name.
    """
    for name, slot in slots.items():
        leaf = leaves[slot.path]
        axis = leaf.ndim - (1 if slot.transposed else len(slot.shape))
        starts, sizes = np.zeros(leaf.ndim, np.int32), list(leaf.sharding.shard_shape(leaf.shape))
        if slot.layer is not None:
            starts[0], sizes[0] = slot.layer, 1
        own = sizes[axis]  # rows of one device
        count = slot.shape[0] // own
        size = sizes[axis] = _rows((own, count, *slot.shape[1:]))
        for row in range(0, own, size):
            row = starts[axis] = min(row, own - size)  # the last block may repeat rows, so that all have one shape
            block = _gathered(leaf, starts, sizes=tuple(sizes), sharding=leaf.sharding)
            whole = np.asarray(block.addressable_data(0)).view(leaf.dtype)
            whole = whole if slot.layer is None else whole[0]
            whole = whole.T if slot.transposed else whole
            for i in range(count):
                yield name, i * own + row, whole[i * size : (i + 1) * size]


@partial(jax.jit, static_argnames=("sizes", "sharding"))
def _gathered(leaf: jax.Array, starts: np.ndarray, *, sizes: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """The bits of what every device has from `starts` on of its part, side by side, whole on every device."""

    def gather(part, starts):
        # As bits: on CPU, bfloat16 would be copied and sent as float32, which changes some NaN.
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
    path: Path, slots: Mapping[str, Slot], dtypes: Mapping[str, np.dtype], rows: Iterable[tuple[str, int, np.ndarray]]
) -> None:
    """A safetensors file: length of the header, header, tensors; the same bytes as of safetensors' own `save_file`.

    Args:
      path: of the file.
      slots: of its tensors, by name, in their order in the file.
      dtypes: of the file's tensors, float32 or bfloat16, by path.
      rows: as of `blocks`, in any order.

    Raises:
      OSError: it cannot be written; the message names it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, slot in slots.items():
        dtype = dtypes[slot.path]
        begin, end = end, end + math.prod(slot.shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype.name], "shape": slot.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, row, block in rows:
                slot, begin = slots[name], header[name]["data_offsets"][0]
                data = np.ascontiguousarray(block, dtypes[slot.path])
                file.seek(8 + len(text) + begin + row * math.prod(slot.shape[1:]) * data.itemsize)
                file.write(data.reshape(-1).view(np.uint8).data)
    except OSError as error:  # such as a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def _rows(shape: tuple[int, ...]) -> int:
    """Of a block of an array of this shape."""
    return min(shape[0], max(1, BLOCK // math.prod(shape[1:])))


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)
