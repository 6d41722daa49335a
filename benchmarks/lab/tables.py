"""The tables of docs/lab.md and docs/smollm2.md, from the rows beside this file. Nothing is trained.

    python benchmarks/lab/tables.py
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from sgpo_jax.stats import claims

Rows = list[dict]
Table = list[list[str]]  # lines of cells, the first of them the header

FIVE, TEN = range(5), range(10)
WORLDS = ("base", "two-stages", "noisy-strategies", "four-methods", "weak-base", "rare-success")
HARD = ("four-methods", "weak-base", "rare-success")
METHODS = {
    "sft": "SFT", "grpo": "SFT+GRPO", "hpt": "HPT", "luffy": "LUFFY", "sgpo": "SGPO",
    "fixed_weight": "w/o adaptive weighting (fixed)", "group_advantage_weight": "weight by group advantage",
    "reverse_kl": "reverse KL", "direct_sft": "direct SFT", "no_grpo": "w/o autonomous GRPO",
    "no_proximal": "w/o all proximal constraints", "no_kl_clip": "w/o KL clipping",
    "no_target_selection": "w/o target selection", "jensen_shannon": "Jensen-Shannon",
    "top_k_kl": "forward KL of the top 4",
}  # fmt: skip
IN_WORLDS = {"grpo": "GRPO", "sgpo": "SGPO", "no_kl_clip": "no KL clip", "direct_sft": "direct SFT"}


def read(*names: str) -> Rows:
    """Rows of the named files beside this one."""
    here = Path(__file__).parent
    return [json.loads(line) for name in names for line in (here / f"{name}.jsonl").read_text().splitlines()]


def tuned(rows: Rows, tuning: Sequence[int]) -> Callable[[str, str], float]:
    """(world, method) -> its best rate on the seeds `tuning`, as the lab chooses it; 1 for the warm-up."""
    of_tuning = [row for row in rows if row["seed"] in tuning]
    return lambda world, method: 1.0 if method == "sft" else claims.best_rate(of_tuning, world, method)


def chosen(rows: Rows, seeds: Iterable[int], rate: Callable[[str, str], float]) -> Rows:
    """The rows of `seeds` whose rate is the one of their method in their world."""
    wanted = [row for row in rows if row["seed"] in seeds]
    return [row for row in wanted if row["rate"] == rate(row["world"], row["method"])]


def percent(rows: Rows, world: str, method: str, metric: str = "accuracy") -> str:
    """Mean over seeds in percent, with its interval."""
    return claims.percent(claims.interval(list(claims.by_seed(rows, world, method, metric).values())))


def mean(rows: Rows, world: str, method: str, metric: str = "accuracy", scale: float = 100, digits: int = 1) -> str:
    """Mean over seeds, times `scale`."""
    return f"{scale * np.mean(list(claims.by_seed(rows, world, method, metric).values())):.{digits}f}"


def rate_of(rows: Rows, world: str, method: str) -> str:
    (rate,) = {row["rate"] for row in rows if (row["world"], row["method"]) == (world, method)}
    return f"{rate:g}"


def of_grid() -> Rows:
    """The rows of the grid: five seeds, each method at the rate that was best on one other seed."""
    rows = read("results")
    return chosen(rows, FIVE, tuned(rows, [100]))


def grid() -> Table:
    columns, lines = claims.table(of_grid(), "base", METHODS)
    once = [index for index, name in enumerate(columns) if name != "heldout"]  # one set: it is the average
    header = ["accuracy, %" if columns[index] == "average" else columns[index] for index in once]
    return [header, *([line[index] for index in once] for line in lines)]


def claims_table() -> Table:
    return [["table", "claim", "paper, 7B", "here", "verdict"], *claims.claim_lines(of_grid(), "base")]


def claims_of_ten_seeds() -> Table:
    rows = read("results", "more_seeds")
    one_rate = {"sft": 1.0, "hpt": 0.5}
    ways = {
        "tuned on one seed": tuned(rows, [100]), "tuned on three seeds": tuned(rows, [100, 101, 102]),
        "at one rate": lambda world, method: one_rate.get(method, 2.0),
    }  # fmt: skip
    columns = [claims.claim_lines(chosen(rows, TEN, rate), "base") for rate in ways.values()]
    lines = []
    for same in zip(*columns, strict=True):
        cells = [f"{found} {verdict}".removesuffix(" not distinguishable") for *_, found, verdict in same]
        lines.append([same[0][1], *cells])
    return [["claim, ten seeds", *ways], *lines]


def worlds() -> Table:
    rows = of_grid()
    after = ([world, mean(rows, world, "sft"), *(percent(rows, world, name) for name in IN_WORLDS)] for world in WORLDS)
    return [["world", "before", *IN_WORLDS.values()], *after]


def minus_grpo(rows: Rows, world: str) -> list[list[str]]:
    """[difference, verdict] of each method but GRPO."""
    names = {"reproduced": "ahead", "contradicted": "behind"}
    found = [claims.paired(rows, world, method, "grpo") for method in IN_WORLDS if method != "grpo"]
    results = [claims.verdict(each) for each in found]
    return [[claims.signed(each), names.get(told, told)] for each, told in zip(found, results, strict=True)]


def differences() -> Table:
    rows = of_grid()
    header = [cell for name in list(IN_WORLDS.values())[1:] for cell in (f"{name} - GRPO", "")]
    return [["world", *header], *([world, *sum(minus_grpo(rows, world), [])] for world in WORLDS)]


def hard_worlds() -> Table:
    rows = read("results", "more_seeds")
    rows = chosen(rows, TEN, tuned(rows, [100]))
    lines = []
    for world in HARD:
        cells = [" ".join(each).removesuffix(" not distinguishable") for each in minus_grpo(rows, world)]
        lines.append([world, mean(rows, world, "sft"), percent(rows, world, "grpo"), *cells])
    return [["world", "before", "GRPO", *(f"{name} - GRPO" for name in list(IN_WORLDS.values())[1:])], *lines]


def distances() -> Table:
    rows = [row for row in read("results", "more_seeds") if row["seed"] in TEN and row["rate"] == 2.0]
    lines = []
    for method, name in {
        "sgpo": "SGPO, forward KL", "jensen_shannon": "Jensen-Shannon",
        "top_k_kl": "forward KL of the 4 likeliest of 126 tokens and a tail",
    }.items():  # fmt: skip
        clipped = float(mean(rows, "base", method, "mean_kl_clip_share"))
        apart = "" if method == "sgpo" else claims.signed(claims.paired(rows, "base", method, "sgpo"))
        lines.append([
            name, percent(rows, "base", method), apart, mean(rows, "base", method, "accuracy_guided"),
            mean(rows, "base", method, "mean_token_kl", 1, 3), f"{clipped:g} %",
            str(len(claims.by_seed(rows, "base", method))),
        ])  # fmt: skip
    return [
        ["method", "accuracy, %", "minus SGPO", "guided, after", "mean divergence, nats", "clipped", "seeds"], *lines
    ]


SELF_WRITTEN = {
    "sft": "SFT", "grpo": "SFT+GRPO", "sgpo": "SGPO, strategies of the data",
    "self_strategies": "SGPO, strategies of the student",
}  # fmt: skip
AFTER_WARM_UP = {"sft": "SFT (the warm-up)", "grpo": "SFT+GRPO", "sgpo": "SGPO"}


def self_written() -> Table:
    rows, world = read("self_written"), "self-written"
    rows = chosen(rows, FIVE, tuned(rows, [100, 101, 102]))
    lines = []
    for method, name in SELF_WRITTEN.items():
        apart = "" if method == "sgpo" else claims.signed(claims.paired(rows, world, method, "sgpo"))
        alpha = mean(rows, world, method, "mean_alpha", 1, 2) if "SGPO" in name else ""
        cells = [percent(rows, world, method), apart, mean(rows, world, method, "accuracy_guided"), alpha]
        lines.append([name, *cells, rate_of(rows, world, method)])
    return [["method", "accuracy, %", "minus SGPO", "guided, after", "mean alpha", "rate"], *lines]


def of_tuning(file: str, world: str, names: dict[str, str]) -> Table:
    """Accuracy of each method at each rate on three tuning seeds."""
    rows = [row for row in read(file) if row["seed"] >= 100]
    rates = (0.5, 1.0, 2.0, 4.0)
    at = {rate: [row for row in rows if row["rate"] == rate] for rate in rates}
    lines = [[name, *(mean(at[rate], world, method) for rate in rates)] for method, name in names.items()]
    return [["rate, three tuning seeds: accuracy, %", *(f"{rate:g}" for rate in rates)], *lines]


def minus_warm_up(rows: Rows, guided: Callable[..., str]) -> Table:
    """A line for each of SFT, GRPO and SGPO, the latter two with their difference from the first."""
    lines = []
    for method, name in AFTER_WARM_UP.items():
        apart = "" if method == "sft" else claims.signed(claims.paired(rows, "base", method, "sft"))
        lines.append([name, percent(rows, "base", method), apart, guided(rows, "base", method, "accuracy_guided")])
    return [["", "unguided, %", "minus the warm-up", "guided, %"], *lines]


def logic() -> Table:
    rows = read("logic")
    rows = chosen(rows, FIVE, tuned(rows, [100, 101, 102]))
    header, *lines = minus_warm_up(rows, percent)
    alphas = ["", "", mean(rows, "base", "sgpo", "mean_alpha", 1, 2)]
    rates = [rate_of(rows, "base", method) for method in AFTER_WARM_UP]
    more = ([*line, alpha, rate] for line, alpha, rate in zip(lines, alphas, rates, strict=True))
    return [[*header, "mean alpha", "rate"], *more]


def smollm2() -> Table:
    """At the config's rate, and at four times it, from the same warm-ups."""
    rows = read("smollm2")
    header, *lines = minus_warm_up(chosen(rows, FIVE, lambda world, method: 1.0), mean)
    _, _, *high = minus_warm_up(chosen(rows, FIVE, lambda world, method: 1.0 if method == "sft" else 4.0), mean)
    rates = ["", *["5e-6"] * (len(lines) - 1), *["2e-5"] * len(high)]
    named = [[name, rate, *cells] for (name, *cells), rate in zip([*lines, *high], rates, strict=True)]
    return [[header[0], "rate", *header[1:]], *named]


def tables() -> dict[str, Table]:
    """Title -> table, in the order of docs/lab.md."""
    trained = list(SELF_WRITTEN.items())[1:]
    return {
        "The base world": grid(), "The paper's claims": claims_table(), "With ten seeds": claims_of_ten_seeds(),
        "Worlds": worlds(), "Differences in worlds": differences(), "Hard worlds with ten seeds": hard_worlds(),
        "SDPO's distances": distances(), "Strategies that the student writes": self_written(),
        "Their rates": of_tuning("self_written", "self-written", dict(trained)),
        "Logic": logic(), "Its rates": of_tuning("logic", "base", dict(list(AFTER_WARM_UP.items())[1:])),
        "SmolLM2": smollm2(),
    }  # fmt: skip


def markdown(lines: Table) -> list[str]:
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return [text.replace("  |", " |").replace("|  ", "| ") for text in texts]


if __name__ == "__main__":
    for title, lines in tables().items():
        print(f"\n{title}\n", *markdown(lines), sep="\n")
