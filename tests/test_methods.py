"""Every method's update against its formula, written out densely for one problem and one response at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import xla_flags
from helpers.batches import CONFIG, G1, G2, B, T, assert_trees_close, log_probs, make_batch, make_params
from helpers.configs import load
from helpers.paths import ROOT

from sgpo_jax import config as configs
from sgpo_jax import config_checks, methods
from sgpo_jax.commands import train
from sgpo_jax.methods import METHODS, select
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.training import rl
from sgpo_jax.training.batch import Batch, pack_batch
from sgpo_jax.training.forward import Forward
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.state import init_state
from sgpo_jax.training.train_step import make_update
from sgpo_jax.training.weighting import Weighting

# Those of the paper and its neighbours; tests/training/test_other_methods.py has the others.
TRAINED = [name for name in METHODS if name != "sft"][: [*METHODS].index("self_strategies")]
DELTA, BETA, K = 2.2, 0.3, 4


def method_batch(name) -> Batch:
    """Rollouts as the method has them: problem 0 is never solved, problem 2 has no correct guided response."""
    batch = make_batch(seed=2)
    auto = batch.autonomous._replace(rewards=batch.autonomous.rewards.at[0].set(0.0))
    batch = batch._replace(autonomous=auto)
    if name == "grpo":
        return batch._replace(guided=None, guided_prompts=None)
    if name in ("luffy", "hpt"):
        guided = jax.tree.map(lambda x: x[:, :1], batch.guided)
        # One expert is wrong, as its answer is graded like any other.
        guided = guided._replace(rewards=jnp.array([1.0, 1.0, 1.0, 0.0])[:, None])
        return batch._replace(guided=guided, guided_prompts=None)
    if name == "self_strategies":
        return without_strategy(batch, [0, 1])
    return batch


def without_strategy(batch, problems):
    """The guided prompts of these problems are their unguided ones."""
    pairs = zip(batch.prompts.tokens, batch.guided_prompts.tokens, strict=True)
    tokens = [plain if b in problems else guided for b, (plain, guided) in enumerate(pairs)]
    return batch._replace(guided_prompts=batch.guided_prompts._replace(tokens=tokens))


def settings_of(name, **changes):
    """The section rl of the config of a method, as in a run."""
    config = configs.base()
    config.rl.delta = DELTA
    config.rl.beta = BETA
    config.rl.kl_top_k = K
    config.rl.max_new_tokens = T
    select(config, name)
    config.rl.update(changes)
    return config.rl


@functools.cache
def updater(rate, objective):
    """(optimizer, update); methods that differ in the batch alone share the compiled update."""
    optimizer = optax.sgd(rate)
    return optimizer, make_update(Forward(CONFIG), optimizer, objective)


def updated(name, batch, params, rate=1.0, micro_batch=100, exact=False, **changes):
    fields = settings_of(name, **changes)
    packed = pack_batch(
        batch, Weighting.from_config(fields), fields.distillation, micro_batch=micro_batch, chunk=8
    )
    optimizer, update = updater(rate, Objective.from_config(fields))
    update = jax.jit(update, compiler_options=xla_flags.EXACT) if exact else update
    return update(init_state(jax.tree.map(jnp.copy, params), optimizer), packed)


def dense_loss(name, params, old_params, batch):
    """The method's loss from its equations."""
    total = 0.0
    for b in range(B):
        rewards = np.asarray(batch.autonomous.rewards[b], np.float64)
        shown = name in ("luffy", "hpt")
        expert = float(batch.guided.rewards[b, 0]) if shown else None
        if name == "no_grpo":
            advantages = 0 * rewards
        elif name == "luffy":
            mean = (rewards.sum() + expert) / (G1 + 1)
            advantages = rewards - mean
        elif name == "hpt":
            advantages = (rewards - rewards.mean()) * (rewards.sum() > 0)
        else:
            advantages = 0 * rewards if rewards.std() == 0 else (rewards - rewards.mean()) / rewards.std()

        entropy = 0.0
        for i in range(G1):
            length, tokens = int(batch.autonomous.lengths[b, i]), batch.autonomous.tokens[b, i]
            picked = np.arange(length), tokens[:length]
            full = log_probs(params, batch.prompts, b, tokens, length)
            ratio = jnp.exp(full[picked] - log_probs(old_params, batch.prompts, b, tokens, length)[picked])
            gain = ratio * advantages[i]
            if not shown:
                gain = jnp.minimum(gain, jnp.clip(ratio, 0.8, 1.28) * advantages[i])
            total -= gain.sum() / (T if shown else length) / G1
            entropy -= (jnp.exp(full) * full).sum(-1).mean() / G1
        if shown:
            total -= 0.001 * entropy
            length, tokens = int(batch.guided.lengths[b, 0]), batch.guided.tokens[b, 0]
            logp = log_probs(params, batch.prompts, b, tokens, length)[np.arange(length), tokens[:length]]
            if name == "luffy":
                p = jnp.exp(logp)
                total -= (expert - mean) * (p / (p + 0.1)).sum() / T / G1
            elif rewards.sum() == 0:
                total -= logp.sum() / T / G1
        elif name != "grpo":
            total += dense_target_loss(name, params, old_params, batch, b)
    return total / B


