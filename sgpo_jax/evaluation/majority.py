"""Which responses to a problem give the same answer, for maj@k."""

from collections.abc import Sequence

import numpy as np

from sgpo_jax import rewards
from sgpo_jax.policy.generation import Graded
from sgpo_jax.rollout import STOP
from sgpo_jax.runtime import distributed


def votes(graded: Graded) -> list[list[int]]:
    """Groups the responses to each problem by their answer.

    A response without a box, or cut at the limit, has no vote. The correct answers are one class. Wrong answers are
    compared with each other as the verifier compares; an answer that it could not grade is compared as text. The
    problems are split over the processes.

    Returns:
      `[B][K]` class of each response among those to its problem; -1 where it has no vote.
    """
    return distributed.split(_votes, list(zip(graded.verdicts, graded.rollout.finish, strict=True)))


def _votes(problems: Sequence[tuple[list[rewards.Verdict], np.ndarray]]) -> list[list[int]]:
    """Returns `votes` for problems that are given as (verdicts, finish reasons)."""

    def answer_of(verdict: rewards.Verdict, finish: int) -> tuple[str, str] | None:
        if finish != STOP or not verdict.extracted:
            return None
        return (verdict.outcome, "" if verdict.outcome == "correct" else verdict.extracted)

    answers = [[answer_of(*pair) for pair in zip(*problem, strict=True)] for problem in problems]
    wrong = [list(dict.fromkeys(a[1] for a in group if a and a[0] == "wrong")) for group in answers]
    pairs = [(first, later) for group in wrong for i, later in enumerate(group) for first in group[:i]]
    same = dict(zip(pairs, rewards.equal(pairs), strict=True))
    classes = []
    for group in answers:
        firsts: list[tuple[str, str]] = []  # the first answer of each class
        classes.append([-1] * len(group))
        for k, answer in enumerate(group):
            if answer is None:
                continue
            # The first that is equal: an answer given again has not been compared with those that came between.
            equal = (
                c
                for c, first in enumerate(firsts)
                if first == answer or (first[0] == answer[0] == "wrong" and same[first[1], answer[1]])
            )
            classes[-1][k] = next(equal, len(firsts))
            if classes[-1][k] == len(firsts):
                firsts.append(answer)
    return classes
