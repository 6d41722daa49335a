"""Runs `python -m sgpo_jax.analyze`, which is `sgpo analyze`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("analyze")
