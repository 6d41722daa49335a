"""How far long work has come: one line with the time left."""

import math
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

# Metrics worth a place on the line, in this order: name, label, format.
_SHOWN = (
    ("loss", "loss", ".4f"),
    ("validation_loss", "val", ".4f"),
    ("reward_auto", "auto", ".3f"),
    ("reward_guided", "guided", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("alpha", "alpha", ".3f"),
    ("token_kl", "kl", ".3f"),
    ("response_length", "len", ".0f"),
    ("tokens_per_second", "tok/s", ".0f"),
    ("tokens_per_second_rollout", "gen tok/s", ".0f"),
    ("tokens_per_second_update", "train tok/s", ".0f"),
    ("seconds", "seconds", ".0f"),
)
_RECENT = 20  # calls of `show` whose mean speed gives the ETA: the first step compiles, and responses grow
_SECONDS = 5.0  # least time between two printed lines


class Progress:
    """A line that says how far some work has come; a context manager.

    Args:
        name: of the work.
        total: units of the whole work: steps, problems.
        done: units that an earlier run has finished.
        live: this is the outermost work. Its line is kept up to date on a terminal, and it shows its start and its end;
            other work prints nothing in its first seconds.
        seconds: least time between two printed lines.
        enabled: False shows nothing, as on every process but the first.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, live: bool = False, seconds: float = _SECONDS, enabled: bool = True
    ):
        self._name, self._total, self._live, self._seconds, self._enabled = name, total, live, seconds, enabled
        start = (time.monotonic(), done)
        # The first step of a training run compiles, which says nothing about the others.
        self._recent: deque[tuple[float, int]] = deque([] if live else [start], maxlen=_RECENT + 1)
        self._done = done
        self._printed = -math.inf if live else time.monotonic()
        self._terminal: Live | None = None

    def __enter__(self) -> Self:
        if self._enabled and self._live:
            console = Console()
            if console.is_terminal:
                self._terminal = Live(console=console, auto_refresh=False)
                self._terminal.start()
            self.show(self._done)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._terminal is not None:
            self._terminal.stop()

    def show(self, done: int, metrics: Mapping[str, int | float] = {}, note: str = "", name: str = "") -> None:
        """Shows that `done` units are finished.

        Args:
            done: units finished in all.
            metrics: name -> value; those that have no place on the line are left out.
            note: more text, at the end of the line.
            name: takes the place of the work's name on this line.
        """
        now = time.monotonic()
        seconds_left = None
        if done > self._done:
            self._recent.append((now, done))
            self._done = done
        if len(self._recent) > 1:
            (then, before), (last, after) = self._recent[0], self._recent[-1]
            seconds_left = (last - then) / (after - before) * (self._total - done)
        if not self._enabled:
            return
        line = progress_line(name or self._name, done, self._total, metrics, seconds_left) + ("  " + note) * bool(note)
        if self._terminal is not None:
            self._terminal.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif now - self._printed >= self._seconds or (self._live and done == self._total):
            print(line, flush=True)
            self._printed = now


def progress_line(
    name: str, done: int, total: int, metrics: Mapping[str, int | float], seconds_left: float | None
) -> str:
    """Returns one line of text: name, position, time left, the telling metrics.

    Args:
        name: of the work.
        done, total: units finished, and in all.
        metrics: name -> value; those that have no place on the line are left out.
        seconds_left: None where it is not known yet.
    """
    parts = [f"{name} {done}/{total}"]
    if seconds_left is not None:
        parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    parts += [f"{label} {metrics[key]:{form}}" for key, label, form in _SHOWN if key in metrics]
    return "  ".join(parts)
