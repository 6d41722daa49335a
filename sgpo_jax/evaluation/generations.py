"""The generations of one evaluation on disk: which problems are finished, and the numbers of each response."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgpo_jax import rewards
from sgpo_jax.evaluation.majority import votes
from sgpo_jax.policy.generation import Graded
from sgpo_jax.rollout import STOP
from sgpo_jax.runtime.files import jsonl, read_jsonl, write_text

OUTCOMES: tuple[rewards.Outcome, ...] = ("correct", "wrong", *rewards.FAILURES)
NUMBERS = ("reward", "tokens", "truncated", "outcome", "vote")  # of a line; the outcome as its index in OUTCOMES


def digest(rows: Sequence[dict]) -> str:
    """Returns a fingerprint of the problems, their order, their answers and their strategies."""
    shown = [[row["id"], row["problem"], row["answer"], row.get("strategy")] for row in rows]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def resume(path: Path, settings: dict[str, Any], rows: Sequence[dict], samples: int, restart: bool) -> np.ndarray:
    """Reads the finished problems of an evaluation, and leaves the file with these alone.

    The settings stand beside the file, in one that ends in .settings.json.

    Args:
      path: JSONL file of the generations; it need not be there.
      settings: what the generations must have been made with.
      rows: M problems.
      samples: K, responses to each problem.
      restart: begin anew when the settings have changed.

    Returns:
      `[M,K,5]` float32 `NUMBERS` of the finished problems, NaN for the others.

    Raises:
      ValueError: the settings have changed, and `restart` is not set.
    """
    beside = path.with_suffix(".settings.json")
    settings = json.loads(json.dumps(settings))
    lines: list[dict] = []
    if path.is_file() and beside.is_file():
        before = json.loads(beside.read_text(encoding="utf-8"))
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed and not restart:
            differences = ", ".join(f"{name} {before.get(name)!r}, now {settings.get(name)!r}" for name in changed)
            raise ValueError(f"{path} was made with {differences}; continue with the same, or choose another --out")
        lines = [] if changed else read_jsonl(path)
    numbers = np.full((len(rows), samples, len(NUMBERS)), np.nan, np.float32)
    place = {row["id"]: i for i, row in enumerate(rows)}
    for line in lines:
        numbers[place[line["id"]], line["sample"]] = numbers_of(line)
    finished = np.asarray(np.isfinite(numbers).all(axis=(1, 2)))
    write_text(path, jsonl(line for line in lines if finished[place[line["id"]]]))
    write_text(beside, json.dumps(settings, indent=1) + "\n")
    return numbers


def numbers_of(line: dict) -> list[float]:
    """Returns the `NUMBERS` of a line of the file."""
    return [OUTCOMES.index(line[name]) if name == "outcome" else float(line[name]) for name in NUMBERS]


def lines_of(rows: Sequence[dict], graded: Graded, step: int) -> list[list[dict]]:
    """Returns a line of the file for each response, `[B][K]`."""
    classes = votes(graded)
    return [
        [
            {
                "step": step,
                "id": row["id"],
                "sample": k,
                "problem": row["problem"],
                "answer": row["answer"],
                "response": text,
                "extracted": graded.verdicts[i][k].extracted,
                "outcome": graded.verdicts[i][k].outcome,
                "reward": float(graded.rewards[i, k]),
                "tokens": int(graded.rollout.lengths[i, k]),
                "truncated": bool(graded.rollout.finish[i, k] != STOP),
                "vote": classes[i][k],
            }
            for k, text in enumerate(graded.texts[i])
        ]
        for i, row in enumerate(rows)
    ]
