"""Strategies: extracted from expert responses by a strong model, or written by the student itself."""

from sgpo_jax.strategies.ratings import audit
from sgpo_jax.strategies.runs import run

__all__ = ["audit", "run"]
