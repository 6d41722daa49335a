"""Statistics: benchmark scores with intervals, paired differences between methods, the paper's results."""

from sgpo_jax.stats.benchmark import CONTEXTS, bootstrap, contexts, gain, per_problem

__all__ = ["CONTEXTS", "bootstrap", "contexts", "gain", "per_problem"]
