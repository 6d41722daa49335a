"""A plan as tables on the terminal."""

from typing import Any

from sgpo_jax import config as configs
from sgpo_jax.plan import estimate
from sgpo_jax.plan.estimate import Result
from sgpo_jax.plan.hardware import GIB
from sgpo_jax.plan.hlo_cost import KINDS
from sgpo_jax.plan.roofline import Seconds
from sgpo_jax.runtime.tables import table


def show(plan: dict[str, Any]) -> None:
    """Prints a plan as tables."""
    mesh = ", ".join(f"mesh.{axis}={size}" for axis, size in (plan["mesh"] or {}).items())
    print(f"\n{plan['model']}, {plan['parameters'] / 1e9:.3f}e9 parameters, on the {plan['chips']} chips of ", end="")
    print(f"{plan['topology']}: {mesh or 'no mesh was found that fits'}\n", flush=True)
    if plan["tried"]:
        rows = [[each["mesh"]["fsdp"], each["mesh"]["tensor"], *list(each.values())[1:]] for each in plan["tried"]]
        table("Tried", ["mesh.fsdp", "mesh.tensor", "field", "value", "outcome"], rows)
    results = plan["programs"].items()
    if results:
        limit = _short(next(iter(plan["programs"].values()))["hbm"]["limit"] / GIB)
        rows = [[name, *_memory(result)] for name, result in results]
        table(f"HBM of a chip in GiB, of which the compiler allows {limit}", ["program", *_PARTS, "fits"], rows)
        columns = ["program", "array", "GiB", "from"]
        table("Its largest arrays", columns, [row for name, result in results for row in _largest(name, result)])
        columns = ["program, phase", "TFLOP", "HBM GB", "sent GB", "compute s", "HBM s", "ICI s", "least s", "most s"]
        rows = [row for name, result in results for row in _work(name, result)]
        table("A call, on one chip: work, and seconds at the shares of peak speeds assumed", columns, rows)
        columns = ["program, collective", "count", "results GB", "sent GB"]
        rows = [row for name, result in results for row in _collectives(name, result)]
        table("Collectives of a call, on one chip", columns, rows)
        columns = ["program", "calls", "response tokens", "least s", "most s", "tokens/s at most"]
        table("A call, on all chips", columns, [_speed(name, result) for name, result in results])
    if plan["hours"]:
        rows = [[stage, *map(_short, each.values())] for stage, each in plan["hours"].items()]
        table(
            "Hours", ["stage", "least", "most"], rows
        )
    print("Assumed:", ", ".join(f"{name}={value:g}" for name, value in configs.flat(plan["assumed"]).items()))
    print("Not in the hours: grading, packing, loading and saving, compilation")
    for line in plan["advice"]:
        print(line)
    if plan["flags"]:
        print(f"Run it with {plan['flags']}")
    print("fits" if plan["fits"] else "does not fit", flush=True)
_PARTS = ("arguments", "outputs", "temporaries", "code", "resident", "needed")
_LARGEST = 3  # arrays of each program that are shown


def _memory(result: Result) -> list[str]:
    cells = [_short(result["hbm"][part] / GIB) if part in result["hbm"] else "-" for part in _PARTS]
    return [*cells, "yes" if result["fits"] else "no"]


def _largest(name: str, result: Result) -> list[list[str]]:
    return [
        [name, each["array"], _short(each["bytes"] / GIB), each["from"][-90:]]
        for each in result.get("largest", [])[:_LARGEST]
    ]


def _work(name: str, result: Result) -> list[list[str]]:
    rows = []
    for phase, each in result["phases"].items():
        seconds = Seconds(**each["seconds"])
        sent = sum(kind["sent"] for kind in each["collectives"].values())
        cells = [each["flops"] / 1e12, each["hbm_bytes"] / 1e9, sent / 1e9, *seconds, seconds.least, seconds.most]
        rows.append([f"{name}, {phase}", *map(_short, cells)])
    return rows


def _collectives(name: str, result: Result) -> list[list[str]]:
    rows = []
    for kind in KINDS:
        found = [each["collectives"][kind] for each in result["phases"].values() if kind in each["collectives"]]
        count, results, sent = (sum(each[part] for each in found) for part in ("count", "bytes", "sent"))
        if count:
            rows.append([f"{name}, {kind}", _short(count), _short(results / 1e9), _short(sent / 1e9)])
    return rows


def _speed(name: str, result: Result) -> list[str]:
    cells = [name, str(result["calls"]), _short(result["tokens"])]
    if not result["compiled"]:
        return [*cells, "-", "-", "-"]
    least, most = estimate.seconds(result)
    return [*cells, _short(least), _short(most), _short(result["tokens"] / least)]


def _short(value: float) -> str:
    """Four digits, or all those before the point."""
    if 0 < value < 1e-3:
        return "<0.001"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
