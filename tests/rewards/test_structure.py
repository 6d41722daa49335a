"""Lists, sets, tuples and ratios: what has another value is wrong, and what has the same value is right."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_jax import rewards
from sgpo_jax.rewards import Pool, score

# value -> ways to write it
NUMBERS = {
    2.0: ["2", r"\frac{4}{2}", "2.0", r"\sqrt{4}"],
    5.0: ["5", "{5}", r"\frac{10}{2}", "5.0"],
    -3.0: ["-3", "−3", r"-\frac{6}{2}", "-3.0"],
    3.0: ["3", "+3", r"\frac{9}{3}"],
    0.5: [r"\frac{1}{2}", "0.5", "1/2", r"\tfrac12", "½"],
    0.25: ["0.25", r"\frac{1}{4}", ".25"],
    math.sqrt(2): [r"\sqrt{2}", r"\sqrt2", r"\frac{2}{\sqrt{2}}"],
    math.pi: [r"\pi", "π", r"\frac{2\pi}{2}"],
    1e-7: ["10^{-7}", "1e-7", r"\frac{1}{10^7}"],
    120.0: ["120", "5!", r"\binom{10}{3}"],
}
SEVERAL = st.lists(st.sampled_from(sorted(NUMBERS)), min_size=2, max_size=4)
KINDS = {
    "list": ("{}", ", "),
    "set": (r"\{{{}\}}", ", "),
    "tuple": ("({})", ", "),
    "ratio": ("{}", ":"),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with closing(Pool(workers=2, seconds=20.0)) as pool:
        yield pool


def write(kind: str, values: list[float], form: int = 0) -> str:
    """Writes an answer; `form` chooses the way in which each number is written."""
    frame, mark = KINDS[kind]
    return frame.format(mark.join(number(value, form) for value in values))


def number(value: float, form: int) -> str:
    if value in NUMBERS:
        return NUMBERS[value][form % len(NUMBERS[value])]
    if -value in NUMBERS:
        return f"-{NUMBERS[-value][0]}"
    return rf"2\cdot {number(value / 2, form)}" if value > 0 else rf"-2\cdot {number(-value / 2, form)}"


def same(kind: str, golds: list[float], answers: list[float]) -> bool:
    """Returns True if two answers have one value, by the definition of their kind."""
    if kind == "set":
        return set(golds) == set(answers)
    if kind == "list":
        return Counter(golds) == Counter(answers)
    if kind == "tuple":
        return golds == answers
    factors = [answer / gold for gold, answer in zip(golds, answers, strict=False)]
    return len(golds) == len(answers) and all(math.isclose(factor, factors[0]) for factor in factors)


def changes(values: list[float], k: int) -> list[list[float]]:
    """Returns the values permuted, and with the k-th one dropped, repeated, negated, scaled."""
    k %= len(values)
    before, value, after = values[:k], values[k], values[k + 1 :]
    return [
        values[::-1],
        values[1:] + values[:1],
        before + after,
        [*before, value, value, *after],
        [*before, -value, *after],
        [*before, 2 * value, *after],
        [2 * x for x in values],
        [-x for x in values],
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(values=SEVERAL, k=st.integers(0, 3), form=st.integers(0, 4))
def test_a_changed_answer_is_right_only_if_it_has_the_same_value(pool, kind, values, k, form):
    if kind == "ratio" and len(values) == 2:
        values = [*values, 5.0]  # two parts are a division too
    gold = write(kind, values)
    altered = [answer for answer in changes(values, k) if kind != "ratio" or len(answer) > 1]
    answers = [write(kind, answer, form) for answer in altered]
    verdicts = score([rf"\boxed{{{answer}}}" for answer in answers], [gold] * len(answers), pool=pool)
    got = dict(zip(answers, (verdict.outcome for verdict in verdicts), strict=True))
    expected = {a: "correct" if same(kind, values, v) else "wrong" for a, v in zip(answers, altered, strict=True)}
    assert got == expected, gold


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(values=SEVERAL, forms=st.tuples(*[st.integers(0, 4)] * 2), order=st.randoms(use_true_random=False))
def test_an_answer_written_otherwise_stays_right(pool, kind, values, forms, order):
    gold, answers = write(kind, values, forms[0]), [write(kind, values, forms[1])]
    if kind in ("list", "set"):
        answers.append(write(kind, order.sample(values, len(values)), forms[1]))
    answers += [rf"\displaystyle {answers[0]}", rf" {answers[0].replace(',', ' , ')} ", rf"\color{{red}}{answers[0]}"]
    if kind == "list":
        answers.append(r" \text{ and } ".join(number(value, forms[1]) for value in values))
    verdicts = score([rf"\boxed{{{answer}}}" for answer in answers], [gold] * len(answers), pool=pool)
    outcomes = [verdict.outcome for verdict in verdicts]
    assert [pair for pair in zip(answers, outcomes, strict=True) if pair[1] != "correct"] == [], gold


# The words that a golden list of numbers may not lose as if they were units.
WORDS = """
    million, billion, thousand, hundred, dozen, halves, thirds, tenths, and a half, squared, cubed, or more, or less,
    at least, at most, or so, approximately, below zero, and up, percent less, mod two, out of nine, but not integral,
    pairs, couples, trios, twelfths, twentieths, ten thousandths, grand, kilo, basis points, decades, root,
    times as many, short, shy, too many, extra, missing, or so, rounded, repeating, negated, inverted, estimated,
    hopefully, I think, could be, is wrong, ruled out, at best, nicht, tausend, millones, docenas
