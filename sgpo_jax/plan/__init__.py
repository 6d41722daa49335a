"""Plans a run for TPUs that can be absent: its memory, work, communication and time."""

from sgpo_jax.plan.planner import make
from sgpo_jax.plan.report import show

__all__ = ["make", "show"]
