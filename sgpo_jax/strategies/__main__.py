"""Runs `python -m sgpo_jax.strategies`, which is `sgpo strategies`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("strategies")
