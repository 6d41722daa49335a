"""The laboratory: methods against each other over seeds and worlds, with a verdict for each of the paper's claims.

    python -m sgpo_jax.lab --config=configs/lab.py --workdir=DIR [--fast]

First the learning rate of each method is tuned in each world, all with the same budget and on seeds of their own; then
every method is trained in the first world with every seed, and some of them in the other worlds. A finished training
run is a row of DIR/results.jsonl and is not run again; tables, verdicts and figures are made of these rows and of the
metrics beside them. docs/lab.md has what came out.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from sgpo_jax import cli, config_checks, data, methods, rl, sft, sharding, stage
from sgpo_jax import config as configs
from sgpo_jax.evaluation import evaluate_sets
from sgpo_jax.report import figures, page
from sgpo_jax.runtime import environment, lock, tables
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.runtime.progress import progress_line
from sgpo_jax.stats import claims

# Averages over training that a row keeps.
_MEANS = ("reward_auto", "reward_guided", "alpha", "token_kl", "kl_clip_share", "entropy", "response_length")


class Cell(NamedTuple):
    """One training run. The cell of method "sft" is the warm-up that the others of its world and seed begin with."""

    world: str
    method: str
    rate: float  # times the method's learning rate
    seed: int

    def __str__(self) -> str:
        return f"{self.world}/{self.method}@{self.rate:g}/seed{self.seed}"


Rates = dict[tuple[str, str], float]  # (world, method) -> rate

# Cells -> each with its row, or with what went wrong, as it finishes.
RunAll = Callable[[Sequence[Cell]], Iterable[tuple[Cell, dict[str, Any] | Exception]]]


def cell_config(config: ConfigDict, cell: Cell) -> ConfigDict:
    """The lab's config in the cell's world, by its method, at its rate, with its seed."""
    config = config.copy_and_resolve_references()
    config.update(config.lab.changes[cell.world])
    config.seed = cell.seed
    config = methods.select(config, cell.method)
    config.rl.learning_rate *= cell.rate
    config.report_seconds = 0.0  # the lab has a page of its own
    return config.lock()


def check(config: ConfigDict) -> None:
    """Raises ValueError for a lab, or a cell of it, that cannot run, or has problems that cannot be read."""
    config_checks.check_lab(config)
    read = functools.cache(data.load)
    for world, method in _pairs(config):
        try:
            changed = cell_config(config, Cell(world, method, 1.0, 0))
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"config.lab.changes[{world!r}]: {error.args[0]}") from error
        config_checks.check(changed)
        for source in (changed.data.train, changed.sft.train, *(each.source for each in changed.eval.sets.values())):
            if source:  # sft.train may be empty
                read(source)


def tuning_cells(config: ConfigDict) -> list[Cell]:
    """Every method that trains, at every rate, on the tuning seeds; none where there is nothing to choose from."""
    lab = config.lab
    trained = [pair for pair in _pairs(config) if pair[1] != "sft"] if len(lab.rates) > 1 else []
    return [Cell(*pair, *rest) for pair, *rest in itertools.product(trained, lab.rates, lab.tuning_seeds)]


def grid_cells(config: ConfigDict, rates: Rates) -> list[Cell]:
    """Every method of each world with every seed."""
    return [Cell(*pair, rates.get(pair, 1.0), seed) for pair in _pairs(config) for seed in config.lab.seeds]


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
    progress = Progress(results, [*_with_warm_ups(tuning), *_with_warm_ups(expected)])
    with _workers(config, workdir) as run_all:
        _complete(tuning, results, run_all, progress)
        grid = grid_cells(config, chosen_rates(config, results))
        _complete(grid, results, run_all, progress)
    report(config, workdir, results.rows(tuning), _with_before(results.rows(_with_warm_ups(grid))))
    write_page(results, running=False)


def chosen_rates(config: ConfigDict, results: "Results") -> Rates:
    """The best rate of each method in each world on the tuning seeds.

    Raises:
      ValueError: there are no tuning results of a method yet.
    """
    tuning = tuning_cells(config)
    if not tuning:
        return dict.fromkeys(_pairs(config), float(config.lab.rates[0]))
    rows = results.rows(tuning)
    return {pair: claims.best_rate(rows, *pair) for pair in dict.fromkeys(cell[:2] for cell in tuning)}


def write_page(results: "Results", running: bool, to: Path | None = None) -> None:
    """The page of the lab as far as it has come, by default report.html in its folder."""
    config, tuning = results.config, tuning_cells(results.config)
    tuned = all(cell in results for cell in tuning)
    grid = _with_warm_ups(grid_cells(config, chosen_rates(config, results) if tuned else {}))
    every = {*_with_warm_ups(tuning), *grid}
    page.write_lab(
        results.folder, _with_before(results.rows(grid) if tuned else []), results.rows(tuning), home=_home(config),
        runs=lambda row: results.folder / str(_cell_of(row)),
        status=f"{sum(cell in results for cell in every)} of {len(every)} training runs", running=running, to=to,
    )  # fmt: skip


def run_cell(config: ConfigDict, cell: Cell, workdir: Path) -> dict[str, Any]:
    """Trains and evaluates, or goes on where it stopped; what it prints goes to the cell's log.txt.

    Returns:
      The row of results.jsonl. Where the gradient stopped being finite, "failed" says so and the accuracy is 0.
    """
    started, folder = time.perf_counter(), workdir / str(cell)
    folder.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(**config.mesh)
    with (folder / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        configs.check_resume(config, folder / "config.json")
        (folder / "config.json").write_text(configs.to_json(config), encoding="utf-8")
        environment.record(folder)
        policy, load = stage.load_policy(config)
        warm_up = workdir / str(Cell(cell.world, "sft", 1.0, cell.seed))

        def initial() -> Any:
            return load(jax.random.key(config.seed))

        def warmed_up() -> Any:
            params = stage.best_params(config, warm_up, "sft", policy, mesh)
            return initial() if params is None else params

        result: dict[str, Any] = {}
        try:
            if cell.method == "sft":
                sft.train(config, folder, policy, initial, mesh)
            else:
                rl.train(config, folder, policy, warmed_up, mesh)
        except FloatingPointError as error:
            result["failed"] = str(error)
        step = None if cell.method == "sft" else stage.find_step(config, folder, "rl", "last")
        params = warmed_up() if step is None else stage.params_at(config, folder, "rl", step, policy, mesh)
        for suffix in ("", "_guided") if config.eval.guided else ("",):
            with jax.set_mesh(mesh):
                sets = evaluate_sets(config, folder / "eval", policy, params, mesh, step or 0, guided=bool(suffix))
            accuracy = {name: 0.0 if "failed" in result else scores["accuracy"] for name, scores in sets.items()}
            result |= {f"accuracy{suffix}": float(np.mean([*accuracy.values()])), f"sets{suffix}": accuracy}
    if step is not None:
        steps = read_jsonl(folder / "rl.jsonl")
        for name in _MEANS:
            if values := [row[name] for row in steps if row.get(name) is not None]:
                result[f"mean_{name}"] = float(np.mean(values))
    return {**cell._asdict(), "config": digest(config), **result, "seconds": round(time.perf_counter() - started, 1)}


def digest(config: ConfigDict) -> str:
    """Of the fields that a cell's result depends on."""
    fields = json.loads(configs.to_json(config))
    values = [value for name, value in sorted(fields.items()) if name not in ("lab", "report_seconds")]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class Results:
    """results.jsonl: a row for each finished cell. A row that another config gave does not count."""

    def __init__(self, config: ConfigDict, path: Path):
        self.config, self.folder, self._path = config, path.parent, path
        rows = read_jsonl(path) if path.is_file() else []
        self._rows = {(_cell_of(row), row["config"]): row for row in rows}

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
        self._rows[_cell_of(row), row["config"]] = row
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
        line = progress_line(f"lab {_cell_of(row)}", self._all - self._left, self._all, known, seconds)
        print(line, flush=True)


