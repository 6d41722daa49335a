"""A run folder that an earlier version left behind resumes.

`data/run_34d3c70.tar.gz` is a whole run folder of commit 34d3c70, two steps into RL, without its page and figures;
`data/run_34d3c70_continued.jsonl` has what the same commit made of steps 3 and 4. To make them again, check out that
commit and run the command with the fields below, once with rl.steps=2 and once with 4.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.configs import load
from helpers.paths import ROOT

from sgpo_jax import sharding
from sgpo_jax.commands import train
from sgpo_jax.policy import Run
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.training import stage

DATA = Path(__file__).parent / "data"
FIELDS = {
    "model.layers": 1, "model.hidden": 16, "model.heads": 2, "model.mlp": 16, "stages": ("sft", "rl"),
    "data.train": "arithmetic:train,count=64", "sft.train": "arithmetic:pretraining,count=200", "sft.steps": 2,
    "sft.batch": 16, "sft.validation_share": 0.1, "rl.batch": 4, "rl.micro_batch": 4, "rl.max_new_tokens": 8,
    "rl.eval_every": 0, "rl.reward": "helpers.reward_functions:even", "checkpoint.every": 1, "checkpoint.keep": 1,
    "report_seconds": 0.0,
}  # fmt: skip


@pytest.fixture
def mesh(monkeypatch):
    """One device, as the run had."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)
    return mesh


@pytest.fixture
def workdir(tmp_path):
    with tarfile.open(DATA / "run_34d3c70.tar.gz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


def config_of(steps):
    config = load(ROOT / "configs" / "quickstart.py")
    config.update_from_flattened_dict(FIELDS | {"rl.steps": steps})
    return config


@pytest.mark.slow
def test_a_run_of_an_earlier_version_resumes_and_comes_to_the_same_end(workdir, mesh, capsys):
    before = (workdir / "rl.jsonl").read_text()
    assert len(before.splitlines()) == 2
    config = config_of(steps=4)
    policy, _ = stage.load_policy(config)
    state = stage.state_at(Run(config, workdir, policy, mesh), "rl", 2, stage.optimizer(config, "rl", 4)[0])
    assert int(state.step) == 2 and all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))

    train.run(config, workdir)
    assert "damaged" not in capsys.readouterr().out
    assert (workdir / "rl.jsonl").read_text().startswith(before), "what was there stays"
    rows, expected = read_jsonl(workdir / "rl.jsonl")[2:], read_jsonl(DATA / "run_34d3c70_continued.jsonl")
    assert [row["step"] for row in rows] == [3, 4]
    for row, values in zip(rows, expected, strict=True):
        for name, value in values.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_changed_field_of_an_earlier_run_is_still_refused(workdir, mesh):
    config = config_of(steps=4)
    config.rl.delta = 2.0
    with pytest.raises(ValueError, match=r"config\.rl\.delta=2\.0: the run in .* has 1\.0"):
        train.run(config, workdir)
    assert json.loads((workdir / "config.json").read_text())["rl"]["delta"] == 1.0
