"""Progress of long work on one line, with the time left."""

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
_RECENT = 20  # calls of `show` whose mean speed gives the ETA; speed changes, since responses grow in training
_SECONDS = 5.0  # least time between two printed lines


class Progress:
    """A line that shows how far some work has come; a context manager.

    Args:
        name: the work's name.
        total: units of the whole work, such as steps or problems.
        done: units that an earlier run has finished.
        live: True for the outermost work. A terminal shows its line in place, and its start and end are always shown.
            Other work prints lines, the first one after some seconds.
        seconds: least time between two printed lines.
        enabled: False shows nothing, as on every process but the first.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, live: bool = False, seconds: float = _SECONDS, enabled: bool = True
    ):
        self._name, self._total, self._live, self._seconds, self._enabled = name, total, live, seconds, enabled
        start = (time.monotonic(), done)
        # The first step of a training run compiles, so its time says nothing about later steps.
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
            metrics: name -> value; metrics without a place on the line are left out.
            note: text at the end of the line.
            name: replaces the work's name on this line.
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
    """Returns one line of text: name, position, time left and metrics.

    Args:
        name: the work's name.
        done: units finished.
        total: units of the whole work.
        metrics: name -> value; metrics without a place on the line are left out.
        seconds_left: None while unknown.
    """
    parts = [f"{name} {done}/{total}"]
    if seconds_left is not None:
        parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    parts += [f"{label} {metrics[key]:{form}}" for key, label, form in _SHOWN if key in metrics]
    return "  ".join(parts)
