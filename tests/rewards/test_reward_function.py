"""A user's reward function: it has the verifier's pool and limits, and its failures are counted, never fatal."""

import os
import signal
import warnings
from contextlib import closing

import numpy as np
import pytest

from sgpo_jax import rewards
from sgpo_jax.policy import Policy, tokenizer
from sgpo_jax.policy.generation import grade
from sgpo_jax.rewards.verifier import _reward_pools
from sgpo_jax.rollout import LENGTH, STOP, Rollout

ROW = {"id": "p1", "problem": "1+1?", "answer": "2"}
GOOD = "helpers.reward_functions:by_row"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Lowers the pool's limit from 6 s to 1.5 s."""
    with closing(rewards.Pool(workers=2, seconds=1.5, reward=GOOD)) as pool:
        monkeypatch.setitem(_reward_pools, GOOD, pool)
        yield


def judge(*responses, reward=GOOD):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rewards.judge(list(responses), [ROW] * len(responses), reward)


def test_the_function_sees_row_and_response_and_its_number_is_the_reward():
    verdicts = judge("answer:2", "answer:3", "value:one", "value:third", "x" * 300_000, r"value:third \boxed{7}")
    assert [v.reward for v in verdicts[:5]] == [1.0, 0.0, 1.0, 0.25, 1.0]
    assert [v.outcome for v in verdicts] == ["correct", "wrong", "correct", "wrong", "correct", "crash"]
    assert [v.extracted for v in verdicts] == [None] * 5 + ["7"]
    assert rewards.judge(["answer:2"], [ROW | {"id": "p2"}], GOOD)[0].reward == 0.0


@pytest.mark.parametrize(
    ("response", "outcome"),
    [(f"value:{name}", "invalid") for name in ("text", "none", "nan", "two", "minus", "list", "huge")]
    + [("raise:x", "crash"), ("exit:", "crash"), ("die:", "crash"), ("hang:", "timeout"), ("memory:", "crash")],
)
def test_a_failure_is_counted_and_the_next_response_graded(response, outcome):
    verdicts = judge(response, "answer:2")
    assert [v.outcome for v in verdicts] == [outcome, "correct"]
    assert verdicts[0].reward == 0.0


def test_a_worker_that_does_not_read_a_long_response_is_killed_at_the_limit():
    judge("answer:2", "answer:2")
    for worker in _reward_pools[GOOD]._workers.values():
        os.kill(worker.process.pid, signal.SIGSTOP)
    assert [v.outcome for v in judge("x" * 300_000)] == ["timeout"]


def test_the_user_is_told_what_went_wrong():
    with pytest.warns(UserWarning, match=r"helpers.reward_functions:by_row: KeyError: 'why'"):
        rewards.judge(["raise:why"], [ROW], GOOD)
    with pytest.warns(UserWarning, match=r"it returned 2.0; allowed: a number from 0 to 1"):
        rewards.judge(["value:two"], [ROW], GOOD)


def test_without_a_function_the_verifier_judges():
    assert [v.reward for v in judge(r"\boxed{2}", r"\boxed{3}", reward="")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("helpers.reward_functions:missing", "has no attribute 'missing'"),
        ("helpers.reward_functions:not_a_function", "cannot be called"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named(name, message):
    with pytest.raises(ValueError, match=rf"config.rl.reward='{name}': .*{message}"):
        rewards.check(name)


def test_a_function_that_loads_passes():
    rewards.check(GOOD)
    rewards.check("")


class Spelled:
    """A tokenizer of characters."""

    def decode(self, tokens, **_):
        return "".join(map(chr, tokens))


def test_a_function_drives_the_rewards_of_a_rollout(monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", lambda tok, tokens, length: tok.decode(tokens[:length]))
    texts = ["answer:2", "answer:9", "value:third", "value:one", "value:nan", "answer:5"]
    width = max(map(len, texts))
    tokens = np.array([[ord(c) for c in text.ljust(width)] for text in texts]).reshape(2, 3, width)
    lengths = np.array([len(text) for text in texts]).reshape(2, 3)
    finish = np.array([[STOP, STOP, STOP], [STOP, STOP, LENGTH]])
    rollout = Rollout(tokens, np.zeros((2, 3, width), np.float32), lengths, finish)
    policy = Policy(None, Spelled(), (0,), 0, np.float32, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graded = grade(policy, rollout, [ROW, ROW | {"answer": "5"}], GOOD)
    assert graded.rewards.tolist() == [[1.0, 0.0, 0.25], [1.0, 0.0, 0.0]], "the last one is right, but cut"
    assert [v.outcome for v in graded.verdicts[1]] == ["correct", "invalid", "correct"]
