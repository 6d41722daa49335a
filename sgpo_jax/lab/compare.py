"""Runs a whole lab: tunes the learning rates, trains the grid, and reports."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax.lab.grid import Cell, grid_cells, tuning_cells, with_warm_ups
from sgpo_jax.lab.records import Results, chosen_rates, planned_cells
from sgpo_jax.lab.summary import write_page, write_tables
from sgpo_jax.lab.workers import RunCells, has_warmed_up, worker_pool
from sgpo_jax.report import page
from sgpo_jax.runtime import files
from sgpo_jax.runtime.progress import Progress


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs the cells that are left, and reports.

    Raises:
        ValueError: cells failed. The others are finished, and the message names the first that failed.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_text(workdir / "config.json", configs.to_json(config))
    results = Results(config, workdir / "results.jsonl")
    results.repair()
    planned = planned_cells(results)
    finished = sum(cell in results for cell in planned)
    print(f"lab: {len(planned)} cells, {len(planned) - finished} to run", flush=True)
    with (
        worker_pool(config, workdir) as run_cells,
        Progress("lab", len(planned), finished, seconds=0) as progress,  # a line for each cell
    ):

        def add(row: dict[str, Any]) -> None:
            results.add(row)
            finished = sum(cell in results for cell in planned_cells(results))
            progress.show(finished, row, name=f"lab {Cell.from_row(row)}")
            if config.report_seconds:
                page.attempt(write_page, results, running=True)

        _run_missing(tuning_cells(config), results, workdir, run_cells, add)
        _run_missing(grid_cells(config, chosen_rates(results)), results, workdir, run_cells, add)
    write_tables(results)
    write_page(results, running=False)


def _run_missing(
    cells: Sequence[Cell], results: Results, workdir: Path, run_cells: RunCells, add: Callable[[dict[str, Any]], None]
) -> None:
    """Runs the cells that have no row yet, all warm-ups before the others, and calls `add` with each row.

    Rows can be there without their folders. A warm-up is run again where a cell is to begin with it and it has not
    ended in this folder.
    """
    others = [cell for cell in cells if cell.method != "sft" and cell not in results]
    gone = {cell.warm_up for cell in others if not has_warmed_up(results.config, workdir, cell.warm_up)}
    warm_ups = [c for c in with_warm_ups(cells) if c.method == "sft" and (c not in results or c in gone)]
    for missing in (warm_ups, others):
        failures = {}
        for cell, outcome in run_cells(missing):
            if isinstance(outcome, Exception):
                failures[cell] = f"{cell}: {type(outcome).__name__}: {outcome}"
                print(f"lab: failed: {failures[cell]}", flush=True)
            else:
                add(outcome)
        if failures:
            first = next(failures[cell] for cell in missing if cell in failures)
            raise ValueError(f"{len(failures)} of {len(missing)} cells failed, the first is {first}")
