"""Runs `python -m sgpo_jax.replay`, which is `sgpo replay`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("replay", cli.COMMANDS["replay"])
