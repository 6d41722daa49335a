"""Searches a mesh, a layout of the weights in decoding, micro-batches and slots with which a run fits the chips."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import config_checks, models, sharding
from sgpo_jax.models import ModelConfig
from sgpo_jax.plan import hardware
from sgpo_jax.plan.estimate import Result
from sgpo_jax.plan.programs import Program, programs
from sgpo_jax.plan.roofline import Chip
from sgpo_jax.plan.workload import Assumed
from sgpo_jax.training import carried, rl

FIELDS = ("sft.micro_batch", "rl.micro_batch", "rl.slots", "eval.slots")
WAYS = ("rl.decode_ways", "eval.decode_ways")
MOST_ROWS = 4  # rows of a micro-batch on a device that the search begins with

Measured = list[tuple[Program, Result]]


class Tried(NamedTuple):
    """A value of a field that was tried on a mesh, with the outcome."""

    mesh: dict[str, int]
    field: str
    value: int
    outcome: str


def search(
    config: ConfigDict,
    shape: ModelConfig,
    devices: list[jax.Device],
    chip: Chip,
    assumed: Assumed,
    limit: int,
    measure: Callable[..., Result],
) -> tuple[ConfigDict | None, Measured, list[Tried]]:
    """Tries meshes in the order of `moving_seconds`, and on each mesh the largest micro-batches and slots first.

    A program is not compiled where its arguments, its cache and the inputs of its layers are already too large.

    Args:
        config: of the run; its mesh, FIELDS and WAYS are replaced.
        shape, devices, chip, assumed: what the plan is for.
        limit: bytes of HBM of a device.
        measure: `estimate.measure` without the program and the mesh.

    Returns:
        (config, programs, tried): the first config that fits, or None; its programs with their results; and all values
        that were tried.
    """
    tried: list[Tried] = []
    for candidate, mesh in meshes(config, shape, devices, chip, assumed):
        fitting: Measured = []
        for field in FIELDS:
            for value in _values(candidate, field, mesh):
                _set(candidate, field, value)
                affected = [p for p in programs(candidate, shape, mesh, assumed) if p.setting.field == field]
                if not affected:
                    break
                outcome, measured = _measure_all(affected, limit, partial(measure, mesh=mesh))
                tried.append(Tried(dict(mesh.shape), field, value, outcome))
                print(f"{tried[-1].mesh}, {field}={value}: {outcome}", flush=True)
                if len(measured) == len(affected):
                    fitting += measured
                    break
            else:
                break
        else:
            return candidate, fitting, tried
    return None, [], tried


def flags(config: ConfigDict) -> str:
    """Returns the fields that the search has chosen, as flags for the command line."""
    fields = [*(f"mesh.{axis}" for axis in sharding.AXES), *FIELDS]
    values = [f"--config.{field}={config[field.split('.')[0]][field.split('.')[1]]}" for field in fields]
    ways = [f'--config.{field}="({config[field.split(".")[0]].decode_ways[0]},)"' for field in WAYS]
    return " ".join([*values, *ways])


def meshes(
    config: ConfigDict, shape: ModelConfig, devices: list[jax.Device], chip: Chip, assumed: Assumed
) -> list[tuple[ConfigDict, Mesh]]:
    """Returns the configs, with their meshes, that divide heads and batches.

    They are in the order of `moving_seconds`, the fastest first.
    """
    candidates = []
    for tensor in (2**i for i in range(len(devices).bit_length())):
        if len(devices) % tensor or shape.num_heads % tensor or shape.num_kv_heads % tensor or shape.experts % tensor:
            continue
        candidate = ConfigDict(config.to_dict())
        candidate.mesh.update({"data": 1, "fsdp": len(devices) // tensor, "context": 1, "tensor": tensor})
        mesh = sharding.make_mesh(**candidate.mesh, devices=devices)
        for field in FIELDS:
            _set(candidate, field, candidate.mesh.fsdp)
        try:
            config_checks.check_mesh(candidate, mesh)
        except ValueError:  # the mesh does not divide a batch, and the search keeps the batches
            continue
        candidate.rl.decode_ways = candidate.eval.decode_ways = (decode_ways(candidate, mesh, shape, chip),)
        candidates.append((candidate, mesh))
    return sorted(candidates, key=lambda pair: moving_seconds(pair[0], pair[1], shape, chip, assumed))


def moving_seconds(config: ConfigDict, mesh: Mesh, shape: ModelConfig, chip: Chip, assumed: Assumed) -> float:
    """Estimates the seconds of an RL step that depend on the mesh, at peak speeds.

    They go to the transfer of weights and activations. An update gathers the weights three times for each micro-batch,
    and sums activations over the tensor axis four times in each layer. A rollout gathers the weights once.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    size = jax.numpy.dtype(config.model.dtype).itemsize
    gather = _weights(config, shape) / tensor * (fsdp - 1) / fsdp / _speed(mesh, "fsdp", chip)
    ways = config.rl.decode_ways[0]
    decoding = config.rl.max_new_tokens * decoding_seconds(config, mesh, ways, shape, chip) + gather
    tokens = config.rl.batch * (config.rl.autonomous + config.rl.guided) * assumed.response_tokens
    micro_batches = math.ceil(tokens / (fsdp * config.rl.max_new_tokens))
    summed = 4 * shape.num_layers * tokens / fsdp * shape.hidden_size * size * 2 * (tensor - 1) / tensor
    return decoding + 3 * micro_batches * gather + summed / _speed(mesh, "tensor", chip)


