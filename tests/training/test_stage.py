"""Checkpoints of a stage and what happens to a run whose updates are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpo_jax import config as configs
from sgpo_jax import sharding
from sgpo_jax.policy import Run
from sgpo_jax.training import loop, skipped_batch
from sgpo_jax.training.batch import Batch, Contexts, Group
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.state import TrainState


def state(value):
    """A state whose every array tells which one it is."""
    params = {"norm": {"scale": jnp.full(3, value, jnp.float32)}}
    return TrainState(step=jnp.int32(value), params=params, opt_state=(jnp.float32(value),), skipped=jnp.int32(0))


@pytest.mark.parametrize(("higher", "best"), [(True, 2), (False, 3)])
def test_the_last_few_and_the_best_are_kept(tmp_path, higher, best):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: None, 5: 0.5, 6: 0.5, 7: None}
    with Checkpoints(tmp_path, keep=2, best="score", higher_is_better=higher, seed=0) as saved:
        for step, score in scores.items():
            saved.save(step, state(step), score)
    with Checkpoints(tmp_path, keep=2, best="score", higher_is_better=higher, seed=0) as saved:
        assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [best, 6, 7]
        assert saved.best_step() == best and saved.latest_step() == 7
        restored = saved.restore(best, state(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state(best))


def test_without_scores_the_latest_is_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=3, best="score", higher_is_better=True, seed=0) as saved:
        assert saved.latest_step() is None and saved.best_step() is None
        for step in (1, 2):
            saved.save(step, state(step))
        saved.wait()
        assert saved.best_step() == 2


def test_the_earliest_wins_a_tie(tmp_path):
    with Checkpoints(tmp_path, keep=3, best="score", higher_is_better=True, seed=0) as saved:
        for step in (1, 2, 3):
            saved.save(step, state(step), 0.5)
        saved.wait()
        assert saved.best_step() == 1


def test_a_run_goes_on_only_under_its_seed(tmp_path):
    with Checkpoints(tmp_path, keep=1, best="score", higher_is_better=True, seed=7) as saved:
        saved.save(1, state(1))
        saved.wait()
        jax.tree.map(np.testing.assert_array_equal, saved.restore_latest(state(0)), state(1))
    with Checkpoints(tmp_path, keep=1, best="score", higher_is_better=True, seed=8) as saved:
        with pytest.raises(ValueError, match=r"seed=8: the checkpoint .*/1 has 7"):
            saved.restore_latest(state(0))
        saved.restore(1, state(0))  # to look at it is allowed


def test_skipped_updates_keep_the_batch_and_stop_at_the_limit(tmp_path, capsys):
    prompts = Contexts([np.arange(3), np.array([7])], 4)
    group = Group(np.zeros((2, 1, 4), np.int32), np.array([[4], [2]]), np.full((2, 1, 4), -np.inf), np.ones((2, 1)))
    batch, rows = Batch(prompts, None, group, None), [{"id": "a/1"}, {"id": "π"}]
    config = configs.base()
    config.max_skipped = 2
    run = Run(config, tmp_path, None, None)
    skipped_batch.handle(run, "rl", 6, 0, rows, batch)
    assert not list(tmp_path.iterdir())
    skipped_batch.handle(run, "rl", 7, 1, rows, batch)
    said = capsys.readouterr().out
    assert said.startswith("warning: step 7: the update was not finite") and said.endswith("skipped_batch_000007.npz\n")
    with pytest.raises(FloatingPointError, match=r"step 8: 2 updates .*\(max_skipped=2\).*skipped_batch_000008"):
        skipped_batch.handle(run, "rl", 8, 2, rows, batch)
    names = sorted(path.name for path in (tmp_path / "rl").iterdir())
    assert names == ["skipped_batch_000007.npz", "skipped_batch_000008.npz"]
    kept = skipped_batch.read(tmp_path / "rl" / names[0])
    assert kept[:3] == ("rl", 7, ["a/1", "π"]) and kept.batch.guided is None
    assert jax.tree.structure(kept.batch) == jax.tree.structure(batch)
    jax.tree.map(np.testing.assert_array_equal, kept.batch, batch)
    with np.load(tmp_path / "rl" / names[0], allow_pickle=False) as file:  # as earlier versions wrote it
        assert file["batch/prompts/tokens"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 7]]
        assert file["batch/prompts/mask"].tolist() == [[False, True, True, True], [False, False, False, True]]


@pytest.mark.parametrize(("filled", "ways", "said"), [(0.5, 4, True), (0.75, 4, False), (0.5, 8, False)])
def test_a_micro_batch_that_is_too_large_is_noticed(capsys, filled, ways, said):
    config = configs.base()
    config.rl.micro_batch = 8
    run = Run(config, None, None, sharding.make_mesh(devices=jax.devices()[:ways]))
    loop.advise_packing(run, "rl", filled)
    printed = capsys.readouterr().out
    assert (f"rl.micro_batch=8: {filled:.0%} of the rows" in printed) == said, "as many rows as devices is the least"
