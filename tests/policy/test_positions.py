"""Prompts and responses against the positions of the model: at the start of every stage, and before the first."""

import dataclasses

import pytest
from helpers.configs import load
from helpers.paths import ROOT

from sgpo_jax import evaluation, sharding
from sgpo_jax.commands import evaluate, train
from sgpo_jax.policy import Run, positions
from sgpo_jax.training import inputs, stage


def policy_with(count, config=None):
    """A policy of the embedded world with so many positions."""
    chosen, _ = stage.load_policy(config or config_with())
    return chosen._replace(config=dataclasses.replace(chosen.config, max_positions=count))


def config_with(**changes):
    config = load(ROOT / "configs" / "quickstart.py")
    small = {
        "model.layers": 1, "model.hidden": 16, "model.heads": 2, "model.mlp": 16, "mesh.fsdp": 1, "mesh.data": -1,
        "data.train": "arithmetic:train,count=64", "sft.train": "arithmetic:pretraining,count=60", "sft.batch": 8,
        "rl.batch": 8, "report_seconds": 0.0, "sft.micro_batch": 8, "sft.validation_share": 0.2,
    }  # fmt: skip
    config.update_from_flattened_dict(small | changes)
    with config.unlocked():
        config.eval.sets.heldout.source = "arithmetic:eval,count=8"
    return config


def run_with(tmp_path, count, **changes):
    config = config_with(**changes)
    return Run(config, tmp_path, policy_with(count, config), sharding.make_mesh(**config.mesh))


def test_a_limit_that_fits_after_every_prompt_some_or_none(capsys):
    policy, prompts = policy_with(64), [[1] * 10, [1] * 30, [1] * 20]
    positions.check_limit(policy, prompts, "rl.max_new_tokens", 34, "RL")
    positions.check_limit(policy, [], "rl.max_new_tokens", 1000, "RL")
    assert capsys.readouterr().out == ""
    for limit, count in ((35, 1), (45, 2), (54, 2)):
        positions.check_limit(policy, prompts, "rl.max_new_tokens", limit, "RL")
        said = f"warning: config.rl.max_new_tokens={limit}: together with it, {count} of 3 prompts of RL can exceed"
        assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"rl.max_new_tokens=55: must be at most 34: .* 64 positions .* 10 to 30"):
        positions.check_limit(policy, prompts, "rl.max_new_tokens", 55, "RL")
    with pytest.raises(ValueError, match="must be for a model with more positions"):
        positions.check_limit(policy, [[1] * 80], "rl.max_new_tokens", 100, "RL")


def test_known_rows_fit_or_are_named():
    policy = policy_with(64)
    rows = {"a": ([1] * 30, [1] * 34), "b": ([1] * 64, [])}
    positions.check_rows(policy, rows, "config.x=1")
    with pytest.raises(ValueError, match="config.x=1: .* 64 positions .* 1 of 3; the first is c, with 31 .* and 34 of"):
        positions.check_rows(policy, rows | {"c": ([1] * 31, [1] * 34)}, "config.x=1")


def test_every_stage_refuses_what_does_not_fit(tmp_path):
    fields = r"config.data.max_prompt_tokens=64, config.sft.max_response_tokens=28: .* 20 positions"
    with pytest.raises(ValueError, match=fields):
        inputs.demonstrations(run_with(tmp_path / "sft", 20))
    with pytest.raises(ValueError, match=r"config.rl.max_new_tokens=28: must be .* 30 positions .* of RL, autonomous"):
        inputs.problems(run_with(tmp_path / "rl", 30))
    with pytest.raises(ValueError, match=r"eval.max_new_tokens=28: must be .* 30 positions .* heldout, unguided"):
        evaluation.check_sets(run_with(tmp_path / "eval", 30))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"eval.max_new_tokens": 4090}, "eval.max_new_tokens=4090"),
        ({"eval.max_new_tokens": 4090, "stages": ("rl",), "rl.eval_every": 1}, "eval.max_new_tokens=4090"),
        ({"rl.max_new_tokens": 4096}, "rl.max_new_tokens=4096"),
    ],
)
def test_later_stages_are_checked_before_the_first(tmp_path, monkeypatch, changes, field):
    monkeypatch.setattr(train.sft, "train", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(train.rl, "train", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=f"config.{field}: must be at most .* 4096 positions"):
        train.run(config_with(**changes), tmp_path)


def test_what_is_wrong_with_the_rows_of_rl_is_said_before_the_warm_up(tmp_path, monkeypatch):
    monkeypatch.setattr(train.sft, "train", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match="RL has 4 problems, fewer than rl.batch=8"):
        train.run(config_with(**{"data.train": "arithmetic:train,count=4"}), tmp_path)


def test_the_command_for_benchmarks_checks_before_it_reads_weights(tmp_path, monkeypatch):
    config = config_with(**{"eval.max_new_tokens": 4090, "stages": ("eval",)})
    policy, _ = stage.load_policy(config)
    monkeypatch.setattr(evaluate.stage, "load_policy", lambda config: (policy, lambda key: pytest.fail("too late")))
    with pytest.raises(ValueError, match=r"config.eval.max_new_tokens=4090: must be at most"):
        evaluate.run(config, None, str(tmp_path / "out"), "", limit=2)


@pytest.mark.parametrize(
    ("name", "count"),
    [("qwen7b", 32768), ("qwen1p5b", 32768), ("benchmarks", 32768), ("llama8b", 131072), ("smollm2_135m", 8192),
     ("lab_smollm2", 8192), ("quickstart", 4096), ("lab", 4096), ("lab_logic", 4096)],
)  # fmt: skip
def test_the_configs_fit_their_models(name, count):
    config = load(ROOT / "configs" / f"{name}.py")
    limits = config.sft.max_response_tokens, config.rl.max_new_tokens, config.eval.max_new_tokens
    assert config.data.max_prompt_tokens + max(limits) <= count