"""
# Words that say what was counted.
NOUNS = "ordered pairs, possible triples, roots, multiples of it, times, only, exactly, apiece, months, teeth, paths"


@pytest.mark.parametrize("word", [word.strip() for word in WORDS.split(",")])
def test_a_word_that_changes_a_number_is_no_unit(pool, word):
    boxes = [rf"\boxed{{7 \text{{ {word}}}}}", rf"\boxed{{7 {word}}}", rf"\boxed{{7 \text{{ {word} apples}}}}"]
    assert [verdict.outcome for verdict in score(boxes, ["7"] * 3, pool=pool)] == ["wrong"] * 3


@pytest.mark.parametrize("word", [word.strip() for word in NOUNS.split(",")])
def test_a_word_for_what_was_counted_is_a_unit(pool, word):
    boxes = [rf"\boxed{{7 \text{{ {word}}}}}", rf"\boxed{{7\text{{ {word}}}}}"]
    assert [verdict.outcome for verdict in score(boxes, ["7"] * 2, pool=pool)] == ["correct"] * 2


@pytest.mark.parametrize("word", "about,around,not,nearly,half of,at least,minus,double,no more than".split(","))
def test_a_word_before_a_number_that_changes_it_counts(pool, word):
    boxes = [rf"\boxed{{\text{{{word} }} 7}}", rf"\boxed{{{word} 7}}", rf"\boxed{{\text{{{word} 7}}}}"]
    assert [verdict.outcome for verdict in score(boxes, ["7"] * 3, pool=pool)] == ["wrong"] * 3


def test_votes_tell_ratios_and_repeats_apart():
    pairs = [("2:3:4", "2:4:3"), ("1,2,2", "1,2"), ("1,2", "1,2,2"), ("2:3:4", "4:6:8"), ("2,1,2", "1,2,2")]
    assert rewards.equal(pairs) == [False, False, False, True, True]


def test_repeated_items_of_long_hostile_lists_cost_their_time_and_no_more(pool):
    answers = [",".join(["1"] * 400), ":".join(["1"] * 400), ",".join(f"x_{i}" for i in range(150))]
    verdicts = score([rf"\boxed{{{answer}}}" for answer in answers], ["1,1", "1:1:1", "x_1,x_1"], pool=pool)
    assert {verdict.outcome for verdict in verdicts} <= {"wrong", "timeout"}


def test_the_pairs_have_each_kind():
    lines = (Path(__file__).parent / "grading_pairs.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(lines) > 800 and len(set(lines)) > 0.99 * len(lines)
