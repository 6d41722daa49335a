"""Compares methods over seeds and worlds: a grid of training runs, its results and its page."""

from sgpo_jax.cli import lazily

_HOMES = {
    "Cell": "grid", "Results": "records", "cell_config": "grid", "check": "grid", "chosen_rates": "records",
    "digest": "grid", "grid_cells": "grid", "run": "compare", "run_cell": "workers", "tuning_cells": "grid",
    "write_page": "summary",
}  # fmt: skip
__all__ = [*_HOMES]
__getattr__ = lazily(__name__, _HOMES)  # its command reads its flags before it imports all this
