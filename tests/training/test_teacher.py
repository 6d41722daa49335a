"""Teachers and token rules: the update against the equation written out densely, and how a teacher follows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dense
from helpers.batches import CONFIG, assert_trees_close, make_batch, make_params
from helpers.configs import load
from helpers.paths import ROOT
from helpers.runs import TINY, parameters, rows

from sgpo_jax import config as configs
from sgpo_jax import sharding
from sgpo_jax.commands import train
from sgpo_jax.training import Forward, Objective, Teaching, Weighting, init_state, make_update, pack_batch
from sgpo_jax.training.teacher import Teacher, begin, follow

RATE = 0.3


def one_update(teacher_params, batch, rl, micro_batch=100):
    """(state, metrics) of one update with SGD of rate 1, which turns the change of the parameters into the gradient."""
    optimizer, teaching = optax.sgd(1.0), Teaching.from_config(rl)
    update = make_update(Forward(CONFIG), optimizer, Objective.from_config(rl), teaching=teaching)
    state = init_state(make_params(), optimizer, teaching)
    if state.teacher is not None:
        name = "reference" if state.teacher.moving is None else "moving"
        state = state.replace(teacher=state.teacher.replace(**{name: jax.tree.map(jnp.copy, teacher_params)}))
    return update(state, pack_batch(batch, Weighting.from_config(rl), micro_batch=micro_batch, chunk=8))


def rl_of(**changes):
    config = configs.base()
    config.rl.update({"delta": 1.7, "teacher_rate": RATE, "teacher_window": 1, "teacher_margin": 0.0} | changes)
    return config.rl


# What each teacher and rule is tried with; together they are all of both.
SETTINGS = [
    {"teacher": "frozen", "token_rule": "scale"},
    {"teacher": "trust_region", "token_rule": "none", "delta_quantile": 0.6},
    {"teacher": "ema", "token_rule": "mask", "delta_quantile": 0.6},
    {"teacher": "gated", "token_rule": "scale", "delta_quantile": 0.3},
    {"teacher": "live", "token_rule": "scale"},
]
QUICK = SETTINGS[:1]


@pytest.mark.parametrize(
    "changes", [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in SETTINGS], ids=str
)
def test_the_update_is_the_gradient_of_the_written_out_equation(changes):
    params, teacher_params, batch, rl = make_params(), make_params(seed=5), make_batch(), rl_of(**changes)
    value, gradient = jax.value_and_grad(dense.loss)(params, rl, params, batch, teacher_params)
    state, metrics = one_update(teacher_params, batch, rl, micro_batch=2)
    assert_trees_close(jax.tree.map(jnp.subtract, params, state.params), gradient, 1e-5)
    np.testing.assert_allclose(metrics["loss"], value, atol=1e-5)
    assert 0.1 < metrics["kl_clip_share"] < 0.9, "delta must act on some tokens"
    if rl.teacher == "ema":
        moved = jax.tree.map(lambda t, s: (1 - RATE) * t + RATE * s, teacher_params, state.params)
        assert_trees_close(state.teacher.moving, moved, 1e-6)
    elif rl.teacher != "live":  # the first window of a gated one sets what to exceed
        kept = state.teacher.moving if rl.teacher == "gated" else state.teacher.reference
        assert_trees_close(kept, teacher_params, 0)
    if rl.teacher == "gated":
        np.testing.assert_allclose(state.teacher.best_reward, np.mean(batch.autonomous.rewards), rtol=1e-6)


def test_the_live_teacher_is_no_part_of_the_state():
    assert begin({"a": jnp.ones(2)}, Teaching()) is None
    assert follow(None, {"a": jnp.ones(2)}, jnp.int32(1), None, Teaching()) is None


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_teacher_begins_as_a_copy_of_its_own_type(kind):
    params = {"a": jnp.ones(2)}
    teacher = jax.jit(lambda p: (p, begin(p, Teaching("frozen", teacher_dtype=kind))))(params)[1]
    assert teacher.moving is None and teacher.reference["a"].dtype == kind
    params["a"].delete()
    assert (np.asarray(teacher.reference["a"], np.float32) == 1).all()


def test_a_gated_teacher_is_refreshed_when_the_reward_has_risen():
    """Windows of two steps. The creeping rise counts from the last refresh, not from the window before."""
    teaching = Teaching("gated", teacher_window=2, teacher_margin=0.1)
    teacher, refreshed = begin({"a": jnp.float32(0)}, teaching), []
    rewards = [0.2, 0.4, 0.3, 0.42, 0.4, 0.46, 0.9, 0.0, 0.5, 0.6]  # means 0.3, 0.36, 0.43, 0.45, 0.55
    for step, reward in enumerate(rewards, start=1):
        teacher = follow(teacher, {"a": jnp.float32(step)}, jnp.int32(step), jnp.float32(reward), teaching)
        refreshed.append(float(teacher.moving["a"]))
    assert refreshed == [0, 0, 0, 0, 0, 6, 6, 6, 6, 10]
    np.testing.assert_allclose(teacher.best_reward, 0.55, rtol=1e-6)


def test_a_moving_average_follows_at_its_rate():
    teacher, expected = Teacher(moving={"a": jnp.float32(1.0)}), 1.0
    for step, value in enumerate([3.0, -2.0, 5.0], start=1):
        teacher = follow(teacher, {"a": jnp.float32(value)}, jnp.int32(step), None, Teaching("ema", RATE))
        expected = (1 - RATE) * expected + RATE * value
    np.testing.assert_allclose(teacher.moving["a"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "teacher", [pytest.param(name, marks=pytest.mark.slow) for name in ("gated", "trust_region")]
)
def test_a_run_that_stops_and_resumes_ends_bit_for_bit_the_same(teacher, tmp_path, monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)

    def run(folder, steps):
        config = load(ROOT / "configs" / "quickstart.py")
        config.update_from_flattened_dict(TINY | {
            "stages": ("rl",), "rl.teacher": teacher, "rl.token_rule": "scale", "rl.teacher_window": 1,
            "rl.reward": "helpers.reward_functions:even", "rl.steps": steps, "rl.eval_every": 0, "checkpoint.every": 1,
            "rl.learning_rate": 1e-2, "rl.teacher_margin": 0.0, "report_seconds": 0.0,
        })  # fmt: skip
        train.run(config, tmp_path / folder)
        return rows(tmp_path / folder, "rl"), parameters(tmp_path / folder, "rl", steps)

    whole, state = run("whole", 3)
    run("parts", 1)
    parts, resumed = run("parts", 3)
    assert whole == parts and "teacher" in state
    assert jax.tree.structure(state) == jax.tree.structure(resumed)
    jax.tree.map(np.testing.assert_array_equal, state, resumed)
