"""What the TPU compiler says of a run's programs, and the time of the run that follows from stated assumptions."""

import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax.plan import flops, hardware, hlo, hlo_cost, roofline
from sgpo_jax.plan.hardware import Chip
from sgpo_jax.plan.programs import Program, Setting
from sgpo_jax.plan.roofline import Reached
from sgpo_jax.sharding import row_ways

Result = dict[str, Any]
LARGEST = 6  # arrays that are listed


def measure(program: Program, mesh: Mesh, chip: Chip, reached: Reached, limit: int) -> Result:
    """Compiles a program for the devices of `mesh`, and takes down what it needs and moves.

    Args:
      program: what is compiled.
      mesh: of TPUs, which need not be there.
      chip, reached: peak speeds, and the shares of them.
      limit: bytes of HBM of a device.

    Returns:
      Plain data. Bytes, FLOPs and seconds are those of one device. Where the program does not fit, "compiled" is False,
      and what only the compiled program says is missing.
    """
    with jax.set_mesh(mesh):
        started = time.monotonic()
        traced = program.trace()
        work = flops.matmul_flops(traced.jaxpr, program.scopes)
        try:
            compiled, needed = traced.lower().compile(), 0
        except jax.errors.JaxRuntimeError as error:
            if not (sizes := hardware.too_large(error)):
                raise
            compiled, needed = None, sizes[0]
    hbm: dict[str, int] = {"limit": limit, "resident": program.resident}
    moved: list[hlo_cost.Collective] = []
    touched: dict[str, float] = {}
    result: Result = {"stage": program.stage, "calls": program.calls, "tokens": program.tokens}
    if compiled is None:
        hbm["needed"] = needed + program.resident
    else:
        module = hlo.parse(compiled.as_text())
        moved, touched = hlo_cost.collectives(module, program.scopes), hlo_cost.hbm_bytes(module, program.scopes)
        hbm |= _memory(compiled.memory_analysis())
        hbm["needed"] = program.resident + hbm["arguments"] + hbm["outputs"] + hbm["temporaries"] + hbm["code"]
        names = ("bytes", "array", "from")
        result["largest"] = [dict(zip(names, found, strict=True)) for found in hlo_cost.largest(module, LARGEST)]
    phases = {}
    for name in dict.fromkeys([*work, *touched, *(each.phase for each in moved)]):
        ours = [each for each in moved if each.phase == name]
        part = work.get(name, 0.0) / mesh.size, touched.get(name, 0.0)
        phases[name] = {
            "flops": part[0],
            "hbm_bytes": part[1],
            "collectives": _by_kind(ours),
            "seconds": roofline.seconds(*part, ours, chip, reached)._asdict(),
        }
    result |= {"compiled": compiled is not None, "fits": compiled is not None and hbm["needed"] <= limit}
    return result | {"hbm": hbm, "phases": phases, "compile_seconds": time.monotonic() - started}


def _memory(stats: Any) -> dict[str, int]:
    """The compiler's figures, in bytes; outputs that take the place of donated arguments are not counted twice."""
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }


def _by_kind(moved: Sequence[hlo_cost.Collective]) -> dict[str, dict[str, float]]:
    """How many, the bytes of their results, and the bytes that a device sends in a ring, by kind."""
    kinds: dict[str, dict[str, float]] = {}
    for each in moved:
        found = kinds.setdefault(each.kind, {"count": 0.0, "bytes": 0.0, "sent": 0.0})
        for name, one in (("count", 1.0), ("bytes", each.bytes), ("sent", each.sent)):
            found[name] += each.times * one
    return kinds


def seconds(result: Result) -> tuple[float, float]:
    """(least, most) time of a call: in each phase everything at once, or one after the other."""
    phases = [roofline.Seconds(**phase["seconds"]) for phase in result["phases"].values()]
    return sum(phase.least for phase in phases), sum(phase.most for phase in phases)


def hours(results: dict[str, Result]) -> dict[str, dict[str, float]] | None:
    """Stage, or "all" -> hours, least and most; None where a program does not compile."""
    if not all(result["compiled"] for result in results.values()):
        return None
    stages = dict.fromkeys(result["stage"] for result in results.values())
    total = {name: {"least": 0.0, "most": 0.0} for name in (*stages, "all")}
    for result in results.values():
        for name in (result["stage"], "all"):
            for bound, one in zip(("least", "most"), seconds(result), strict=True):
                total[name][bound] += result["calls"] * one / 3600
    return total


def advice(found: Sequence[tuple[Program, Result]], config: ConfigDict, mesh: Mesh, heads: int) -> list[str]:
    """Which field to change, for each program that does not fit.

    Args:
      found: programs, and what `measure` found.
      config, mesh: of the run.
      heads: key and value heads of the model, over which the tensor axis has to divide.
    """
    ways, tensor = row_ways(mesh), mesh.shape["tensor"]
    lines = []
    for program, result in found:
        if result["fits"]:
            continue
        needed, limit = (result["hbm"][name] for name in ("needed", "limit"))
        changes, updates = [], program.setting.field.endswith("micro_batch")
        if updates and config.model.remat != "full":
            changes.append("config.model.remat=full")
        if smaller := _smaller(program.setting, needed - limit, ways):
            changes.append(f"config.{program.setting.field}={smaller}")
        if mesh.shape["data"] > 1:
            changes.append("config.mesh.data=1, so that parameters are held once")
        if (updates or program.resident) and config.optimizer.mu_dtype != "bfloat16":
            changes.append("config.optimizer.mu_dtype=bfloat16")
        if heads % (2 * tensor) == 0 and ways % 2 == 0:
            changes.append(f"config.mesh.tensor={2 * tensor}")
        else:
            changes.append("more chips")
        sizes = f"{needed / hardware.GIB:.2f} of {limit / hardware.GIB:.2f} GiB"
        lines.append(f"{program.name} needs {sizes}; in this order: {'; '.join(changes)}")
    return lines


def _smaller(setting: Setting, excess: int, ways: int) -> int:
    """The largest half, quarter, ... of the value, a multiple of `ways`, that may save the excess; 0 for none."""
    value = setting.value // 2 // ways * ways
    while value and setting.bytes * (1 - value / setting.value) < excess:
        value = value // 2 // ways * ways
    return value
