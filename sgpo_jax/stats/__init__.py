"""Statistics: benchmark scores with intervals, paired differences between methods, the paper's results."""

from sgpo_jax.stats.benchmark import CONTEXTS, bootstrap, contexts, gain, per_problem
from sgpo_jax.stats.scores import is_score

__all__ = ["CONTEXTS", "bootstrap", "contexts", "gain", "is_score", "per_problem"]
