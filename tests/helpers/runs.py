"""Whole runs of a tiny world as subprocesses, and the comparison of two runs."""

import os
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from helpers import xla_flags
from helpers.forks import Fork
from helpers.paths import ROOT
from sgpo_jax.runtime.files import read_jsonl

TIMES = ("seconds", "tokens_per_second")
TINY = {
    "model.hidden": 16, "model.heads": 2, "model.mlp": 32, "model.layers": 1,
    "data.train": "arithmetic:train,count=64", "sft.train": "arithmetic:pretraining,count=200",
    "sft.batch": 16, "sft.micro_batch": 8, "sft.steps": 8, "sft.validate_every": 4, "sft.validation_share": 0.1,
    "rl.batch": 4, "rl.micro_batch": 4, "rl.autonomous": 4, "rl.guided": 2, "rl.steps": 8, "rl.max_new_tokens": 6,
    "rl.eval_every": 4, "eval.batch": 8, "eval.max_new_tokens": 6, "checkpoint.every": 3,
    "eval.sets.heldout.source": "arithmetic:eval,count=12", "eval.sets.heldout.samples": 2, "report_seconds": 0,
}  # fmt: skip


def command(workdir, **overrides):
    fields = TINY | {name.replace("__", "."): value for name, value in overrides.items()}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"--config={ROOT / 'configs/quickstart.py'}"
    return [sys.executable, "-m", "sgpo_jax.main", config, f"--workdir={workdir}", *flags]


def environment(devices=1):
    return os.environ | {"XLA_FLAGS": xla_flags.quick(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(workdir, devices=1, **overrides):
    _, _, module, *arguments = command(workdir, **overrides)
    process = Fork(module, arguments, environment(devices))
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return output


def rows(workdir, stage):
    """Reads the rows of metrics without the timings, which differ from run to run."""
    return [
        {name: value for name, value in row.items() if not name.startswith(TIMES)}
        for row in read_jsonl(workdir / f"{stage}.jsonl")
    ]


def parameters(workdir, stage, step):
    """Reads every saved array of a checkpoint, as a whole, whatever number of processes wrote it."""
    path = (workdir / stage / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return checkpointer.restore(path, restore_args=whole)


def generations(workdir):
    return {path.relative_to(workdir): path.read_text() for path in sorted(workdir.rglob("*_guided_*.jsonl"))} | {
        path.relative_to(workdir): path.read_text() for path in sorted(workdir.rglob("*_unguided_*.jsonl"))
    }


def assert_same_run(first, second):
    for stage in ("sft", "rl"):
        assert rows(first, stage) == rows(second, stage)
        assert [row["step"] for row in rows(first, stage)] == list(range(1, 9))
        pair = parameters(first, stage, 8), parameters(second, stage, 8)
        assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
        for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_array_equal(a, b)
    assert generations(first) == generations(second)
    for name in ("before_unguided", "before_guided", "after_unguided", "after_guided"):
        assert (first / "eval" / f"{name}.json").read_text() == (second / "eval" / f"{name}.json").read_text()
