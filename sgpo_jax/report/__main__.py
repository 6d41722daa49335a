"""Runs `python -m sgpo_jax.report`, which is `sgpo report`."""

from sgpo_jax import cli

if __name__ == "__main__":
    cli.start("report", cli.COMMANDS["report"])