def _cell_of(row: dict[str, Any]) -> Cell:
    return Cell(row["world"], row["method"], row["rate"], row["seed"])


def _home(config: ConfigDict) -> str:
    return config.lab.worlds[0]


def _pairs(config: ConfigDict) -> list[tuple[str, str]]:
    """(world, method): all methods in the first world, `lab.world_methods` in the others."""
    lab, home = config.lab, _home(config)
    return [(w, m) for w in lab.worlds for m in (lab.methods if w == home else lab.world_methods)]


def _with_warm_ups(cells: Sequence[Cell]) -> list[Cell]:
    warm_ups = [Cell(world, "sft", 1.0, seed) for world, seed in dict.fromkeys((c.world, c.seed) for c in cells)]
    return [*warm_ups, *(cell for cell in cells if cell.method != "sft")]


def _complete(cells: Sequence[Cell], results: Results, run_all: RunAll, progress: Progress) -> None:
    """Runs the cells that have no row yet, warm-ups first."""
    everything = _with_warm_ups(cells)
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


@contextlib.contextmanager
def _workers(config: ConfigDict, workdir: Path) -> Iterator[RunAll]:
    """Runs cells in `lab.workers` processes with a core each, or in this one for 0."""
    if not config.lab.workers:
        yield lambda cells: ((cell, _attempt(config, cell, workdir)) for cell in cells)
        return
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.Queue()
    available = sorted(os.sched_getaffinity(0))
    for i in range(config.lab.workers):
        cores.put(available[i % len(available)])
    arguments = cores, str(workdir / "compiled")
    pool = ProcessPoolExecutor(config.lab.workers, spawn, initializer=_begin, initargs=arguments)

    def run_all(cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
        running = {pool.submit(_attempt, config, cell, workdir): cell for cell in cells}
        for future in as_completed(running):
            yield running[future], future.result()

    try:
        yield run_all
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(cores: Any, compiled: str) -> None:
    """Of a worker: cells have the same shapes, so what one has compiled the others read."""
    os.sched_setaffinity(0, {cores.get()})
    logging.set_verbosity(logging.ERROR)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _attempt(config: ConfigDict, cell: Cell, workdir: Path) -> dict[str, Any] | Exception:
    """The cell's row, or what went wrong: one cell must not cost the others."""
    try:
        return run_cell(cell_config(config, cell), cell, workdir)
    except Exception as error:
        return error


def _with_before(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose warm-up is among them, each with its accuracy as "before"."""
    warm = {(row["world"], row["seed"]): row["accuracy"] for row in rows if row["method"] == "sft"}
    return [row | {"before": warm[key]} for row in rows if (key := (row["world"], row["seed"])) in warm]


def report(
    config: ConfigDict, workdir: Path, tuning: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> None:
    """Prints the tables, and writes them with the figures to `workdir`."""
    home = _home(config)
    text = [tables.table(*each) for each in claims.tables(rows, tuning, home)]
    (workdir / "tables.txt").write_text("".join(text), encoding="utf-8")
    runs: dict[str, list] = {}
    for row in rows:
        path = workdir / str(_cell_of(row)) / "rl.jsonl"
        if row["world"] == home and path.is_file():  # a run that failed at once has none
            runs.setdefault(row["method"], []).append(read_jsonl(path))
    if runs:
        figures.overlay(runs, workdir / "dynamics.png")
    if worlds := claims.across_worlds(rows):
        figures.worlds(worlds, runs).savefig(workdir / "worlds.png", dpi=150)
    print(f"Tables and figures: {workdir}", flush=True)


def main(config, given) -> None:
    if given.fast:
        config.update(config.lab.fast)
    check(config)
    workdir = cli.folder("workdir", given.workdir)
    with lock.hold(workdir):
        run(config, workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the results; goes on with what is there.")
    flags.DEFINE_bool("fast", False, "The small lab: the changes of config.lab.fast.")
    cli.start(main, required=["config", "workdir"])
