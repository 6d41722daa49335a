"""Rewards of responses: the verifier or a user's reward function, run in separate processes."""

from sgpo_jax.rewards.answers import MAX_ANSWER
from sgpo_jax.rewards.golds import read_gold, survey
from sgpo_jax.rewards.pool import Outcome, Pool
from sgpo_jax.rewards.verifier import FAILURES, Verdict, check, equal, judge, score

__all__ = [
    "FAILURES", "MAX_ANSWER", "Outcome", "Pool", "Verdict",
    "check", "equal", "judge", "read_gold", "score", "survey",
]  # fmt: skip
