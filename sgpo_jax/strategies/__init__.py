"""Strategies: extracted from expert responses by a strong model, or written by the student itself."""

from sgpo_jax.strategies.runs import audit, run

__all__ = ["audit", "run"]
