"""Runs into which NaN and Inf are injected, and the command that says of each skipped batch where it began."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import ROOT

from sgpo_jax import losses, models
from sgpo_jax.commands import replay, train
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.training import rl, skipped_batch
from sgpo_jax.training.batch import Batch


def config_of(stage):
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.model.update({"hidden": 16, "heads": 2, "mlp": 32, "layers": 1})
    config.data.train, config.sft.train = "arithmetic:train,count=16", "arithmetic:pretraining,count=40"
    config.sft.update({"batch": 8, "micro_batch": 8, "steps": 4, "validation_share": 0.1})
    config.rl.update({"batch": 8, "micro_batch": 8, "steps": 4, "autonomous": 3, "guided": 1, "max_new_tokens": 6})
    config.rl.share_prompt = 2
    config.report_seconds = 0.0
    config.checkpoint.update({"every": 1, "keep": 9})
    config.stages, config.max_skipped = (stage,), 4
    return config


def poison(number):
    """`losses.clipped_surrogate` with NaN in the loss of good advantages, Inf in the gradient of bad ones, and a batch
    that has neither, bad log-probabilities, good or bad advantages, by the step `number()`."""
    surrogate = losses.clipped_surrogate

    def poisoned_loss(logp, old_logp, advantage, *clip):
        bad = advantage < -1.2
        steep = jnp.sqrt(jnp.where(bad, logp - jax.lax.stop_gradient(logp), 1.0))  # 0 with an infinite slope
        loss = surrogate(logp, old_logp, advantage, *clip) + jnp.where(bad, steep, 0.0)
        return loss + jnp.where(advantage > 1.2, jnp.nan, 0.0)

    def poisoned_batch(prompts, guided_prompts, autonomous, guided):
        rewards, logp = np.zeros_like(autonomous.rewards), autonomous.logp.copy()
        step = number()
        if step == 2:
            logp[5, 1, 0] = -np.inf
        if step in (3, 4):
            rewards[step] = [1, 0, 0] if step == 3 else [1, 1, 0]
        return Batch(prompts, guided_prompts, autonomous._replace(rewards=rewards, logp=logp), guided)

    return poisoned_loss, poisoned_batch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps, all but the first of which are spoiled: by log-probabilities, loss and gradient."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        loss, batch = poison(iter([1, 2, 3, 4]).__next__)
        patch.setattr(losses, "clipped_surrogate", loss)
        patch.setattr(rl, "Batch", batch)
        train.run(config_of("rl"), workdir)
        yield workdir


def test_injected_nan_and_inf_are_skipped_and_counted_and_the_run_goes_on(run, capsys):
    rows = read_jsonl(run / "rl.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3]
    assert [row["loss"] is None for row in rows] == [False, False, True, False]
    assert [row["logp_mismatch"] is None for row in rows] == [False, True, False, False]
    assert [row["grad_norm"] is None for row in rows] == [False, False, False, True]
    names = [f"skipped_batch_00000{step}.npz" for step in (2, 3, 4)]
    assert sorted(path.name for path in (run / "rl").glob("*.npz")) == names


@pytest.mark.parametrize(
    ("step", "first", "metrics"),
    [
        (2, ("sampler's log-probability (autonomous)", "problem {5}, response 1, token 0"),
         ["logp_mismatch", "logp_mismatch_max"]),
        (3, ("loss (autonomous)", "problem {3}, response 0, token 0"), ["loss_grpo", "loss"]),
        (4, ("metric", "grad_norm"), ["grad_norm"]),
    ],
)  # fmt: skip
def test_the_replay_says_where_it_begins(run, step, first, metrics, capsys):
    path = run / "rl" / f"skipped_batch_00000{step}.npz"
    kept = skipped_batch.read(path)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    found = replay.run(config_of("rl"), run, path)
    output = capsys.readouterr().out
    what, where = first[0], first[1].format(*map(repr, kept.ids))
    assert (found[0].what, found[0].first) == (what, where)
    assert f"state after step {step - 1}" in output and "the update is skipped" in output
    assert f"it begins with: {what}, {where}" in output and "warning" not in output
    assert sorted(each.first for each in found if each.what == "metric") == sorted(metrics)
    gradient = {each.first for each in found if each.what == "gradient"}
    assert ("layers/q/kernel" in gradient) == (step == 4), gradient
    if step < 4:
        assert found[0].problems == (kept.ids[5 if step == 2 else 3],)
    assert before == {file: file.stat().st_mtime_ns for file in run.rglob("*")}, "it only reads"


def test_a_batch_that_is_sound_under_another_state_is_applied_and_wrong_steps_are_refused(run, capsys):
    config, path = config_of("rl"), run / "rl" / "skipped_batch_000003.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "clipped_surrogate", lambda logp, old_logp, advantage, *clip: -advantage * logp)
        assert replay.run(config, run, path, step=0) == []
    output = capsys.readouterr().out
    assert "warning: step 3 may have met another state" in output and "the update is applied" in output
    assert "all numbers are finite" in output
    with pytest.raises(ValueError, match=r"--step=9: must be one of \[0, 1, 2, 3, 4\]"):
        replay.run(config, run, path, step=9)
    config.seed = 1
    with pytest.raises(ValueError, match=r"config\.seed=1: the run in .* has 0"):
        replay.run(config, run, path)


@pytest.mark.slow
def test_a_bad_parameter_stops_the_warm_up_and_the_replay_names_it(tmp_path, monkeypatch, capsys):
    init = models.init

    def spoiled(key, config):
        params = init(key, config)
        return params | {"norm": {"scale": params["norm"]["scale"].at[3].set(jnp.inf)}}

    monkeypatch.setattr(models, "init", spoiled)
    config = config_of("sft")
    config.max_skipped = 2
    with pytest.raises(FloatingPointError, match=r"step 2: 2 updates .*\(max_skipped=2\).*replay .*skipped_batch_0+2"):
        train.run(config, tmp_path)
    capsys.readouterr()
    path = tmp_path / "sft" / "skipped_batch_000002.npz"
    found = replay.run(config, tmp_path, path)
    assert found[0] == ("parameters", "norm/scale", 1, ())
    hidden = next(each for each in found if each.what == "hidden state")
    assert hidden.first.endswith("response 0, token 0") and set(hidden.problems) == set(skipped_batch.read(path).ids)
    assert {"log-probability", "entropy", "loss", "metric", "gradient"} <= {each.what for each in found}


def test_a_file_that_is_no_batch_is_refused(run, tmp_path):
    whole = (run / "rl" / "skipped_batch_000002.npz").read_bytes()
    np.savez(tmp_path / "other.npz", tokens=np.arange(3))
    (tmp_path / "cut.npz").write_bytes(whole[:-100])
    (tmp_path / "text.npz").write_text("no")
    for name in ("other.npz", "cut.npz", "text.npz", "none.npz"):
        with pytest.raises(ValueError, match=rf"{name}: must be a skipped_batch_STEP.npz that a run left behind"):
            skipped_batch.read(tmp_path / name)