def dense_target_loss(name, params, old_params, batch, b):
    """alpha times the distillation loss of one problem, for the methods with a strategy."""
    responses = []
    for j in range(G2):
        length, tokens = int(batch.guided.lengths[b, j]), batch.guided.tokens[b, j]
        if batch.guided.rewards[b, j] == 1:
            picked = np.arange(length), tokens[:length]
            likely = float(log_probs(old_params, batch.prompts, b, tokens, length)[picked].sum())
            responses.append((likely, j, length, tokens))
    if not responses:
        return 0.0
    if name not in ("no_target_selection", "no_proximal"):
        responses = [max(responses, key=lambda response: response[0])]
    auto = np.asarray(batch.autonomous.rewards[b], np.float64)
    p_auto, p_guide = auto.mean(), float(batch.guided.rewards[b].mean())
    alpha = min(max(0.5 * (p_guide - p_auto + 0.1) / (p_auto + 0.1), 0.0), 0.8)
    if name == "fixed_weight":
        alpha = 1.0
    elif name == "group_advantage_weight":
        joined = np.append(auto, 1.0)
        alpha = 0.0 if joined.std() == 0 else min(max((1.0 - joined.mean()) / joined.std(), 0.0), 0.8)

    total = 0.0
    for _, _, length, tokens in responses:
        guided = jax.lax.stop_gradient(log_probs(params, batch.guided_prompts, b, tokens, length))
        unguided = log_probs(params, batch.prompts, b, tokens, length)
        if name == "direct_sft":
            distance = -unguided[np.arange(length), tokens[:length]]
        else:
            distance = dense_distance(name, guided, unguided)
            if name not in ("no_kl_clip", "no_proximal"):
                distance = jnp.where(distance <= DELTA, distance, 0.0)
        total += distance.sum() / length
    return alpha * total / len(responses)


def dense_distance(name, guided, unguided):
    """`[length]`, of log-probabilities `[length,V]` of both sides."""

    def kl(log_p, log_q):
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    if name == "jensen_shannon":
        mixture = jnp.log((1 - BETA) * jnp.exp(unguided) + BETA * jnp.exp(guided))
        return (1 - BETA) * kl(unguided, mixture) + BETA * kl(guided, mixture)
    if name == "top_k_kl":
        top, places = jax.lax.top_k(guided, K)
        sides = jnp.exp(top), jnp.exp(jnp.take_along_axis(unguided, places, axis=-1))
        return kl(*(jnp.log(jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1)) for x in sides))
    return kl(unguided, guided) if name == "reverse_kl" else kl(guided, unguided)


@pytest.mark.parametrize("name", TRAINED)
def test_the_update_is_the_gradient_of_the_methods_equation(name):
    params, batch = make_params(), method_batch(name)
    loss, grads = jax.value_and_grad(dense_loss, argnums=1)(name, params, params, batch)
    state, metrics = updated(name, batch, params)
    assert_trees_close(jax.tree.map(jnp.subtract, params, state.params), grads, 1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)


