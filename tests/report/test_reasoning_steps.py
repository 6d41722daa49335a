"""Splitting a response into steps, and how strongly a KL is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_jax.report import reasoning_steps


def texts(*pieces):
    return ["".join(pieces[start:stop]) for start, stop in reasoning_steps.split(pieces)]


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        (["(a)", " sum", " 3", " (b)", " larger", "."], ["(a) sum 3", " (b) larger."]),
        (["So", " x", " =", " 3", ".", "5", ".", " Then", " y"], ["So x = 3.5.", " Then y"]),
        (["one", "\n\n", "two", "?", " three", "!"], ["one\n\n", "two?", " three!"]),
        (["1", ".", " add", "\n", "2", ".", " multiply"], ["1. add\n", "2. multiply"]),
        (["f", "(a)", " is", " (", "2", ")", "x"], ["f(a) is (2)x"]),  # no marks: not between white space
        (["see", " (ii)", " now", " (12)", " end"], ["see", " (ii) now", " (12) end"]),
        (["one. Two", " tokens"], ["one. Two", " tokens"]),  # a token is never split
        (["", "\n", " ", "x", "", ".", "\n"], ["\n x.\n"]),
        (["end", ".", " ", "y"], ["end. ", "y"]),  # white space alone begins no step
    ],
)
def test_steps_end_with_lines_and_sentences_and_before_marks(pieces, wanted):
    assert texts(*pieces) == wanted


@given(st.lists(st.text("ab1 .(\n)é", max_size=4), max_size=30))
def test_the_steps_are_all_of_the_tokens_in_order(pieces):
    spans = reasoning_steps.split(pieces)
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(len(pieces)))
    assert all(start < stop for start, stop in spans)


def test_a_step_has_its_text_and_mean():
    found = reasoning_steps.steps(["(a)", " x", " (b)", " y"], [0.25, 0.75, 1.0, 2.0])
    assert found == [reasoning_steps.Step(0, 2, "(a) x", 0.5), reasoning_steps.Step(2, 4, " (b) y", 1.5)]
    assert reasoning_steps.steps([], []) == []
    with pytest.raises(ValueError, match="token_kl has 1 values; must be one for each of the 2 tokens"):
        reasoning_steps.steps(["a", "b"], [0.0])


def test_the_colour_is_full_from_delta_on_and_shows_small_values():
    assert [reasoning_steps.strength(kl, 2.0) for kl in (0.0, 0.5, 2.0, 9.0)] == [0.0, 0.5, 1.0, 1.0]
    assert reasoning_steps.strength(0.25, None) == 0.5
    assert reasoning_steps.strength(-1e-9, 1.0) == 0.0, "rounding"
