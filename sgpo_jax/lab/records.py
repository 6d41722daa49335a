"""The finished cells of a lab on disk, and what follows from them: the rates, and the cells that are planned."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sgpo_jax.lab.grid import Cell, Rates, cell_config, digest, grid_cells, pairs, tuning_cells, with_warm_ups
from sgpo_jax.runtime import files
from sgpo_jax.stats import claims


class Results:
    """The file results.jsonl, with a row for each finished cell. Rows of another config are ignored.

    Args:
        config: of the lab; it must not change afterwards.
        path: of the file, which can be absent. Its folder is that of the lab.
    """

    def __init__(self, config: ConfigDict, path: Path):
        self.config, self.folder, self._path = config, path.parent, path
        rows = files.read_jsonl(path) if path.is_file() else []
        self._rows = {(Cell.from_row(row), row["config"]): row for row in rows}
        self._digest = functools.cache(lambda cell: digest(cell_config(config, cell)))

    def repair(self) -> None:
        """Rewrites the file without a last line that a kill has left half written."""
        files.write_text(self._path, files.jsonl(self._rows.values()))

    def __contains__(self, cell: Cell) -> bool:
        return (cell, self._digest(cell)) in self._rows

    def add(self, row: dict[str, Any]) -> None:
        """Adds the row of a finished cell, and writes it to disk."""
        self._rows[Cell.from_row(row), row["config"]] = row
        files.append_text(self._path, files.jsonl([row]))

    def rows(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Returns the rows of those of the cells that are finished."""
        return [self._rows[cell, self._digest(cell)] for cell in cells if cell in self]

    @property
    def tuned(self) -> bool:
        """True once all tuning cells are finished."""
        return all(cell in self for cell in tuning_cells(self.config))


def chosen_rates(results: Results) -> Rates:
    """Returns the best rate of each method in each world on the tuning seeds; the only rate where there is one.

    Raises:
        ValueError: a method has no tuning results yet.
    """
    config = results.config
    tuning = tuning_cells(config)
    if not tuning:
        return dict.fromkeys(pairs(config), float(config.lab.rates[0]))
    rows = results.rows(tuning)
    return {pair: claims.best_rate(rows, *pair) for pair in dict.fromkeys(cell[:2] for cell in tuning)}


def planned_cells(results: Results) -> list[Cell]:
    """Returns every cell of the lab. The rates of the grid are preliminary until the tuning is complete."""
    rates = chosen_rates(results) if results.tuned else {}
    tuning, grid = tuning_cells(results.config), grid_cells(results.config, rates)
    return list(dict.fromkeys([*with_warm_ups(tuning), *with_warm_ups(grid)]))
