"""The paper's claims tested on a grid of methods and seeds: paired intervals, and a verdict for each claim.

All functions are pure. They read the rows of results, `{"world": ..., "method": ..., "seed": ..., "accuracy": ...}`.
Methods with the same seed share warm-up, problems and noise, so differences are taken seed by seed. A value that is
not finite is no score: it is left out as if the row were absent.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from sgpo_jax.stats.scores import is_score

Row = Mapping[str, Any]

# table -> (its question, {method: name in the table}): those of the paper, and others of methods beyond it.
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
    "Teachers": (
        "whose parameters teach, and what is above delta",
        {
            "sgpo": "live, masked", "anchored": "frozen, scaled",
            "anchored_guided": "frozen, scaled; the guided side held", "scaled_kl": "live, scaled",
            "quantile_clip": "live, masked above a quantile", "frozen_teacher": "frozen, masked",
            "ema_teacher": "moving average, masked", "trust_region": "trust region, masked",
            "gated_teacher": "gated, masked", "guided_grpo": "guided policy loss",
            "reference_kl": "KL to the first policy",
        },
    ),
    "Own responses": ("the student's own responses", {"sgpo": "SGPO", "sdpo": "SDPO", "opsd": "OPSD", "sdft": "SDFT"}),
    "GRPO": (
        "the family of GRPO",
        {
            "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "dapo": "DAPO", "gspo": "GSPO", "cispo": "CISPO",
            "truncated_is": "truncated importance",
        },
    ),
}  # fmt: skip


class Difference(NamedTuple):
    """Mean and 95 % interval of paired differences, or of single values; `pairs` is their number."""

    mean: float
    low: float
    high: float
    pairs: int


class Claim(NamedTuple):
    """A claim of the paper's `table`: `better` is ahead of `worse` by `paper` points of the 7B average."""

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


def interval(values: Sequence[float | None]) -> Difference:
    """Returns the mean of values, one per seed, with Student's 95 % interval: infinite for fewer than two values.

    Values that are not scores are left out, and `pairs` does not count them.
    """
    scores = [float(value) for value in values if value is not None and is_score(value)]
    count = len(scores)
    mean = float(np.mean(scores)) if count else math.nan
    if count < 2:
        return Difference(mean, -math.inf, math.inf, count)
    half = float(special.stdtrit(count - 1, 0.975) * np.std(scores, ddof=1) / math.sqrt(count))
    return Difference(mean, mean - half, mean + half, count)


def by_seed(rows: Iterable[Row], world: str, method: str, metric: str = "accuracy") -> dict[int, float]:
    """Returns {seed: metric} of a method in a world, for the seeds whose metric is a score."""
    rows = [row for row in rows if row["world"] == world and row["method"] == method]
    return {row["seed"]: row[metric] for row in rows if is_score(row[metric])}


def paired(rows: Sequence[Row], world: str, first: str, second: str, metric: str = "accuracy") -> Difference:
    """Returns the interval of `first` minus `second`, two methods, over the seeds that both have."""
    minuend, subtrahend = (by_seed(rows, world, method, metric) for method in (first, second))
    return interval([minuend[seed] - subtrahend[seed] for seed in sorted(minuend.keys() & subtrahend.keys())])


def verdict(difference: Difference) -> str:
    """Returns the verdict on a claim "above 0": "reproduced", "contradicted" or "not distinguishable"."""
    if difference.low > 0:
        return "reproduced"
    return "contradicted" if difference.high < 0 else "not distinguishable"


def claims(rows: Sequence[Row], world: str) -> list[tuple[Claim, Difference, str]]:
    """Returns (claim, difference, verdict) for the claims whose two methods are in the rows."""
    differences = [(claim, paired(rows, world, claim.better, claim.worse)) for claim in CLAIMS]
    return [(claim, difference, verdict(difference)) for claim, difference in differences if difference.pairs]


def best_rate(rows: Iterable[Row], world: str, method: str) -> float:
    """Returns the rate with the highest mean accuracy over a method's tuning rows in a world; the smallest on a tie.

    Raises:
      ValueError: the method has no rows with a score in that world.
    """
    scores: dict[float, list[float]] = {}
    for row in rows:
        if (row["world"], row["method"]) == (world, method) and is_score(row["accuracy"]):
            scores.setdefault(row["rate"], []).append(row["accuracy"])
    if not scores:
        raise ValueError(f"method {method!r} in world {world!r}: no tuning results")
    return max(sorted(scores), key=lambda rate: float(np.mean(scores[rate])))


