"""A mesh, micro-batches and slots with which a run fits given chips: estimated first, then compiled until one fits."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import config_checks, models, sharding
from sgpo_jax.models import ModelConfig
from sgpo_jax.plan import hardware
from sgpo_jax.plan.estimate import Result
from sgpo_jax.plan.hardware import Chip
from sgpo_jax.plan.programs import Program, programs
from sgpo_jax.plan.workload import Assumed
from sgpo_jax.training import rl

FIELDS = ("sft.micro_batch", "rl.micro_batch", "rl.slots", "eval.slots")
MOST_ROWS = 4  # of a micro-batch on a device, that are tried first

Measured = list[tuple[Program, Result]]


class Tried(NamedTuple):
    """One value of one field on one mesh."""

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
    """Tries meshes in the order of `moving_seconds`, and on each the largest micro-batches and slots.

    What its arguments, its cache and its layers' inputs alone make too large is not compiled.

    Args:
      config: of the run; its mesh and FIELDS are replaced.
      shape, devices, chip, assumed: what it is planned for.
      limit: bytes of HBM of a device.
      measure: `estimate.measure` with all else.

    Returns:
      (the first config that fits, or None; its programs and what was measured; everything that was tried).
    """
    tried: list[Tried] = []
    for candidate, mesh in meshes(config, shape, devices, chip, assumed):
        found: Measured = []
        for field in FIELDS:
            for value in _values(candidate, field, mesh):
                _set(candidate, field, value)
                ours = [each for each in programs(candidate, shape, mesh, assumed) if each.setting.field == field]
                if not ours:
                    break
                outcome, measured = _fits(ours, limit, partial(measure, mesh=mesh))
                tried.append(Tried(dict(mesh.shape), field, value, outcome))
                print(f"{tried[-1].mesh}, {field}={value}: {outcome}", flush=True)
                if len(measured) == len(ours):
                    found += measured
                    break
            else:
                break
        else:
            return candidate, found, tried
    return None, [], tried


def flags(config: ConfigDict) -> str:
    """What the search has chosen, for the command line."""
    fields = [*(f"mesh.{axis}" for axis in sharding.AXES), *FIELDS]
    return " ".join(f"--config.{field}={config[field.split('.')[0]][field.split('.')[1]]}" for field in fields)


def meshes(
    config: ConfigDict, shape: ModelConfig, devices: list[jax.Device], chip: Chip, assumed: Assumed
) -> list[tuple[ConfigDict, Mesh]]:
    """Configs, with their meshes, that divide heads and batches; what moves least is the first."""
    found = []
    for tensor in (2**i for i in range(len(devices).bit_length())):
        if len(devices) % tensor or shape.num_heads % tensor or shape.num_kv_heads % tensor:
            continue
        candidate = ConfigDict(config.to_dict())
        candidate.mesh.update({"data": 1, "fsdp": len(devices) // tensor, "tensor": tensor})
        mesh = sharding.make_mesh(**candidate.mesh, devices=devices)
        for field in FIELDS:
            _set(candidate, field, candidate.mesh.fsdp)
        try:
            config_checks.check_mesh(candidate, candidate.mesh.fsdp)
        except ValueError:  # a batch that is not to be changed
            continue
        found.append((candidate, mesh))
    return sorted(found, key=lambda pair: moving_seconds(pair[0], pair[1], shape, chip, assumed))


def moving_seconds(config: ConfigDict, mesh: Mesh, shape: ModelConfig, chip: Chip, assumed: Assumed) -> float:
    """Of an RL step, at peak speeds, the time of what depends on the mesh: weights and activations between devices.

    Decoding reads the weights of its part of the tensor axis at every token, gathered from the fsdp axis; an update
    gathers them for each micro-batch three times, and sums activations over the tensor axis four times in each layer.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    size = jax.numpy.dtype(config.model.dtype).itemsize
    params = jax.eval_shape(partial(models.init, config=shape), jax.random.key(0))
    weights = size * sum(x.size for x in jax.tree.leaves(params)) / tensor
    gather = weights * (fsdp - 1) / fsdp / chip.ici
    decoding = config.rl.max_new_tokens * (weights / chip.hbm + gather)
    tokens = config.rl.batch * (config.rl.autonomous + config.rl.guided) * assumed.response_tokens
    micro_batches = math.ceil(tokens / (fsdp * config.rl.max_new_tokens))
    summed = 4 * shape.num_layers * tokens / fsdp * shape.hidden_size * size * 2 * (tensor - 1) / tensor / chip.ici
    return decoding + 3 * micro_batches * gather + summed


def _values(config: ConfigDict, field: str, mesh: Mesh) -> list[int]:
    """What is tried, in this order: multiples of the devices that rows are split over, halved again and again."""
    ways = mesh.shape["fsdp"]
    section, name = field.split(".")
    most = {
        "sft": config.sft.batch,
        "rl": config.rl.batch * sum(rl.sampled_groups(config.rl).values()),
        "eval": config.eval.batch * max((each.samples for each in config.eval.sets.values()), default=1),
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


def _fits(ours: list[Program], limit: int, measure: Callable[[Program], Result]) -> tuple[str, Measured]:
    """(what came of it, what was measured of the programs up to the first that does not fit)."""
    for program in ours:
        if program.least > limit:
            return f"{program.name} needs more than {program.least / hardware.GIB:.2f} GiB", []
    measured: Measured = []
    for program in ours:
        result = measure(program)
        if not result["fits"]:
            return f"{program.name} needs {result['hbm']['needed'] / hardware.GIB:.2f} GiB", measured
        measured.append((program, result))
    return "fits", measured
