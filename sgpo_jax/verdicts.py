"""What a grid of methods and seeds says about the paper's claims: paired intervals, and a verdict for each claim.

Pure functions of the results' rows, `{"world": ..., "method": ..., "seed": ..., "accuracy": ...}`. The same seed means
the same warm-up, problems and noise for every method, so differences are taken seed by seed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Row = Mapping[str, Any]

# The methods of each of the paper's tables, and more: table -> (what it asks, {method: name in the table}).
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "Table 1": (
        "methods at equal samples",
        {"sft": "SFT", "grpo": "SFT+GRPO", "hpt": "HPT", "luffy": "LUFFY", "sgpo": "SGPO"},
    ),
    "Table 2": (
        "what each part is worth",
        {
            "sgpo": "SGPO", "grpo": "w/o strategy distillation", "no_grpo": "w/o autonomous GRPO",
            "no_proximal": "w/o all proximal constraints", "no_kl_clip": "w/o KL clipping",
            "no_target_selection": "w/o target selection", "fixed_weight": "w/o adaptive weighting",
        },
    ),
    "Table 3": ("the target's distribution or its tokens", {"sgpo": "token-level KL", "direct_sft": "direct SFT"}),
    "Table 6": ("the direction of the KL", {"sgpo": "forward KL", "reverse_kl": "reverse KL"}),
    "Table 7": (
        "the weight of the distillation",
        {"sgpo": "adaptive", "fixed_weight": "fixed", "group_advantage_weight": "group advantage"},
    ),
    "Beyond the paper": (
        "what is distilled",
        {
            "sgpo": "forward KL", "jensen_shannon": "Jensen-Shannon", "top_k_kl": "forward KL of the top k",
            "self_strategies": "from strategies of its own",
        },
    ),
}  # fmt: skip


class Difference(NamedTuple):
    """Mean of paired differences with its 95 % interval; `pairs` of them."""

    mean: float
    low: float
    high: float
    pairs: int


class Claim(NamedTuple):
    """In the paper's `table` the first method is ahead of the second, by `paper` points of the 7B average."""

    table: str
    better: str
    worse: str
    paper: float


CLAIMS = (
    Claim("Table 1", "grpo", "sft", 49.9 - 42.7),
    Claim("Table 1", "sgpo", "grpo", 52.1 - 49.9),
    Claim("Table 1", "sgpo", "hpt", 52.1 - 49.6),
    Claim("Table 1", "sgpo", "luffy", 52.1 - 48.8),
    Claim("Table 2", "sgpo", "no_grpo", 52.1 - 48.6),
    Claim("Table 2", "sgpo", "no_proximal", 52.1 - 45.3),
    Claim("Table 2", "sgpo", "no_kl_clip", 52.1 - 48.7),
    Claim("Table 2", "sgpo", "no_target_selection", 52.1 - 48.1),
    Claim("Table 2", "sgpo", "fixed_weight", 52.1 - 50.9),
    Claim("Table 3", "sgpo", "direct_sft", 52.1 - 49.3),
    Claim("Table 6", "sgpo", "reverse_kl", 52.1 - 50.9),
    Claim("Table 7", "sgpo", "group_advantage_weight", 52.1 - 50.6),
)


def interval(values: Sequence[float]) -> Difference:
    """Mean of values, one a seed, with Student's 95 % interval; infinite for fewer than two."""
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    if count < 2:
        return Difference(mean, -math.inf, math.inf, count)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Difference(mean, mean - half, mean + half, count)


def by_seed(rows: Iterable[Row], world: str, method: str, metric: str = "accuracy") -> dict[int, float]:
    """seed -> metric of a method in a world."""
    return {row["seed"]: row[metric] for row in rows if row["world"] == world and row["method"] == method}


def paired(rows: Sequence[Row], world: str, first: str, second: str, metric: str = "accuracy") -> Difference:
    """`first` minus `second` over the seeds that both have."""
    left, right = (by_seed(rows, world, method, metric) for method in (first, second))
    return interval([left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())])


def verdict(difference: Difference) -> str:
    """Of the claim that the difference is above 0: reproduced, contradicted, or not distinguishable."""
    if difference.low > 0:
        return "reproduced"
    return "contradicted" if difference.high < 0 else "not distinguishable"


def claims(rows: Sequence[Row], world: str) -> list[tuple[Claim, Difference, str]]:
    """The claims whose two methods the rows have."""
    found = [(claim, paired(rows, world, claim.better, claim.worse)) for claim in CLAIMS]
    return [(claim, difference, verdict(difference)) for claim, difference in found if difference.pairs]


