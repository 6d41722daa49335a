"""The frame of both training loops: the learning rate that a step reports."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.configs import load
from helpers.paths import ROOT

from sgpo_jax import sharding
from sgpo_jax.policy import Run
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.training import stage
from sgpo_jax.training.gradients import apply_gradients
from sgpo_jax.training.loop import Loop

TOTAL = 8


@pytest.fixture(scope="module")
def run_in():
    config = load(ROOT / "configs" / "quickstart.py")
    small = {"model.layers": 1, "model.hidden": 16, "model.heads": 2, "model.mlp": 16, "report_seconds": 0.0}
    # With these the size of each step is the learning rate.
    signs = {"optimizer.b1": 0.0, "optimizer.b2": 0.0, "optimizer.eps": 1e-12, "optimizer.weight_decay": 0.0}
    steps = {"sft.learning_rate": 1.0, "sft.warmup_share": 0.3, "sft.decay": "cosine", "checkpoint.every": 1}
    config.update_from_flattened_dict(small | signs | steps | {"mesh.fsdp": 1, "mesh.data": -1, "stages": ("sft",)})
    policy, initial = stage.load_policy(config)
    mesh = sharding.make_mesh(**config.mesh)
    return lambda workdir: (Run(config, workdir, policy, mesh), lambda: initial(jax.random.key(0)))


def train(run, initial, total, skipped, updates):
    """Trains on gradients of 1, of which the numbered ones are NaN; returns the size of the first update of each step.

    A step without an update has size 0.
    """
    sizes = []
    with Loop(run, "sft", TOTAL, updates=updates) as loop:

        @jax.jit
        def update(state, factor):
            gradient = jax.tree.map(lambda x: jnp.full(x.shape, factor, x.dtype), state.params)
            return apply_gradients(state, gradient, loop.optimizer, jnp.float32(0))[0]

        state = loop.start(initial)
        for step in itertools.takewhile(lambda step: step < total, loop.steps()):
            first = 0.0
            for number in range(step * updates, (step + 1) * updates):
                before = np.asarray(jax.tree.leaves(state.params)[0]).flat[0]
                state = update(state, jnp.nan if number in skipped else 1.0)
                first = first or float(before - np.asarray(jax.tree.leaves(state.params)[0]).flat[0])
            sizes.append(first)
            state = state.replace(step=state.step + 1)
            metrics = {"loss": 0.0, "skipped": int(state.skipped), "rows_filled": 1.0}
            state = loop.finish(state, metrics, [{"id": "a"}], {"x": np.zeros(1)})
    return sizes


@pytest.mark.parametrize(
    ("skipped", "updates"), [((), 1), ((1, 2), 1), ((0,), 1), ((3, 5, 7), 1), ((), 2), ((1, 4, 9), 2)]
)
def test_the_reported_rate_is_the_one_of_the_first_update(run_in, tmp_path, skipped, updates):
    """After skipped updates too, and in a run that resumes among them."""
    run, initial = run_in(tmp_path)
    sizes = train(run, initial, 4, skipped, updates) + train(run, initial, TOTAL, skipped, updates)
    rows = read_jsonl(tmp_path / "sft.jsonl")
    assert len(rows) == len(sizes) == TOTAL
    rate = stage.optimizer(run.config, "sft", TOTAL * updates)[1]
    taken = 0
    for step, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        numbers = range(step * updates, (step + 1) * updates)
        assert row["learning_rate"] == pytest.approx(float(rate(taken)), rel=1e-6)
        if not {*numbers} <= {*skipped}:
            assert size == pytest.approx(row["learning_rate"], rel=1e-3)
        taken += len({*numbers} - {*skipped})
    assert taken == TOTAL * updates - len(skipped), "the schedule ends that many updates before its end"
