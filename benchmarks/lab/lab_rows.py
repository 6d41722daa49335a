"""Reads the rows beside this file, chooses those of a table, and formats its cells."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from sgpo_jax.stats import claims

Rows = list[dict]
Table = list[list[str]]  # lines of cells; the first line is the header

AHEAD = {"reproduced": "ahead", "contradicted": "behind"}  # verdicts on differences that are no claims of the paper


def read(*names: str) -> Rows:
    """Reads the rows of the named files beside this one."""
    folder = Path(__file__).parent
    return [json.loads(line) for name in names for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def tuned(rows: Rows, tuning: Sequence[int]) -> Callable[[str, str], float]:
    """Returns (world, method) -> its best rate on the seeds `tuning`, as the lab chooses it; 1 for the warm-up."""
    tuning_rows = [row for row in rows if row["seed"] in tuning]
    return lambda world, method: 1.0 if method == "sft" else claims.best_rate(tuning_rows, world, method)


def chosen(rows: Rows, seeds: Iterable[int], rate: Callable[[str, str], float]) -> Rows:
    """Returns the rows of `seeds` that have the rate of their method in their world."""
    candidates = [row for row in rows if row["seed"] in seeds]
    return [row for row in candidates if row["rate"] == rate(row["world"], row["method"])]


def percent(rows: Rows, world: str, method: str, metric: str = "accuracy") -> str:
    """Formats the mean over seeds in percent, with its interval."""
    return claims.percent(claims.interval(list(claims.by_seed(rows, world, method, metric).values())))


def mean(rows: Rows, world: str, method: str, metric: str = "accuracy", scale: float = 100, digits: int = 1) -> str:
    """Formats the mean over seeds, times `scale`."""
    return f"{scale * np.mean(list(claims.by_seed(rows, world, method, metric).values())):.{digits}f}"


def rate_of(rows: Rows, world: str, method: str) -> str:
    """Returns the one rate of a method's rows in a world."""
    (rate,) = {row["rate"] for row in rows if (row["world"], row["method"]) == (world, method)}
    return f"{rate:g}"


def compared(rows: Rows, world: str, method: str, other: str) -> list[str]:
    """Returns [difference of two methods, verdict]."""
    interval = claims.paired(rows, world, method, other)
    verdict = claims.verdict(interval)
    return [claims.signed(interval), AHEAD.get(verdict, verdict)]


def versus(rows: Rows, world: str, method: str, other: str) -> str:
    """Returns the difference of two methods, with its verdict where they can be told apart."""
    return " ".join(compared(rows, world, method, other)).removesuffix(" not distinguishable")


def markdown(lines: Table) -> list[str]:
    """Returns the lines of a table in Markdown, without the line under the header."""
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return [text.replace("  |", " |").replace("|  ", "| ") for text in texts]
