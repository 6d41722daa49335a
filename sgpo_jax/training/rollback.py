"""Going back to before a collapse: what changes on disk, so that to go on is to resume.

`rl/rollbacks.json` lists them as [{"at": 60, "to": 40, "sign": ...}]. Steps are numbered anew from "to" on, but take
other batches and noise: those after the ones that the run had come to. The rows taken back are moved from `rl.jsonl` to
`rl.rolled_back.jsonl`. The list is written last: a run that is killed before that meets the sign again.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from sgpo_jax.runtime import distributed
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.training import collapse
from sgpo_jax.training.checkpoint import Checkpoints


def read(workdir: Path) -> list[dict[str, Any]]:
    """The rollbacks of a run so far: at which step, to which, and the sign."""
    path = workdir / "rl" / "rollbacks.json"
    return distributed.first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else [])


def passed(rollbacks: list[dict[str, Any]]) -> int:
    """How much further than its step the data position of a run is, batches."""
    return sum(each["at"] - each["to"] for each in rollbacks)


def recent_rows(workdir: Path, step: int, window: int) -> list[dict[str, Any]]:
    """The last rows of rl.jsonl up to `step`, at most `window`."""
    path = workdir / "rl.jsonl"
    rows = distributed.first(lambda: read_jsonl(path)[-window:] if path.is_file() else [])
    return [row for row in rows if row["step"] <= step]


def go_back(workdir: Path, saved: Checkpoints, limits: Mapping[str, Any], every: int, step: int, sign: str) -> bool:
    """Takes back what came after the last checkpoint from before the rows in which a sign appeared.

    Args:
      workdir: of the run.
      saved: checkpoints of RL; the later ones are deleted.
      limits: `config.monitor`.
      every: steps between checkpoints; with fewer sound steps than that the run goes back to its first state.
      step: the last finished one, whose row in rl.jsonl is the last.
      sign: why.

    Returns:
      False, and nothing has changed, where no checkpoint from before the sign is left.
    """
    saved.wait()
    rollbacks = read(workdir)
    sound = distributed.first(lambda: collapse.sound_steps(read_jsonl(workdir / "rl.jsonl"), limits))
    sound = max(sound, *(each["to"] for each in rollbacks[-1:]), 0)  # where it went back to last was sound
    to = max((each for each in saved.all_steps() if each <= sound), default=0)
    if not to and sound >= every:
        print(f"warning: step {step}: there is no checkpoint of step {sound} or before to go back to", flush=True)
        return False
    saved.delete_after(to)
    if jax.process_index() == 0:
        _keep_rows(workdir, to, len(rollbacks) + 1)
        for path in (workdir / "rl" / "generations").glob("*"):
            if (found := re.search(r"_(\d{6,})\.", path.name)) and int(found[1]) > to:
                path.unlink()  # else the evaluation after the same step would go on with them
        _replace(workdir / "rl" / "rollbacks.json", [*rollbacks, {"at": step, "to": to, "sign": sign}])
        print(f"step {step}: {sign}; back to step {to}, and on with other batches", flush=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the run has gone back")
    return True


def _keep_rows(workdir: Path, to: int, number: int) -> None:
    """Copies the rows after step `to`; a rollback that was interrupted has done it already."""
    path = workdir / "rl.rolled_back.jsonl"
    before = [row for row in read_jsonl(path) if row["rollback"] < number] if path.is_file() else []
    rows = [{"rollback": number} | row for row in read_jsonl(workdir / "rl.jsonl") if row["step"] > to]
    _replace(path, *before, *rows)


def _replace(path: Path, *lines: Any) -> None:
    """Writes each of `lines` as JSON, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
