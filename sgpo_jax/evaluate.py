"""Runs `python -m sgpo_jax.evaluate`, which is `sgpo evaluate`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("evaluate", cli.COMMANDS["evaluate"])
