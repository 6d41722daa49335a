"""Numbers from arrays: benchmark scores with intervals, the lab's paired differences, the paper's table."""

from sgpo_jax.stats.benchmark import bootstrap, gain, per_problem

__all__ = ["bootstrap", "gain", "per_problem"]