def table(rows: Sequence[Row], world: str, methods: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Returns (columns, lines) of a table in the paper's layout.

    It has a column for each evaluation set, their average, the paired difference from SGPO and, where rows have it, the
    share of problems that a group solved at the end of training. Values are percentages, means over seeds with the
    half-width of their 95 % interval.

    Args:
      rows: results of all worlds.
      world: the world of the table.
      methods: method -> its name in the table; methods without results are left out.
    """
    rows = [row for row in rows if row["world"] == world]
    sets = list(dict.fromkeys(name for row in rows for name in row["sets"]))
    solved = ["pass@G"] if any("pass_at_group" in row for row in rows) else []
    lines = []
    for method, title in methods.items():
        results = [row for row in rows if row["method"] == method]
        if not results:
            continue
        cells = [percent(interval([row["sets"][name] for row in results])) for name in sets]
        cells.append(percent(interval([row["accuracy"] for row in results])))
        difference = "" if method == "sgpo" else signed(paired(rows, world, method, "sgpo"))
        groups = [percent(interval([row.get("pass_at_group") for row in results]))] if solved else []
        rates = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in results}))
        lines.append([title, *cells, difference, *groups, rates, str(len(results))])
    return ["method", *sets, "average", "minus SGPO", *solved, "rate", "seeds"], lines


def percent(value: Difference) -> str:
    """Returns a value in percent, with the half-width of its interval where that is finite: "85.2 ± 17.4"; or ""."""
    if not value.pairs:
        return ""
    half = value.high - value.mean
    return f"{100 * value.mean:.1f} ± {100 * half:.1f}" if math.isfinite(half) else f"{100 * value.mean:.1f}"


def signed(difference: Difference) -> str:
    """Returns a difference in points, with its interval where that is finite: "+0.9 [-5.5, +7.3]"; "" without pairs."""
    mean, low, high = (f"{100 * value:+.1f}" for value in difference[:3])
    if not math.isfinite(difference.low):
        return mean if difference.pairs else ""
    return f"{mean} [{low}, {high}]"


def claim_lines(rows: Sequence[Row], world: str) -> list[list[str]]:
    """Returns the lines of the table of claims: table, claim, points in the paper, measured points, verdict."""
    lines = []
    for claim, difference, result in claims(rows, world):
        _, names = TABLES[claim.table]
        text = f"{names[claim.better]} > {names[claim.worse]}"
        lines.append([claim.table, text, f"{claim.paper:+.1f}", signed(difference), result])
    return lines


def tables(
    rows: Sequence[Row], tuning: Sequence[Row], home: str
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Returns (title, columns, lines) of each table: learning rates, the paper's tables, its claims, the worlds.

    Tables without results are left out.

    Args:
      rows: results of the grid, each with "before", the accuracy after its warm-up.
      tuning: results of the runs that tune the learning rates.
      home: world in which all methods are compared.
    """
    result = []
    if tuning:
        rates = sorted({row["rate"] for row in tuning})
        columns = ["world", "method", *(f"{rate:g}" for rate in rates)]
        pairs = dict.fromkeys((row["world"], row["method"]) for row in tuning)
        lines = [[*pair, *(_tuned(tuning, *pair, rate) for rate in rates)] for pair in pairs]
        result.append(("Learning rate, times the method's own: accuracy in %", columns, lines))
    for name, (question, methods) in TABLES.items():
        columns, lines = table(rows, home, methods)
        if len(lines) > 1:
            result.append((f"{name}, {question}: accuracy in %, 95 % over seeds", columns, lines))
    if lines := claim_lines(rows, home):
        columns = ["table", "claim", "paper, 7B", "here, paired over seeds", "verdict"]
        result.append(("The paper's claims, in points", columns, lines))
    if worlds := across_worlds(rows):
        columns = ["world", "before", "method", "after", "minus GRPO", "verdict", "rate", "seeds"]
        result.append(("Where distillation helps: accuracy in %", columns, world_lines(worlds)))
    return result


def _tuned(rows: Sequence[Row], *cell: Any) -> str:
    """Returns the mean accuracy, in percent, of a cell (world, method, rate), "" where there is none."""
    values = interval([row["accuracy"] for row in rows if (row["world"], row["method"], row["rate"]) == cell])
    return f"{100 * values.mean:.1f}" if values.pairs else ""


class Standing(NamedTuple):
    """Results of a method in a world: accuracy before and after RL, and the difference from GRPO.

    For GRPO itself `ahead` has no pairs. `kept` is the guided accuracy after RL over that before, both means over
    seeds; None where guided prompts were not evaluated.
    """

    world: str
    method: str
    rate: float
    before: float
    after: Difference
    ahead: Difference
    kept: float | None


def across_worlds(rows: Sequence[Row]) -> list[Standing]:
    """Returns the standings of the methods that ran in several worlds, in the order of the rows; none without GRPO."""
    worlds: dict[str, dict[str, None]] = {}  # of each method
    for row in rows:
        worlds.setdefault(row["method"], {})[row["world"]] = None
    methods = [method for method in worlds if method != "sft" and len(worlds[method]) > 1]
    if "grpo" not in methods:
        return []
    standings = []
    for world in worlds["grpo"]:
        for method in methods:
            if not (results := [row for row in rows if (row["world"], row["method"]) == (world, method)]):
                continue
            after = interval([row["accuracy"] for row in results])
            ahead = paired(rows, world, method, "grpo") if method != "grpo" else interval([])
            before = interval([row["before"] for row in results]).mean
            standings.append(Standing(world, method, results[0]["rate"], before, after, ahead, _kept(results)))
    return standings


def _kept(rows: Sequence[Row]) -> float | None:
    after, before = (interval([row.get(name) for row in rows]) for name in ("accuracy_guided", "before_guided"))
    return after.mean / before.mean if after.pairs and before.pairs and before.mean else None


def world_lines(standings: Sequence[Standing]) -> list[list[str]]:
    """Returns the lines of the table of worlds: world, before, method, after, minus GRPO, verdict, rate, seeds."""
    names = {"reproduced": "ahead", "contradicted": "behind"}
    lines = []
    for standing in standings:
        result = verdict(standing.ahead) if standing.ahead.pairs else ""
        cells = [f"{100 * standing.before:.1f}", standing.method, percent(standing.after), signed(standing.ahead)]
        seeds = str(standing.after.pairs)
        lines.append([standing.world, *cells, names.get(result, result), f"{standing.rate:g}", seeds])
    return lines
