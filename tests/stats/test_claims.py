"""Intervals and verdicts from rows of results, against values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_jax.methods import METHODS
from sgpo_jax.stats import claims


def row(method, seed, accuracy, world="base", rate=1.0, **more):
    return {"world": world, "method": method, "rate": rate, "seed": seed, "accuracy": accuracy, **more}


def test_an_interval_by_hand():
    difference = claims.interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # Student's t with 2 degrees of freedom; the standard deviation is 1
    assert difference == pytest.approx((2.0, 2.0 - half, 2.0 + half, 3))
    assert claims.interval([0.5]) == (0.5, -math.inf, math.inf, 1)
    assert claims.interval([0.5, 0.5]) == (0.5, 0.5, 0.5, 2)


def test_intervals_of_five_seeds_hold_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    intervals = [claims.interval(values) for values in rng.normal(0.3, 0.1, size=(4000, 5))]
    assert 0.94 < np.mean([interval.low <= 0.3 <= interval.high for interval in intervals]) < 0.96


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than methods do; a seed that one method lacks does not count."""
    rows = [row("sgpo", seed, 0.1 * seed + 0.02 + 0.001 * (seed % 2)) for seed in range(6)]
    rows += [row("grpo", seed, 0.1 * seed) for seed in (4, 3, 2, 1)] + [row("grpo", 5, 9.0, world="other")]
    difference = claims.paired(rows, "base", "sgpo", "grpo")
    assert difference.pairs == 4 and difference.mean == pytest.approx(0.0205)
    assert 0.019 < difference.low < difference.high < 0.022
    reverse = claims.paired(rows, "base", "grpo", "sgpo")
    assert (reverse.low, reverse.high) == pytest.approx((-difference.high, -difference.low))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.1, 0.2, 0.15], "reproduced"),
        ([-0.1, -0.2, -0.15], "contradicted"),
        ([0.1, -0.2, 0.15], "not distinguishable"),
        ([0.5], "not distinguishable"),
        ([0.0, 0.0], "not distinguishable"),
    ],
)
def test_verdicts(differences, expected):
    assert claims.verdict(claims.interval(differences)) == expected


def test_claims_are_those_of_methods_that_were_run():
    rows = [row(method, seed, a + 0.01 * seed) for method, a in (("sgpo", 0.8), ("grpo", 0.6)) for seed in range(3)]
    ((claim, difference, verdict),) = claims.claims(rows, "base")
    assert (claim.better, claim.worse, claim.table, verdict) == ("sgpo", "grpo", "Table 1", "reproduced")
    assert claim.paper == pytest.approx(2.2) and difference.mean == pytest.approx(0.2)
    (line,) = claims.claim_lines(rows, "base")
    assert line == ["Table 1", "SGPO > SFT+GRPO", "+2.2", "+20.0 [+20.0, +20.0]", "reproduced"]


def test_every_claim_and_table_is_about_methods_that_exist():
    named = {method for claim in claims.CLAIMS for method in (claim.better, claim.worse)}
    shown = {method for _, methods in claims.TABLES.values() for method in methods}
    assert named <= set(METHODS) and shown == set(METHODS)
    assert {claim.table for claim in claims.CLAIMS} == {name for name in claims.TABLES if name.startswith("Table")}


def test_the_best_rate():
    rows = [row("sgpo", s, a, rate=r) for r, a in ((2.0, 0.5), (0.5, 0.4), (1.0, 0.5)) for s in (7, 8)]
    rows += [row("sgpo", 7, 0.9, rate=0.5), row("grpo", 7, 1.0, rate=4.0)]
    rows += [row("sgpo", 7, 1.0, rate=2.0, world="rare")]
    assert claims.best_rate(rows[:6], "base", "sgpo") == 1.0, "the smallest of the best"
    assert claims.best_rate(rows, "base", "sgpo") == 0.5, "by the mean over seeds"
    assert claims.best_rate(rows, "rare", "sgpo") == 2.0, "of that world"
    with pytest.raises(ValueError, match="'grpo' in world 'rare': no tuning results"):
        claims.best_rate(rows, "rare", "grpo")


def test_a_table_has_the_solved_groups_of_rows_that_have_them():
    rows = [row("sgpo", seed, 0.5, sets={}, pass_at_group=share) for seed, share in ((0, 0.75), (1, 0.85))]
    rows += [row("grpo", 0, 0.5, sets={})]
    columns, lines = claims.table(rows, "base", {"grpo": "SFT+GRPO", "sgpo": "SGPO"})
    place = columns.index("pass@G")
    assert [line[place] for line in lines] == ["", "80.0 ± 63.5"], "12.706 * 0.0707 / sqrt(2) = 0.635"
    assert {len(line) for line in lines} == {len(columns)}
    assert "pass@G" not in claims.table(rows[2:], "base", {"grpo": "SFT+GRPO"})[0]


