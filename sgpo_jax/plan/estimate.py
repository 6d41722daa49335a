"""Measures the compiled programs of a run, and estimates the time of the run from stated assumptions."""

import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax.plan import flops, hlo, hlo_cost, roofline, tpus
from sgpo_jax.plan.hardware import GIB
from sgpo_jax.plan.programs import Program, Setting
from sgpo_jax.plan.roofline import Chip, Reached
from sgpo_jax.sharding import BATCH, ROWS, axis_ways

Result = dict[str, Any]
LARGEST = 6  # arrays that a result lists


def measure(program: Program, mesh: Mesh, chip: Chip, reached: Reached, limit: int) -> Result:
    """Compiles a program for the devices of `mesh`, and measures its memory, work and communication.

    Args:
        program: what to compile.
        mesh: of TPUs or GPUs, which can be absent.
        chip, reached: peak speeds, and the shares of them.
        limit: bytes of HBM of a device.

    Returns:
        Plain data. Bytes, FLOPs and seconds are those of one device. "compiled" is False where the compiler refuses the
        program as too large. The entries that need the compiled program are then missing.
    """
    with jax.set_mesh(program.mesh):
        started = time.monotonic()
        traced = program.trace()
        work = flops.matmul_flops(traced.jaxpr, program.scopes)
        try:
            compiled, needed = traced.lower().compile(), 0
        except jax.errors.JaxRuntimeError as error:
            if not (sizes := tpus.too_large(error)):
                raise
            compiled, needed = None, sizes[0]
    hbm: dict[str, int] = {"limit": limit, "resident": program.resident}
    collectives: list[hlo_cost.Collective] = []
    hbm_bytes: dict[str, float] = {}
    result: Result = {"stage": program.stage, "calls": program.calls, "tokens": program.tokens}
    if compiled is None:
        hbm["needed"] = needed + program.resident
    else:
        module = hlo.parse(compiled.as_text())
        per_host = mesh.size // len(hosts(mesh)) if chip.network else 0
        collectives = hlo_cost.collectives(module, program.scopes, per_host)
        hbm_bytes = hlo_cost.hbm_bytes(module, program.scopes)
        hbm |= memory(compiled.memory_analysis())
        if chip.network:
            hbm["workspace"] = hlo_cost.workspace(module)  # one of the temporaries
        hbm["needed"] = program.resident + hbm["arguments"] + hbm["outputs"] + hbm["temporaries"] + hbm["code"]
        names = ("bytes", "array", "from")
        result["largest"] = [dict(zip(names, array, strict=True)) for array in hlo_cost.largest(module, LARGEST)]
    phases = {}
    for name in dict.fromkeys([*work, *hbm_bytes, *(collective.phase for collective in collectives)]):
        in_phase = [collective for collective in collectives if collective.phase == name]
        device_flops, device_bytes = work.get(name, 0.0) / mesh.size, hbm_bytes.get(name, 0.0)
        phases[name] = {
            "flops": device_flops,
            "hbm_bytes": device_bytes,
            "collectives": _by_kind(in_phase),
            "seconds": roofline.seconds(device_flops, device_bytes, in_phase, chip, reached)._asdict(),
        }
    result |= {"compiled": compiled is not None, "fits": compiled is not None and hbm["needed"] <= limit}
    return result | {"hbm": hbm, "phases": phases, "compile_seconds": time.monotonic() - started}


def memory(stats: Any) -> dict[str, int]:
    """Returns the compiler's figures in bytes. Outputs that reuse donated arguments are not counted twice."""
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }


def _by_kind(collectives: Sequence[hlo_cost.Collective]) -> dict[str, dict[str, float]]:
    """Returns kind -> number of collectives, bytes of their results, and bytes that a device sends in a ring.

    "network" are the bytes of those that go to another host.
    """
    kinds: dict[str, dict[str, float]] = {}
    for collective in collectives:
        totals = kinds.setdefault(collective.kind, {"count": 0.0, "bytes": 0.0, "sent": 0.0, "network": 0.0})
        values = 1.0, collective.bytes, collective.sent, collective.sent_to_hosts
        for name, value in zip(totals, values, strict=True):
            totals[name] += collective.times * value
    return kinds


