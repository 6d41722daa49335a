"""The jitted update against an independent, dense, unjitted computation of Eq. 7, and the properties it promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.batches import CONFIG, G1, G2, PG, B, T, assert_trees_close, log_probs, make_batch, make_params
from helpers.small_models import CONFIGS

from sgpo_jax import losses, models
from sgpo_jax.training import gradients, train_step
from sgpo_jax.training.batch import Batch, pack_batch
from sgpo_jax.training.forward import Forward
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.optimizer import adamw, schedule
from sgpo_jax.training.state import TrainState, init_state
from sgpo_jax.training.train_step import make_update
from sgpo_jax.training.weighting import Weighting


def reference_loss(params, old_params, batch, delta, choose):
    """Eq. 7 written out for one problem and one response at a time; `choose` are the fixed targets and weights."""
    total = 0.0
    for b in range(B):
        rewards = np.asarray(batch.autonomous.rewards[b], np.float64)
        std = rewards.std()
        for i in range(G1):
            length = int(batch.autonomous.lengths[b, i])
            tokens = batch.autonomous.tokens[b, i]
            picked = np.arange(length), tokens[:length]
            logp = log_probs(params, batch.prompts, b, tokens, length)[picked]
            old = log_probs(old_params, batch.prompts, b, tokens, length)[picked]
            advantage = 0.0 if std == 0 else (rewards[i] - rewards.mean()) / std
            ratio = jnp.exp(logp - old)
            surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.28) * advantage)
            total -= surrogate.mean() / G1
        if choose[b] is None:
            continue
        j, alpha = choose[b]
        length = int(batch.guided.lengths[b, j])
        tokens = batch.guided.tokens[b, j]
        guided = jax.lax.stop_gradient(log_probs(params, batch.guided_prompts, b, tokens, length))
        unguided = log_probs(params, batch.prompts, b, tokens, length)
        kl = (jnp.exp(guided) * (guided - unguided)).sum(-1)
        total += alpha * jnp.where(kl <= delta, kl, 0.0).sum() / length
    return total / B


def reference_choice(params, batch, reduce=np.sum):
    """(o+, alpha) of each problem by Eq. 4 and 6, or None."""
    choice = []
    for b in range(B):
        scores = {}
        for j in range(G2):
            length = int(batch.guided.lengths[b, j])
            tokens = batch.guided.tokens[b, j]
            if batch.guided.rewards[b, j] == 1:
                scores[j] = float(
                    reduce(log_probs(params, batch.prompts, b, tokens, length)[np.arange(length), tokens[:length]])
                )
        p_auto, p_guide = float(batch.autonomous.rewards[b].mean()), float(batch.guided.rewards[b].mean())
        alpha = min(max(0.5 * (p_guide - p_auto + 0.1) / (p_auto + 0.1), 0.0), 0.8)
        choice.append((max(scores, key=scores.get), alpha) if scores else None)
    return choice


def public_loss(params, old_params, batch, delta):
    """Eq. 7 in the public functions of `losses`, as somebody would write it who reuses them."""

    def picked(full, tokens):
        return full[jnp.arange(len(tokens)), tokens]

    total = 0.0
    for b in range(B):
        auto, guided = (jax.tree.map(lambda x, b=b: jnp.asarray(x)[b], g) for g in (batch.autonomous, batch.guided))
        for i, advantage in enumerate(losses.group_advantages(auto.rewards)):
            full, old = (log_probs(p, batch.prompts, b, auto.tokens[i], T) for p in (params, old_params))
            logp, old_logp = picked(full, auto.tokens[i]), picked(old, auto.tokens[i])
            loss = losses.clipped_surrogate(logp, old_logp, advantage)
            total += losses.sequence_mean(loss, jnp.arange(T) < auto.lengths[i]) / G1
        inside = jnp.arange(T) < guided.lengths[:, None]
        unguided = jnp.stack([log_probs(params, batch.prompts, b, tokens, T) for tokens in guided.tokens])
        with_strategy = jnp.stack([log_probs(params, batch.guided_prompts, b, tokens, T) for tokens in guided.tokens])
        scores = jnp.where(inside, jax.vmap(picked)(unguided, guided.tokens), 0.0).sum(axis=1)
        target, found = losses.select_target(jax.lax.stop_gradient(scores), guided.rewards == 1)
        token_kl = losses.kl_divergence(jax.lax.stop_gradient(with_strategy[target]), unguided[target])
        alpha = losses.adaptive_weight(auto.rewards.mean(), guided.rewards.mean())
        total += jnp.where(found, alpha, 0.0) * losses.distillation_loss(token_kl, inside[target], delta)
    return total / B


@functools.cache
def updater(rate, remat="none", **coefficients):
    """(optimizer, update): SGD; with rate 1 it turns the parameter change into the gradient."""
    optimizer = optax.sgd(rate)
    return optimizer, make_update(Forward(CONFIG, remat=remat), optimizer, Objective(**coefficients))


def run(batch, params=None, rate=1.0, micro_batch=100, chunk=8, **settings):
    """(new state, metrics) of one update."""
    params = make_params() if params is None else params
    optimizer, update = updater(rate, **{"delta": 1.7} | settings)
    packed = pack_batch(batch, Weighting(), micro_batch=micro_batch, chunk=chunk)
    return update(init_state(jax.tree.map(jnp.copy, params), optimizer), packed)


@pytest.mark.parametrize("delta", [1.7, float("inf")])
def test_update_is_the_gradient_of_equation_7(delta):
    params, batch = make_params(), make_batch()
    choice = reference_choice(params, batch)
    assert choice[2] is None and any(c is not None and c[0] == 1 for c in choice), "the batch must exercise selection"
    loss, grads = jax.value_and_grad(reference_loss)(params, params, batch, delta, choice)
    state, metrics = run(batch, params, delta=delta)
    assert_trees_close(jax.tree.map(jnp.subtract, params, state.params), grads, 1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    np.testing.assert_allclose(metrics["alpha"], np.mean([c[1] if c else 0.0 for c in choice]), rtol=1e-5)
    np.testing.assert_allclose(metrics["target_found"], np.mean([c is not None for c in choice]))
    if delta == 1.7:
        assert 0 < metrics["kl_clip_share"] < 1, "the clip must act on some tokens for this test to say anything"


@pytest.mark.parametrize("seed", [0, 3])
def test_update_is_the_gradient_of_the_public_losses(seed):
    """The formula that is read is the formula that runs."""
    params, batch = make_params(), make_batch(seed)
    loss, gradient = jax.value_and_grad(public_loss)(params, params, batch, 1.7)
    state, metrics = run(batch, params)
    assert_trees_close(jax.tree.map(jnp.subtract, params, state.params), gradient, 1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
    assert 0 < metrics["kl_clip_share"] < 1 and 0 < metrics["target_found"] < 1


def test_the_target_is_chosen_by_the_sum_and_not_by_the_mean():
    """In this batch the two rules choose different targets, so only the right one gives the gradient of Eq. 7."""
    params, batch = make_params(), make_batch(seed=3)
    choice = reference_choice(params, batch)
    by_mean = reference_choice(params, batch, reduce=np.mean)
    assert [c and c[0] for c in choice] != [c and c[0] for c in by_mean]
    grads = jax.grad(reference_loss)(params, params, batch, float("inf"), choice)
    state, _ = run(batch, params, delta=float("inf"))
    assert_trees_close(jax.tree.map(jnp.subtract, params, state.params), grads, 1e-5)


def test_the_target_may_be_longer_than_another_candidate():
    """A long likely response beside a short unlikely one; by the sum the short one nearly always wins."""
    params, batch = make_params(), make_batch()
    tokens = np.zeros((2, T), np.int32)
    for t in range(T):
        tokens[0, t] = log_probs(params, batch.prompts, 0, tokens[0], T)[t].argmax()
        tokens[1, t] = log_probs(params, batch.prompts, 0, tokens[1], T)[t].argmin()
    guided = batch.guided._replace(
        tokens=batch.guided.tokens.at[0, :2].set(tokens),
        lengths=batch.guided.lengths.at[0].set(jnp.array([T, 3, 3])),
        rewards=batch.guided.rewards.at[0].set(jnp.array([1.0, 1.0, 0.0])),
    )
    batch = batch._replace(guided=guided)
    choice = reference_choice(params, batch)
    assert choice[0][0] == 0
    grads = jax.grad(reference_loss)(params, params, batch, float("inf"), choice)
    state, _ = run(batch, params, delta=float("inf"))
    assert_trees_close(jax.tree.map(jnp.subtract, params, state.params), grads, 1e-5)


def test_several_updates_per_batch_keep_targets_and_old_policy():
    batch, rate, steps = make_batch(), 0.1, 3
    state, metrics = run(batch, rate=rate, updates_per_batch=steps)
    old = params = make_params()
    choice = reference_choice(old, batch)
    for _ in range(steps):
        grads = jax.grad(reference_loss)(params, old, batch, 1.7, choice)
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    assert_trees_close(state.params, params, 2e-5)
    assert metrics["ratio"] != 1.0 and state.step == 1


@pytest.mark.parametrize(
    ("micro_batch", "updates"), [(2, 2), *(pytest.param(size, 1, marks=pytest.mark.slow) for size in (1, 4))]
)
def test_micro_batches_give_the_result_of_one_batch(micro_batch, updates):
    batch = make_batch()
    whole, whole_metrics = run(batch, rate=0.1, updates_per_batch=updates)
    parts, parts_metrics = run(batch, rate=0.1, updates_per_batch=updates, micro_batch=micro_batch)
    assert_trees_close(parts.params, whole.params, 1e-5)
    assert_trees_close(parts_metrics, whole_metrics, 1e-5)


def test_remat_changes_nothing():
    batch = make_batch()
    plain, _ = run(batch, remat="none")
    saved, _ = run(batch, remat="full")
    assert_trees_close(saved.params, plain.params, 1e-6)
    arguments = init_state(make_params(), optax.sgd(1.0)), pack_batch(batch, Weighting(), micro_batch=100)
    text, plain_text = (
        str(jax.make_jaxpr(updater(1.0, remat)[1])(*arguments)) for remat in ("full", "none")
    )
    assert text.count("checkpoint") + text.count("remat") > plain_text.count("checkpoint") + plain_text.count("remat")


def test_guided_side_gets_exactly_no_gradient(monkeypatch):
    """A perturbation of the guided hidden states changes the loss, but has no gradient; the unguided one has."""
    accumulate, apply = train_step.accumulate, models.apply

    def probed(loss_fn, params, count, micro_batches, *gradient):
        def loss(perturbation):
            def perturbed(params, config, tokens, *args, **kwargs):
                hidden, cache = apply(params, config, tokens, *args, **kwargs)
                return hidden + perturbation["guided" if tokens.shape[1] == PG + T else "unguided"], cache

            with monkeypatch.context() as patch:
                patch.setattr(models, "apply", perturbed)
                return loss_fn(params, jax.tree.map(lambda x: x[0], micro_batches))[0]

        zero = {"guided": jnp.zeros(16), "unguided": jnp.zeros(16)}
        grads, metrics = accumulate(loss_fn, params, count, micro_batches, *gradient)
        if micro_batches.guided_rows is not None:
            probes = jax.tree.map(lambda g: jnp.abs(g).sum(), jax.grad(loss)(zero))
            metrics |= {**probes, "change": loss(zero | {"guided": jnp.ones(16)}) - loss(zero)}
        return grads, metrics

    monkeypatch.setattr(train_step, "accumulate", probed)
    optimizer = optax.sgd(1.0)
    update = make_update(Forward(CONFIG), optimizer, Objective(delta=1.7))
    packed = pack_batch(make_batch(), Weighting(), micro_batch=100, chunk=8)
    _, metrics = update(init_state(make_params(), optimizer), packed)
    assert metrics["guided"] == 0 and metrics["unguided"] > 0 and metrics["change"] != 0


def test_no_correct_guided_response_means_no_distillation():
    batch = make_batch(all_wrong=range(B))
    _, metrics = run(batch)
    assert metrics["loss_kd"] == 0 and metrics["alpha"] == 0 and metrics["target_found"] == 0
    assert metrics["token_kl"] == 0 and metrics["token_kl_max"] == 0
    # Other guided responses, as wrong as before: the update must be the same bit for bit.
    other = make_batch(seed=7)
    changed = batch._replace(guided=batch.guided._replace(tokens=other.guided.tokens, lengths=other.guided.lengths))
    first, second = run(batch)[0], run(changed)[0]
    assert all(jnp.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def test_padding_changes_nothing():
    batch = make_batch()
    wider = Batch(
        *(contexts._replace(longest=contexts.longest + 3) for contexts in (batch.prompts, batch.guided_prompts)),
        *(
            g._replace(
                tokens=jnp.pad(g.tokens, ((0, 0), (0, 0), (0, extra)), constant_values=4),
                logp=jnp.pad(g.logp, ((0, 0), (0, 0), (0, extra)), constant_values=jnp.nan),
            )
            for g, extra in ((batch.autonomous, 2), (batch.guided, 5))
        ),
    )
    state, metrics = run(batch)
    padded, padded_metrics = run(wider)
    assert_trees_close(padded.params, state.params, 1e-5)
    assert_trees_close(padded_metrics, metrics, 1e-5)


def test_mismatch_measures_the_samplers_logprobs():
    batch = make_batch()
    params = make_params()
    exact = np.zeros((B, G1, T), np.float32)
    for b in range(B):
        for i in range(G1):
            tokens, length = batch.autonomous.tokens[b, i], int(batch.autonomous.lengths[b, i])
            picked = np.arange(length), tokens[:length]
            exact[b, i, :length] = log_probs(params, batch.prompts, b, tokens, length)[picked]
    for offset in (0.0, 0.25):
        sampler = batch.autonomous._replace(logp=jnp.asarray(exact + offset))
        _, metrics = run(batch._replace(autonomous=sampler))
        np.testing.assert_allclose(metrics["logp_mismatch"], offset, atol=1e-5)
        np.testing.assert_allclose(metrics["logp_mismatch_max"], offset, atol=1e-5)


def test_non_finite_gradient_is_skipped_and_counted():
    optimizer = optax.adam(0.1)
    update = make_update(Forward(CONFIG), optimizer, Objective())
    batch = make_batch()
    bad_rewards = batch.autonomous.rewards.at[0, 0].set(jnp.nan)
    bad = batch._replace(autonomous=batch.autonomous._replace(rewards=bad_rewards))
    good, bad = pack_batch(batch, Weighting(), micro_batch=100), pack_batch(bad, Weighting(), micro_batch=100)
    state, _ = update(init_state(make_params(), optimizer), good)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    for expected in (1, 2):
        state, metrics = update(state, bad)
        assert metrics["skipped"] == expected and not np.isfinite(metrics["grad_norm"])
    after = jax.tree.map(np.array, (state.params, state.opt_state))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    state, metrics = update(state, good)
    assert metrics["skipped"] == 0 and state.step == 4
    assert not np.array_equal(before[0]["norm"]["scale"], state.params["norm"]["scale"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["gradient", "optimizer state", "parameters", "measured"])
def test_one_number_that_is_not_finite_skips_the_update(place, value):
    """The sign of an infinite gradient is finite; weight decay alone meets a parameter that the batch does not use."""
    optimizer = optax.chain(optax.sign_sgd(0.1), optax.trace(0.9), optax.add_decayed_weights(-0.1))
    state = init_state({"a": jnp.ones(3), "b": jnp.ones(3)}, optimizer)
    grads, measured = {"a": jnp.ones(3), "b": jnp.zeros(3)}, {"loss": jnp.ones(()), "other": jnp.ones(())}
    sound, _ = gradients.apply_gradients(state, grads, optimizer, measured)
    assert sound.skipped == 0 and not np.array_equal(sound.params["a"], state.params["a"])
    state = sound.replace(skipped=jnp.int32(4))

    def spoil(tree):
        return jax.tree.map(lambda x: x.at[(1,) * x.ndim].set(value), tree)

    if place == "gradient":
        grads = grads | {"a": spoil(grads["a"])}
    if place == "optimizer state":
        state = state.replace(opt_state=spoil(state.opt_state))
    if place == "parameters":
        state = state.replace(params=state.params | {"b": spoil(state.params["b"])})
    if place == "measured":
        measured = measured | {"other": jnp.float32(value)}
    after, norm = gradients.apply_gradients(state, grads, optimizer, measured)
    assert after.skipped == 5 and np.isfinite(norm) == (place != "gradient")
    jax.tree.map(np.testing.assert_array_equal, after.replace(skipped=state.skipped), state)
    good = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    assert gradients.apply_gradients(sound.replace(skipped=jnp.int32(4)), good, optimizer, ())[0].skipped == 0


def test_state_is_donated():
    state = init_state(make_params(), optax.sgd(1.0))
    packed = pack_batch(make_batch(), Weighting(), micro_batch=100)
    make_update(Forward(CONFIG), optax.sgd(1.0), Objective())(state, packed)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_no_vocabulary_sized_array_for_all_tokens():
    """No intermediate of the update holds logits of every response token."""
    state: TrainState = init_state(make_params(), optax.sgd(1.0))
    update = make_update(Forward(CONFIG), optax.sgd(1.0), Objective())
    jaxpr = jax.make_jaxpr(update)(state, pack_batch(make_batch(), Weighting(), micro_batch=2, chunk=4))
    limit = B * G2 * T * CONFIG.vocab_size
    smallest = min(limit, B * T * CONFIG.vocab_size)

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
            for parameter in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)

    big = [s for s in shapes(jaxpr.jaxpr) if CONFIG.vocab_size in s and np.prod(s) >= smallest]
    assert not big, big


@pytest.mark.parametrize("guided", [False, True])
def test_an_update_holds_one_gradient_and_nothing_else_of_that_size(guided):
    """Micro-batches and both losses add to the same gradient, and AdamW works where its moments lie."""
    config = dataclasses.replace(CONFIG, hidden_size=64, mlp_size=512, num_layers=32)
    optimizer = adamw(schedule(1.0, 9), b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    state = jax.eval_shape(lambda: init_state(models.init(jax.random.key(0), config), optimizer))
    batch = make_batch()
    batch = batch if guided else batch._replace(guided=None, guided_prompts=None)
    forward = Forward(config, remat="full")
    packed = pack_batch(batch, Weighting(), micro_batch=2, chunk=8)
    update = make_update(forward, optimizer, Objective()).lower(state, packed)
    gradient = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))
    assert update.compile().memory_analysis().temp_size_in_bytes < 1.5 * gradient


def test_an_update_of_experts_says_how_uneven_their_load_is():
    """Against the counts of the unpacked sequences: 3 tokens of a prompt and the response, without padding."""
    config = dataclasses.replace(CONFIGS["qwen3moe"], num_layers=2)
    params, batch, optimizer = make_params(config=config), make_batch(), optax.sgd(1e-2)
    batch = batch._replace(guided=None, guided_prompts=None)
    update = make_update(Forward(config, remat="full"), optimizer, Objective())
    packed = pack_batch(batch, Weighting(), micro_batch=2, chunk=8)
    lengths, responses = (np.asarray(x).reshape(16, -1) for x in (batch.autonomous.lengths, batch.autonomous.tokens))
    tokens = np.concatenate([np.repeat(np.stack(batch.prompts.tokens), 4, axis=0), responses], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    _, load = models.expert_load(params, config, tokens, positions, positions < 3 + lengths)
    _, metrics = update(init_state(params, optimizer), packed)
    np.testing.assert_allclose(metrics["expert_load_max"], (load.max(axis=1) / load.mean(axis=1)).max(), rtol=1e-6)
    assert 1.1 < metrics["expert_load_max"] <= 3
