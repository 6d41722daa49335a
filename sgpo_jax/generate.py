"""Runs `python -m sgpo_jax.generate`, which is `sgpo generate`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("generate")
