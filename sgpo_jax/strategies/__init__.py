"""Strategies: extracted from expert responses by a strong model, or written by the student itself."""

from sgpo_jax.cli import lazily

_HOMES = {"audit": "ratings", "run": "runs"}
__all__ = [*_HOMES]
__getattr__ = lazily(__name__, _HOMES)  # its command reads its flags before it imports all this
