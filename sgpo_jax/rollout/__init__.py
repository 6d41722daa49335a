"""Sampling responses from a policy: prefill, then slots that decode and are refilled."""

from sgpo_jax.rollout.engine import (
    LENGTH,
    RUNNING,
    STOP,
    Begun,
    LanguageModel,
    Problems,
    Prompts,
    Rollout,
    Steps,
    generate,
)
from sgpo_jax.rollout.sampling import Sampling

__all__ = [
    "LENGTH", "RUNNING", "STOP", "Begun", "LanguageModel", "Problems", "Prompts", "Rollout", "Sampling", "Steps",
    "generate",
]  # fmt: skip
