"""Sampling responses from a policy."""

from sgpo_jax.rollout.engine import LENGTH, STOP, Rollout, generate

__all__ = ["LENGTH", "STOP", "Rollout", "generate"]
