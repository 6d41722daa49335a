"""Rollbacks of RL to a step before a collapse: the changes on disk from which the run then simply resumes.

`rl/rollbacks.json` lists the rollbacks as [{"at": 60, "to": 40, "sign": ...}]. Steps after "to" get their numbers
again, but other batches and noise: the first ones that the run has not used yet. Their old rows move from `rl.jsonl`
to `rl.rolled_back.jsonl`. The list is written last: a run that is killed before that meets the sign again.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from sgpo_jax.runtime import distributed
from sgpo_jax.runtime.files import jsonl, read_jsonl, write_text
from sgpo_jax.training import collapse
from sgpo_jax.training.checkpoint import Checkpoints


def read(workdir: Path) -> list[dict[str, Any]]:
    """Reads the rollbacks of a run so far: for each one the step, the step it went back to, and the sign."""
    path = workdir / "rl" / "rollbacks.json"
    return distributed.first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else [])


def passed(rollbacks: list[dict[str, Any]]) -> int:
    """Returns the number of batches by which the data position of a run is ahead of its step."""
    return sum(entry["at"] - entry["to"] for entry in rollbacks)


def rows_up_to(workdir: Path, step: int) -> list[dict[str, Any]]:
    """Reads the rows of rl.jsonl up to `step`."""
    path = workdir / "rl.jsonl"
    rows = distributed.first(lambda: read_jsonl(path) if path.is_file() else [])
    return [row for row in rows if row["step"] <= step]


def go_back(workdir: Path, saved: Checkpoints, limits: Mapping[str, Any], every: int, step: int, sign: str) -> bool:
    """Goes back to the last checkpoint before the rows that show a sign of collapse.

    Args:
      workdir: folder of the run.
      saved: checkpoints of RL; the later ones are deleted.
      limits: `config.monitor`.
      every: steps between checkpoints; with fewer sound steps the run goes back to its initial state.
      step: the last finished step, the step of the last row of rl.jsonl.
      sign: the sign of collapse, which is the reason for the rollback.

    Returns:
      Whether the run went back. If no checkpoint from before the sign is left, nothing changes.
    """
    saved.wait()
    rollbacks = read(workdir)
    sound = distributed.first(lambda: collapse.sound_steps(read_jsonl(workdir / "rl.jsonl"), limits))
    sound = max(sound, *(entry["to"] for entry in rollbacks[-1:]), 0)  # the last rollback led to a sound step
    to = max((saved_step for saved_step in saved.all_steps() if saved_step <= sound), default=0)
    if not to and sound >= every:
        print(f"warning: step {step}: there is no checkpoint of step {sound} or before to go back to", flush=True)
        return False
    saved.delete_after(to)
    if distributed.is_first():
        _keep_rows(workdir, to, len(rollbacks) + 1)
        for path in (workdir / "rl" / "generations").glob("*"):
            if (match := re.search(r"_(\d{6,})\.", path.name)) and int(match[1]) > to:
                path.unlink()  # otherwise the evaluation after the same step would resume from it
        content = json.dumps([*rollbacks, {"at": step, "to": to, "sign": sign}])
        write_text(workdir / "rl" / "rollbacks.json", content + "\n")
        print(f"step {step}: {sign}; back to step {to}, to continue with other batches", flush=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the run has gone back")
    return True


def _keep_rows(workdir: Path, to: int, number: int) -> None:
    """Copies the rows after step `to`; an interrupted rollback may have done so already."""
    path = workdir / "rl.rolled_back.jsonl"
    before = [row for row in read_jsonl(path) if row["rollback"] < number] if path.is_file() else []
    rows = [{"rollback": number} | row for row in read_jsonl(workdir / "rl.jsonl") if row["step"] > to]
    write_text(path, jsonl([*before, *rows]))
