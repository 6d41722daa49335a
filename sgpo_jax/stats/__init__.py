"""Numbers from arrays: benchmark scores with intervals, the lab's paired differences, the paper's table."""

from sgpo_jax.stats.benchmark import CONTEXTS, bootstrap, contexts, gain, per_problem

__all__ = ["CONTEXTS", "bootstrap", "contexts", "gain", "per_problem"]
