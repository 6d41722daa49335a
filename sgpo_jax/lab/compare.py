"""The whole lab: tunes the rates, runs the grid, reports."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax.lab.grid import Cell, grid_cells, tuning_cells, with_warm_ups
from sgpo_jax.lab.results import Progress, Results, chosen_rates, report, with_before, write_page
from sgpo_jax.lab.workers import RunAll, worker_pool
from sgpo_jax.report import page


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs what is left of the lab, and reports.

    Raises:
      ValueError: cells failed; the others are finished, and the message names one.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(configs.to_json(config), encoding="utf-8")
    results = Results(config, workdir / "results.jsonl")
    results.repair()
    tuning = tuning_cells(config)
    tuned = all(cell in results for cell in tuning)
    expected = grid_cells(config, chosen_rates(config, results) if tuned else {})  # as many, whatever the rates
    progress = Progress(results, [*with_warm_ups(tuning), *with_warm_ups(expected)])
    with worker_pool(config, workdir) as run_all:
        _complete(tuning, results, run_all, progress)
        grid = grid_cells(config, chosen_rates(config, results))
        _complete(grid, results, run_all, progress)
    report(config, workdir, results.rows(tuning), with_before(results.rows(with_warm_ups(grid))))
    write_page(results, running=False)


def _complete(cells: Sequence[Cell], results: Results, run_all: RunAll, progress: Progress) -> None:
    """Runs the cells that have no row yet, warm-ups first."""
    everything = with_warm_ups(cells)
    for warm in (True, False):
        left = [cell for cell in everything if cell not in results and (cell.method == "sft") == warm]
        failures = {}
        for cell, found in run_all(left):
            if isinstance(found, Exception):
                failures[cell] = f"{cell}: {type(found).__name__}: {found}"
                print(f"lab: failed: {failures[cell]}", flush=True)
                continue
            results.add(found)
            progress.show(found)
            if results.config.report_seconds:
                page.attempt(write_page, results, running=True)
        if failures:
            first = next(failures[cell] for cell in left if cell in failures)
            raise ValueError(f"{len(failures)} of {len(left)} cells failed, the first is {first}")
