"""Runs `python -m sgpo_jax.export`, which is `sgpo export`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("export", cli.COMMANDS["export"])