def decode_ways(config: ConfigDict, mesh: Mesh, shape: ModelConfig, chip: Chip) -> int:
    """Returns the ways to split the weights, beyond the tensor axis, with which a step of decoding is the fastest."""
    rows = sharding.row_ways(mesh)
    ways = [2**i for i in range(rows.bit_length()) if rows % 2**i == 0]
    return min(ways, key=lambda count: decoding_seconds(config, mesh, count, shape, chip))


def decoding_seconds(config: ConfigDict, mesh: Mesh, ways: int, shape: ModelConfig, chip: Chip) -> float:
    """Estimates the seconds of a step of decoding, all responses at once, that depend on the split of the weights.

    They go to reading the weights; and, twice in each layer, to gathering the rows of the devices that split them
    further than the tensor axis does, and to summing the results. All at peak speeds.
    """
    tensor, size = mesh.shape["tensor"], jax.numpy.dtype(config.model.dtype).itemsize
    responses = config.rl.batch * sum(rl.sampled_groups(config.rl).values())
    rows = ways * responses / sharding.row_ways(mesh) * shape.hidden_size * size
    all_ways = ways * tensor
    moved = 2 * shape.num_layers * rows * (2 * (all_ways - 1) / all_ways + (ways - 1) / ways)
    speed = min(_speed(sharding.decoding_mesh(mesh, (ways,)), axis, chip) for axis in ("fsdp", "tensor")[ways == 1 :])
    return _weights(config, shape) / all_ways / chip.hbm + moved / speed


def _weights(config: ConfigDict, shape: ModelConfig) -> int:
    """Returns the bytes of the weights in the type of the products."""
    params = jax.eval_shape(partial(models.init, config=shape), jax.random.key(0))
    return jax.numpy.dtype(config.model.dtype).itemsize * sum(x.size for x in jax.tree.leaves(params))


def _speed(mesh: Mesh, axis: str, chip: Chip) -> float:
    """Returns the bytes per second that a device sends in a ring along an axis of the mesh."""
    if not chip.network:
        return chip.ici
    first = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    hosts = len({device.process_index for device in first})
    # Each device of a host takes part of what goes to the next host through its own network card.
    return chip.ici if hosts == 1 else min(chip.ici, chip.network * len(first) / hosts)


def _values(config: ConfigDict, field: str, mesh: Mesh) -> list[int]:
    """Returns the values to try, halved from one to the next; all are multiples of the devices that split the rows."""
    ways = mesh.shape["fsdp"]
    section, name = field.split(".")
    most = {
        "sft": config.sft.batch,
        "rl": (config.rl.batch + carried.extra(config.rl)) * sum(rl.sampled_groups(config.rl).values()),
        "eval": config.eval.batch * max((eval_set.samples for eval_set in config.eval.sets.values()), default=1),
    }[section]
    most = min(most, MOST_ROWS * ways) if name == "micro_batch" else most
    values = []
    while most >= ways:
        values.append(most // ways * ways)
        most //= 2
    return values or [ways]


def _set(config: ConfigDict, field: str, value: int) -> None:
    section, name = field.split(".")
    config[section][name] = value


def _measure_all(affected: list[Program], limit: int, measure: Callable[[Program], Result]) -> tuple[str, Measured]:
    """Measures programs up to the first that does not fit; returns (outcome, programs that fit)."""
    for program in affected:
        if program.least > limit:
            return f"{program.name} needs more than {program.least / hardware.GIB:.2f} GiB", []
    measured: Measured = []
    for program in affected:
        result = measure(program)
        if not result["fits"]:
            return f"{program.name} needs {result['hbm']['needed'] / hardware.GIB:.2f} GiB", measured
        measured.append((program, result))
    return "fits", measured
