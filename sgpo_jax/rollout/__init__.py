"""Sampling responses from a policy."""

from sgpo_jax.rollout.engine import LENGTH, STOP, Rollout, generate
from sgpo_jax.rollout.sampling import Sampling

__all__ = ["LENGTH", "STOP", "Rollout", "Sampling", "generate"]
