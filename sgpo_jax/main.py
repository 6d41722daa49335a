"""Runs `python -m sgpo_jax.main`, which is `sgpo train`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("train")
