"""Whole runs in several processes: what one process gives, and the same again after one of them was killed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import xla_flags
from helpers.bucket_servers import SERVERS
from helpers.forks import Fork
from helpers.paths import ROOT

from sgpo_jax.models import huggingface
from sgpo_jax.runtime import buckets, lock
from sgpo_jax.runtime.files import read_jsonl

TIMES = ("seconds", "tokens_per_second")
STEPS = {"sft": 3, "rl": 5}
AFTER_WARM_UP = ("rl", "rl.jsonl", "eval")  # of a run's folder
# Every group has right and wrong answers by a reward that a model without skill can earn.
TINY = {
    "model.hidden": 16, "model.heads": 2, "model.mlp": 32, "model.layers": 1, "model.remat": "none",
    "data.train": "arithmetic:train,count=64", "sft.train": "arithmetic:pretraining,count=200",
    "sft.batch": 16, "sft.micro_batch": 8, "sft.steps": STEPS["sft"], "sft.validate_every": 2,
    "sft.validation_share": 0.1, "sft.learning_rate": 0.03, "rl.reward": "tests.helpers.reward_functions:even",
    "rl.batch": 8, "rl.micro_batch": 8, "rl.autonomous": 4, "rl.guided": 2, "rl.steps": STEPS["rl"],
    "rl.max_new_tokens": 10, "rl.eval_every": 3, "eval.guided": False, "eval.batch": 8, "eval.max_new_tokens": 10,
    "eval.sets.heldout.source": "arithmetic:eval,count=12", "eval.sets.heldout.samples": 4,
    "checkpoint.every": 1, "checkpoint.keep": 3, "report_seconds": 0,
}  # fmt: skip
# A stop during an evaluation comes before its step is written.
SAVED = re.compile(r"stopped by SIGTERM; (saved at step \d+|the finished work is saved); the same command resumes\s*$")


def start(workdir, processes, devices, module="sgpo_jax.main"):
    """Starts the processes of a run or of another module, with this number of devices each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": xla_flags.quick(devices)}
    flags = [f"--config={ROOT / 'configs/quickstart.py'}", f"--workdir={workdir}"]
    flags += [f"--config.{name}={value}" for name, value in TINY.items()]

    def one(i):
        several = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={i}"]
        return Fork(module, [*flags, *several * (processes > 1)], environment)

    return [one(i) for i in range(processes)]


def end(run):
    """Waits for all processes, kills those that hang, and returns [(exit code, stdout, stderr)]."""
    try:
        outputs = [one.communicate(timeout=500) for one in run]
    finally:
        for one in run:
            one.kill()
    return [(one.returncode, *texts) for one, texts in zip(run, outputs, strict=True)]


def finished(workdir, processes, devices, **more):
    """Returns the output of the first process of a run without errors."""
    results = end(start(workdir, processes, devices, **more))
    assert [code for code, _, _ in results] == [0] * processes, results
    for _, output, errors in results[1:]:
        # Threads of Gloo write at the same time, and between the parts of each other's lines.
        gloo = r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\s"
        numbers = re.sub(gloo, "", output)
        errors = re.sub(r".*GOOGLE_AUTH_TOKEN_FOR_TESTING\n", "", errors)  # TensorStore, of the bucket of a test
        assert errors == "" and re.fullmatch(r"\d*", numbers), "only the first talks"
        assert len(numbers) == 3 * output.count("[Gloo] Rank"), "of one digit each"
    return results[0][1]


def interrupt(workdir, stage, step, process, how):
    """Sends a signal to one of two processes after `step` rows of a stage; returns (`end`'s result, seconds)."""
    run, deadline = start(workdir, 2, 2), time.monotonic() + 400
    try:
        while len(written(workdir, f"{stage}.jsonl").splitlines()) < step:
            assert all(one.poll() is None for one in run) and time.monotonic() < deadline
            time.sleep(0.005)
        run[process].send_signal(how)
        started = time.monotonic()
    finally:
        results = end(run) if sys.exc_info()[0] is None else [one.kill() for one in run]
    assert not written(workdir, "eval/after_unguided.json"), "stopped too late to say anything"
    return results, time.monotonic() - started


