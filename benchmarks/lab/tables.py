"""Makes the tables of docs/results/lab.md and docs/smollm2.md from the rows beside this file, without any training.

    python benchmarks/lab/tables.py [FIGURE]     # FIGURE: a file for docs/lab.md's figure
"""

import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
from lab_rows import Rows, Table, chosen, compared, markdown, mean, percent, rate_of, read, tuned, versus

from sgpo_jax.lab.summary import with_before
from sgpo_jax.report import figures
from sgpo_jax.stats import claims

FIVE, TEN, TUNING = range(5), range(10), (100, 101, 102)  # seeds
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


def grid_rows() -> Rows:
    """Returns the rows of the grid: five seeds, each method at the rate that was best on one tuning seed."""
    rows = read("results")
    return chosen(rows, FIVE, tuned(rows, [100]))


def grid() -> Table:
    """Makes the table of all methods in the base world."""
    columns, lines = claims.table(grid_rows(), "base", METHODS)
    places = [place for place, name in enumerate(columns) if name != "heldout"]  # the only set: equal to the average
    header = ["accuracy, %" if columns[place] == "average" else columns[place] for place in places]
    return [header, *([line[place] for place in places] for line in lines)]


def claims_table() -> Table:
    """Makes the table of the paper's claims."""
    return [["table", "claim", "paper, 7B", "here", "verdict"], *claims.claim_lines(grid_rows(), "base")]


def claims_of_ten_seeds() -> Table:
    """Makes the table of the claims with ten seeds and three ways to choose the rates."""
    rows = read("results", "more_seeds")
    fixed_rates = {"sft": 1.0, "hpt": 0.5}
    choices = {
        "tuned on one seed": tuned(rows, [100]), "tuned on three seeds": tuned(rows, TUNING),
        "at one rate": lambda world, method: fixed_rates.get(method, 2.0),
    }  # fmt: skip
    columns = [claims.claim_lines(chosen(rows, TEN, rate), "base") for rate in choices.values()]
    lines = []
    for claim in zip(*columns, strict=True):
        cells = [f"{measured} {verdict}".removesuffix(" not distinguishable") for *_, measured, verdict in claim]
        lines.append([claim[0][1], *cells])
    return [["claim, ten seeds", *choices], *lines]


def worlds() -> Table:
    """Makes the table of accuracies in all worlds."""
    rows = grid_rows()
    after = ([world, mean(rows, world, "sft"), *(percent(rows, world, name) for name in IN_WORLDS)] for world in WORLDS)
    return [["world", "before", *IN_WORLDS.values()], *after]


def minus_grpo(rows: Rows, world: str) -> list[list[str]]:
    """Returns [difference from GRPO, verdict] for each other method."""
    return [compared(rows, world, method, "grpo") for method in IN_WORLDS if method != "grpo"]


def differences() -> Table:
    """Makes the table of differences from GRPO in all worlds."""
    rows = grid_rows()
    header = [cell for name in list(IN_WORLDS.values())[1:] for cell in (f"{name} - GRPO", "")]
    return [["world", *header], *([world, *sum(minus_grpo(rows, world), [])] for world in WORLDS)]


def hard_worlds() -> Table:
    """Makes the table of the hard worlds with ten seeds."""
    rows = read("results", "more_seeds")
    rows = chosen(rows, TEN, tuned(rows, [100]))
    lines = []
    for world in HARD:
        cells = [versus(rows, world, method, "grpo") for method in IN_WORLDS if method != "grpo"]
        lines.append([world, mean(rows, world, "sft"), percent(rows, world, "grpo"), *cells])
    return [["world", "before", "GRPO", *(f"{name} - GRPO" for name in list(IN_WORLDS.values())[1:])], *lines]


