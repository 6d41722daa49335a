"""avg@k, pass@k, maj@k and their intervals against enumeration and known cases."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_jax.stats import benchmark, paper


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(combinations(correct, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert benchmark.pass_at(sum(correct), len(correct), k) == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [(1, 4, 5), (1, 4, 0), (5, 4, 1), (-1, 4, 1)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="correct=.*samples=.*k="):
        benchmark.pass_at(*arguments)


@pytest.mark.parametrize(
    ("votes", "sample"),
    [
        ([0, 1, 1, 2], 1),
        ([0, 1, 1, 0], 0),  # a tie: the answer that came first
        ([-1, 1, 0, 0, 1], 1),
        ([-1, -1, 3], 2),
        ([-1, -1, -1, 5, 4, 4], 4),  # no box is no vote
        ([-1, -1], None),
    ],
)
def test_the_most_votes_win_and_the_first_of_a_tie(votes, sample):
    assert benchmark.winner(votes) == sample


def test_values_of_each_problem():
    rewards = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0.5, 0, 0, 1], [1, 0, 0, 0]])
    votes = np.array([[1, 0, 0, 1], [-1, -1, -1, -1], [0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 1, 1]])
    values = benchmark.per_problem(rewards, votes)
    assert list(values) == ["accuracy", "pass@1", "pass@2", "pass@4", "maj@1", "maj@2", "maj@4"]
    np.testing.assert_allclose(values["accuracy"], [0.5, 0, 1, 0.375, 0.25])
    np.testing.assert_allclose(values["pass@1"], [0.5, 0, 1, 0.25, 0.25])  # 0.5 is not correct
    np.testing.assert_allclose(values["pass@2"], [5 / 6, 0, 1, 0.5, 0.5])
    np.testing.assert_allclose(values["pass@4"], [1, 0, 1, 1, 1])
    np.testing.assert_allclose(values["maj@2"], [0, 0, 1, 0.5, 1])
    np.testing.assert_allclose(values["maj@4"], [0, 0, 1, 0.5, 0])
    assert benchmark.powers_of_two(1) == [1] and benchmark.powers_of_two(6) == [1, 2, 4, 6]


def test_bootstrap_interval_of_a_known_case():
    values = np.repeat([0.0, 1.0], [70, 30])
    low, high = benchmark.bootstrap(values)
    normal = 1.96 * np.sqrt(0.3 * 0.7 / 100)
    assert low == pytest.approx(0.3 - normal, abs=0.015) and high == pytest.approx(0.3 + normal, abs=0.015)
    assert benchmark.bootstrap(np.full(5, 0.25)) == (0.25, 0.25)
    assert benchmark.bootstrap(values) == (low, high)


def test_contexts():
    assert benchmark.contexts(False) == ("unguided",) and benchmark.contexts(True) == benchmark.CONTEXTS
    assert [benchmark.CONTEXTS[guided] for guided in (False, True)] == ["unguided", "guided"]


def test_the_paper_s_rows():
    title, cells = paper.row("qwen7b:sgpo")
    assert title == "Qwen2.5-7B-Instruct, SGPO"
    assert cells == {"MATH500": 82.7, "AMC23": 55.9, "OlympiadBench": 50.0, "AIME24": 19.7, "Average": 52.1}
    assert paper.row("llama8b:luffy")[1] == {"Average": 26.5}
    for cells in paper.TABLE["qwen7b"].values():  # the average is the plain mean of the four
        assert np.mean(cells[:4]) == pytest.approx(cells[4], abs=0.0501)
    for name in ("", "qwen7b", "qwen7b:ppo", "gpt:sgpo"):
        with pytest.raises(ValueError, match="qwen7b.*sgpo"):
            paper.row(name)
