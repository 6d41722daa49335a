"""Checkpoints that the first process alone has as files: arrays on the way to it and back, and what is on its disk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.two_processes import ARRAYS, there_and_back

from sgpo_jax import sharding
from sgpo_jax.runtime import checksums, mirror
from sgpo_jax.training import gathered
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.state import TrainState


@pytest.mark.parametrize("piece", [64, 100, 2**28])
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_gathered_and_spread_to_the_last_bit(monkeypatch, name, piece):
    monkeypatch.setattr(gathered, "_PIECE", piece)
    there_and_back(sharding.make_mesh(2, 2, 2), *ARRAYS[name])


def test_what_the_first_process_has_is_not_sent(monkeypatch):
    monkeypatch.setattr(gathered, "_join", None)
    assert gathered.gather(sharding.put(np.ones(3), jax.P(), sharding.make_mesh())).tolist() == [1, 1, 1]


def state(value, width=16):
    kernel = sharding.put(value + np.arange(8.0 * width).reshape(8, width), jax.P("fsdp"), sharding.make_mesh(1, 8, 1))
    params = {"kernel": kernel, "scale": jnp.full(3, value, jnp.bfloat16)}
    return TrainState(jnp.int32(value), params, optax.adam(1e-3).init(params), jnp.int32(0))


def opened(folder, monkeypatch, alone=True, **more):
    monkeypatch.setattr(mirror, "is_of_first", lambda folder: alone)
    return Checkpoints(folder, **{"keep": 2, "best": "score", "higher_is_better": True, "seed": 0} | more)


def assert_same(restored, expected):
    for a, b in zip(*map(jax.tree.leaves, (restored, expected)), strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_all_processes_and_the_first_alone_read_each_others_checkpoints(monkeypatch, tmp_path, caplog):
    """Also the parameters alone, the best one, after a deletion, and where the last one is damaged."""
    for step, alone in ((1, True), (2, False), (3, True), (4, False), (5, True)):
        with opened(tmp_path, monkeypatch, alone, keep=4) as saved:
            if step > 1:
                assert_same(saved.restore_latest(state(0)), state(step - 1))
                assert_same(saved.restore_params(step - 1, state(0)), state(step - 1).params)
            saved.save(step, state(step), {1: 0.9}.get(step, 0.1))
    assert not caplog.records, "Orbax warns of nothing"
    with opened(tmp_path, monkeypatch) as saved:
        assert saved.all_steps() == [1, 2, 3, 4, 5] and saved.best_step() == 1
        saved.delete_after(4)
        next((tmp_path / "4/state/ocdbt.process_0/d").iterdir()).write_bytes(b"of another run")
        assert_same(saved.restore_latest(state(0)), state(3))
        assert saved.latest_step() == 3 and (tmp_path / "4.damaged").is_dir()


def test_a_state_of_another_shape_or_seed_is_refused(monkeypatch, tmp_path):
    with opened(tmp_path, monkeypatch) as saved:
        saved.save(1, state(1))
        with pytest.raises(ValueError, match=r"/1 has another model .*kernel.* has shape \(8, 16\) instead"):
            saved.restore_latest(state(0, width=8))
        with pytest.raises(ValueError, match="has another model or optimizer"):
            saved.restore_latest(state(0).replace(params={"other": jnp.zeros(3)}))
    message = "^seed=1: the checkpoint .* has 0"
    with opened(tmp_path, monkeypatch, seed=1) as saved, pytest.raises(ValueError, match=message):
        saved.restore_latest(state(0))


def test_what_is_written_is_not_copied_and_has_its_checksums_once_it_is_whole(monkeypatch, tmp_path):
    """A host has memory for one state, not for two."""
    copied = []
    monkeypatch.setattr("copy.deepcopy", lambda value: copied.append(type(value)) or value)
    with opened(tmp_path, monkeypatch) as saved:
        saved.save(1, state(1))
        saved.wait()
        assert checksums.is_written(tmp_path / "1") and not checksums.damage(tmp_path / "1", quick=False)
    assert np.ndarray not in copied
