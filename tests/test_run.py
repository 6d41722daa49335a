"""Whole runs of the command on a tiny world: all stages, the same again after a preemption, and refusals."""

import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import transformers
from helpers.forks import Fork
from helpers.hub_server import TOKEN, HubServer
from helpers.paths import ROOT
from helpers.runs import assert_same_run, command, environment, parameters, rows, run

import sgpo_jax
from sgpo_jax import models
from sgpo_jax.models import huggingface
from sgpo_jax.policy import tokenizer
from sgpo_jax.runtime.files import read_jsonl


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, run(workdir)


def test_a_run_leaves_metrics_checkpoints_generations_table_and_figures(undisturbed):
    workdir, output = undisturbed
    assert "Accuracy with 95 % bootstrap intervals" in output and "heldout (k=2)" in output
    for name in ("config.json", "environment.json", "summary.png", "training.png", "eval/table.txt", "report.html"):
        assert (workdir / name).stat().st_size > 0
    wanted = """reward_auto reward_guided alpha token_kl token_kl_max kl_clip_share entropy response_length truncated
        ratio clip_share grad_norm logp_mismatch loss seconds_rollout seconds_reward seconds_update seconds_step
        tokens_per_second_rollout tokens_per_second_update rows_filled""".split()
    row = read_jsonl(workdir / "rl.jsonl")[0]
    assert not set(wanted) - set(row)
    assert 0 < row["rows_filled"] <= 1 and 0 < read_jsonl(workdir / "sft.jsonl")[0]["rows_filled"] <= 1
    assert row["logp_mismatch_max"] < 1e-4, "sampler and trainer agree in float32"
    steps = {int(path.name) for path in (workdir / "rl/checkpoints").iterdir() if path.name.isdigit()}
    assert {6, 8} <= steps and len(steps) <= 3, "the last two, and the best"
    (answers,) = (workdir / "eval/after").glob("heldout_unguided_*.jsonl")
    assert len(read_jsonl(answers)) == 24


@pytest.mark.slow
def test_another_seed_and_another_reward_give_another_run(undisturbed, tmp_path):
    half = "tests.helpers.reward_functions:half"  # of the user's own
    run(tmp_path / "other", rl__steps=2, rl__eval_every=0, eval__guided=False, seed=1, rl__reward=half)
    assert rows(tmp_path / "other", "sft") != rows(undisturbed[0], "sft")
    for row in rows(tmp_path / "other", "rl"):
        assert row["reward_auto"] == pytest.approx(0.5 * (1 - row["truncated"]), abs=1e-6)
    for path in (tmp_path / "other").rglob("heldout_*.jsonl"):
        assert {line["reward"] for line in read_jsonl(path)} <= {0.0, 0.5}


def stop(workdir, stage, step, how):
    """Starts a run, sends it a signal after `step` rows of a stage, and returns its exit code and output."""
    process = Fork("sgpo_jax.main", command(workdir)[3:], environment())
    path, deadline = workdir / f"{stage}.jsonl", time.monotonic() + 300
    try:
        while not (path.is_file() and len(path.read_text().splitlines()) >= step):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(how)
        output, _ = process.communicate(timeout=60)
    assert not (workdir / "eval" / "after_guided.json").exists(), "stopped too late to say anything"
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130)])  # SIGTERM: tests/runtime/test_distributed.py
def test_an_interrupted_run_saves_and_resumes_bit_for_bit(undisturbed, tmp_path, how, status):
    code, output = stop(tmp_path, "rl", 1, how)
    done = len(rows(tmp_path, "rl"))
    assert code == status
    assert output.rstrip().splitlines()[-1].endswith(f"saved at step {done}; the same command resumes")
    assert (tmp_path / "rl" / "checkpoints" / str(done)).is_dir(), "no step is lost"
    output = run(tmp_path)
    assert output.startswith(f"sgpo_jax {sgpo_jax.__version__} train, workdir {tmp_path}\n1 x cpu (cpu), jax ")
    assert f"{tmp_path}: SFT finished at step 8; RL resumes at step {done} of 8\n" in output
    assert re.search(r"\nrl: compiling the first step\n", output)
    assert re.search(r"\nrl: first step done after \d+ s, of which \d+ s compiling\n", output)
    assert output.rstrip().endswith(f"Page: {tmp_path / 'report.html'}")
    assert_same_run(undisturbed[0], tmp_path)


@pytest.mark.slow
def test_a_run_on_eight_devices_agrees_with_one(undisturbed, tmp_path):
    sharded = {"eval__batch": 8, "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    run(tmp_path, devices=8, **sharded)
    for stage in ("sft", "rl"):
        for ours, theirs in zip(rows(undisturbed[0], stage), rows(tmp_path, stage), strict=True):
            for name in ("loss", "grad_norm", "reward_auto", "response_length"):
                if name in ours:
                    assert ours[name] == pytest.approx(theirs[name], abs=1e-3)


def test_the_evaluate_command_measures_what_the_run_measured(undisturbed, tmp_path):
    workdir, _ = undisturbed
    flags = [flag for flag in command(workdir)[3:] if not flag.startswith("--workdir")]
    evaluated = Fork("sgpo_jax.evaluate", [*flags, f"--checkpoint={workdir}", f"--out={tmp_path}"], environment())
    _, errors = evaluated.communicate(timeout=300)
    assert evaluated.returncode == 0, errors[-3000:]
    ours = json.loads((tmp_path / "results.json").read_text())
    for kind in ("unguided", "guided"):
        theirs = json.loads((workdir / "eval" / f"after_{kind}.json").read_text())
        assert ours["model"] == f"{workdir} after rl step {theirs['step']}"
        assert ours["results"][kind] == theirs["results"]


def test_the_trained_model_is_exported_for_transformers(undisturbed, tmp_path):
    workdir, _ = undisturbed
    step = min(int(path.name) for path in (workdir / "rl/checkpoints").iterdir() if path.name.isdigit())
    flags = [flag for flag in command(workdir)[3:] if not flag.startswith("--workdir")]
    arguments = [*flags, f"--workdir={workdir}", f"--to={tmp_path / 'model'}", "--dtype=float32", "--push=me/tiny"]
    with HubServer() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        exported = subprocess.run(
            [sys.executable, "-m", "sgpo_jax.export", *arguments],
            env=environment() | variables, cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert exported.returncode == 0, exported.stderr[-3000:]
    written = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in written and hub.files == {"models/me/tiny": written}
    assert hub.repositories == {"models/me/tiny": True}, "private"
    params, config = huggingface.load(tmp_path / "model")
    saved = [parameters(workdir, "rl", s)["params"] for s in (step, 6, 8) if (workdir / f"rl/checkpoints/{s}").exists()]
    assert any(
        all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(tree), strict=True))
        for tree in saved
    )
    tok = tokenizer.load(str(tmp_path / "model"))
    assert tokenizer.stop_ids(tok, tmp_path / "model") == tokenizer.stop_ids(tokenizer.load("arithmetic"))
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = np.arange(12)[None] + 5
    hidden, _ = models.apply(params, config, tokens, tokens - 5, tokens > 0)
    with torch.no_grad():
        theirs = model(torch.as_tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(hidden @ models.head(params, config), theirs, atol=1e-4)


def test_another_config_in_the_same_workdir_is_refused(undisturbed):
    workdir, _ = undisturbed
    refused = Fork("sgpo_jax.main", command(workdir, seed=3)[3:], environment())
    _, errors = refused.communicate(timeout=300)
    assert refused.returncode == 1
    assert f"config.seed=3: the run in {workdir} has 0" in errors and "Traceback" not in errors
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0, "a refused run changes nothing"
