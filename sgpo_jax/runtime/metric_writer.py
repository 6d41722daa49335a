"""Writes the metrics of a training stage to a JSONL file, the trackers and the progress line."""

import json
import math
import os
from pathlib import Path
from typing import Any, Self, TextIO

from sgpo_jax.runtime.files import read_jsonl, sync, write_text
from sgpo_jax.runtime.progress import Progress
from sgpo_jax.runtime.trackers import Trackers


class Writer:
    """A writer of one stage's metrics, one row a step; a context manager.

    It writes `folder/NAME.jsonl` with one strict JSON object a line (`step` first, then the metrics in the order
    given, null for a value that is not finite).

    Steps count from 1. A run that resumes after step `resume_step` first drops the later rows, because it will write
    them again. So the file has each step once.

    Args:
        folder: where the files go; created if missing.
        total_steps: steps of the whole stage, for the progress line.
        name: the stage, such as "sft" or "rl".
        resume_step: last step whose row is kept; 0 starts an empty file.
        enabled: False on every process but the first; then nothing is read, written or shown.
        trackers: get every row too.

    Raises:
        ValueError: `total_steps` or `resume_step` is out of range, or the JSONL file is broken.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        total_steps: int,
        name: str,
        resume_step: int = 0,
        enabled: bool = True,
        trackers: Trackers | None = None,
    ):
        if total_steps < 0:
            raise ValueError(f"total_steps must be at least 0, not {total_steps}")
        if not 0 <= resume_step <= total_steps:
            raise ValueError(f"resume_step must be in 0..{total_steps}, not {resume_step}")
        self._path = Path(folder) / f"{name}.jsonl"
        self._total_steps = total_steps
        self._name = name
        self._last_step = resume_step
        self._enabled = enabled
        self._trackers = trackers or Trackers()
        self._progress = Progress(name, total_steps, resume_step, live=True, enabled=enabled)

    def __enter__(self) -> Self:
        if not self._enabled:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_rows_after(self._path, self._last_step)
        self._rows: TextIO = self._path.open("a", encoding="utf-8")
        self._trackers.begin(self._name, self._last_step)
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._enabled:
            return
        self._progress.__exit__(*exception)
        self._rows.close()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends the row of one finished step and updates the progress line.

        Args:
            step: the finished step, greater than every step written before.
            metrics: name -> scalar (Python, numpy or jax).

        Raises:
            ValueError: `step` does not follow the last one, or a metric is named "step".
        """
        if not self._enabled:
            return
        if not self._last_step < step <= self._total_steps:
            raise ValueError(f"step must be in {self._last_step + 1}..{self._total_steps}, not {step}")
        if "step" in metrics:
            raise ValueError("metrics must not contain 'step': it is an argument of its own")
        values = {key: _number(value) for key, value in metrics.items()}
        self._rows.write(_line({"step": step, **values}))
        self._rows.flush()
        self._trackers.log(self._name, step, values)
        self._last_step = step
        self._progress.show(step, values)

    def sync(self) -> None:
        """Puts every row of the file on disk: a run that resumes after a checkpoint does not write those before it."""
        if self._enabled:
            sync(self._rows)


def _drop_rows_after(path: Path, step: int) -> None:
    """Rewrites the file with the rows of steps 1..step only."""
    if path.exists():
        write_text(path, "".join(_line(row) for row in read_jsonl(path) if 1 <= row["step"] <= step))


def _line(row: dict[str, Any]) -> str:
    """Returns a line of strict JSON, which has no NaN and no infinity."""
    strict = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"


def _number(value: Any) -> int | float:
    """Returns a scalar of any kind as a Python number; a count stays an integer."""
    return value if type(value) is int else float(value)
