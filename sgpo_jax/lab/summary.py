"""Summarises the results of a lab: tables, figures, and the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_jax.lab.grid import Cell, grid_cells, home_world, tuning_cells, with_warm_ups
from sgpo_jax.lab.records import Results, chosen_rates, planned_cells
from sgpo_jax.report import figures, page
from sgpo_jax.runtime import files, mirror, tables
from sgpo_jax.stats import claims

Rows = list[dict[str, Any]]


def write_page(results: Results, running: bool, to: Path | None = None) -> None:
    """Writes the page of a lab, which can be unfinished.

    Args:
        results: the finished cells.
        running: more cells are coming; the page then reloads itself.
        to: file of the page; by default report.html in the folder of the lab.
    """
    planned = planned_cells(results)
    page.write_lab(
        results.folder, _grid_rows(results), results.rows(tuning_cells(results.config)),
        home=home_world(results.config), runs=lambda row: results.folder / str(Cell.from_row(row)),
        status=f"{sum(cell in results for cell in planned)} of {len(planned)} training runs", running=running, to=to,
    )  # fmt: skip


def write_tables(results: Results) -> None:
    """Prints the tables of a lab, and writes them and the figures to its folder: tables.txt and *.png.

    Raises:
        ValueError: the tuning is not complete.
    """
    home, rows = home_world(results.config), _grid_rows(results)
    texts = [tables.table(*table) for table in claims.tables(rows, results.rows(tuning_cells(results.config)), home)]
    files.write_text(results.folder / "tables.txt", "".join(texts))
    runs: dict[str, list[Rows]] = {}
    for row in rows:
        metrics = results.folder / str(Cell.from_row(row)) / "rl.jsonl"
        if row["world"] == home and metrics.is_file():  # a run that failed in its first step has none
            runs.setdefault(row["method"], []).append(files.read_jsonl(metrics))
    if runs:
        figures.overlay(runs, results.folder / "dynamics.png")
    if worlds := claims.across_worlds(rows):
        figures.worlds(worlds, runs).savefig(results.folder / "worlds.png", dpi=150)
        figures.kept(worlds).savefig(results.folder / "kept.png", dpi=150)
    print(mirror.shown(f"Tables and figures: {results.folder}"), flush=True)


def _grid_rows(results: Results) -> Rows:
    """Returns the rows of the grid, warm-ups included, each with "before"; none until the tuning is complete."""
    if not results.tuned:
        return []
    return with_before(results.rows(with_warm_ups(grid_cells(results.config, chosen_rates(results)))))


def with_before(rows: Sequence[dict[str, Any]]) -> Rows:
    """Returns the rows whose warm-up is among them, each with its accuracies as "before" and "before_guided"."""
    names = {"accuracy": "before", "accuracy_guided": "before_guided"}
    before = {
        Cell.from_row(row): {new: row[name] for name, new in names.items() if name in row}
        for row in rows
        if row["method"] == "sft"
    }
    warm_ups = [Cell.from_row(row).warm_up for row in rows]
    return [row | before[warm_up] for row, warm_up in zip(rows, warm_ups, strict=True) if warm_up in before]
