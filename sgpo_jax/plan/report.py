"""Shows a plan as tables on the terminal."""

from collections.abc import Callable
from typing import Any

from sgpo_jax import config as configs
from sgpo_jax.plan import estimate
from sgpo_jax.plan.estimate import Result
from sgpo_jax.plan.hardware import GIB
from sgpo_jax.plan.hlo_cost import KINDS
from sgpo_jax.plan.roofline import Seconds
from sgpo_jax.runtime.tables import table

_PARTS = ("arguments", "outputs", "temporaries", "code", "resident", "needed")  # of a program's memory
_RESOURCES = {"compute": "compute s", "hbm": "HBM s", "ici": "links s", "network": "network s"}
_LARGEST = 3  # arrays of each program that are shown
CAUTIOUS = 0.4  # share of the bandwidth of HBM at which hours are shown too


def show(plan: dict[str, Any]) -> None:
    """Prints a plan as tables."""
    mesh = ", ".join(f"mesh.{axis}={size}" for axis, size in (plan["mesh"] or {}).items())
    print(f"\n{plan['model']}, {plan['parameters'] / 1e9:.3f}e9 parameters, on the {plan['chips']} chips of ", end="")
    print(f"{plan['topology']}: {mesh or 'no mesh was found that fits'}\n", flush=True)
    if plan["tried"]:
        rows = [[tried["mesh"]["fsdp"], tried["mesh"]["tensor"], *list(tried.values())[1:]] for tried in plan["tried"]]
        table("Tried", ["mesh.fsdp", "mesh.tensor", "field", "value", "outcome"], rows)
    if plan["programs"]:
        _show_programs(plan["programs"])
    if plan["hours"]:
        show_hours(plan)
    print("Assumed:", ", ".join(f"{name}={value:g}" for name, value in configs.flat(plan["assumed"]).items()))
    print("Not in the hours: grading, packing, loading and saving, compilation")
    for line in plan["remarks"] + plan["advice"]:
        print(line)
    if plan["flags"]:
        print(f"Run it with {plan['flags']}")
    print("fits" if plan["fits"] else "does not fit", flush=True)


def show_hours(plan: dict[str, Any]) -> None:
    """Prints hours and dollars at the assumed share of the bandwidth of HBM, and at one that is easier to reach."""
    count, price, assumed = plan["chips"], plan["assumed"]["chip"]["price"], plan["assumed"]["reached"]["hbm"]
    cautious = min(CAUTIOUS, assumed)
    columns = ["stage"]
    rows: dict[str, list[str]] = {name: [] for name in (*plan["hours"], "dollars")}
    for share in (assumed, cautious):
        hours = estimate.hours(plan["programs"], assumed / share) or {}
        columns += [f"{bound}, HBM at {100 * share:g} %" for bound in ("least", "most")]
        for name, bounds in (hours | {"dollars": estimate.dollars(hours, count, price)}).items():
            rows[name] += map(_short, bounds.values())
    table("Hours", columns, [[name, *cells] for name, cells in rows.items()])
    print(f"Dollars are {price:g} for a chip and hour, {count} chips")


def _show_programs(results: dict[str, Result]) -> None:
    """Prints memory, work, communication and speed of every program."""

    def show_rows(title: str, columns: list[str], rows_of: Callable[[str, Result], list[list[str]]]) -> None:
        table(title, columns, [row for name, result in results.items() for row in rows_of(name, result)])

    limit = _short(next(iter(results.values()))["hbm"]["limit"] / GIB)
    show_rows(f"HBM of a chip in GiB, of which a program may take {limit}", ["program", *_PARTS, "fits"], _memory_rows)
    show_rows("Its largest arrays", ["program", "array", "GiB", "from"], _array_rows)
    show_rows(
        "A call, on one chip: work, and seconds at the assumed shares of the peak speeds",
        ["program, phase", "TFLOP", "HBM GB", "sent GB", *_RESOURCES.values(), "least s", "most s"],
        _work_rows,
    )
    show_rows(
        "Collectives of a call, on one chip",
        ["program, collective", "count", "results GB", "sent GB", "of it to other hosts"], _collective_rows,
    )  # fmt: skip
    show_rows(
        "A call, on all chips", ["program", "calls", "response tokens", "least s", "most s", "tokens/s at most"],
        _speed_rows,
    )  # fmt: skip


def _memory_rows(name: str, result: Result) -> list[list[str]]:
    cells = [_short(result["hbm"][part] / GIB) if part in result["hbm"] else "-" for part in _PARTS]
    return [[name, *cells, "yes" if result["fits"] else "no"]]


def _array_rows(name: str, result: Result) -> list[list[str]]:
    arrays = result.get("largest", [])[:_LARGEST]
    return [[name, array["array"], _short(array["bytes"] / GIB), array["from"][-90:]] for array in arrays]


def _work_rows(name: str, result: Result) -> list[list[str]]:
    rows = []
    for label, phase in result["phases"].items():
        seconds = Seconds(**phase["seconds"])
        sent = sum(totals["sent"] for totals in phase["collectives"].values())
        cells = [phase["flops"] / 1e12, phase["hbm_bytes"] / 1e9, sent / 1e9, *seconds, seconds.least, seconds.most]
        rows.append([f"{name}, {label}", *map(_short, cells)])
    return rows


def _collective_rows(name: str, result: Result) -> list[list[str]]:
    rows = []
    for kind in KINDS:
        phases = [p["collectives"][kind] for p in result["phases"].values() if kind in p["collectives"]]
        count, *sizes = (sum(totals[part] for totals in phases) for part in ("count", "bytes", "sent", "network"))
        if count:
            rows.append([f"{name}, {kind}", _short(count), *(_short(size / 1e9) for size in sizes)])
    return rows


def _speed_rows(name: str, result: Result) -> list[list[str]]:
    cells = [name, str(result["calls"]), _short(result["tokens"])]
    if not result["compiled"]:
        return [[*cells, "-", "-", "-"]]
    least, most = estimate.seconds(result)
    return [[*cells, _short(least), _short(most), _short(result["tokens"] / least)]]


def _short(value: float) -> str:
    """Formats a number with four digits; a number from 1000 on as a whole one."""
    if 0 < value < 1e-3:
        return "<0.001"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
