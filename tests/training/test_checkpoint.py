"""Checkpoints that are not what was saved: found, named, and the last good one used."""

import errno
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sgpo_jax.runtime import checksums
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.state import TrainState


def state(value, width=40):
    kernel = value + jnp.arange(50.0 * width).reshape(50, width)
    params = {"layers": {"kernel": kernel}, "scale": jnp.full(3, value, float)}
    return TrainState(step=jnp.int32(value), params=params, opt_state=(jnp.float32(value),), skipped=jnp.int32(0))


SMALL = TrainState(step=jnp.int32(0), params={"scale": jnp.zeros(2)}, opt_state=(), skipped=jnp.int32(0))


def checkpoints(folder, **more):
    return Checkpoints(folder, **{"keep": 2, "best": "score", "higher_is_better": True, "seed": 0} | more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1, 2 and 3, of which 1 is the best."""
    folder = tmp_path_factory.mktemp("saved")
    with checkpoints(folder) as saved:
        for step, score in ((1, 0.9), (2, 0.1), (3, None)):
            saved.save(step, state(step), score)
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncate": truncate,
    "flip": flip,
    "delete": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("how", DAMAGES)
def test_whichever_file_is_damaged_the_one_before_is_used(saved, tmp_path, capfd, how):
    """Every file of the latest checkpoint in turn, what holds the arrays and what only describes them."""
    files = names(saved / "3")
    assert len(files) > 10
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        DAMAGES[how](folder / "3" / name)
        with checkpoints(folder) as found:
            restored = found.restore_latest(state(0))
            jax.tree.map(np.testing.assert_array_equal, restored, state(2))
            found.save(3, state(3))
        output, errors = capfd.readouterr()
        assert f"warning: checkpoint {folder / '3'} is damaged: {name} " in output
        assert "Traceback" not in output + errors
        assert (folder / "3.damaged").is_dir()
        with checkpoints(folder) as found:
            assert found.all_steps() == [1, 2, 3] and found.best_step() == 1
            jax.tree.map(np.testing.assert_array_equal, found.restore_latest(state(0)), state(3))


def test_a_large_file_that_changed_is_found_when_it_is_read(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checksums, "SMALL", 100)
    shutil.copytree(saved, tmp_path / "run")
    large = max((tmp_path / "run" / "3").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    flip(large)
    with checkpoints(tmp_path / "run") as found:
        assert found.latest_step() == 3, "its size is right"
        with pytest.raises(ValueError, match="3 is damaged: .* has changed since it was saved"):
            found.restore(3, state(0))
        jax.tree.map(np.testing.assert_array_equal, found.restore_latest(state(0)), state(2))
        assert found.all_steps() == [1, 2]


def test_never_silently_fresh(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in (1, 2, 3):
        flip(tmp_path / "run" / str(step) / "run" / "metadata")
    with checkpoints(tmp_path / "run") as found:
        assert found.latest_step() is None
        with pytest.raises(ValueError, match=r"all checkpoints are damaged: .*1.damaged.*3.damaged; remove them"):
            found.restore_latest(state(0))
    with checkpoints(tmp_path / "empty") as found:
        assert found.restore_latest(state(0)) is None


def test_damaged_checksums_and_files_that_were_not_there(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    assert checksums.damage(tmp_path / "run" / "3", quick=False) is None
    (tmp_path / "run" / "3" / "state" / "new").write_text("?")
    assert checksums.damage(tmp_path / "run" / "3", quick=True) == "state/new was not there when it was saved"
    for text in ("", "[]", '{"a": 3}', '{"a": [1]}', "\x00"):
        (tmp_path / "run" / "2.files.json").write_text(text)
        assert "its checksums 2.files.json cannot be read" in checksums.damage(tmp_path / "run" / "2", quick=True)


def test_a_checkpoint_that_a_kill_left_without_checksums_is_used_and_sealed(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "3.files.json").unlink()
    with checkpoints(tmp_path / "run") as found:
        jax.tree.map(np.testing.assert_array_equal, found.restore_latest(state(0)), state(3))
        found.wait()
    assert checksums.is_written(tmp_path / "run" / "3")


def test_checksums_go_with_their_checkpoints(saved):
    assert sorted(path.name for path in saved.glob("*.json")) == ["1.files.json", "2.files.json", "3.files.json"]
    shutil.copytree(saved, saved.parent / "more")
    with checkpoints(saved.parent / "more") as found:
        found.save(4, state(4), 0.95)
        found.wait()
    assert sorted(path.name for path in (saved.parent / "more").glob("*.json")) == ["3.files.json", "4.files.json"]


def test_another_format_and_another_model_are_refused(saved, tmp_path, monkeypatch):
    with checkpoints(saved) as found:
        for other in (state(0, width=41), state(0).replace(params={"scale": jnp.zeros(3)})):
            with pytest.raises(ValueError, match="checkpoint .*/3 has another model or optimizer than the config"):
                found.restore_latest(other)
        monkeypatch.setattr("sgpo_jax.training.checkpoint.FORMAT", 2)
        with pytest.raises(ValueError, match="checkpoint .*/3 has format 1; this version reads 2"):
            found.restore_latest(state(0))
    assert names(saved / "3"), "a refusal leaves it where it is"


@pytest.mark.parametrize("stop", [True, False])
def test_a_full_disk(saved, tmp_path, monkeypatch, capsys, stop):
    shutil.copytree(saved, tmp_path / "run")
    full = OSError(errno.ENOSPC, "No space left on device")
    with checkpoints(tmp_path / "run", stop_on_error=stop) as found:
        real = found._manager.save

        def save(*arguments, **more):
            raise full

        monkeypatch.setattr(found._manager, "save", save)
        message = "could not be saved .*No space left on device.*; the last good one is .*/3"
        if stop:
            with pytest.raises(OSError, match=message):
                found.save(4, state(4))
        else:
            found.save(4, state(4))
            assert "No space left on device" in capsys.readouterr().out
        monkeypatch.setattr(found._manager, "save", real)
        jax.tree.map(np.testing.assert_array_equal, found.restore_latest(state(0)), state(3))
        found.save(5, state(5))
    with checkpoints(tmp_path / "run") as found:
        assert found.latest_step() == 5


@pytest.mark.parametrize("damaged", ["state/manifest.ocdbt", "metrics/metrics"])
def test_who_only_reads_changes_nothing(saved, tmp_path, damaged):
    """A run may be writing there: its checkpoints are neither sealed nor renamed, and a damaged one is refused."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    (run / "2.files.json").unlink()
    flip(run / "1" / damaged)
    before = names(run)
    with pytest.raises(ValueError, match="checkpoint .*is damaged: "), checkpoints(run, reading=True) as found:
        assert found.best_step() == 1
        jax.tree.map(np.testing.assert_array_equal, found.restore(3, state(0)), state(3))
        found.wait()
        found.restore(1, state(0))
    assert names(run) == before
    with checkpoints(run) as found:
        assert found.all_steps() == [2, 3]
    assert checksums.is_written(run / "2")


LIMIT = """
import resource, sys
import jax
import jax.numpy as jnp
from test_checkpoint import checkpoints, state

stop = sys.argv[2] == "stop"
noise = jax.random.normal(jax.random.key(0), (50, 40))  # cannot be compressed below the limit
large = state(4).replace(params={"layers": {"kernel": noise}, "scale": jnp.ones(3)})
before = resource.getrlimit(resource.RLIMIT_FSIZE)
with checkpoints(sys.argv[1], stop_on_error=stop) as found:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        found.save(4, large)
        found.wait()
    except OSError as error:
        print("stopped:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.latest_step() == 3
    found.restore_latest(state(0))
    found.save(5, state(5))
"""


@pytest.mark.parametrize("how", [pytest.param("stop", marks=pytest.mark.slow), "go on"])
def test_a_limit_of_the_system_in_the_middle_of_a_save(saved, tmp_path, how):
    """The system itself refuses to let a file grow, while Orbax writes in the background."""
    shutil.copytree(saved, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", LIMIT, str(tmp_path / "run"), how],
        cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    start = "stopped: a checkpoint" if how == "stop" else "warning: a checkpoint"
    assert done.stdout.startswith(f"{start} could not be saved")
    assert f"; the last good one is {tmp_path / 'run' / '3'}" in done.stdout
    assert done.stdout.rstrip().endswith("the run continues") == (how == "go on")
    with checkpoints(tmp_path / "run") as found:
        assert found.all_steps()[-1] == 5
        jax.tree.map(np.testing.assert_array_equal, found.restore_latest(state(0)), state(5))


SCORES = st.one_of(
    st.sampled_from([None, math.nan, math.inf, -math.inf]), st.integers(-3, 3).map(float), st.floats(-1e30, 1e30)
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SCORES, min_size=1, max_size=6), st.integers(1, 3), st.booleans(), st.sets(st.integers(1, 6)))
@example([2.0, 1.0, math.nan, 1.5, 1.6], 1, False, set())
@example([math.nan, 2.0, 1.0, 1.5], 1, False, {2})
@example([math.inf, 2.0, 1.0, 1.5], 1, True, set())
@example([0.2, 0.9, None, math.nan, 0.5, 0.4], 1, True, {4})
@example([math.nan, math.inf, -math.inf, None], 2, True, {1, 2, 3})
def test_the_best_checkpoint_stays_whatever_the_scores(tmp_path_factory, scores, keep, higher, resumed):
    """Only finite scores count; the best is kept and named at each moment, and in a run that resumes."""
    folder = tmp_path_factory.mktemp("scores")
    more = {"keep": keep, "higher_is_better": higher}
    saved = checkpoints(folder, **more)
    for step, score in enumerate(scores, 1):
        saved.save(step, SMALL.replace(step=jnp.int32(step)), score)
        saved.wait()
        finite = {i: s for i, s in enumerate(scores[:step], 1) if s is not None and math.isfinite(s)}
        best = (max if higher else min)(finite.values(), default=None)
        latest = [*range(max(step - keep, 0) + 1, step + 1)]
        assert set(latest) <= set(saved.all_steps()) and len(saved.all_steps()) <= keep + 1
        if best is None:
            assert (saved.best_step(), saved.all_steps()) == (step, latest)
        else:
            assert finite[saved.best_step()] == best
            assert saved.best_step() in saved.all_steps()
        if step in resumed:
            before = saved.all_steps(), saved.best_step()
            saved.__exit__()
            saved = checkpoints(folder, **more)
            assert (saved.all_steps(), saved.best_step()) == before
    saved.__exit__()
    with checkpoints(folder, **more, reading=True) as again:
        assert again.best_step() in again.all_steps()


def test_a_score_that_is_not_finite_is_said(tmp_path, capsys):
    with checkpoints(tmp_path) as saved:
        saved.save(1, SMALL, 0.5)
        saved.save(2, SMALL, None)
        assert "warning" not in capsys.readouterr().out
        saved.save(3, SMALL, float("nan"))
        assert "warning: step 3: score is nan; its checkpoint cannot become the best" in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["NaN", "Infinity", "-Infinity", "null"])
def test_a_checkpoint_of_an_earlier_version_with_such_a_score_is_not_the_best(tmp_path, stored):
    """Earlier versions wrote the score itself."""
    with checkpoints(tmp_path) as saved:
        for step, score in ((1, 0.25), (2, 0.5), (3, 0.75)):
            saved.save(step, SMALL.replace(step=jnp.int32(step)), score)
    (metrics,) = (tmp_path / "3").rglob("metrics/metrics")
    metrics.write_text(f'{{"score": {stored}}}')
    (tmp_path / "3.files.json").unlink()
    for higher, best in ((True, 2), (False, 1)):
        with checkpoints(tmp_path, higher_is_better=higher, reading=True) as saved:
            assert saved.best_step() == (best if best in saved.all_steps() else 2)
    with checkpoints(tmp_path, keep=1) as saved:
        saved.save(4, SMALL.replace(step=jnp.int32(4)), 0.1)
        saved.wait()
        assert (saved.all_steps(), saved.best_step()) == ([2, 4], 2)
