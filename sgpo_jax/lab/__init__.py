"""Compares methods over seeds and worlds: a grid of training runs, its results and its page."""

from sgpo_jax.lab.compare import run
from sgpo_jax.lab.grid import Cell, cell_config, check, digest, grid_cells, tuning_cells
from sgpo_jax.lab.records import Results, chosen_rates
from sgpo_jax.lab.summary import write_page
from sgpo_jax.lab.workers import run_cell

__all__ = [
    "Cell", "Results", "cell_config", "check", "chosen_rates", "digest", "grid_cells", "run", "run_cell",
    "tuning_cells", "write_page",
]  # fmt: skip
