r"""The outcome reward of a response: from the verifier, or from a user's reward function.

`score` compares the last balanced \boxed{...} of each response with the gold answer, as text where that decides
(`answers`), else by math-verify (`worker`). Answers may be hostile, so math-verify runs in processes that can be
killed. docs/rewards.md says which answers count as correct. `judge` scores rows, or calls `module:function` for each.
"""

import atexit
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from sgpo_jax.rewards.answers import MAX_ANSWER, compare_text, normalize_answer
from sgpo_jax.rewards.boxes import extract_boxed
from sgpo_jax.rewards.forms import alike
from sgpo_jax.rewards.golds import read_gold
from sgpo_jax.rewards.pool import Outcome, Pool, Worker
from sgpo_jax.rewards.symbols import to_latex
from sgpo_jax.rewards.units import unit

FAILURES: tuple[Outcome, ...] = ("no_box", "timeout", "crash", "invalid")  # ways to score 0 without being wrong


@dataclass(frozen=True)
class Verdict:
    """The grade of one response."""

    reward: float  # 0.0 or 1.0; from a user's function any number from 0 to 1
    outcome: Outcome  # "correct" is a reward of 1; "invalid": a user's function returned no number from 0 to 1
    extracted: str | None  # content of the box, cut at MAX_ANSWER characters; None without a box


_shared_pool = Pool()  # its processes start with the first items
_reward_pools: dict[str, Pool] = {}
_reward_lock = threading.Lock()


def _renew_pools() -> None:
    global _shared_pool, _reward_pools, _reward_lock
    _shared_pool, _reward_pools, _reward_lock = Pool(), {}, threading.Lock()


def _close_pools() -> None:
    for pool in (_shared_pool, *_reward_pools.values()):
        pool.close()


os.register_at_fork(after_in_child=_renew_pools)  # a fork lacks its parent's threads
atexit.register(_close_pools)


def score(responses: list[str], answers: list[str], *, pool: Pool | None = None) -> list[Verdict]:
    """Grades each response against its gold answer. Safe with hostile text and from any thread.

    Args:
      responses: texts.
      answers: gold answers, one for each response.
      pool: the processes to grade in; None is the pool that the whole program shares.

    Returns:
      The verdicts, in the order of the responses.

    Raises:
      ValueError: the lists have different lengths, or an entry is not a str.
      RuntimeError: the processes cannot start.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses for {len(answers)} answers; must be equal")
    for name, texts in [("responses", responses), ("answers", answers)]:
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{i}] is {text!r:.80}; it must be a str")
    boxes = [extract_boxed(response) for response in responses]
    pairs = [
        None if box is None else _normalized(read_gold(gold), box) for gold, box in zip(answers, boxes, strict=True)
    ]
    compared = _compare([pair for pair in pairs if pair], pool or _shared_pool)
    outcomes: list[Outcome] = ["no_box" if pair is None else compared[pair] for pair in pairs]
    return [
        Verdict(float(outcome == "correct"), outcome, box and box[:MAX_ANSWER])
        for outcome, box in zip(outcomes, boxes, strict=True)
    ]


def equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Returns True for each pair of answers that `score` would call equal, the first as the gold answer."""
    normalized = [_normalized(*pair) for pair in pairs]
    outcomes = _compare(normalized, _shared_pool)
    return [outcomes[pair] == "correct" for pair in normalized]


def _normalized(gold: str, answer: str) -> tuple[str, str]:
    """Returns two answers normalised and in one form; ("", ""), which is wrong, if their units differ."""
    if len(answer) <= MAX_ANSWER and len(gold) <= MAX_ANSWER:
        measures = unit(to_latex(gold)), unit(to_latex(answer))
        if all(measures) and measures[0] != measures[1]:
            return "", ""
    return alike(normalize_answer(gold), normalize_answer(answer))


def _compare(pairs: Sequence[tuple[str, str]], pool: Pool) -> dict[tuple[str, str], Outcome]:
    """Returns the outcome of each pair of normalised answers; equal pairs are compared once."""
    by_text = {pair: compare_text(*pair) for pair in pairs}
    undecided = [pair for pair, same in by_text.items() if same is None]
    outcomes: dict[tuple[str, str], Outcome] = {
        pair: "correct" if same else "wrong" for pair, same in by_text.items()
    }
    return outcomes | dict(zip(undecided, pool.grade(undecided), strict=True))


def judge(responses: list[str], rows: Sequence[dict], reward: str = "") -> list[Verdict]:
    """Grades each response to the problem of its row. Safe with hostile text and from any thread.

    Args:
      responses: texts.
      rows: one for each response, with its `answer` and all other fields that the user's function reads.
      reward: "" is `score`; else `module:function`, called as `function(row, response)`, which returns the reward.

    Returns:
      The verdicts, in the order of the responses.

    Raises:
      ValueError: the lists have different lengths.
      RuntimeError: the processes cannot start, or the function cannot be loaded.
    """
    if not reward:
        return score(responses, [row["answer"] for row in rows])
    if len(responses) != len(rows):
        raise ValueError(f"{len(responses)} responses for {len(rows)} rows; must be equal")
    with _reward_lock:
        if reward not in _reward_pools:
            _reward_pools[reward] = Pool(reward=reward)
        pool = _reward_pools[reward]
    requests = [{"problem": row, "response": text} for row, text in zip(rows, responses, strict=True)]
    replies = pool.ask(requests)
    if notes := [reply["note"] for reply in replies if "note" in reply]:
        warnings.warn(f"the reward {reward}: {notes[0]}", stacklevel=2)
    boxes = [extract_boxed(response) for response in responses]
    return [
        Verdict(reply.get("reward", 0.0), reply["outcome"], box and box[:MAX_ANSWER])
        for reply, box in zip(replies, boxes, strict=True)
    ]


def check(reward: str) -> None:
    """Checks that a user's reward function can be loaded in a worker; "", the verifier, always passes.

    Raises:
      ValueError: the function cannot be loaded.
    """
    if not reward:
        return
    try:
        Worker(6.0, 1024, reward).kill()
    except RuntimeError as error:
        raise ValueError(f"config.rl.reward={reward!r}: {error}") from error