def written(workdir, name):
    """Returns the content of a file of a run on a disk or in a bucket; nothing where it is not there."""
    try:
        return buckets.read(f"{workdir}/{name}") if buckets.is_url(str(workdir)) else (workdir / name).read_bytes()
    except FileNotFoundError:
        return b""


def rows(workdir, stage):
    """Returns the metrics rows without timings, which no two runs share."""
    return [
        {name: value for name, value in row.items() if not name.startswith(TIMES)}
        for row in read_jsonl(workdir / f"{stage}.jsonl")
    ]


def saved_steps(workdir, stage):
    return sorted(int(path.name) for path in (workdir / stage / "checkpoints").iterdir() if path.name.isdigit())


def state(workdir, stage, step):
    """Reads every array of a checkpoint, whatever devices it was saved from."""
    path = (workdir / stage / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return checkpointer.restore(path, restore_args=to_numpy)


def results(workdir):
    """Reads all generations with verdicts, and the evaluations."""
    paths = [*workdir.rglob("heldout_*.jsonl"), *workdir.glob("eval/*.json")]
    return {str(path.relative_to(workdir)): path.read_text() for path in paths}


def files(workdir):
    """Returns the names of all files except those of checkpoints and TensorBoard, whose names have the time."""
    names = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
    return {name for name in names if "/checkpoints/" not in name and not name.startswith("tensorboard/")}


def assert_agree(one, several):
    """Checks that rollouts and rewards are equal, and parameters and other metrics nearly equal."""
    assert results(one) == results(several) and len(results(one)) == 6
    assert files(one) == files(several)
    for stage, total in STEPS.items():
        assert [row["step"] for row in rows(several, stage)] == list(range(1, total + 1))
        for ours, theirs in zip(rows(one, stage), rows(several, stage), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
            for name in ("reward_auto", "reward_guided", "response_length", "truncated", "accuracy", "alpha"):
                assert ours.get(name) == theirs.get(name)
        assert saved_steps(one, stage) == saved_steps(several, stage)
        for step in saved_steps(one, stage):
            pair = state(one, stage, step), state(several, stage, step)
            assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
            for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    for row in rows(one, "rl"):
        assert 0 < row["reward_auto"] < 1 and row["alpha"] > 0, "rewards and targets were there to be got wrong"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finished(workdir, 2, 2)
    return workdir


@pytest.mark.slow
def test_two_processes_do_what_one_does(undisturbed, tmp_path):
    finished(tmp_path, 1, 4)
    assert_agree(tmp_path, undisturbed)
    assert json.loads((undisturbed / "environment.json").read_text())[0]["processes"] == 2


@pytest.mark.slow
def test_four_processes_do_what_two_do(undisturbed, tmp_path):
    """Four go on where two have finished the warm-up."""
    workdir = shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns(*AFTER_WARM_UP))
    finished(workdir, 4, 1)
    assert_agree(undisturbed, workdir)
    assert json.loads((workdir / "environment.json").read_text())[-1]["processes"] == 4


@pytest.mark.slow
def test_killed_preempted_and_damaged_it_ends_bit_for_bit_as_undisturbed(undisturbed, tmp_path):
    killed, seconds = interrupt(tmp_path, "sft", 2, 1, signal.SIGKILL)
    assert [code for code, _, _ in killed] == [1, -signal.SIGKILL] and seconds < 60
    host = re.escape(socket.gethostname())
    died = rf"sgpo_jax: process 1 of 2, on host {host}, has died without a word .*; this one, 0, stops too\n"
    assert re.fullmatch(died, killed[0][2]), killed[0][2]

    preempted, seconds = interrupt(tmp_path, "rl", 2, 1, signal.SIGTERM)
    assert [code for code, _, _ in preempted] == [0, 0] and seconds < 60, preempted
    assert SAVED.search(preempted[0][1]) and preempted[1][2] == ""
    last = len(rows(tmp_path, "rl"))
    assert saved_steps(tmp_path, "rl")[-1] == last, "no step is lost"

    broken = max((tmp_path / f"rl/checkpoints/{last}/state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 4
    broken.write_bytes(bytes(content))
    output = finished(tmp_path, 2, 2)
    assert output.count(f"rl/checkpoints/{last} is damaged") == 1 and f"renamed to {last}.damaged" in output

    assert results(tmp_path) == results(undisturbed)
    for stage, total in STEPS.items():
        assert rows(tmp_path, stage) == rows(undisturbed, stage)
        for a, b in zip(*(jax.tree.leaves(state(w, stage, total)) for w in (tmp_path, undisturbed)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_two_processes_in_a_bucket_end_as_on_a_disk(undisturbed, tmp_path):
    """It goes on with the warm-up, is stopped in RL and started again; each process writes its part of checkpoints."""
    url = "gs://bucket/runs/two"
    with SERVERS["gs"]():
        upload_warm_up(undisturbed, url)
        preempted, _ = interrupt(url, "rl", 2, 1, signal.SIGTERM)
        assert [code for code, _, _ in preempted] == [0, 0] and SAVED.search(preempted[0][1]), preempted
        finished(url, 2, 2)
        download(url, tmp_path)
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "hf"])
def test_two_processes_in_a_bucket_go_on_with_what_was_begun_on_a_disk(kind, undisturbed, tmp_path):
    """They read the warm-up's checkpoint in the bucket; to s3:// each writes its part of those of RL."""
    with SERVERS[kind]() as server:
        url = f"{server.root}/two"
        upload_warm_up(undisturbed, url)
        server.requests.clear()
        finished(url, 2, 2)
        sent = [line for line in server.requests if line.startswith("PUT")]
        parts = [any(f"/ocdbt.process_{i}/" in line for line in sent) for i in (0, 1)]
        assert all(parts) or kind == "hf", "each its own part"
        download(url, tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


def upload_warm_up(workdir, url):
    files = [path for path in workdir.rglob("*") if path.is_file()]
    names = {str(path.relative_to(workdir)): path for path in files}
    buckets.change(url, {name: path for name, path in names.items() if name.split("/")[0] not in AFTER_WARM_UP})


def download(url, folder):
    buckets.download(url, {name: folder / name for name in buckets.listing(url) if not name.startswith("lock")})


def assert_same(copy, undisturbed):
    """Checks that a run that was copied from a bucket ended bit for bit as one on a disk."""
    assert results(copy) == results(undisturbed) and files(copy) == files(undisturbed) - {"lock"}
    for stage, total in STEPS.items():
        assert rows(copy, stage) == rows(undisturbed, stage)
        for a, b in zip(*(jax.tree.leaves(state(w, stage, total)) for w in (copy, undisturbed)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_other_commands_in_two_processes_do_what_the_run_did(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    finished(workdir, 2, 2, module="helpers.other_commands")
    after = json.loads((workdir / "eval/after_unguided.json").read_text())
    assert json.loads((workdir / "out/results.json").read_text())["results"]["unguided"] == after["results"]
    exported, _ = huggingface.load(workdir / "model")
    trained = state(workdir, "rl", after["step"])["params"]
    for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = read_jsonl(workdir / "analysis.jsonl")
    assert [line["step"] for line in lines] == [after["step"]] * 3
    assert all(0 < kl < 1 for line in lines for kl in line["token_kl"])


@pytest.mark.slow
def test_a_run_in_a_locked_folder_is_refused_in_every_process(tmp_path):
    with lock.hold(tmp_path):
        refused = end(start(tmp_path, 2, 1))
    said = f"{tmp_path}: already in use by process {os.getpid()} on host {socket.gethostname()} (since"
    assert [code for code, _, _ in refused] == [1, 1]
    assert refused[0][2].startswith(f"sgpo_jax: {said}")
    assert f"has failed: {said}" in refused[1][2] and "choose another --workdir" in refused[1][2]
    assert all("Traceback" not in errors for _, _, errors in refused) and not (tmp_path / "config.json").exists()


SEES = """
import sys, jax
from sgpo_jax.runtime import distributed
distributed.start(sys.argv[1], 1, 0)
print(jax.config.read("jax_cuda_visible_devices"))
"""


def test_a_process_with_a_coordinator_has_all_gpus_of_its_host_inside_slurm():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip
    environment = os.environ | slurm | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SEES, address]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "all", result.stderr
