"""Runs whose folder is in a bucket, on servers that misbehave: killed, resumed, read and exported."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from faults.test_kills import attempts, plan_of
from helpers import runs
from helpers.bucket_servers import SERVERS

from sgpo_jax import cli
from sgpo_jax.runtime import buckets, mirror

WORLD = {
    "stages": "('rl',)", "rl__steps": 3, "rl__eval_every": 0, "checkpoint__every": 2, "model__remat": "none",
    "report_seconds": 0,
}  # fmt: skip
# While the runs are at work: what becomes of requests that fit, some way apart.
# The server on loopback forgets a resumable upload once it is whole, where Google's repeats its answer: none gets lost.
FAULTS = [
    ("PO|PU", 503), ("GET", 429), ("PO|PU", "cut"), ("GET", "cut"),
    ("P(OS|U)T(?!.*upload_id)", "lost"), ("DELETE", 503),
]  # fmt: skip
SILENCE = [("GET .*prefix", "mute"), ("POST .*=media&", "mute"), ("GET .*tensorstore=", "mute")]  # two of TensorStore
S3_SILENCE = [("PUT .*/ocdbt.process_1/", "mute"), ("GET .*/manifest.ocdbt", "mute")]  # of TensorStore
COMMITS = [("POST .*/commit/", "lost"), ("POST .*/commit/", 429)]  # in which the hub also deletes
APART = 20  # requests
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Runs `helpers.small_run`; a call returns the exit codes of each start, and what the processes have said."""
    words = tmp_path_factory.mktemp("small_run") / "words"
    with words.open("w") as errors, subprocess.Popen(
        [sys.executable, str(runs.ROOT / "tests/helpers/small_run.py")], env=runs.environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
    ) as started:  # fmt: skip

        def run(workdir, processes=1, kills=(), variables=None):
            said = words.stat().st_size
            plan = {"workdir": str(workdir), "processes": processes, "kills": kills, "variables": variables or {}}
            print(json.dumps(plan), file=started.stdin, flush=True)
            limit = threading.Timer(300, os.killpg, (started.pid, signal.SIGKILL))
            limit.start()
            codes = json.loads(started.stdout.readline() or '"no answer in time"')
            limit.cancel()
            with words.open() as file:
                file.seek(said)
                return codes, file.read()

        yield run
        started.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(small_run, tmp_path_factory):
    """The folders of small runs on disk, of one process and of two."""
    folders = {count: tmp_path_factory.mktemp("undisturbed") / str(count) for count in (1, 2)}
    for count, folder in folders.items():
        assert small_run(folder, count)[0] == [[0] * count]
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
def test_rows_files_and_checkpoints_outlive_kills_and_faults(kind, small_run, undisturbed, tmp_path):
    """Does the same as the last test below without a model, with more kills."""
    with SERVERS[kind]() as server:
        faults = {"gs": SILENCE + FAULTS, "s3": FAULTS, "hf": FAULTS[:-1] + COMMITS}[kind]
        server.fails[:], server.apart = faults, APART
        kills = [[1, "row", 0], [2, "sent" if kind == "hf" else "saving", 0], [5, "row", 0]]
        codes, said = small_run(f"{server.root}/small", 1, kills, server.variables)
        assert codes == [[-signal.SIGKILL]] * 3 + [[0]], said
        assert not server.fails
        assert_same(downloaded(f"{server.root}/small", tmp_path), undisturbed[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
def test_two_processes_outlive_kills_faults_and_the_loss_of_the_lock(kind, small_run, undisturbed, tmp_path):
    """Either process is killed, while a checkpoint is written and between two; then another run takes the lock."""
    kills = [[1, "row", 1], [2, "saving", 1], [4, "sent" if kind == "hf" else "saving", 0], [5, "robbed", 0]]
    faults = {"gs": SILENCE + FAULTS, "s3": S3_SILENCE + FAULTS, "hf": FAULTS[:-1] + COMMITS}[kind]
    with SERVERS[kind]() as server:
        well, ill = f"{server.root}/well", f"{server.root}/ill"
        codes, said = small_run(well, 2, [], server.variables)
        assert codes == [[0, 0]], said
        assert_same(downloaded(well, tmp_path / "well"), undisturbed[2])
        server.fails[:], server.apart = faults, APART
        codes, said = small_run(ill, 2, kills, server.variables)
        assert not server.fails
        assert_same(downloaded(ill, tmp_path / "ill"), undisturbed[2])
    assert said.count(f"sgpo_jax: process 0 of 2, on host {HOST}, has lost the lock of {ill} to ") == 1, said
    killed, left = -signal.SIGKILL, (1, -signal.SIGABRT)  # jaxlib may notice that the first process is dead, and abort
    assert [codes[i][dead] for i, dead in enumerate((1, 1, 0))] == [killed] * 3, codes
    assert codes[0][0] == codes[1][0] == 1 and codes[2][1] in left and codes[3:] == [[1, 1], [0, 0]], (codes, said)


def assert_same(copy, run):
    """Checks that a copy of a small run in a bucket has what one on a disk has."""
    assert runs.rows(copy, "rl") == runs.rows(run, "rl")
    assert [row["step"] for row in runs.rows(copy, "rl")] == [1, 2, 3, 4, 5, 6]
    assert_same_arrays(copy, run, 6)
    assert names(copy) == names(run) - {"lock"} == {"rl.jsonl", "eval/result.json"}
    steps = {path.name for path in (copy / "rl/checkpoints").iterdir()}
    assert steps == {"4", "4.files.json", "6", "6.files.json"}


def downloaded(url, folder):
    copy = folder / "copy"
    buckets.download(url, {name: copy / name for name in buckets.listing(url) if not name.startswith("lock/")})
    return copy


@pytest.mark.slow
def test_a_run_on_the_hub_goes_on_with_another_number_of_processes(small_run, undisturbed, tmp_path):
    with SERVERS["hf"]() as server:
        url, kills = f"{server.root}/small", [[2, "saved", 0], [5, "row", 0]]
        codes, said = small_run(url, [2, 1, 2], kills, server.variables)
        assert [codes[0][0], *codes[1:]] == [-signal.SIGKILL, [-signal.SIGKILL], [0, 0]], (codes, said)
        assert_same(downloaded(url, tmp_path), undisturbed[2])


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_as_one_on_disk_and_is_read_and_exported(tmp_path, monkeypatch):
    url, exported = "gs://bucket/runs/killed", "gs://bucket/exported"
    with SERVERS["gs"]():
        plans = [
            plan_of(workdir, "sgpo_jax.main", runs.command(workdir, **WORLD)[3:], kills)
            for workdir, kills in ((tmp_path / "run", []), (url, [["checkpoint", 1, 0.1]]))
        ]
        assert [len(ends) for ends in attempts(tmp_path, *plans)] == [1, 2]
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
