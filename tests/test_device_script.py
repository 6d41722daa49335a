"""Tests benchmarks/device.py with a tiny model on the CPU: its parts, their limits, and what it writes."""

import json
import os
import subprocess
import sys

import pytest
from helpers import xla_flags
from helpers.paths import ROOT

TINY = ("--shape=2x64x4x2x128x256", "--prompt=16", "--longest=24", "--problems=1", "--micro-batch=2")


def run(place, *arguments, timeout=600):
    """Runs the script; returns (parts of the JSON, printed text)."""
    command = [sys.executable, "benchmarks/device.py", *TINY, f"--json={place}/device.json", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.quick(1)},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((place / "device.json").read_text())["results"], done.stdout


@pytest.mark.slow
def test_parity_and_a_step_on_the_cpu(tmp_path):
    results, printed = run(tmp_path, "--parts=parity,rollout,update,lora", "--minutes=9", "--slack=5")
    assert [result["status"] for result in results.values()] == ["done"] * 4, results
    # Both sides are the CPU here, so that float32 differs in nothing, and bfloat16 by its rounding.
    parity = results["parity"]
    assert all(value == 0 for name, value in parity.items() if name.startswith("attention float32"))
    assert all(1e-4 < value < 3e-2 for name, value in parity.items() if name.startswith("attention bfloat16"))
    assert parity["log-probabilities of decoding"] < 1e-4 and parity["loss of an update"] == 0
    # 1 problem with 8 + 4 responses, of which few are shorter than 24 tokens.
    rollout, update = results["rollout"], results["update"]
    assert rollout["responses"] == 12 and 0 < rollout["tokens/s"] * rollout["seconds"] <= 12 * 24
    assert rollout["planned GiB"] > 0 and update["planned GiB"] > 0 and update["tokens/s"] > 0
    # Adapters learn from the same responses; what one part lacks is in no ratio.
    lora = results["lora"]
    assert lora["rank"] == 64 and lora["response tokens"] == update["response tokens"] and 0 < lora["grad_norm"] < 1
    ratios = json.loads((tmp_path / "device.json").read_text())["ratios"]
    assert ratios == {
        "LoRA over full update, seconds": lora["seconds"] / update["seconds"],
        "merging over a rollout, seconds": lora["seconds to merge"] / rollout["seconds"],
    }
    # The peaks of a CPU are not known.
    assert rollout["share of HBM peak"] is None and update["MFU"] is None
    assert "share of HBM peak" in printed


@pytest.mark.slow
def test_a_part_that_runs_too_long_leaves_the_others(tmp_path):
    results, _ = run(tmp_path, "--parts=rollout,parity", "--minutes=0.01")
    assert [result["status"].split(" after")[0] for result in results.values()] == ["stopped", "stopped"]


@pytest.mark.slow
def test_a_part_that_fails_says_why(tmp_path):
    results, printed = run(tmp_path, "--parts=rollout", "--shape=none")
    assert results["rollout"]["status"] == "failed: exit status 1"
    assert "--shape='none': allowed: small" in results["rollout"]["output"] and "allowed: small" in printed


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="--parts=speed: speed is none of parity, rollout, update"):
        run(tmp_path, "--parts=speed")