@pytest.mark.parametrize("name", ["sgpo", "reverse_kl", "jensen_shannon", "top_k_kl"])
def test_the_distillation_alone_equals_its_equation(name):
    params, batch = make_params(), method_batch(name)
    expected = sum(dense_target_loss(name, params, params, batch, b) for b in range(B)) / B
    _, metrics = updated(name, batch, params)
    assert expected > 0.01
    np.testing.assert_allclose(metrics["loss_kd"], expected, rtol=1e-4)


def test_a_distillation_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="divergence='kl': must be one of 'forward_kl', 'reverse_kl'"):
        updated("sgpo", method_batch("sgpo"), make_params(), distillation="kl")


def test_the_methods_differ_on_this_batch():
    """So that none of the comparisons above would pass for another method."""
    params = make_params()
    norms = {name: float(updated(name, method_batch(name), params)[1]["grad_norm"]) for name in TRAINED}
    shares = updated("sgpo", method_batch("sgpo"), params)[1]["kl_clip_share"]
    assert 0.2 < shares < 0.8, "the clip must act on some tokens"
    assert len({round(norm, 5) for norm in norms.values()}) == len(TRAINED), norms


@pytest.mark.slow
@pytest.mark.parametrize("name", ["self_strategies", "direct_sft"])
def test_problems_without_a_strategy_are_not_distilled(name):
    """Bit for bit, whatever alpha, the loss and the choice of targets are."""
    params, batch = make_params(), method_batch("sgpo")
    alone, _ = updated("grpo", batch._replace(guided=None, guided_prompts=None), params, exact=True)
    given, metrics = updated(name, batch, params, exact=True)
    assert metrics["loss_kd"] > 0 and not same(given, alone), "with strategies there is something to distil"
    state, metrics = updated(name, without_strategy(batch, range(B)), params, exact=True)
    assert metrics["loss_kd"] == 0 and same(state, alone)


def same(first, second):
    leaves = zip(*(jax.tree.leaves(state.params) for state in (first, second)), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


@pytest.mark.parametrize("name", ["luffy", "hpt", "no_target_selection"])
def test_micro_batches_of_a_method_give_the_result_of_one_batch(name):
    params, batch = make_params(), method_batch(name)
    whole, parts = (updated(name, batch, params, micro_batch=size) for size in (100, 2))
    assert_trees_close(parts[0].params, whole[0].params, 1e-5)
    assert_trees_close(parts[1], whole[1], 1e-5)


@pytest.mark.slow
def test_luffy_does_not_clip_the_ratio():
    """In the second of two updates the ratios are far from 1."""
    rate = 1.0
    old, batch = make_params(), method_batch("luffy")
    params = old
    for _ in range(2):
        grads = jax.grad(dense_loss, argnums=1)("luffy", params, old, batch)
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    state, metrics = updated("luffy", batch, old, rate, updates_per_batch=2)
    assert_trees_close(state.params, params, 5e-5)
    clipped, _ = updated("luffy", batch, old, rate, updates_per_batch=2, clip_low=0.2, clip_high=0.28)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), clipped.params, params))) > 1e-3


def test_hpt_with_a_higher_gate_imitates_more():
    params, batch = make_params(), method_batch("hpt")
    shares = [float(updated("hpt", batch, params, gate=gate)[1]["alpha"]) for gate in (0.0, 0.5, 1.0)]
    assert shares[0] == 0.25 and shares[0] < shares[1] <= shares[2] == 1.0
    _, metrics = updated("hpt", batch, params, gate=1.0)
    assert metrics["loss_grpo"] == 0 and metrics["loss_kd"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_to_the_samples_of_the_config(name):
    config = select(configs.base(), name)
    # The demonstration stands for one of LUFFY's samples; HPT verifies with all of them.
    samples = config.rl.autonomous + (config.rl.guided if name != "hpt" else 0)
    assert samples == 12
    assert (config.stages == ("sft", "eval")) == (name == "sft")


@pytest.mark.parametrize("name", METHODS)
def test_every_config_of_a_method_passes(name):
    config = load(ROOT / "configs" / "quickstart.py")
    config_checks.check(select(config, name))


def test_a_method_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="config:grop: must be one of sgpo, sft, grpo, luffy"):
        select(configs.base(), "grop")


