"""Runs `python -m sgpo_jax.generate`, which is `sgpo generate`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("generate", cli.COMMANDS["generate"])
