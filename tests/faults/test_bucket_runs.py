"""Runs whose folder is in a bucket, on servers that misbehave: killed, resumed, read and exported."""

import jax
import numpy as np
import pytest
from faults.test_kills import attempts
from helpers import runs
from helpers.bucket_servers import SERVERS

from sgpo_jax import commands
from sgpo_jax.runtime import buckets, mirror

WORLD = {"stages": "('rl','eval')", "rl__steps": 3, "rl__eval_every": 0, "checkpoint__every": 2, "eval__guided": False}
KILLS = {"gs": ["checkpoint", 1, 0.1], "s3": ["RL update", 3, 0.001]}
# While the runs are at work: what becomes of the first requests that fit.
FAULTS = [("PO|PU", 503), ("GET", 429), ("PO|PU", "cut"), ("GET", "cut"), ("PO|PU", "lost"), ("DELETE", 503)]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_disk")
    run(folder, folder / "run", [])
    return folder


def run(folder, workdir, kills):
    return attempts(folder, workdir, "sgpo_jax.main", runs.command(workdir, **WORLD)[3:], kills)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
def test_a_killed_run_in_a_bucket_ends_as_one_on_disk_and_is_read_and_exported(kind, on_disk, tmp_path, monkeypatch):
    url, exported = f"{kind}://bucket/runs/killed", f"{kind}://bucket/exported"
    with SERVERS[kind]() as server:
        buckets._filesystem.cache_clear()
        server.fails[:] = FAULTS
        assert len(run(on_disk, url, [KILLS[kind]])) == 2
        assert not server.fails
        copy = tmp_path / "copy"
        buckets.download(url, {name: copy / name for name in buckets.listing(url) if not name.startswith("lock/")})
        assert_same(copy, on_disk / "run")
        sgpo(monkeypatch, "report", f"--workdir={url}", f"--to={exported}.html")
        assert b"SGPO" in buckets.read(f"{exported}.html")
        sgpo(monkeypatch, "export", f"--workdir={url}", f"--to={exported}")
        assert {"config.json", "model.safetensors", "README.md"} <= buckets.listing(exported).keys()
        with pytest.raises(SystemExit, match=f"--to={exported}: has files already; must be a new folder"):
            sgpo(monkeypatch, "export", f"--workdir={url}", f"--to={exported}")
        assert mirror._mirrors == {}
    buckets._filesystem.cache_clear()


def sgpo(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sgpo", *arguments])
    commands.main()


def assert_same(first, second):
    assert runs.rows(first, "rl") == runs.rows(second, "rl")
    pair = runs.parameters(first, "rl", 3), runs.parameters(second, "rl", 3)
    assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_array_equal(a, b)
    assert runs.generations(first) == runs.generations(second)
    assert names(first) == names(second) - {"lock"}


def names(folder):
    """Returns the names of the files of a run that are the same in every run."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in files if "checkpoints" not in path.parts and "tensorboard" not in path.parts}
