"""Runs `python -m sgpo_jax.evaluate`, which is `sgpo evaluate`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("evaluate")
