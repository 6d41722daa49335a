"""Runs `python -m sgpo_jax.plan`, which is `sgpo plan`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("plan")
