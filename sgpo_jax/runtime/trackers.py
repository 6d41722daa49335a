"""Trackers of experiments behind one writer: TensorBoard, Weights & Biases, MLflow and Trackio.

Each works in a thread of its own and never costs a step: one that fails or stands still is left out, with one warning.
"""

import itertools
import json
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any, Self

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax.runtime.distributed import is_first
from sgpo_jax.runtime.files import write_text
from sgpo_jax.runtime.tracker_clients import CLIENTS, PACKAGES, Client, Tracked

FILE = "trackers.json"  # in the folder of a run: the id by which its trackers find it again
ROWS = 100  # first rows of a table that trackers get; the run's own files have all
_WAITING = 1000  # calls that wait for a slow tracker; with more it counts as standing still
_PATIENCE = 60.0  # seconds at the end of a run in which the trackers finish their work
_HURRY = 5.0  # the same where the run was stopped or has failed


def check(names: Sequence[str]) -> None:
    """Checks that the packages of the trackers are installed, without importing them.

    Raises:
      ValueError: one is not.
    """
    if missing := [PACKAGES[name] for name in names if util.find_spec(PACKAGES[name]) is None]:
        raise ValueError(
            f"config.trackers={tuple(names)!r}: must have their packages installed; without {', '.join(missing)}: "
            "pip install 'sgpo_jax[trackers]'"
        )


class Trackers:
    """The trackers of a run; a context manager. Without names it does nothing.

    Args:
      names: from `tracker_clients.CLIENTS`.
      workdir: folder of the run.
      config: of the run, as in config.json.
    """

    def __init__(
        self, names: Sequence[str] = (), workdir: Path = Path(), config: Mapping[str, Any] | None = None
    ):
        self._names, self._workdir, self._config = names, workdir, config or {}
        self._workers: list[_Worker] = []

    @classmethod
    def from_config(cls, config: ConfigDict, workdir: Path) -> Self:
        """Returns the trackers that a config names; in the first process only."""
        return cls(config.trackers if is_first() else (), workdir, configs.to_dict(config))

    def __enter__(self) -> Self:
        if self._names:
            named = any(name != "tensorboard" for name in self._names)  # event files need no id
            run = Tracked(_id(self._workdir / FILE) if named else "", self._workdir, self._config)
            self._workers = [_Worker(name, run) for name in self._names]
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for worker in self._workers:
            worker.put(lambda client: client.close(kind is not None))
        until = time.monotonic() + (_PATIENCE if kind is None else _HURRY)
        for worker in self._workers:
            worker.end(until)

    def begin(self, stage: str, after: int) -> None:
        """Begins a stage, or goes on with it after a step."""
        self._put(lambda client: client.begin(stage, after))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Gives the trackers the metrics of a step that are finite."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._put(lambda client: client.log(stage, step, finite))

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Gives the trackers the first `ROWS` rows of a table, whose keys are those of its first row."""
        if rows:
            self._put(lambda client: client.table(name, step, rows[:ROWS]))

    def lines(self, name: str, step: int, path: Path) -> None:
        """Gives the trackers the first `ROWS` lines of a JSONL file as a table."""
        if self._workers:
            with path.open(encoding="utf-8") as file:
                self.table(name, step, [json.loads(line) for line in itertools.islice(file, ROWS)])

    def file(self, path: Path) -> None:
        """Gives the trackers a file, if it is there."""
        if path.is_file():
            self._put(lambda client: client.file(path))

    def _put(self, call: Callable[[Client], None]) -> None:
        for worker in self._workers:
            worker.put(call)


class _Worker:
    """The thread of one tracker."""

    def __init__(self, name: str, run: Tracked):
        self._name, self._run = name, run
        self._calls: queue.Queue[Callable[[Client], None] | None] = queue.Queue(_WAITING)
        self._left_out = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Client], None] | None) -> None:
        """Adds a call to those that wait, unless the tracker is left out."""
        if self._left_out:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._leave_out(f"{_WAITING} calls wait for it")

    def end(self, until: float) -> None:
        """Waits until all is done, or for the time on the clock."""
        self.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._leave_out("has not finished in time")

    def _work(self) -> None:
        try:
            client = CLIENTS[self._name](self._run)
            if client.where:
                print(f"{self._name}: {client.where}", flush=True)
            while (call := self._calls.get()) and not self._left_out:
                call(client)
        except BaseException as error:  # what a client raises here would end in this thread, unseen
            self._leave_out(f"{type(error).__name__}: {error}")

    def _leave_out(self, why: str) -> None:
        if not self._left_out:
            self._left_out = True
            print(f"warning: {self._name}: {' '.join(why.split())}; the run goes on without it", flush=True)


def _id(path: Path) -> str:
    """Returns the id in the file of a run; a new one where there is none."""
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    new = uuid.uuid4().hex[:12]
    write_text(path, json.dumps({"id": new}) + "\n")
    return new
