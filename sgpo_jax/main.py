"""Runs `python -m sgpo_jax.main`, which is `sgpo train`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("train", cli.COMMANDS["train"])