def test_a_table_in_the_papers_layout():
    rows = [
        row(method, seed, (x + y) / 2, rate=rate, sets={"A": x, "B": y})
        for method, rate, x, y in (("sgpo", 2.0, 0.8, 0.4), ("grpo", 1.0, 0.6, 0.2))
        for seed in (0, 1)
    ]
    columns, lines = claims.table(rows, "base", {"grpo": "SFT+GRPO", "hpt": "HPT", "sgpo": "SGPO"})
    assert columns == ["method", "A", "B", "average", "minus SGPO", "rate", "seeds"]
    grpo = ["SFT+GRPO", "60.0 ± 0.0", "20.0 ± 0.0", "40.0 ± 0.0", "-20.0 [-20.0, -20.0]", "1", "2"]
    assert lines == [grpo, ["SGPO", "80.0 ± 0.0", "40.0 ± 0.0", "60.0 ± 0.0", "", "2", "2"]]


def test_worlds():
    rows = [
        row(method, seed, accuracy + 0.1 * seed, world=world, rate=rate, before=0.05 + 0.1 * seed)
        for world, *accuracies in (("base", 0.5, 0.5, 0.6), ("rare", 0.4, 0.1, 0.3))
        for method, rate, accuracy in zip(("grpo", "sgpo", "direct_sft"), (1.0, 2.0, 0.5), accuracies, strict=True)
        for seed in (0, 1)
    ] + [row(method, 0, 0.4, before=0.0) for method in ("sft", "hpt")]
    standings = claims.across_worlds(rows)
    shown = ("grpo", "sgpo", "direct_sft")
    assert [standing[:2] for standing in standings] == [(w, method) for w in ("base", "rare") for method in shown]
    rare = {standing.method: standing for standing in standings if standing.world == "rare"}
    assert rare["sgpo"].ahead.mean == pytest.approx(-0.3) and rare["sgpo"].after.mean == pytest.approx(0.15)
    assert rare["sgpo"].kept is None, "guided prompts were not evaluated"
    guided = [{**r, "accuracy_guided": 0.3 + 0.2 * r["seed"], "before_guided": 0.8} for r in rows]
    assert [standing.kept for standing in claims.across_worlds(guided)] == [pytest.approx(0.5)] * 6
    assert rare["sgpo"].before == pytest.approx(0.1) and rare["grpo"].ahead.pairs == 0
    lines = claims.world_lines(standings)
    assert [line[5] for line in lines] == ["", "not distinguishable", "ahead", "", "behind", "behind"]
    assert lines[4][:2] == ["rare", "10.0"] and lines[4][2] == "sgpo" and lines[4][4:] == [
        "-30.0 [-30.0, -30.0]", "behind", "2", "2",
    ]  # fmt: skip
    assert lines[3][4] == "", "GRPO minus itself"


def test_methods_of_one_world_or_without_grpo_are_not_compared_across_worlds():
    rows = [row(m, 0, 0.5, world=w, before=0.1) for w in ("base", "rare") for m in ("sft", "sgpo", "no_kl_clip")]
    assert claims.across_worlds(rows) == []
    assert claims.across_worlds([*rows, row("grpo", 0, 0.5, before=0.1)]) == []


NO_SCORES = (math.nan, math.inf, -math.inf, None)


@pytest.mark.parametrize("value", NO_SCORES)
def test_what_is_no_score_counts_as_absent(value):
    """In every statistic: as if its row were not there."""
    assert claims.interval([0.25, value, 0.75]) == claims.interval([0.25, 0.75])
    rows = [row("sgpo", s, 0.5 + s / 16, sets={}, before=0.5) for s in range(3)]
    rows += [row("grpo", s, 0.25 + s / 32, sets={}, before=0.5) for s in range(3)]
    rows += [{**r, "world": "rare", "accuracy": r["accuracy"] / 2} for r in rows]
    more = [row(m, 3, value, w, sets={}, before=value) for m in ("sgpo", "grpo") for w in ("base", "rare")]
    assert claims.by_seed(rows + more, "base", "sgpo") == claims.by_seed(rows, "base", "sgpo")
    assert claims.claims(rows + more, "base") == claims.claims(rows, "base")
    assert claims.across_worlds(rows + more) == claims.across_worlds(rows)
    assert claims.percent(claims.interval([value])) == ""
    measured = ((0.5, value), (1.0, 0.75), (2.0, 0.25), (4.0, value))
    rates = [row("sgpo", seed, accuracy, rate=rate) for rate, accuracy in measured for seed in (7, 8)]
    for order in (rates, rates[::-1]):
        assert claims.best_rate(order, "base", "sgpo") == 1.0
    cells = claims.tables([], rates, "base")[0][2]
    assert cells == [["base", "sgpo", "", "75.0", "25.0", ""]]
    with pytest.raises(ValueError, match="'sgpo' in world 'base': no tuning results"):
        claims.best_rate([row("sgpo", 7, value)], "base", "sgpo")


@given(st.lists(st.one_of(st.sampled_from(NO_SCORES), st.floats(0, 1)), max_size=8))
def test_intervals_are_those_of_the_scores_alone(values):
    scores = [value for value in values if value is not None and math.isfinite(value)]
    assert repr(claims.interval(values)) == repr(claims.interval(scores))
