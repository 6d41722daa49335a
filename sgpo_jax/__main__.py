"""Runs `sgpo COMMAND ...`, which is also `python -m sgpo_jax COMMAND ...`."""

from sgpo_jax.cli import main

if __name__ == "__main__":
    main()
