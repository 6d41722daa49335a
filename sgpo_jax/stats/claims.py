"""What a grid of methods and seeds says about the paper's claims: paired intervals, and a verdict for each claim.

Pure functions of the results' rows, `{"world": ..., "method": ..., "seed": ..., "accuracy": ...}`. The same seed means
the same warm-up, problems and noise for every method, so differences are taken seed by seed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

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
    half = float(special.stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(count))
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


def best_rate(rows: Iterable[Row], world: str, method: str) -> float:
    """The rate of a method with the highest mean accuracy over its tuning rows in a world, the smallest on a tie.

    Raises:
      ValueError: the method has no rows there.
    """
    scores: dict[float, list[float]] = {}
    for row in rows:
        if (row["world"], row["method"]) == (world, method):
            scores.setdefault(row["rate"], []).append(row["accuracy"])
    if not scores:
        raise ValueError(f"method {method!r} in world {world!r}: no tuning results")
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
        cells = [percent(interval([row["sets"][part] for row in mine])) for part in sets]
        cells.append(percent(interval([row["accuracy"] for row in mine])))
        apart = "" if method == "sgpo" else signed(paired(here, world, method, "sgpo"))
        rates = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in mine}))
        lines.append([name, *cells, apart, rates, str(len(mine))])
    return ["method", *sets, "average", "minus SGPO", "rate", "seeds"], lines


def percent(found: Difference) -> str:
    """In percent with the half-width of the interval, if it has one: "85.2 ± 17.4"."""
    half = found.high - found.mean
    return f"{100 * found.mean:.1f} ± {100 * half:.1f}" if math.isfinite(half) else f"{100 * found.mean:.1f}"


def signed(found: Difference) -> str:
    """In points with the interval, if there is one: "+0.9 [-5.5, +7.3]"; "" without pairs."""
    if not math.isfinite(found.low):
        return f"{100 * found.mean:+.1f}" if found.pairs else ""
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def claim_lines(rows: Sequence[Row], world: str) -> list[list[str]]:
    """Lines of the table of claims: table, claim, the paper's points, measured points with interval, verdict."""
    lines = []
    for claim, difference, result in claims(rows, world):
        _, names = TABLES[claim.table]
        text = f"{names[claim.better]} > {names[claim.worse]}"
        lines.append([claim.table, text, f"{claim.paper:+.1f}", signed(difference), result])
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
        columns = ["world", "method", *(f"{rate:g}" for rate in rates)]
        pairs = dict.fromkeys((row["world"], row["method"]) for row in tuning)
        lines = [[*pair, *(_tuned(tuning, *pair, rate) for rate in rates)] for pair in pairs]
        found.append(("Learning rate, times the method's own: accuracy in %", columns, lines))
    for name, (question, of_table) in TABLES.items():
        columns, lines = table(rows, home, of_table)
        if len(lines) > 1:
            found.append((f"{name}, {question}: accuracy in %, 95 % over seeds", columns, lines))
    if lines := claim_lines(rows, home):
        columns = ["table", "claim", "paper, 7B", "here, paired over seeds", "verdict"]
        found.append(("The paper's claims, in points", columns, lines))
    if worlds := across_worlds(rows):
        columns = ["world", "before", "method", "after", "minus GRPO", "verdict", "rate", "seeds"]
        found.append(("Where distillation helps: accuracy in %", columns, world_lines(worlds)))
    return found


def _tuned(rows: Sequence[Row], *cell: Any) -> str:
    values = [row["accuracy"] for row in rows if (row["world"], row["method"], row["rate"]) == cell]
    return f"{100 * np.mean(values):.1f}" if values else ""


class Standing(NamedTuple):
    """A method in a world: accuracy before and after, and how far it is ahead of GRPO (no pairs for GRPO itself)."""

    world: str
    method: str
    rate: float
    before: float
    after: Difference
    ahead: Difference


def across_worlds(rows: Sequence[Row]) -> list[Standing]:
    """The methods that were run in several worlds, GRPO among them, in the order of the rows; none without GRPO."""
    worlds_of: dict[str, dict[str, None]] = {}
    for row in rows:
        worlds_of.setdefault(row["method"], {})[row["world"]] = None
    several = [method for method, worlds in worlds_of.items() if method != "sft" and len(worlds) > 1]
    if "grpo" not in several:
        return []
    found = []
    for world in worlds_of["grpo"]:
        for method in several:
            if not (mine := [row for row in rows if (row["world"], row["method"]) == (world, method)]):
                continue
            after = interval([row["accuracy"] for row in mine])
            ahead = paired(rows, world, method, "grpo") if method != "grpo" else interval([])
            before = float(np.mean([row["before"] for row in mine]))
            found.append(Standing(world, method, mine[0]["rate"], before, after, ahead))
    return found


def world_lines(found: Sequence[Standing]) -> list[list[str]]:
    """Lines of the table of worlds: world, before, method, after, minus GRPO, which is ahead, rate, seeds."""
    names = {"reproduced": "ahead", "contradicted": "behind"}
    lines = []
    for each in found:
        result = verdict(each.ahead) if each.ahead.pairs else ""
        cells = [f"{100 * each.before:.1f}", each.method, percent(each.after), signed(each.ahead)]
        lines.append([each.world, *cells, names.get(result, result), f"{each.rate:g}", str(each.after.pairs)])
    return lines
