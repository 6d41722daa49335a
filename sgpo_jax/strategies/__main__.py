"""Runs `python -m sgpo_jax.strategies`, which is `sgpo strategies`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("strategies", cli.COMMANDS["strategies"])