def anchored() -> Table:
    """Makes the table of `anchored` in the hard worlds: ten seeds at rate 2, which was not tuned for it."""
    rows, lines = anchored_rows(), []
    for world in HARD:
        cells = [versus(rows, world, "anchored", other) for other in ("grpo", "direct_sft")]
        guided = [mean(rows, world, method, "accuracy_guided") for method in ("sft", "sgpo", "anchored")]
        lines.append([world, *(percent(rows, world, name) for name in ("grpo", "anchored")), *cells, *guided])
    header = ["world", "GRPO", "anchored", "anchored - GRPO", "anchored - direct SFT"]
    return [[*header, "guided, before", "after SGPO", "after anchored"], *lines]


def anchored_rows() -> Rows:
    """Returns the rows of ten seeds in the hard worlds, and those of `anchored` and `anchored_guided`."""
    rows = read("results", "more_seeds")
    return chosen(rows, TEN, tuned(rows, [100])) + read("anchored")


def guided_side() -> Table:
    """Makes the table of `anchored_guided` in the hard worlds, with the same seeds and rate."""
    rows, lines = anchored_rows(), []
    for world in HARD:
        cells = [versus(rows, world, "anchored_guided", other) for other in ("anchored", "grpo", "direct_sft")]
        guided = [mean(rows, world, method, "accuracy_guided") for method in ("sft", "anchored", "anchored_guided")]
        lines.append([world, percent(rows, world, "anchored_guided"), *cells, *guided])
    others = ("anchored", "GRPO", "direct SFT")
    header = ["world", "anchored_guided", *(f"anchored_guided - {name}" for name in others)]
    return [[*header, "guided, before", "after anchored", "after anchored_guided"], *lines]


def anchored_elsewhere() -> Table:
    """Makes the table of both forms where the base solves a quarter of the problems or more: five seeds at rate 2."""
    rows, lines = grid_rows() + read("anchored"), []
    for world in ("base", "two-stages"):
        accuracies = [percent(rows, world, name) for name in ("grpo", "anchored", "anchored_guided")]
        cells = [versus(rows, world, name, "grpo") for name in ("anchored", "anchored_guided")]
        names = "sft", "grpo", "sgpo", "anchored", "anchored_guided"
        lines.append([world, *accuracies, *cells, *(mean(rows, world, name, "accuracy_guided") for name in names)])
    header = ["world", "GRPO", "anchored", "anchored_guided", "anchored - GRPO", "anchored_guided - GRPO"]
    after = (f"after {name}" for name in ("GRPO", "SGPO", "anchored", "anchored_guided"))
    return [[*header, "guided, before", *after], *lines]


RULES = {  # whose parameters teach, what becomes of a token above delta
    "sgpo": "live, masked (SGPO)", "frozen_teacher": "frozen, masked", "scaled_kl": "live, scaled",
    "anchored": "frozen, scaled",
}  # fmt: skip


def rules_tuning() -> Rows:
    """Returns the tuning rows of the rules in the hard worlds, of the rates that all three tuning seeds have."""
    every = read("results", "tuned", "rules")
    rows = [row for row in every if row["seed"] in TUNING and row["world"] in HARD and row["method"] in RULES]
    seeds = Counter((row["world"], row["method"], row["rate"]) for row in rows)
    return [row for row in rows if seeds[row["world"], row["method"], row["rate"]] == len(TUNING)]


def rates_of_rules() -> Table:
    """Makes the table of accuracies of the teacher and token rules at each rate on three tuning seeds."""
    rows, lines = rules_tuning(), []
    rates = sorted({row["rate"] for row in rows})
    for world in HARD:
        for method, name in RULES.items():
            by_rate = [[row for row in rows if row["rate"] == rate] for rate in rates]
            ran = [claims.by_seed(some, world, method) for some in by_rate]
            lines.append([world, name, *(f"{100 * np.mean([*found.values()]):.1f}" if found else "" for found in ran)])
    return [["world", "teacher, token rule", *(f"rate {rate:g}" for rate in rates)], *lines]


