"""The learning rate by hand, what is decayed and what is not, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sgpo_jax import models
from sgpo_jax.training.optimizer import adamw, schedule

HYPER = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0}


def rates(rate, steps):
    return [float(rate(jnp.int32(step))) for step in steps]


# ---- schedule


def test_constant_rate_from_the_first_step():
    np.testing.assert_allclose(rates(schedule(2e-4, 10), [0, 1, 9, 10]), [2e-4] * 4, rtol=1e-6)


def test_warm_up_rises_linearly_and_is_never_zero():
    # 4 of 10 steps: fifths of the peak, which step 4 reaches.
    rate = schedule(1.0, 10, warmup_share=0.4)
    np.testing.assert_allclose(rates(rate, range(7)), [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0], rtol=1e-6)


def test_cosine_after_warm_up_ends_at_zero():
    rate = schedule(1.0, 10, warmup_share=0.2, decay="cosine")
    # cos from step 2 to step 10, halfway at step 6.
    expected = [1 / 3, 2 / 3, 1.0, 0.5 + 0.5 * np.cos(np.pi / 8), 0.5, 0.5 - 0.5 * np.cos(np.pi / 8), 0.0, 0.0]
    np.testing.assert_allclose(rates(rate, [0, 1, 2, 3, 6, 9, 10, 11]), expected, rtol=1e-5, atol=1e-7)


def test_every_step_has_a_rate_above_zero():
    for total in (1, 2, 3, 100):
        for share in (0.0, 0.1, 0.5, 1.0):
            for decay in ("constant", "cosine"):
                rate = schedule(3e-3, total, warmup_share=share, decay=decay)
                values = np.array(rates(rate, range(total)))
                assert (values > 0).all(), (total, share, decay)
                assert (values <= 3e-3 * (1 + 1e-6)).all(), (total, share, decay)


def test_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="decay='linear': must be 'constant' or 'cosine'"):
        schedule(1e-3, 10, decay="linear")


# ---- adamw


def test_first_step_is_the_rate_against_the_sign():
    # AdamW's first step is -rate * g / (|g| + eps), whatever the size of g.
    params = {"a": {"kernel": jnp.array([1.0, 2.0])}}
    optimizer = adamw(schedule(0.125, 10), **HYPER)
    updates, _ = optimizer.update({"a": {"kernel": jnp.array([0.1, -0.3])}}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], [-0.125, 0.125], rtol=1e-5)


def test_two_steps_by_hand():
    params = {"a": {"kernel": jnp.array([1.0])}}
    optimizer = adamw(schedule(0.1, 10), b1=0.5, b2=0.75, eps=0.0, weight_decay=0.2, clip_norm=100.0)
    state = optimizer.init(params)
    # 1 - 0.1 (1 + 0.2). Then the first moment is 0.5 - 0.5 = 0 and only the decay is left: 0.88 (1 - 0.1 * 0.2).
    for gradient, expected in ((2.0, 0.88), (-1.0, 0.8624)):
        updates, state = optimizer.update({"a": {"kernel": jnp.array([gradient])}}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["a"]["kernel"], [expected], rtol=1e-6)


def test_large_gradients_are_clipped_together():
    params = {"a": {"kernel": jnp.zeros(2)}, "b": {"scale": jnp.zeros(1)}}
    gradients = {"a": {"kernel": jnp.array([3.0, 0.0])}, "b": {"scale": jnp.array([4.0])}}

    def first_moments(gradients, clip_norm):
        optimizer = adamw(schedule(0.1, 10), **{**HYPER, "clip_norm": clip_norm})
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        (moments,) = [m for m in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(m, "mu")]
        return moments.mu

    # The norm is 5; the first moment is (1 - b1) times the clipped gradient.
    clipped = first_moments(gradients, 1.0)
    np.testing.assert_allclose(clipped["a"]["kernel"], [0.1 * 3 / 5, 0.0], rtol=1e-5)
    np.testing.assert_allclose(clipped["b"]["scale"], [0.1 * 4 / 5], rtol=1e-5)
    kept = first_moments(gradients, 5.5)
    np.testing.assert_allclose(kept["a"]["kernel"], [0.3, 0.0], rtol=1e-5)
    np.testing.assert_allclose(kept["b"]["scale"], [0.4], rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Qwen3ForCausalLM", {}),
        ("Qwen2ForCausalLM", {"qk_norm": False, "qkv_bias": True}),
        ("LlamaForCausalLM", {"qk_norm": False, "tie_embeddings": True}),
    ],
)
def test_norms_and_biases_are_not_decayed(tiny, architecture, changes):
    config = models.ModelConfig(**{**vars(tiny), "architecture": architecture, **changes})
    shapes = jax.eval_shape(lambda: models.init(jax.random.key(0), config))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    optimizer = adamw(schedule(1.0, 10), **{**HYPER, "weight_decay": 0.25})
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(update.ravel()[0])
        for path, update in jax.tree_util.tree_leaves_with_path(updates)
    }
    matrices = {name for name, change in decayed.items() if change == -0.25}
    assert {name for name, change in decayed.items() if change == 0} == decayed.keys() - matrices
    layers = {f"layers/{name}/kernel" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert matrices == layers | {"embed/embedding"} | (set() if config.tie_embeddings else {"head/kernel"})