def hosts(mesh: Mesh) -> set[int]:
    """Returns the numbers of the hosts whose devices are in a mesh."""
    return {device.process_index for device in mesh.devices.flat}


def dollars(run_hours: dict[str, dict[str, float]], chips: int, price: float) -> dict[str, float]:
    """Returns the dollars of a run, "least" and "most", from the result of `hours` and the price of a chip's hour."""
    return {bound: value * chips * price for bound, value in run_hours["all"].items()}


def seconds(result: Result, slower: float = 1.0) -> tuple[float, float]:
    """Returns (least, most) seconds of a call: full overlap within each phase, or none.

    HBM is `slower` times slower than assumed.
    """
    phases = [roofline.Seconds(**phase["seconds"]) for phase in result["phases"].values()]
    phases = [phase._replace(hbm=slower * phase.hbm) for phase in phases]
    return sum(phase.least for phase in phases), sum(phase.most for phase in phases)


def hours(results: dict[str, Result], slower: float = 1.0) -> dict[str, dict[str, float]] | None:
    """Returns stage -> hours of the run, "least" and "most". "all" is their sum.

    The result is None where a program does not compile. HBM is `slower` times slower than assumed.
    """
    if not all(result["compiled"] for result in results.values()):
        return None
    stages = dict.fromkeys(result["stage"] for result in results.values())
    total = {name: {"least": 0.0, "most": 0.0} for name in (*stages, "all")}
    for result in results.values():
        for name in (result["stage"], "all"):
            for bound, call_seconds in zip(("least", "most"), seconds(result, slower), strict=True):
                total[name][bound] += result["calls"] * call_seconds / 3600
    return total


def remarks(mesh: Mesh, chip: Chip) -> list[str]:
    """Returns a line where the tensor axis of a mesh leaves a host, for which the network is too slow."""
    group = mesh.devices.reshape(-1, mesh.shape["tensor"])[0]
    count = len({device.process_index for device in group})
    if not chip.network or count == 1:
        return []
    return [
        f"mesh.tensor={mesh.shape['tensor']} reaches over {count} hosts: every layer sums activations over it, so keep "
        f"it within the {mesh.size // len(hosts(mesh))} GPUs of a host"
    ]


def advice(measured: Sequence[tuple[Program, Result]], config: ConfigDict, mesh: Mesh, heads: int) -> list[str]:
    """Returns a line for each program that does not fit, with the fields to change.

    Args:
        measured: programs, each with the result of `measure`.
        config, mesh: of the run.
        heads: key and value heads of the model, which the tensor axis has to divide.
    """
    tensor = mesh.shape["tensor"]
    lines = []
    for program, result in measured:
        if result["fits"]:
            continue
        needed, limit = (result["hbm"][name] for name in ("needed", "limit"))
        changes, updates = [], program.setting.field.endswith("micro_batch")
        ways = axis_ways(mesh, ROWS if updates else BATCH)
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
        sizes = f"{needed / GIB:.2f} of {limit / GIB:.2f} GiB"
        lines.append(f"{program.name} needs {sizes}; in this order: {'; '.join(changes)}")
    return lines


def _smaller(setting: Setting, excess: int, ways: int) -> int:
    """Returns the largest half, quarter, ... of the value that may save the excess, or 0.

    Args:
        setting: whose value is to shrink.
        excess: bytes of a device's HBM to save.
        ways: devices that rows are split over, which must divide the value.
    """
    value = setting.value // 2 // ways * ways
    while value and setting.bytes * (1 - value / setting.value) < excess:
        value = value // 2 // ways * ways
    return value
