"""Runs whose folder is in a bucket, on servers that misbehave: killed, resumed, read and exported."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from faults.test_kills import attempts
from helpers import runs
from helpers.bucket_servers import SERVERS

from sgpo_jax import cli
from sgpo_jax.runtime import buckets, mirror

WORLD = {"stages": "('rl',)", "rl__steps": 3, "rl__eval_every": 0, "checkpoint__every": 2}
# While the runs are at work: what becomes of the first requests that fit.
FAULTS = [("PO|PU", 503), ("GET", 429), ("PO|PU", "cut"), ("GET", "cut"), ("PO|PU", "lost"), ("DELETE", 503)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
def test_rows_files_and_checkpoints_outlive_kills_and_faults(kind, tmp_path):
    """Does the same as the test below without a model, with more kills."""
    kills = [[1, "row"], [2, "saving"], [5, "row"]]
    small_run(tmp_path / "run", [])
    url = f"{kind}://bucket/small"
    with SERVERS[kind]() as server:
        server.fails[:] = FAULTS
        small_run(url, kills)
        assert not server.fails
        copy = downloaded(url, tmp_path)
        assert runs.rows(copy, "rl") == runs.rows(tmp_path / "run", "rl")
        assert [row["step"] for row in runs.rows(copy, "rl")] == [1, 2, 3, 4, 5, 6]
        assert_same_arrays(copy, tmp_path / "run", 6)
        assert names(copy) == names(tmp_path / "run") - {"lock"} == {"rl.jsonl", "eval/result.json"}
        steps = {path.name for path in (copy / "rl/checkpoints").iterdir()}
        assert steps == {"4", "4.files.json", "6", "6.files.json"}


def small_run(workdir, kills):
    done = subprocess.run(
        [sys.executable, str(runs.ROOT / "tests/helpers/small_run.py"), str(workdir), json.dumps(kills)],
        env=runs.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def downloaded(url, folder):
    copy = folder / "copy"
    buckets.download(url, {name: copy / name for name in buckets.listing(url) if not name.startswith("lock/")})
    return copy


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_as_one_on_disk_and_is_read_and_exported(tmp_path, monkeypatch):
    url, exported = "gs://bucket/runs/killed", "gs://bucket/exported"
    run(tmp_path, tmp_path / "run", [])
    with SERVERS["gs"]():
        assert len(run(tmp_path, url, [["checkpoint", 1, 0.1]])) == 2
        copy = downloaded(url, tmp_path)
        assert runs.rows(copy, "rl") == runs.rows(tmp_path / "run", "rl")
        assert_same_arrays(copy, tmp_path / "run", 3)
        assert names(copy) == names(tmp_path / "run") - {"lock"}
        sgpo(monkeypatch, "report", f"--workdir={url}", f"--to={exported}.html")
        assert b"SGPO" in buckets.read(f"{exported}.html")
        sgpo(monkeypatch, "export", f"--workdir={url}", f"--to={exported}")
        assert {"config.json", "model.safetensors", "README.md"} <= buckets.listing(exported).keys()
        with pytest.raises(SystemExit, match=f"--to={exported}: has files already; must be a new folder"):
            sgpo(monkeypatch, "export", f"--workdir={url}", f"--to={exported}")
        assert mirror._mirrors == {}


def run(folder, workdir, kills):
    return attempts(folder, workdir, "sgpo_jax.main", runs.command(workdir, **WORLD)[3:], kills)


def sgpo(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sgpo", *arguments])
    cli.main()


def assert_same_arrays(first, second, step):
    pair = runs.parameters(first, "rl", step), runs.parameters(second, "rl", step)
    assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_array_equal(a, b)


def names(folder):
    """Returns the names of the files of a run that are the same in every run."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in files if "checkpoints" not in path.parts and "tensorboard" not in path.parts}
