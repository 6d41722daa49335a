"""Runs `python -m sgpo_jax.export`, which is `sgpo export`."""

from sgpo_jax.commands import start

if __name__ == "__main__":
    start("export")
