"""Runs the cells of a lab in worker processes, with a core each. A cell that fails does not stop the others."""

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import sharding
from sgpo_jax.evaluation import evaluate_sets
from sgpo_jax.lab.grid import Cell, cell_config, digest
from sgpo_jax.policy import Run
from sgpo_jax.runtime import environment, files
from sgpo_jax.runtime.trackers import Trackers
from sgpo_jax.training import inputs, rl, sft, stage

# A row has the mean of these metrics over the steps of training.
_MEANS = ("reward_auto", "reward_guided", "alpha", "token_kl", "kl_clip_share", "entropy", "response_length")
_ROW = "row.json"  # in the folder of a cell that has ended
# Runs cells; yields each one that finishes with its row, or with its error.
RunCells = Callable[[Sequence[Cell]], Iterable[tuple[Cell, dict[str, Any] | Exception]]]


def run_cell(config: ConfigDict, cell: Cell, workdir: Path) -> dict[str, Any]:
    """Trains and evaluates a cell, or resumes where it stopped. Its output goes to the cell's log.txt.

    Args:
        config: of the cell: `cell_config`.
        cell: which one it is.
        workdir: folder of the lab.

    Returns:
        The row of results.jsonl. Where a gradient was not finite, "failed" has the message and the accuracy is 0.
    """
    started, folder = time.perf_counter(), workdir / str(cell)
    folder.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(**config.mesh)
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        Trackers.from_config(config, folder) as trackers,
    ):
        configs.check_resume(config, folder / "config.json")
        files.write_text(folder / "config.json", configs.to_json(config))
        environment.record(folder)
        run, initial = stage.open_run(config, folder, mesh)
        run = dataclasses.replace(run, trackers=trackers)
        stage.check_positions(run)
        warm_up = dataclasses.replace(run, workdir=workdir / str(cell.warm_up))
        warmed_up = functools.partial(stage.warmed_up, warm_up, initial)
        result: dict[str, Any] = {}
        try:
            if cell.method == "sft":
                sft.train(run, initial, inputs.demonstrations(run))
            elif not has_warmed_up(config, workdir, cell.warm_up):
                raise ValueError(f"{warm_up.workdir} has no finished warm-up, with which {cell} begins")
            else:
                problems = inputs.with_own_strategies(run, inputs.problems(run), warmed_up)
                rl.train(run, warmed_up, problems, rl.step_sampling(run))
        except FloatingPointError as error:
            result["failed"] = str(error)
        step = None if cell.method == "sft" else stage.find_step(config, folder, "rl", "last")
        params = warmed_up() if step is None else stage.params_at(run, "rl", step)
        result |= _accuracies(run, stage.weights(run, params), step or 0, failed="failed" in result)
    if step is not None:
        result |= training_means(folder / "rl.jsonl")
    row = {**cell._asdict(), "config": digest(config), **result, "seconds": round(time.perf_counter() - started, 1)}
    files.write_text(folder / _ROW, files.jsonl([row]))
    return row


def has_warmed_up(config: ConfigDict, workdir: Path, warm_up: Cell) -> bool:
    """Returns True if a warm-up has ended in the folder of the lab, and its checkpoint is there."""
    folder = workdir / str(warm_up)
    return (folder / _ROW).is_file() and stage.find_step(config, folder, "sft", "best") is not None


def _accuracies(run: Run, params: Any, step: int, failed: bool) -> dict[str, Any]:
    """Evaluates a cell; returns the accuracy of each set and their mean, both 0 where the training failed."""
    result: dict[str, Any] = {}
    for suffix in ("", "_guided") if run.config.eval.guided else ("",):
        with jax.set_mesh(run.mesh):
            sets = evaluate_sets(run, params, run.workdir / "eval", step, bool(suffix))
        accuracies = {name: 0.0 if failed else scores["accuracy"] for name, scores in sets.items()}
        result |= {f"accuracy{suffix}": float(np.mean([*accuracies.values()])), f"sets{suffix}": accuracies}
    return result


def training_means(path: Path) -> dict[str, float]:
    """Returns the means of _MEANS over the metrics rows of a training; a metric without values is left out.

    "pass_at_group" is the share of problems that a group solved, pass@G1, over the last tenth of the steps.
    """
    rows = files.read_jsonl(path)
    last = rows[-math.ceil(len(rows) / 10) :]
    values = {f"mean_{name}": [row.get(name) for row in rows] for name in _MEANS}
    values["pass_at_group"] = [row.get("solved") for row in last]
    known = {name: [number for number in numbers if number is not None] for name, numbers in values.items()}
    return {name: float(np.mean(numbers)) for name, numbers in known.items() if numbers}


@contextlib.contextmanager
def worker_pool(config: ConfigDict, workdir: Path) -> Iterator[RunCells]:
    """Yields a function that runs cells in `lab.workers` processes with a core each, or in this process for 0.

    On a host with GPUs a worker has one of them, or a part of its memory if there are more workers than GPUs.
    """
    if not config.lab.workers:
        yield lambda cells: ((cell, _attempt(config, cell, workdir)) for cell in cells)
        return
    spawn = multiprocessing.get_context("spawn")
    shares = spawn.Queue()
    available, gpus = sorted(os.sched_getaffinity(0)), host_gpus()
    for i in range(config.lab.workers):
        shares.put((available[i % len(available)], gpu_share(i, config.lab.workers, gpus)))
    arguments = shares, str(workdir / "compiled")
    pool = ProcessPoolExecutor(config.lab.workers, spawn, initializer=_begin, initargs=arguments)

    def run_cells(cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
        running = {pool.submit(_attempt, config, cell, workdir): cell for cell in cells}
        for future in as_completed(running):
            yield running[future], future.result()

    try:
        yield run_cells
    except KeyboardInterrupt:
        print("lab: stopped by Ctrl-C; finished training runs are kept, and the same command resumes", flush=True)
        os._exit(130)  # the workers end with this process, in the middle of a training run
    finally:
        pool.shutdown(cancel_futures=True)


def host_gpus() -> list[str]:
    """Returns the GPUs of this host that a process may use, as CUDA_VISIBLE_DEVICES names them, without opening one."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(driver.iterdir())))] if driver.is_dir() else []


def gpu_share(worker: int, workers: int, gpus: Sequence[str]) -> dict[str, str]:
    """Returns the environment variables of a worker: its GPU and, where it has not all of it, its share of the memory.

    A process of JAX takes this share of the memory of every GPU that it sees, 0.75 if the variable is not set.
    """
    if not gpus:
        return {}
    variables = {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]}
    if (users := len(range(worker % len(gpus), workers, len(gpus)))) > 1:
        whole = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
        variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{whole / users:.3f}"
    return variables


def _begin(shares: Any, compiled: str) -> None:
    """Prepares a worker process: its core, its GPU, and the compilation cache, which cells of the same shapes share."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent answers it
    core, variables = shares.get()
    os.sched_setaffinity(0, {core})
    os.environ.update(variables)
    logging.set_verbosity(logging.ERROR)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed; it would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _attempt(config: ConfigDict, cell: Cell, workdir: Path) -> dict[str, Any] | Exception:
    """Returns the row of a cell, or the error that it raised."""
    try:
        return run_cell(cell_config(config, cell), cell, workdir)
    except Exception as error:
        return error