@pytest.mark.parametrize("choice", ["few", "grpo,few", "few,grpo"])
def test_cards_are_chosen_beside_a_method(choice):
    config = select(configs.base(), choice, {"few": {"rl.slots": 8, "mesh.tensor": 2}, "many": {}})
    assert (config.rl.slots, config.mesh.tensor) == (8, 2)
    assert config.rl.guided == (0 if "grpo" in choice else 4)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("grpo,fewer", "config:fewer: must be one of sgpo, .*, few, many$"),
        ("few,many", "config:few,many: few and many cannot be chosen together"),
        ("grpo,luffy", "config:grpo,luffy: grpo and luffy cannot be chosen together"),
    ],
)
def test_names_that_cannot_be_chosen_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        select(configs.base(), choice, {"few": {}, "many": {}})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "luffy", "hpt"])
def test_a_method_trains(name, tmp_path):
    """The loop itself: what is sampled, shown and logged."""
    config = methods.select(load(ROOT / "configs" / "quickstart.py"), name)
    config.model.update({"hidden": 16, "heads": 2, "mlp": 32, "layers": 1})
    config.data.train = "arithmetic:train,count=32"
    config.stages = ("rl",)
    config.rl.update({"batch": 8, "micro_batch": 8, "steps": 2, "autonomous": 3, "max_new_tokens": 26})
    config.checkpoint.every = 1
    train.run(config, tmp_path)
    rows = read_jsonl(tmp_path / "rl.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert np.isfinite(row["loss"]) and row["skipped"] == 0
        assert ("reward_guided" in row) == (name != "grpo")
        if name in ("luffy", "hpt"):
            assert row["reward_guided"] == 1.0, "the expert's solutions of this world are correct"
            assert 0 < row["target_nll"] < 20
        if name == "hpt":
            assert row["alpha"] == 1.0 and row["loss_grpo"] == 0.0, "an untrained model solves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpo", "dapo", "anchored"])
def test_a_method_beyond_the_paper_trains(name, tmp_path, monkeypatch):
    """Hints of two kinds, problems that are replaced, and a teacher that is kept; half of all answers are right."""
    config = load(ROOT / "configs" / "quickstart.py")
    config.model.update({"hidden": 16, "heads": 2, "mlp": 32, "layers": 1})
    config.data.train = "arithmetic:train,count=32"
    config.stages = ("rl",)
    config.rl.update({"batch": 8, "micro_batch": 8, "steps": 2, "autonomous": 3, "guided": 1, "max_new_tokens": 6})
    config.rl.reward = "helpers.reward_functions:even"
    grade, graded = rl.grade, []
    monkeypatch.setattr(rl, "grade", lambda *arguments: graded.append(arguments) or grade(*arguments))
    train.run(methods.select(config, name), tmp_path)
    rows = read_jsonl(tmp_path / "rl.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert np.isfinite(row["loss"]) and row["skipped"] == 0 and row["grad_norm"] > 0
        assert 0 < row["solved"] <= 1 and ("guidance" in row) == (name == "anchored")
        if name in ("sdpo", "opsd"):
            assert row["token_kl"] > 0 and 0 < row["alpha"] <= 1, "alpha is the share of responses with a hint"
            assert (row["alpha"] == 1) == (name == "opsd")
    rounds = 1 + config.rl.resample  # so few answers are right that some problem is idle to the last
    assert len(graded) == 2 * rounds * (2 if name == "anchored" else 1) and (rounds > 1) == (name == "dapo")


def test_a_collapse_stops_the_run_after_a_checkpoint(tmp_path):
    config = methods.select(load(ROOT / "configs" / "quickstart.py"), "grpo")
    config.model.update({"hidden": 16, "heads": 2, "mlp": 32, "layers": 1})
    config.data.train = "arithmetic:train,count=32"
    config.stages = ("rl",)
    config.rl.update({"batch": 8, "micro_batch": 8, "steps": 4, "autonomous": 3, "max_new_tokens": 8})
    config.monitor.update({"window": 2, "most_truncated": 0.1, "action": "stop"})
    with pytest.raises(FloatingPointError, match="step 2: truncated is .*, above monitor.most_truncated=0.1"):
        train.run(config, tmp_path)
    assert [row["step"] for row in read_jsonl(tmp_path / "rl.jsonl")] == [1, 2]
    assert [path.name for path in (tmp_path / "rl" / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]
