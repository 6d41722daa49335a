"""Finished cells on disk, and what is reported of them: rates, tables, figures, the page."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sgpo_jax.lab.grid import (
    Cell,
    Rates,
    cell_config,
    cell_of,
    digest,
    grid_cells,
    home_of,
    pairs,
    tuning_cells,
    with_warm_ups,
)
from sgpo_jax.report import figures, page
from sgpo_jax.runtime import tables
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.runtime.progress import progress_line
from sgpo_jax.stats import claims


def chosen_rates(config: ConfigDict, results: "Results") -> Rates:
    """The best rate of each method in each world on the tuning seeds.

    Raises:
      ValueError: there are no tuning results of a method yet.
    """
    tuning = tuning_cells(config)
    if not tuning:
        return dict.fromkeys(pairs(config), float(config.lab.rates[0]))
    rows = results.rows(tuning)
    return {pair: claims.best_rate(rows, *pair) for pair in dict.fromkeys(cell[:2] for cell in tuning)}


def write_page(results: "Results", running: bool, to: Path | None = None) -> None:
    """The page of the lab as far as it has come, by default report.html in its folder."""
    config, tuning = results.config, tuning_cells(results.config)
    tuned = all(cell in results for cell in tuning)
    grid = with_warm_ups(grid_cells(config, chosen_rates(config, results) if tuned else {}))
    every = {*with_warm_ups(tuning), *grid}
    page.write_lab(
        results.folder, with_before(results.rows(grid) if tuned else []), results.rows(tuning), home=home_of(config),
        runs=lambda row: results.folder / str(cell_of(row)),
        status=f"{sum(cell in results for cell in every)} of {len(every)} training runs", running=running, to=to,
    )  # fmt: skip


class Results:
    """results.jsonl: a row for each finished cell. A row that another config gave does not count."""

    def __init__(self, config: ConfigDict, path: Path):
        self.config, self.folder, self._path = config, path.parent, path
        rows = read_jsonl(path) if path.is_file() else []
        self._rows = {(cell_of(row), row["config"]): row for row in rows}

    def repair(self) -> None:
        """Rewrites the file without the line that a kill may have torn."""
        unfinished = self._path.with_suffix(".partial")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in self._rows.values()), encoding="utf-8")
        os.replace(unfinished, self._path)

    def _key(self, cell: Cell) -> tuple[Cell, str]:
        return cell, digest(cell_config(self.config, cell))

    def __contains__(self, cell: Cell) -> bool:
        return self._key(cell) in self._rows

    def add(self, row: dict[str, Any]) -> None:
        self._rows[cell_of(row), row["config"]] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Those of the cells that are finished."""
        return [self._rows[self._key(cell)] for cell in cells if cell in self]


class Progress:
    """A line for each finished cell, with the time that the others will take."""

    def __init__(self, results: Results, cells: Sequence[Cell]):
        self._left = len({cell for cell in cells if cell not in results})
        self._all, self._done, self._started = len(set(cells)), 0, time.monotonic()
        print(f"lab: {self._all} cells, {self._left} to run", flush=True)

    def show(self, row: dict[str, Any]) -> None:
        self._done += 1
        self._left = max(self._left - 1, 0)
        seconds = (time.monotonic() - self._started) / self._done * self._left
        known = {"accuracy": row["accuracy"], "seconds": row["seconds"]}
        line = progress_line(f"lab {cell_of(row)}", self._all - self._left, self._all, known, seconds)
        print(line, flush=True)


def with_before(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose warm-up is among them, each with its accuracy as "before"."""
    warm = {(row["world"], row["seed"]): row["accuracy"] for row in rows if row["method"] == "sft"}
    return [row | {"before": warm[key]} for row in rows if (key := (row["world"], row["seed"])) in warm]


def report(
    config: ConfigDict, workdir: Path, tuning: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> None:
    """Prints the tables, and writes them with the figures to `workdir`."""
    home = home_of(config)
    text = [tables.table(*each) for each in claims.tables(rows, tuning, home)]
    (workdir / "tables.txt").write_text("".join(text), encoding="utf-8")
    runs: dict[str, list] = {}
    for row in rows:
        path = workdir / str(cell_of(row)) / "rl.jsonl"
        if row["world"] == home and path.is_file():  # a run that failed at once has none
            runs.setdefault(row["method"], []).append(read_jsonl(path))
    if runs:
        figures.overlay(runs, workdir / "dynamics.png")
    if worlds := claims.across_worlds(rows):
        figures.worlds(worlds, runs).savefig(workdir / "worlds.png", dpi=150)
    print(f"Tables and figures: {workdir}", flush=True)
