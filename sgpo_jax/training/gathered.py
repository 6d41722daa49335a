"""Checkpoints that the first process alone has as files: the others send it their parts, and get theirs from it.

An array goes from process to process in pieces: a sum over the processes of bytes that one of them has and that are
zero elsewhere. So a device needs room for a part of a piece, however large the array is. The first host needs memory
for a whole state, every other one for its largest array, besides the parts of its own devices.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import type_handlers

from sgpo_jax.runtime import distributed, watchdog

_PIECE = 2**28  # bytes that are sent at once; each device of a host carries an equal part
_WORD = np.dtype(np.uint32)  # as which bytes are sent


class Manager:
    """Orbax's manager, as far as `Checkpoints` needs it, of files that only the first process has.

    Every process calls `save` and `restore`, in the same order. The other methods do nothing in all but the first.

    Args:
      folder: of the checkpoints, on the disk of the first process.
      options: of Orbax's manager.
    """

    def __init__(self, folder: Path, options: ocp.CheckpointManagerOptions):
        self._manager: ocp.CheckpointManager | None = None
        if not distributed.is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        # By default Orbax copies the arrays, which nobody changes, before it writes them. It warns without the second.
        numpy = type_handlers.create_type_handler_registry(
            (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
            (jax.Array, type_handlers.ArrayHandler()),
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, type_handler_registry=numpy),
            "run": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
        options = dataclasses.replace(
            options, create=False, single_host_load_and_broadcast=False, multiprocessing_options=alone
        )
        self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints."""
        return list(self._manager.all_steps()) if self._manager else []

    def metrics(self, step: int) -> Any:
        """Returns the metrics of a checkpoint."""
        return self._manager.metrics(step) if self._manager else None

    def save(self, step: int, args: ocp.args.Composite, metrics: Any = None) -> None:
        """Saves the items of `args`, whose `state` has arrays of all processes, and returns once these are gathered."""
        state = ocp.args.PyTreeSave(jax.tree.map(gather, args.state.item), args.state.save_args)
        if self._manager:
            self._manager.save(step, args=ocp.args.Composite(state=state, run=args.run), metrics=metrics)

    def restore(self, step: int, args: ocp.args.Composite) -> dict[str, Any]:
        """Returns the items that `args` names; the arrays of `state` are placed as its item says.

        Raises:
          ValueError: an array has another shape than the item.
        """
        if "run" in args.keys():
            return {"run": distributed.first(lambda: self._read(step, args)["run"])}
        return {"state": spread(self._read_state(step, args.state.item), args.state.item)}

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        assert self._manager is not None
        return self._manager.restore(step, args=args)

    def _read_state(self, step: int, wanted: Any) -> Any:
        """Returns the arrays in host memory of the first process, and nothing in others."""
        if self._manager is None:
            return None
        as_numpy = jax.tree.map(lambda x: ocp.RestoreArgs(np.ndarray, x.dtype) if _is_array(x) else x, wanted)
        state = self._read(step, ocp.args.Composite(state=ocp.args.PyTreeRestore(wanted, as_numpy)))["state"]

        def check(path, value, target):
            if _is_array(target) and value.shape != target.shape:
                raise ValueError(f"{jax.tree_util.keystr(path)} has shape {value.shape} instead of {target.shape}")

        jax.tree_util.tree_map_with_path(check, state, wanted)
        return state

    def delete(self, step: int) -> None:
        """Deletes a checkpoint."""
        if self._manager:
            self._manager.delete(step)

    def reload(self) -> None:
        """Looks anew which checkpoints there are."""
        if self._manager:
            self._manager.reload()

    def wait_until_finished(self) -> None:
        """Waits until what was saved has been written."""
        if self._manager:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends the threads that write."""
        if self._manager:
            self._manager.close()


def gather(array: jax.Array) -> np.ndarray | None:
    """Returns a whole array in host memory of the first process, and None in the others, which all call this."""
    if array.is_fully_replicated:  # copied, because the next update may write to the same memory
        return np.array(array.addressable_data(0)) if distributed.is_first() else None
    whole = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:  # else another device has the same part, maybe of another process
            whole[shard.index] = shard.data
    _join(whole, only_first=True)
    return whole if distributed.is_first() else None


def spread(tree: Any, targets: Any) -> Any:
    """Returns the arrays that the first process has in host memory, each placed as its target, in every process.

    Args:
      tree: of arrays; None in the other processes.
      targets: ShapeDtypeStructs with shardings, or placeholders, which stay.
    """

    def placed(target, value=None):
        if not _is_array(target):
            return target
        has = value is not None
        whole = np.require(value, target.dtype, "CW") if has else np.zeros(target.shape, target.dtype)
        _join(whole)
        return jax.make_array_from_callback(whole.shape, target.sharding, lambda part: whole[part])

    return jax.tree.map(placed, targets) if tree is None else jax.tree.map(placed, targets, tree)


def _is_array(target: Any) -> bool:
    return isinstance(target, jax.ShapeDtypeStruct)


def _join(whole: np.ndarray, only_first: bool = False) -> None:
    """Makes an array whole in place, of which each process has a part and zeros elsewhere.

    Args:
      whole: contiguous.
      only_first: in the first process alone.
    """
    devices = np.array(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))
    mesh = Mesh(devices.reshape(jax.process_count(), -1), ("processes", "devices"))
    count = mesh.shape["devices"]
    content = whole.reshape(-1).view(np.uint8)
    for start in range(0, content.size, _PIECE):
        piece = content[start : start + _PIECE]
        words = math.ceil(piece.size / _WORD.itemsize / count) * count
        padded = np.zeros((1, words), _WORD)
        padded.view(np.uint8)[0, : piece.size] = piece
        sent = jax.make_array_from_process_local_data(
            NamedSharding(mesh, P(*mesh.axis_names)), padded, (jax.process_count(), words)
        )
        with jax.set_mesh(mesh):
            joined = jax.block_until_ready(_sum(sent, mesh))
        watchdog.met()
        if only_first and not distributed.is_first():
            continue
        for shard in joined.addressable_shards:
            padded[0, shard.index[0]] = shard.data
        piece[:] = padded.view(np.uint8)[0, : piece.size]


@partial(jax.jit, static_argnums=1)
def _sum(rows: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns the sum of rows `[processes, N]`; each device has its part of it."""
    return jax.lax.with_sharding_constraint(rows.sum(0, dtype=rows.dtype), NamedSharding(mesh, P("devices")))
