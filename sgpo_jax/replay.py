"""Runs `python -m sgpo_jax.replay`, which is `sgpo replay`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("replay")
