"""What a skipped update read, as a file: arrays alone, opened without pickle."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sgpo_jax.policy.generation import Prompts
from sgpo_jax.sharding import path_name
from sgpo_jax.training.batch import Batch, Group
from sgpo_jax.training.packing import Packed, Rows


class Skipped(NamedTuple):
    """A batch whose update was skipped."""

    stage: str  # "sft" or "rl"
    step: int  # of the skipped update
    ids: list[str]  # of its problems
    batch: Any  # in host memory: a `Batch`, or for "sft" (Packed, tokens)


def write(path: Path, kept: Skipped) -> None:
    """Writes an .npz file with the arrays of the batch by their path in it, and stage, step and ids."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(kept.batch)
    arrays: dict[str, Any] = {f"batch/{path_name(key)}": np.asarray(value) for key, value in leaves}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial.npz")
    np.savez_compressed(unfinished, stage=kept.stage, step=kept.step, ids=np.array(kept.ids), **arrays)
    os.replace(unfinished, path)


def read(path: Path) -> Skipped:
    """What `write` wrote.

    Raises:
      ValueError: the file cannot be read, or is another one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        stage, step, ids = str(arrays.pop("stage")), int(arrays.pop("step")), arrays.pop("ids").tolist()
        return Skipped(stage, step, ids, {"sft": _of_sft, "rl": _of_rl}[stage](_nested(arrays)["batch"]))
    except Exception as error:  # a damaged archive raises many kinds
        raise ValueError(
            f"{path}: must be a skipped_batch_STEP.npz that a run left behind ({type(error).__name__}: {error})"
        ) from error


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays by their path "a/b/c" as dicts of dicts."""
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _of_rl(tree: dict[str, Any]) -> Batch:
    guided_prompts = Prompts(**tree["guided_prompts"]) if "guided_prompts" in tree else None
    guided = Group(**tree["guided"]) if "guided" in tree else None
    return Batch(Prompts(**tree["prompts"]), guided_prompts, Group(**tree["autonomous"]), guided)


def _of_sft(tree: dict[str, Any]) -> tuple[Packed, np.ndarray]:
    packed, tokens = tree["0"], tree["1"]
    contexts = [Rows(**packed["contexts"][str(i)]) for i in range(len(packed["contexts"]))]
    return Packed(**packed | {"contexts": tuple(contexts)}), tokens
