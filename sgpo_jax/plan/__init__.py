"""What a run will need on accelerators that are not there: memory, work, communication, time."""

from sgpo_jax.plan.planner import make
from sgpo_jax.plan.report import show

__all__ = ["make", "show"]
