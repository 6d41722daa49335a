"""Plans a run for TPUs or GPUs that can be absent: its memory, work, communication, time and cost."""

from sgpo_jax.plan.planner import make
from sgpo_jax.plan.report import show

__all__ = ["make", "show"]
