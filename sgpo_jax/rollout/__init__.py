"""Sampling responses from a policy: prefill, then slots that decode and are refilled."""

from sgpo_jax.rollout.engine import Begun, LanguageModel, Problems, Prompts, generate
from sgpo_jax.rollout.records import LENGTH, RUNNING, STOP, Rollout, Steps
from sgpo_jax.rollout.sampling import Sampling

__all__ = [
    "LENGTH", "RUNNING", "STOP", "Begun", "LanguageModel", "Problems", "Prompts", "Rollout", "Sampling", "Steps",
    "generate",
]  # fmt: skip
