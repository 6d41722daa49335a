"""Runs `python -m sgpo_jax.plan`, which is `sgpo plan`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("plan", cli.COMMANDS["plan"])