def rules() -> Table:
    """Makes the table of the teacher and token rules: ten seeds, each at its best rate on three tuning seeds."""
    rate = tuned(rules_tuning(), TUNING)
    rows, lines = chosen([row for row in read("rules") if row["method"] in RULES], TEN, rate), []
    for world in HARD:
        for method, name in RULES.items():
            apart = "" if method == "anchored" else versus(rows, world, "anchored", method)
            after = [mean(rows, world, method, metric) for metric in ("pass_at_group", "accuracy_guided")]
            lines.append([world, name, rate_of(rows, world, method), percent(rows, world, method), apart, *after])
    header = ["world", "teacher, token rule", "rate", "accuracy", "anchored minus it", "pass@8", "guided, after"]
    return [header, *lines]


def new_worlds() -> Table:
    """Makes the table of the worlds of the second edition, at rate 2, which was tuned for none."""
    rows, lines = read("new_worlds"), []
    methods = "grpo", "sgpo", "direct_sft", "anchored", "anchored_guided"
    for world in dict.fromkeys(row["world"] for row in rows):
        accuracies = [percent(rows, world, name) for name in methods]
        others = ("anchored", "grpo"), ("anchored", "direct_sft"), ("anchored_guided", "grpo")
        pairs = [versus(rows, world, *pair) for pair in others]
        names = "sft", "sgpo", "anchored", "anchored_guided"
        guided = [mean(rows, world, name, "accuracy_guided") for name in names]
        seeds = str(len(claims.by_seed(rows, world, "grpo")))
        lines.append([world, seeds, mean(rows, world, "sft"), *accuracies, *pairs, *guided])
    header = ["world", "seeds", "before", "GRPO", "SGPO", "direct SFT", "anchored", "anchored_guided"]
    after = (f"after {name}" for name in ("SGPO", "anchored", "anchored_guided"))
    header += ["anchored - GRPO", "anchored - direct SFT", "anchored_guided - GRPO", "guided, before", *after]
    return [header, *lines]


def carried() -> Table:
    """Makes the table of steps that wait for their longest responses and of steps that do not (rl.carry_over=1)."""
    rows, lines = read("carried"), []
    for method in "grpo", "anchored":
        pairs = [claims.by_seed(rows, world, method) for world in ("waits", "goes-on")]
        difference = claims.interval([pairs[1][seed] - pairs[0][seed] for seed in pairs[0]])
        cells = [percent(rows, world, method) for world in ("waits", "goes-on")]
        guided = [mean(rows, world, method, "accuracy_guided") for world in ("waits", "goes-on")]
        lines.append([method, *cells, claims.signed(difference), *guided])
    return [["method", "waits", "goes on", "goes on - waits", "guided: waits", "guided: goes on"], *lines]


def distances() -> Table:
    """Makes the table of SGPO with the forward KL and with SDPO's two distances."""
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
    """Makes the table of SGPO with strategies that the student writes."""
    rows, world = read("self_written"), "self-written"
    rows = chosen(rows, FIVE, tuned(rows, TUNING))
    lines = []
    for method, name in SELF_WRITTEN.items():
        apart = "" if method == "sgpo" else claims.signed(claims.paired(rows, world, method, "sgpo"))
        alpha = mean(rows, world, method, "mean_alpha", 1, 2) if "SGPO" in name else ""
        cells = [percent(rows, world, method), apart, mean(rows, world, method, "accuracy_guided"), alpha]
        lines.append([name, *cells, rate_of(rows, world, method)])
    return [["method", "accuracy, %", "minus SGPO", "guided, after", "mean alpha", "rate"], *lines]


TUNED = {"grpo": "GRPO", "direct_sft": "direct SFT", "anchored": "anchored"}


def rates_of_hard_worlds() -> Table:
    """Makes the table of accuracies at each rate on three tuning seeds, in the hard worlds."""
    rows, rates = [row for row in read("results", "tuned") if row["seed"] >= 100], (1.0, 2.0, 4.0, 8.0)
    lines = []
    for world in HARD:
        for method, name in TUNED.items():
            by_rate = [[row for row in rows if row["rate"] == rate] for rate in rates]
            lines.append([world, name, *(mean(some, world, method) for some in by_rate)])
    return [["world", "method", *(f"rate {rate:g}" for rate in rates)], *lines]


