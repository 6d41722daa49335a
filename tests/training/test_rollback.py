"""A run that shows a sign of a collapse goes back to a step before it and continues with other batches."""

import json
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import ROOT

from sgpo_jax import config as configs
from sgpo_jax import config_checks, sharding
from sgpo_jax.commands import train
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.training import collapse, rl, rollback
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.state import TrainState

SOUND, SICK = {"truncated": 0.0}, {"truncated": 1.0}


@pytest.fixture
def limits():
    limits = configs.base().monitor
    limits.window = 2
    return limits


def steps(*rows):
    return [{"step": step} | row for step, row in enumerate(rows, start=1)]


def test_sound_steps_end_before_the_window_of_the_first_of_the_present_signs(limits):
    for rows, expected in [
        (steps(SOUND, SOUND, SOUND, SICK, SICK), 3),
        (steps(SOUND, SOUND, SOUND, SICK, SICK, SICK, SICK), 3),  # seen since step 5
        (steps(SICK, SICK, SOUND, SOUND, SICK, SICK), 4),  # an earlier collapse has passed
        (steps(SICK, SICK), 0),
        (steps(SOUND, SICK, SICK)[1:], 1),  # rows begin later
    ]:
        assert collapse.signs(rows, limits)
        assert collapse.sound_steps(rows, limits) == expected, rows


def state(value):
    params = {"norm": {"scale": jnp.full(3, value, jnp.float32)}}
    return TrainState(step=jnp.int32(value), params=params, opt_state=(jnp.float32(value),), skipped=jnp.int32(0))


def checkpoints(workdir):
    folder = workdir / "rl" / "checkpoints"
    return Checkpoints(folder, keep=4, best="accuracy", higher_is_better=True, seed=0)


@pytest.fixture
def workdir(tmp_path):
    """A run that is at step 9 and sick since step 8; checkpoints after 2, 4, 6 and 8, evaluations after 4 and 8."""
    rows = steps(*[SOUND] * 7, SICK, SICK)
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generations = tmp_path / "rl" / "generations"
    generations.mkdir(parents=True)
    for step in (4, 8):
        for ending in ("jsonl", "settings.json"):
            (generations / f"set_2_unguided_{step:06d}.{ending}").write_text("")
    with checkpoints(tmp_path) as saved:
        for step in (2, 4, 6, 8):
            saved.save(step, state(step), 0.1 * step if step % 4 == 0 else None)
    return tmp_path


def files(workdir):
    """Everything but the contents of checkpoints, which have times in them."""
    found = sorted(path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())
    return {path: (workdir / path).read_text() if "checkpoints" not in path.parts else "" for path in found}


def go_back(workdir, limits, step=9, every=2):
    with checkpoints(workdir) as saved:
        return rollback.go_back(workdir, saved, limits, every, step, "sick")


def test_what_came_after_the_last_sound_checkpoint_is_taken_back(workdir, limits, capsys):
    assert rollback.read(workdir) == [] and rollback.passed([]) == 0
    assert go_back(workdir, limits)
    assert capsys.readouterr().out == "step 9: sick; back to step 6, to continue with other batches\n"
    with checkpoints(workdir) as saved:
        assert saved.all_steps() == [2, 4, 6] and saved.best_step() == 4
        jax.tree.map(np.testing.assert_array_equal, saved.restore_latest(state(0)), state(6))
    assert not (workdir / "rl" / "checkpoints" / "8.files.json").exists()
    names = sorted(path.name for path in (workdir / "rl" / "generations").iterdir())
    assert names == ["set_2_unguided_000004.jsonl", "set_2_unguided_000004.settings.json"]
    kept = read_jsonl(workdir / "rl.rolled_back.jsonl")
    assert kept == [{"rollback": 1} | row for row in steps(*[SOUND] * 7, SICK, SICK)[6:]]
    rollbacks = rollback.read(workdir)
    assert rollbacks == [{"at": 9, "to": 6, "sign": "sick"}]
    assert rollback.passed(rollbacks) == 3 and rollback.passed([*rollbacks, {"at": 8, "to": 6}]) == 5
    # Sick at once, with a window that reaches back to before step 6: that was sound.
    (workdir / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps(*[SOUND] * 5, SICK, SICK)))
    assert go_back(workdir, limits, step=7)
    assert rollback.read(workdir)[1:] == [{"at": 7, "to": 6, "sign": "sick"}]
    assert read_jsonl(workdir / "rl.rolled_back.jsonl") == [*kept, {"rollback": 2, "step": 7} | SICK]


