"""Problems that cannot be solved as stated are flagged, and others are not."""

import pytest

from sgpo_jax.data import unsolvable


@pytest.mark.parametrize(
    "problem",
    [
        "Let $T=T N Y W R$. Compute $T+1$.",
        "Let $T=TNYWR$. Compute $T+1$.",
        "Find all values for a sequence satisfying the condition in part (a).",
        "Using the result of the previous problem, find $x$.",
        "Find the area of the triangle in the figure below.",
        "The tiles are laid as shown in the diagram. How many are there?",
    ],
)
def test_what_cannot_be_solved_as_stated_is_flagged(problem):
    assert unsolvable.reason(problem)


@pytest.mark.parametrize(
    "problem",
    [
        "Let $T=20$. Compute $T+1$.",
        "Let $T=(0,0), N=(2,0), Y=(6,6), W=(2,6)$, and $R=(0,2)$. Compute the area of pentagon $T N Y W R$.",
        "(a) Show that $n$ is odd. (b) With $n$ as in part (a), find $n^2$.",
        "Find the area of the triangle in the figure below. [asy] draw((0,0)--(1,0)); [/asy]",
        "Each term is the sum of the previous two. Find the tenth.",
        "What is the area below the graph of $y = x^2$, above the $x$-axis, for $x$ from 0 to 1?",
        "A figure skater makes a spin. How many students are in the picture, at least?",
    ],
)
def test_what_can_be_solved_is_not_flagged(problem):
    assert unsolvable.reason(problem) is None