def tuned_alike() -> Table:
    """Makes the table of the hard worlds with ten seeds, each method at its best rate on the three tuning seeds."""
    rate = tuned([row for row in read("results", "tuned") if row["rate"] >= 1], TUNING)
    every = read("results", "more_seeds", "anchored", "tuned_ten")
    wanted = [row for row in every if row["world"] in HARD and row["method"] in ("sft", *TUNED)]
    rows, lines = chosen(wanted, TEN, rate), []
    for world in HARD:
        accuracies = [f"{percent(rows, world, name)} at {rate_of(rows, world, name)}" for name in TUNED]
        cells = [versus(rows, world, "anchored", other) for other in ("grpo", "direct_sft")]
        guided = [mean(rows, world, name, "accuracy_guided") for name in ("sft", *TUNED)]
        lines.append([world, *accuracies, *cells, *guided])
    header = ["world", *(f"{name}, at rate" for name in TUNED.values()), "anchored - GRPO", "anchored - direct SFT"]
    return [[*header, "guided, before", *(f"after {name}" for name in TUNED.values())], *lines]


def guided_side_at_four() -> Table:
    """Makes the table of both forms at rate 4, the best one of `anchored` in these worlds, with ten seeds."""
    warm_ups = [row for row in read("results", "more_seeds") if row["method"] == "sft" and row["seed"] in TEN]
    rows, lines = warm_ups + [row for row in read("tuned_ten") if row["rate"] == 4], []
    for world in HARD[1:]:
        accuracies = [percent(rows, world, name) for name in ("anchored", "anchored_guided")]
        pair = versus(rows, world, "anchored_guided", "anchored")
        guided = [mean(rows, world, name, "accuracy_guided") for name in ("sft", "anchored", "anchored_guided")]
        lines.append([world, *accuracies, pair, *guided])
    header = ["world, rate 4", "anchored", "anchored_guided", "anchored_guided - anchored"]
    return [[*header, "guided, before", "after anchored", "after anchored_guided"], *lines]


def accuracies_by_rate(file: str, world: str, names: dict[str, str]) -> Table:
    """Makes the table of accuracies at each rate on three tuning seeds."""
    rows = [row for row in read(file) if row["seed"] >= 100]
    rates = (0.5, 1.0, 2.0, 4.0)
    by_rate = {rate: [row for row in rows if row["rate"] == rate] for rate in rates}
    lines = [[name, *(mean(by_rate[rate], world, method) for rate in rates)] for method, name in names.items()]
    return [["rate, three tuning seeds: accuracy, %", *(f"{rate:g}" for rate in rates)], *lines]


def minus_warm_up(
    rows: Rows, guided: Callable[..., str], world: str = "base", names: dict[str, str] = AFTER_WARM_UP
) -> Table:
    """Makes the table of SFT and methods that begin with it, these with their difference from SFT."""
    lines = []
    for method, name in names.items():
        apart = "" if method == "sft" else claims.signed(claims.paired(rows, world, method, "sft"))
        lines.append([name, percent(rows, world, method), apart, guided(rows, world, method, "accuracy_guided")])
    return [["", "unguided, %", "minus the warm-up", "guided, %"], *lines]


def logic() -> Table:
    """Makes the table of the logic world."""
    rows = read("logic")
    rows = chosen(rows, FIVE, tuned(rows, TUNING))
    header, *lines = minus_warm_up(rows, percent)
    alphas = ["", "", mean(rows, "base", "sgpo", "mean_alpha", 1, 2)]
    rates = [rate_of(rows, "base", method) for method in AFTER_WARM_UP]
    more = ([*line, alpha, rate] for line, alpha, rate in zip(lines, alphas, rates, strict=True))
    return [[*header, "mean alpha", "rate"], *more]


