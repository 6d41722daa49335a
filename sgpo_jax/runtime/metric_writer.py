"""What a run reports: a JSONL file, TensorBoard scalars, one progress line, tables.

Only the first process of a run writes; the others hold a `Writer` with `enabled=False`.
"""

import json
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboardX import SummaryWriter

from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.runtime.progress import progress_line

_RECENT_STEPS = 20  # steps whose mean duration gives the ETA
_PLAIN_SECONDS = 5.0  # least time between two lines when the output is not a terminal


class Writer:
    """Writes the metrics of one stage, one row a step; a context manager.

    Files: `folder/NAME.jsonl` with one strict JSON object a line (`step` first, then the metrics in
    the order given, null for a value that is not finite), and `folder/tensorboard/NAME`.

    Steps count from 1. A run that resumes after step `resume_step` first drops the later rows,
    which it is about to write again, so that the file holds each step once.

    Args:
        folder: where the files go; made when absent.
        total_steps: steps of the whole stage, for the progress line.
        name: the stage, such as "sft" or "rl".
        resume_step: last step whose row is kept; 0 starts an empty file.
        enabled: False on every process but the first; nothing is then read, written or shown.

    Raises:
        ValueError: for an impossible `total_steps` or `resume_step`, or a broken JSONL file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        total_steps: int,
        name: str,
        resume_step: int = 0,
        enabled: bool = True,
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
        self._finished: deque[tuple[float, int]] = deque(maxlen=_RECENT_STEPS + 1)
        self._printed = -math.inf

    def __enter__(self) -> Self:
        if not self._enabled:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_rows_after(self._path, self._last_step)
        self._rows: TextIO = self._path.open("a", encoding="utf-8")
        # purge_step makes TensorBoard ignore what an earlier run logged from that step on.
        self._scalars = SummaryWriter(
            str(self._path.parent / "tensorboard" / self._name), purge_step=self._last_step + 1
        )
        console = Console()
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        self._show({})
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._enabled:
            return
        if self._live is not None:
            self._live.stop()
        self._scalars.close()
        self._rows.close()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends the row of one finished step and updates the progress line.

        Args:
            step: the step just finished, greater than every step written before.
            metrics: name -> scalar (Python, numpy or jax).

        Raises:
            ValueError: when `step` does not follow the last one, or a metric is named "step".
        """
        if not self._enabled:
            return
        if not self._last_step < step <= self._total_steps:
            raise ValueError(
                f"step must be in {self._last_step + 1}..{self._total_steps}, not {step}"
            )
        if "step" in metrics:
            raise ValueError("metrics must not contain 'step': it is an argument of its own")
        values = {key: _number(value) for key, value in metrics.items()}
        self._rows.write(_line({"step": step, **values}))
        self._rows.flush()
        for key, value in values.items():
            if math.isfinite(value):
                self._scalars.add_scalar(f"{self._name}/{key}", value, step)
        self._last_step = step
        self._finished.append((time.monotonic(), step))
        self._show(values)

    def _show(self, values: dict[str, int | float]) -> None:
        line = progress_line(
            self._name, self._last_step, self._total_steps, values, self._seconds_left()
        )
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        now = time.monotonic()
        if now - self._printed >= _PLAIN_SECONDS or self._last_step == self._total_steps:
            print(line, flush=True)
            self._printed = now

    def _seconds_left(self) -> float | None:
        """From the recent steps alone: the first one compiles, and responses grow with training."""
        if len(self._finished) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._finished[0], self._finished[-1]
        seconds = (last_time - first_time) / (last_step - first_step)
        return seconds * (self._total_steps - last_step)


def _drop_rows_after(path: Path, step: int) -> None:
    """Rewrites the file with the rows of steps 1..step, whole or not at all."""
    if not path.exists():
        return
    kept = [row for row in read_jsonl(path) if 1 <= row["step"] <= step]
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_line(row) for row in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _line(row: dict[str, Any]) -> str:
    """One line of strict JSON, which has no NaN and no infinity."""
    strict = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"


def _number(value: Any) -> int | float:
    """A Python number from a scalar of any kind, so that a count stays an integer."""
    return value if type(value) is int else float(value)
