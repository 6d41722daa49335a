"""Runs `python -m sgpo_jax.lab`, which is `sgpo lab`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("lab", cli.COMMANDS["lab"])