@pytest.mark.parametrize("point", ["delete_after", "_keep_rows", "unlink", "rollbacks.json"])
def test_an_interrupted_rollback_is_done_again_with_the_same_result(workdir, limits, monkeypatch, point):
    whole = workdir.with_name(f"{workdir.name}_whole")
    shutil.copytree(workdir, whole)
    assert go_back(whole, limits)
    with monkeypatch.context() as patch:
        module, name = {
            "delete_after": (Checkpoints, "delete_after"), "_keep_rows": (rollback, "_keep_rows"),
            "unlink": (Path, "unlink"), "rollbacks.json": (rollback, "write_text"),
        }[point]  # fmt: skip
        function = getattr(module, name)

        def killed(*arguments, **more):
            if name != "write_text" or arguments[0].name == point:
                if name != "write_text":
                    function(*arguments, **more)
                raise KeyboardInterrupt
            return function(*arguments, **more)

        patch.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            go_back(workdir, limits)
    assert rollback.read(workdir) == []
    assert go_back(workdir, limits)
    assert files(workdir) == files(whole)


def test_it_does_not_go_back_where_nothing_sound_is_left(workdir, limits, capsys):
    (workdir / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps(SOUND, *[SICK] * 8)))
    before = files(workdir)
    assert not go_back(workdir, limits, every=1)
    assert "there is no checkpoint of step 1 or before to go back to" in capsys.readouterr().out
    assert files(workdir) == before
    assert go_back(workdir, limits, every=2), "before the first checkpoint there is the state that RL began with"
    assert rollback.read(workdir) == [{"at": 9, "to": 0, "sign": "sick"}]
    with checkpoints(workdir) as saved:
        assert saved.all_steps() == []


@pytest.mark.parametrize(
    ("changes", "keep"), [({}, 2), ({"checkpoint.every": 4}, 4), ({"checkpoint.every": 4, "rl.eval_every": 5}, 6)]
)
def test_enough_checkpoints_have_to_be_kept(changes, keep):
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.update_from_flattened_dict(changes | {"monitor.action": "rollback", "checkpoint.keep": keep})
    config_checks.check(config)
    config.checkpoint.keep = keep - 1
    message = rf"config\.checkpoint\.keep={keep - 1}: must be at least {keep} when monitor\.action is 'rollback'"
    if keep > 1:
        with pytest.raises(ValueError, match=message):
            config_checks.check(config)
    config.monitor.action = "stop"
    config_checks.check(config)


def config_of(most_rollbacks):
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.model.update({"hidden": 16, "heads": 2, "mlp": 32, "layers": 1})
    config.data.train = "arithmetic:train,count=16"
    config.stages, config.report_seconds = ("rl",), 0.0
    config.rl.update({"batch": 8, "micro_batch": 8, "steps": 8, "autonomous": 3, "guided": 0, "max_new_tokens": 6})
    config.rl.eval_every = 0
    config.checkpoint.update({"every": 1, "keep": 4})
    config.monitor.update({"window": 2, "most_truncated": 0.5, "action": "rollback"})
    config.monitor.most_rollbacks = most_rollbacks
    return config


@pytest.fixture
def world(monkeypatch):
    """`world(sick)`: responses to the batches at these positions count as truncated; returns the positions visited."""
    batches, measure = rl.data.batches, rl._rollout_metrics

    def make(*sick):
        visited = []

        class Batches:
            def __init__(self, *arguments):
                self.all = batches(*arguments)

            def __getitem__(self, position):
                visited.append(position)
                return self.all[position]

        def measured(*graded):
            return measure(*graded) | {"truncated": float(visited[-1] in sick)}

        mesh = sharding.make_mesh(devices=jax.devices()[:1])  # faster
        monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)
        monkeypatch.setattr(rl.data, "batches", Batches)
        monkeypatch.setattr(rl, "_rollout_metrics", measured)
        return visited

    return make


@pytest.mark.slow
def test_a_collapse_is_left_behind_until_the_last_rollback_has_been_made(world, tmp_path, capsys):
    visited = world(3, 4, 6, 7, 8)
    said = "truncated is 1, above monitor.most_truncated=0.5: responses do not end"
    with pytest.raises(FloatingPointError, match=r"step 6: truncated is 1, .*; stopped after 1 rollbacks, as monitor"):
        train.run(config_of(most_rollbacks=1), tmp_path)
    # Batches 3 and 4, of steps 4 and 5, were sick: it went back to step 3, and on with 5, 6 and 7, which ended it.
    assert visited == [0, 1, 2, 3, 4, 5, 6, 7]
    assert rollback.read(tmp_path) == [{"at": 5, "to": 3, "sign": said}]
    assert f"step 5: {said}; back to step 3, to continue with other batches" in capsys.readouterr().out
    visited.clear()
    train.run(config_of(most_rollbacks=2), tmp_path)
    # The rows of before tell that step 7, with batch 8, is sick too, and has been since step 6: back to step 4.
    assert visited == [8, 9, 10, 11, 12]
    assert rollback.read(tmp_path)[1:] == [{"at": 7, "to": 4, "sign": said}]
    rows = read_jsonl(tmp_path / "rl.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8] and not any(row["truncated"] for row in rows)
    kept = [tuple(row.values())[:2] for row in read_jsonl(tmp_path / "rl.rolled_back.jsonl")]
    assert kept == [(1, 4), (1, 5), (2, 5), (2, 6), (2, 7)]
    assert {int(path.name) for path in (tmp_path / "rl" / "checkpoints").glob("[0-9]")} == {5, 6, 7, 8}
