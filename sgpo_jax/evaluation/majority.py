"""Which responses to a problem give the same answer, for maj@k."""

from collections.abc import Sequence

import numpy as np

from sgpo_jax import rewards
from sgpo_jax.policy.generation import Graded
from sgpo_jax.rollout import STOP
from sgpo_jax.runtime import distributed


def _votes(graded: Graded) -> list[list[int]]:
    """`[B][K]` class of each response's answer among those of its problem, equal answers sharing one; -1 for none.

    A response without a box, or cut at the limit, has no vote. Correct answers are one class, wrong ones are compared
    with each other as the verifier compares; what it could not grade is compared as text. The problems are split over
    the processes.
    """
    return distributed.split(_votes_of, list(zip(graded.verdicts, graded.rollout.finish, strict=True)))


def _votes_of(problems: Sequence[tuple[list[rewards.Verdict], np.ndarray]]) -> list[list[int]]:
    """`_votes` of some problems, given as (verdicts, finish reasons)."""

    def name(verdict: rewards.Verdict, finish: int) -> tuple[str, str] | None:
        if finish != STOP or not verdict.extracted:
            return None
        return (verdict.outcome, "" if verdict.outcome == "correct" else verdict.extracted)

    names = [
        [name(*pair) for pair in zip(group, finish, strict=True)]
        for group, finish in problems
    ]
    wrong = [list(dict.fromkeys(n[1] for n in group if n and n[0] == "wrong")) for group in names]
    pairs = [(first, later) for group in wrong for i, later in enumerate(group) for first in group[:i]]
    same = dict(zip(pairs, rewards.equal(pairs), strict=True))
    votes = []
    for group in names:
        classes: list[tuple[str, str]] = []  # the first answer of each
        votes.append([-1] * len(group))
        for k, answer in enumerate(group):
            if answer is None:
                continue
            # The first that is equal: an answer given again has not been compared with those that came between.
            equal = (
                c
                for c, first in enumerate(classes)
                if first == answer or (first[0] == answer[0] == "wrong" and same[first[1], answer[1]])
            )
            votes[-1][k] = next(equal, len(classes))
            if votes[-1][k] == len(classes):
                classes.append(answer)
    return votes
