"""Runs `python -m sgpo_jax.report`, which is `sgpo report`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("report")