def smollm2() -> Table:
    """Makes the table of SmolLM2: the rate of the config, and four times that rate, from the same warm-ups."""
    rows = read("smollm2")
    header, *lines = minus_warm_up(chosen(rows, FIVE, lambda world, method: 1.0), mean)
    _, _, *high = minus_warm_up(chosen(rows, FIVE, lambda world, method: 1.0 if method == "sft" else 4.0), mean)
    rates = ["", *["5e-6"] * (len(lines) - 1), *["2e-5"] * len(high)]
    named = [[name, rate, *cells] for (name, *cells), rate in zip([*lines, *high], rates, strict=True)]
    return [[header[0], "rate", *header[1:]], *named]


STRATEGIES = AFTER_WARM_UP | {"direct_sft": "direct SFT", "anchored": "anchored"}


def smollm2_strategies() -> Table:
    """Makes the table of SmolLM2 where strategies decide, each method at its best rate of one tuning seed."""
    rows = read("smollm2_strategies")
    rows = chosen(rows, FIVE, tuned(rows, [100]))
    header, *lines = minus_warm_up(rows, mean, "strategies", STRATEGIES)
    ahead = [compared(rows, "strategies", method, "grpo")[0] for method in list(STRATEGIES)[2:]]
    rates = ["", *(rate_of(rows, "strategies", method) for method in list(STRATEGIES)[1:])]
    more = ([*line, apart, rate] for line, apart, rate in zip(lines, ["", "", *ahead], rates, strict=True))
    return [[*header, "minus GRPO", "rate"], *more]


def smollm2_rates() -> Table:
    """Makes the table of the tuning seed: accuracy at each rate, unguided and guided."""
    rows = [row for row in read("smollm2_strategies") if row["seed"] == 100 and row["method"] != "sft"]
    rates = sorted({row["rate"] for row in rows})
    found = {(row["method"], row["rate"]): row for row in rows}
    both = [[found[method, rate] for rate in rates] for method in list(STRATEGIES)[1:]]
    cells = [[f"{100 * row['accuracy']:.1f}, {100 * row['accuracy_guided']:.1f}" for row in line] for line in both]
    header = ["unguided, guided, %, one tuning seed", *(f"rate {rate:g}" for rate in rates)]
    return [header, *([STRATEGIES[line[0]["method"]], *texts] for line, texts in zip(both, cells, strict=True))]


def tables() -> dict[str, Table]:
    """Returns title -> table, in the order of docs/results/lab.md."""
    trained = list(SELF_WRITTEN.items())[1:]
    return {
        "The base world": grid(), "The paper's claims": claims_table(), "With ten seeds": claims_of_ten_seeds(),
        "Worlds": worlds(), "Differences in worlds": differences(), "Hard worlds with ten seeds": hard_worlds(),
        "Anchored": anchored(), "Anchored on both sides": guided_side(),
        "Rates of the hard worlds": rates_of_hard_worlds(), "Hard worlds, tuned alike": tuned_alike(),
        "Both sides at rate 4": guided_side_at_four(),
        "Anchored where the base is good": anchored_elsewhere(),
        "Rates of the rules": rates_of_rules(), "Rules": rules(),
        "New worlds": new_worlds(), "Steps that do not wait": carried(),
        "SDPO's distances": distances(), "Strategies that the student writes": self_written(),
        "Their rates": accuracies_by_rate("self_written", "self-written", dict(trained)),
        "Logic": logic(), "Its rates": accuracies_by_rate("logic", "base", dict(list(AFTER_WARM_UP.items())[1:])),
        "SmolLM2": smollm2(), "SmolLM2 where strategies decide": smollm2_strategies(),
        "SmolLM2, rates where strategies decide": smollm2_rates(),
    }  # fmt: skip


def draw_kept(path: str) -> None:
    """Draws accuracy against the guided accuracy that is kept, of the methods that ran in several worlds."""
    rows = [row for world in WORLDS for row in grid_rows() + read("anchored") if row["world"] == world]
    figures.kept(claims.across_worlds(with_before(rows))).savefig(path, dpi=150)


if __name__ == "__main__":
    if sys.argv[1:]:
        draw_kept(sys.argv[1])
    for title, lines in tables().items():
        print(f"\n{title}\n", *markdown(lines), sep="\n")
