"""Runs `python -m sgpo_jax.analyze`, which is `sgpo analyze`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("analyze", cli.COMMANDS["analyze"])
