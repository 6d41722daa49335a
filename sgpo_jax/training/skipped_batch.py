"""The batches of skipped updates, as files of arrays that open without pickle; and when skipping stops a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from sgpo_jax.policy import Run
from sgpo_jax.policy.tokenizer import pad_left
from sgpo_jax.rollout import Prompts
from sgpo_jax.runtime import is_first, mirror
from sgpo_jax.runtime.files import replacing
from sgpo_jax.sharding import path_name
from sgpo_jax.training.batch import Batch, Contexts, Group
from sgpo_jax.training.packing import Packed, Rows


class Skipped(NamedTuple):
    """A batch whose update was skipped."""

    stage: str  # "sft" or "rl"
    step: int  # of the skipped update
    ids: list[str]  # of its problems
    batch: Any  # in host memory: a `Batch`, or for "sft" (Packed, tokens)


def handle(run: Run, stage: str, step: int, in_a_row: int, rows: Sequence[dict], batch: Any) -> None:
    """Keeps what a skipped update read; stops the run when `config.max_skipped` in a row were skipped.

    Args:
      run, stage: where the update was.
      step: of the update.
      in_a_row: updates skipped in a row; 0 when the last one was not, and there is nothing to do.
      rows: its problems.
      batch: what it read, in host memory.

    Raises:
      FloatingPointError: at the limit; the message names the saved batch.
    """
    if not in_a_row:
        return
    path = run.workdir / stage / f"skipped_batch_{step:06d}.npz"
    if is_first():
        write(path, Skipped(stage, step, [row["id"] for row in rows], batch))
    if in_a_row >= run.config.max_skipped:
        raise FloatingPointError(
            f"step {step}: {in_a_row} updates in a row were not finite (max_skipped={run.config.max_skipped}); the "
            "parameters are those before them. To see where it begins: "
            f"sgpo replay --workdir={mirror.shown(run.workdir)} --batch={mirror.shown(path)}"
        )
    where = mirror.shown(path)
    print(f"warning: step {step}: the update was not finite and is skipped; what it read is in {where}", flush=True)


def write(path: Path, skipped: Skipped) -> None:
    """Writes an .npz file with the arrays of the batch by their path in it, and stage, step and ids."""
    batch = _padded(skipped.batch) if isinstance(skipped.batch, Batch) else skipped.batch
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    arrays: dict[str, Any] = {f"batch/{path_name(key)}": np.asarray(value) for key, value in leaves}
    with replacing(path) as unfinished:
        np.savez_compressed(unfinished, stage=skipped.stage, step=skipped.step, ids=np.array(skipped.ids), **arrays)


def read(path: Path) -> Skipped:
    """Reads what `write` wrote.

    Raises:
      ValueError: the file cannot be read, or is another one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        stage, step, ids = str(arrays.pop("stage")), int(arrays.pop("step")), arrays.pop("ids").tolist()
        make = {"sft": _sft_batch, "rl": _rl_batch}[stage]
        return Skipped(stage, step, ids, make(unflatten_dict(arrays, sep="/")["batch"]))
    except Exception as error:  # a damaged archive raises many kinds
        raise ValueError(
            f"{path}: must be a skipped_batch_STEP.npz that a run left behind ({type(error).__name__}: {error})"
        ) from error


def _padded(batch: Batch) -> Batch:
    """Returns the batch with its prompts as rectangular arrays."""

    def padded(contexts):
        return contexts and Prompts(*pad_left([list(tokens) for tokens in contexts.tokens], contexts.longest, 0))

    return batch._replace(prompts=padded(batch.prompts), guided_prompts=padded(batch.guided_prompts))


def _contexts(tokens: np.ndarray, mask: np.ndarray) -> Contexts:
    return Contexts([row[real] for row, real in zip(tokens, mask, strict=True)], tokens.shape[1])


def _rl_batch(tree: dict[str, Any]) -> Batch:
    guided_prompts = _contexts(**tree["guided_prompts"]) if "guided_prompts" in tree else None
    guided = Group(**tree["guided"]) if "guided" in tree else None
    return Batch(_contexts(**tree["prompts"]), guided_prompts, Group(**tree["autonomous"]), guided)


def _sft_batch(tree: dict[str, Any]) -> tuple[Packed, np.ndarray]:
    packed, tokens = tree["0"], tree["1"]
    contexts = [Rows(**packed["contexts"][str(i)]) for i in range(len(packed["contexts"]))]
    return Packed(**packed | {"contexts": tuple(contexts)}), tokens
