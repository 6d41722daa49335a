"""Runs `python -m sgpo_jax.lab`, which is `sgpo lab`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("lab")
