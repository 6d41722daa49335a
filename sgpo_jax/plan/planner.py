"""Plans a run: compiles its jitted programs for chips that can be absent, and adds up what they need."""

from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import config_checks, models, sharding
from sgpo_jax.plan import estimate, gpus, hardware, search
from sgpo_jax.plan.programs import load_shape, programs
from sgpo_jax.plan.roofline import Reached
from sgpo_jax.plan.workload import Assumed


def make(
    config: ConfigDict,
    topology: str,
    auto: bool,
    assumed: Assumed,
    reached: Reached,
    *,
    memory_share: float = gpus.MEMORY_SHARE,
    price: float = 0.0,
) -> dict[str, Any]:
    """Returns the plan of a run as plain data.

    Args:
        config: of the run; its rows are not read.
        topology: such as "v5e:16x16" or "h100:4x8".
        auto: search a mesh, micro-batches and slots.
        assumed, reached: assumptions about the workload and the speed.
        memory_share: of a GPU's memory that JAX takes.
        price: dollars for a chip and hour; 0 takes the one that is stated for the chip.

    Raises:
        ValueError: the topology does not exist, the run does not divide over it, or it has a pool
            that is too small, or that a search would need to choose.
    """
    if auto and (tokens := config.rl.pool_tokens):
        raise ValueError(f"config.rl.pool_tokens={tokens}: must be 0 with --topology=auto, which searches slots")
    shape = load_shape(config)
    chip, devices = hardware.topology(topology)
    chip = chip._replace(price=price or chip.price)
    limit = hardware.hbm_limit(topology, devices[0], memory_share)
    measure = partial(estimate.measure, chip=chip, reached=reached, limit=limit)
    tried: list[search.Tried] = []
    if auto:
        fitting, measured, tried = search.search(config, shape, devices, chip, assumed, limit, measure)
        config = fitting or config
        mesh = sharding.make_mesh(**config.mesh, devices=devices) if fitting else None
    else:
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        config_checks.check_mesh(config, mesh)
        models.check_heads(shape.num_heads, mesh)
        measured = []
        for program in programs(config, shape, mesh, assumed):
            print(f"compiling {program.name}", end=": ", flush=True)
            result = measure(program, mesh)
            print(f"{result['hbm']['needed'] / hardware.GIB:.2f} of {limit / hardware.GIB:.2f} GiB", flush=True)
            measured.append((program, result))
    results = {program.name: result for program, result in measured}
    run_hours = estimate.hours(results) if results else None
    assumptions: dict[str, Any] = {"reached": reached._asdict(), "chip": chip._asdict()}
    if hardware.is_gpu(topology):
        assumptions["memory_share"] = memory_share
    params = jax.eval_shape(partial(models.init, config=shape), jax.random.key(0))
    return {
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(mesh.shape) if mesh else None,
        "model": config.model.source,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "versions": hardware.versions(topology),
        "assumed": assumed._asdict() | assumptions,
        "fits": bool(results) and all(result["fits"] for result in results.values()),
        "programs": results,
        "hours": run_hours,
        "dollars": estimate.dollars(run_hours, len(devices), chip.price) if run_hours else None,
        "advice": estimate.advice(measured, config, mesh, shape.num_kv_heads) if mesh else [],
        "remarks": estimate.remarks(mesh, chip) if mesh else [],
        "tried": [attempt._asdict() for attempt in tried],
        "flags": search.flags(config) if auto and mesh else "",
        "config": configs.to_dict(config),
    }


def without_files(config: ConfigDict) -> ConfigDict:
    """Returns the config without the paths of its data, which a plan does not read and which can be absent."""
    config = ConfigDict(config.to_dict()).lock()
    for section in (config.data, config.sft):
        section.train = "rows" if section.train else ""
    for eval_set in config.eval.sets.values():
        eval_set.source = "rows"
    return config