def best_rate(rows: Iterable[Row], method: str) -> float:
    """The rate of a method with the highest mean accuracy over its tuning rows, the smallest on a tie.

    Raises:
      ValueError: the method has no rows.
    """
    scores: dict[float, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            scores.setdefault(row["rate"], []).append(row["accuracy"])
    if not scores:
        raise ValueError(f"method {method!r}: no tuning results")
    return max(sorted(scores), key=lambda rate: float(np.mean(scores[rate])))


def table(rows: Sequence[Row], world: str, methods: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """(columns, lines) in the paper's layout: a column for each evaluation set, their average, and what sets it apart.

    Values are percentages: mean over seeds, half-width of the 95 % interval, and the paired difference from SGPO.
    """
    here = [row for row in rows if row["world"] == world]
    sets = list(dict.fromkeys(name for row in here for name in row["sets"]))
    lines = []
    for method, name in methods.items():
        mine = [row for row in here if row["method"] == method]
        if not mine:
            continue
        cells = [_percent(interval([row["sets"][part] for row in mine])) for part in sets]
        cells.append(_percent(interval([row["accuracy"] for row in mine])))
        apart = "" if method == "sgpo" else _signed(paired(here, world, method, "sgpo"))
        rates = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in mine}))
        lines.append([name, *cells, apart, rates, str(len(mine))])
    return ["method", *sets, "average", "minus SGPO", "rate", "seeds"], lines


def _percent(found: Difference) -> str:
    half = found.high - found.mean
    return f"{100 * found.mean:.1f} ± {100 * half:.1f}" if math.isfinite(half) else f"{100 * found.mean:.1f}"


def _signed(found: Difference) -> str:
    if not math.isfinite(found.low):
        return f"{100 * found.mean:+.1f}" if found.pairs else ""
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def claim_lines(rows: Sequence[Row], world: str) -> list[list[str]]:
    """Lines of the table of claims: table, claim, the paper's points, measured points with interval, verdict."""
    lines = []
    for claim, difference, result in claims(rows, world):
        _, names = TABLES[claim.table]
        text = f"{names[claim.better]} > {names[claim.worse]}"
        lines.append([claim.table, text, f"{claim.paper:+.1f}", _signed(difference), result])
    return lines


def tables(
    rows: Sequence[Row], tuning: Sequence[Row], home: str
) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, lines) of all that can be said: the tuning, the paper's tables, its claims, the worlds.

    Args:
      rows: of the grid, each with "before", the accuracy of its warm-up.
      tuning: of the learning rates tried.
      home: world in which all methods are compared.
    """
    found = []
    if tuning:
        rates = sorted({row["rate"] for row in tuning})
        columns = ["method", *(f"{rate:g}" for rate in rates)]
        lines = [[m, *(_tuned(tuning, m, rate) for rate in rates)] for m in dict.fromkeys(r["method"] for r in tuning)]
        found.append(("Learning rate, times the method's own: accuracy in %", columns, lines))
    for name, (question, of_table) in TABLES.items():
        columns, lines = table(rows, home, of_table)
        if len(lines) > 1:
            found.append((f"{name}, {question}: accuracy in %, 95 % over seeds", columns, lines))
    if lines := claim_lines(rows, home):
        columns = ["table", "claim", "paper, 7B", "here, paired over seeds", "verdict"]
        found.append(("The paper's claims, in points", columns, lines))
    if len(worlds := across_worlds(rows)) > 1:
        columns = ["world", "before", "GRPO", "SGPO", "SGPO - GRPO", "verdict"]
        found.append(("Where distillation helps: accuracy in %", columns, world_lines(worlds)))
    return found


def _tuned(rows: Sequence[Row], method: str, rate: float) -> str:
    values = [row["accuracy"] for row in rows if (row["method"], row["rate"]) == (method, rate)]
    return f"{100 * np.mean(values):.1f}" if values else ""


class World(NamedTuple):
    """Two methods in one world: accuracies before and after, and how far the second is ahead."""

    name: str
    before: float
    first: Difference
    second: Difference
    ahead: Difference


def across_worlds(rows: Sequence[Row], first: str = "grpo", second: str = "sgpo") -> list[World]:
    """The worlds in which both methods were run, in the order of the rows."""
    found = []
    for world in dict.fromkeys(row["world"] for row in rows):
        one, two = (by_seed(rows, world, method) for method in (first, second))
        if not one or not two:
            continue
        before = [row["before"] for row in rows if row["world"] == world and row["method"] == second]
        both = interval([*one.values()]), interval([*two.values()])
        found.append(World(world, float(np.mean(before)), *both, paired(rows, world, second, first)))
    return found


def world_lines(worlds: Sequence[World]) -> list[list[str]]:
    """Lines of the table of worlds: world, before, both methods, difference, which of them is ahead."""
    ahead = {"reproduced": "SGPO ahead", "contradicted": "GRPO ahead"}
    lines = []
    for world in worlds:
        result = verdict(world.ahead)
        cells = [f"{100 * world.before:.1f}", _percent(world.first), _percent(world.second), _signed(world.ahead)]
        lines.append([world.name, *cells, ahead.get(result, result)])
    return lines
