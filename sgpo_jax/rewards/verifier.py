r"""The outcome reward of a response: the verifier, or a function of the user's own, in processes that can be killed.

`score` takes the last balanced \boxed{...} of each response and compares it with the gold answer: as text where
certain (`answers`), else by math-verify (`worker`), since answers are hostile. What counts as correct where opinions
differ: docs/rewards.md. `judge` does the same for rows, or calls `module:function` for each of them.
"""

import atexit
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from sgpo_jax.rewards.answers import MAX_ANSWER, compare_text, extract_boxed, normalize_answer
from sgpo_jax.rewards.pool import Outcome, Pool, Worker

FAILURES: tuple[Outcome, ...] = ("no_box", "timeout", "crash", "invalid")  # ways to score 0 without being wrong


@dataclass(frozen=True)
class Verdict:
    """Grade of one response. `extracted` is the box's content, cut at MAX_ANSWER, None without."""

    reward: float  # 0.0 or 1.0; from a user's function anything between, too
    outcome: Outcome  # "correct" is a reward of 1; "invalid" is a user's function that returned no number from 0 to 1
    extracted: str | None


_shared_pool = Pool()  # starts nothing before the first item
_reward_pools: dict[str, Pool] = {}
_reward_lock = threading.Lock()


def _renew_pools() -> None:
    global _shared_pool, _reward_pools, _reward_lock
    _shared_pool, _reward_pools, _reward_lock = Pool(), {}, threading.Lock()


def _close_pools() -> None:
    for pool in (_shared_pool, *_reward_pools.values()):
        pool.close()


os.register_at_fork(after_in_child=_renew_pools)  # a fork has not its parent's threads
atexit.register(_close_pools)


def score(responses: list[str], answers: list[str], *, pool: Pool | None = None) -> list[Verdict]:
    """Grade each response against its gold answer; order kept, from any thread, on hostile text.

    `pool` is where to grade, by default the pool that the whole program shares. ValueError for
    lists of different length and an entry that is no str, RuntimeError if workers cannot start.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses for {len(answers)} answers; must be equal")
    for name, texts in [("responses", responses), ("answers", answers)]:
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{i}] is {text!r:.80}; it must be a str")
    boxes = [extract_boxed(response) for response in responses]
    pairs = [
        None if box is None else (normalize_answer(gold), normalize_answer(box))
        for gold, box in zip(answers, boxes, strict=True)
    ]
    compared = _compare([pair for pair in pairs if pair], pool or _shared_pool)
    outcomes: list[Outcome] = ["no_box" if pair is None else compared[pair] for pair in pairs]
    return [
        Verdict(float(outcome == "correct"), outcome, box and box[:MAX_ANSWER])
        for outcome, box in zip(outcomes, boxes, strict=True)
    ]


def equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the answers of each pair are the same, as a gold answer and a response's would be."""
    normal = [(normalize_answer(first), normalize_answer(second)) for first, second in pairs]
    outcomes = _compare(normal, _shared_pool)
    return [outcomes[pair] == "correct" for pair in normal]


def _compare(pairs: Sequence[tuple[str, str]], pool: Pool) -> dict[tuple[str, str], Outcome]:
    """Pair of normalised answers -> "correct", "wrong", "timeout" or "crash"; each pair is compared once."""
    same = {pair: compare_text(*pair) for pair in pairs}
    undecided = [pair for pair, certain in same.items() if certain is None]
    outcomes: dict[tuple[str, str], Outcome] = {
        pair: "correct" if certain else "wrong" for pair, certain in same.items()
    }
    return outcomes | dict(zip(undecided, pool.grade(undecided), strict=True))


def judge(responses: list[str], rows: Sequence[dict], reward: str = "") -> list[Verdict]:
    """Grade each response to the problem of its row; order kept, from any thread, on hostile text.

    Args:
        responses: texts.
        rows: one for each response, with its `answer`, and what else the user's function reads.
        reward: "" is `score`; else `module:function`, called as `function(row, response)`, whose result is the reward.

    Raises:
        ValueError: lists of different length, or a function that cannot be loaded.
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
    """Loads a user's reward function in a worker, as grading will; nothing to do for "", the verifier.

    Raises:
        ValueError: it cannot be loaded.
    """
    if not reward:
        return
    try:
        Worker(6.0, 1024, reward).kill()
    except RuntimeError as error:
        raise ValueError(f"config.rl.reward={reward!r}: {error}") from error
