"""The objectives against numbers worked out by hand and against loops over float64 numbers."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.oracles import INF, LOGITS, NAN, G, P, Q, T, V, floats, log_softmax, numeric_gradient
from hypothesis import assume, given
from hypothesis.extra.numpy import arrays

from sgpo_jax import losses

KLS = arrays(np.float32, T, elements=floats(0, 3))
MASKS = arrays(np.bool_, T)
# Eighths are exact in float32, so that equal rewards are equal and no cancellation blurs the comparison.
REWARDS = arrays(np.float32, G, elements=st.integers(-16, 16).map(lambda n: n / 8))


# ---- group_advantages


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 1], [1, -1, -1, 1]),
        ([1, 1, 1, 0], [1 / math.sqrt(3)] * 3 + [-math.sqrt(3)]),
        ([0, 0, 0, 0, 0, 0, 0, 1], [-1 / math.sqrt(7)] * 7 + [math.sqrt(7)]),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_advantages_by_hand(rewards, expected, dtype):
    advantages = losses.group_advantages(jnp.array(rewards, dtype))
    assert advantages.dtype == jnp.float32
    np.testing.assert_allclose(advantages, expected, rtol=5e-6)


@pytest.mark.parametrize("size", [1, 8, 23])
@pytest.mark.parametrize("function", [losses.group_advantages, jax.jit(losses.group_advantages)])
def test_equal_rewards_have_no_advantage(size, function):
    for reward in (0.0, 1.0, 0.1, 0.7, -3.3):
        np.testing.assert_array_equal(function(jnp.full(size, reward)), np.zeros(size))


def test_advantages_add_eps_to_the_deviation():
    np.testing.assert_allclose(losses.group_advantages(jnp.array([0.0, 1.0]), eps=0.5), [-0.5, 0.5])


group_advantages = jax.jit(losses.group_advantages)


@given(REWARDS)
def test_advantages_equal_the_float64_oracle(rewards):
    values = rewards.astype(np.float64)
    mean = sum(values) / G
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / G)
    expected = [(value - mean) / (deviation + 1e-6) if deviation else 0.0 for value in values]
    np.testing.assert_allclose(group_advantages(rewards), expected, rtol=1e-5, atol=1e-5)


def test_rewards_get_no_gradient_from_advantages():
    gradient = jax.grad(lambda rewards: losses.group_advantages(rewards)[0])(jnp.array([1.0, 0.0, 0.5]))
    np.testing.assert_array_equal(gradient, np.zeros(3))


# ---- clipped_surrogate

RATIOS = np.array([1.0, 1.5, 0.5, 1.1, 0.9])


@pytest.mark.parametrize(
    ("advantage", "loss", "gradient"),
    [
        # A rise of the ratio stops counting at 1.28 when the advantage is positive, a fall at 0.8 when it is negative.
        (1.0, [-1.0, -1.28, -0.5, -1.1, -0.9], [-1.0, 0.0, -0.5, -1.1, -0.9]),
        (-2.0, [2.0, 3.0, 1.6, 2.2, 1.8], [2.0, 3.0, 0.0, 2.2, 1.8]),
        (0.0, [0.0] * 5, [0.0] * 5),
    ],
)
def test_surrogate_by_hand(advantage, loss, gradient):
    old = jnp.array([-1.0, -2.0, -3.0, -0.5, -7.0])
    logp = old + jnp.log(RATIOS)
    np.testing.assert_allclose(losses.clipped_surrogate(logp, old, jnp.float32(advantage)), loss, rtol=1e-6)
    actual = jax.grad(lambda logp: losses.clipped_surrogate(logp, old, jnp.float32(advantage)).sum())(logp)
    np.testing.assert_allclose(actual, gradient, rtol=1e-6)


def test_surrogate_clips_at_its_limits():
    loss = losses.clipped_surrogate(jnp.log(RATIOS), jnp.zeros(5), jnp.float32(1.0), clip_low=0.0, clip_high=0.05)
    np.testing.assert_allclose(loss, [-1.0, -1.05, -0.5, -1.05, -0.9], rtol=1e-6)
    loss = losses.clipped_surrogate(jnp.log(RATIOS), jnp.zeros(5), jnp.float32(-1.0), clip_low=0.0, clip_high=0.05)
    np.testing.assert_allclose(loss, [1.0, 1.5, 1.0, 1.1, 1.0], rtol=1e-6)


def surrogate_oracle(logp, old, advantage):
    total = 0.0
    for new, before in zip(logp, old, strict=True):
        ratio = math.exp(new - before)
        total -= min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
    return total


LOGPS = arrays(np.float32, T, elements=floats(-5, 0))
surrogate_and_gradient = jax.jit(
    jax.value_and_grad(lambda logp, old, advantage: losses.clipped_surrogate(logp, old, advantage).sum())
)


@given(LOGPS, LOGPS, floats(-3, 3))
def test_surrogate_equals_the_float64_oracle(logp, old, advantage):
    wide, old_wide = logp.astype(np.float64), old.astype(np.float64)
    # The gradient is not defined at the two corners of the clipping.
    ratio = np.exp(wide - old_wide)
    assume(np.abs(ratio / 0.8 - 1).min() > 1e-4 and np.abs(ratio / 1.28 - 1).min() > 1e-4)
    loss, gradient = surrogate_and_gradient(logp, old, np.float32(advantage))
    np.testing.assert_allclose(loss, surrogate_oracle(wide, old_wide, advantage), rtol=1e-5, atol=1e-6)
    expected = numeric_gradient(lambda x: surrogate_oracle(x, old_wide, advantage), wide)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_surrogate_of_tokens_that_each_have_an_advantage():
    logp, old = jnp.array([-1.0, -2.0, -0.5, -3.0]), jnp.array([-1.2, -1.0, -0.5, -3.6])
    advantage = jnp.array([2.0, -1.0, 0.5, 1.5])
    alone = [losses.clipped_surrogate(logp[t : t + 1], old[t : t + 1], advantage[t])[0] for t in range(4)]
    np.testing.assert_array_equal(losses.clipped_surrogate(logp, old, advantage), jnp.stack(alone))


def test_surrogate_moves_the_current_policy_only():
    def total(logp, old, advantage):
        return losses.clipped_surrogate(logp, old, advantage).sum()

    gradients = jax.grad(total, argnums=(0, 1, 2))(jnp.array([-1.0]), jnp.array([-1.1]), jnp.float32(1.0))
    assert gradients[0][0] < 0
    assert gradients[1][0] == 0
    assert gradients[2] == 0


@pytest.mark.parametrize(
    ("logp", "old", "advantage", "loss"),
    [
        # A token that became impossible: ratio 0.
        (-INF, -1.0, 1.0, 0.0),
        (-INF, -1.0, -1.0, 0.8),
        # A ratio beyond float32 (e^100), and one without bound.
        (-1.0, -101.0, 1.0, -1.28),
        (-1.0, -INF, 1.0, -1.28),
        (-1.0, -101.0, 0.0, 0.0),
        (-1.0, -INF, 0.0, 0.0),
    ],
)
def test_extreme_ratios_give_numbers(logp, old, advantage, loss):
    value, gradient = surrogate_and_gradient(jnp.array([logp]), jnp.array([old]), jnp.float32(advantage))
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_array_equal(gradient, [0.0])


# ---- kl_divergence


def test_kl_by_hand_in_both_directions():
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # 0.5108
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)  # 0.3681
    np.testing.assert_allclose(losses.kl_divergence(jnp.array(P), jnp.array(Q)), forward, rtol=1e-6)
    np.testing.assert_allclose(losses.kl_divergence(jnp.array(Q), jnp.array(P)), reverse, rtol=1e-6)


def test_kl_has_the_direction_of_optax():
    expected = optax.losses.kl_divergence_with_log_targets(log_predictions=jnp.array(Q), log_targets=jnp.array(P))
    np.testing.assert_allclose(losses.kl_divergence(jnp.array(P), jnp.array(Q)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("log_p", "log_q", "expected"),
    [
        ([0.0, -INF], [math.log(0.5)] * 2, math.log(2)),
        ([0.0, -INF], [0.0, -INF], 0.0),
        ([math.log(0.5)] * 2, [0.0, -INF], INF),
        ([0.0, -200.0], [0.0, -INF], 0.0),  # a probability that float32 rounds to 0
        ([0.0, NAN], [0.0, -1.0], NAN),
        ([0.0, -1.0], [NAN, -1.0], NAN),
    ],
)
def test_kl_of_impossible_outcomes(log_p, log_q, expected):
    np.testing.assert_allclose(losses.kl_divergence(jnp.array(log_p), jnp.array(log_q)), expected, rtol=1e-6)


def test_impossible_outcomes_leave_the_gradient_of_kl_finite():
    log_p, log_q = jnp.array([math.log(0.25), math.log(0.75), -INF]), jnp.array([math.log(0.5), -INF, -INF])
    gradient = jax.grad(losses.kl_divergence, argnums=1)(log_p, log_q)
    np.testing.assert_allclose(gradient, [-0.25, -0.75, 0.0], rtol=1e-6)
    gradient = jax.grad(losses.kl_divergence)(log_p, jnp.array([math.log(0.5), math.log(0.5), -INF]))
    np.testing.assert_allclose(gradient, [0.25 * (math.log(0.5) + 1), 0.75 * (math.log(1.5) + 1), 0.0], rtol=1e-6)


def kl_oracle(log_p, log_q):
    return sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


@jax.jit
def kl_and_gradients(log_p, log_q):
    gradients = jax.grad(lambda p, q: losses.kl_divergence(p, q).sum(), argnums=(0, 1))(log_p, log_q)
    return losses.kl_divergence(log_p, log_q), *gradients


@given(LOGITS, LOGITS)
def test_kl_equals_the_float64_oracle(p_logits, q_logits):
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    kl, p_gradient, q_gradient = kl_and_gradients(log_p.astype(np.float32), log_q.astype(np.float32))
    assert kl.shape == (T,)
    np.testing.assert_allclose(kl, [kl_oracle(*pair) for pair in zip(log_p, log_q, strict=True)], rtol=1e-5, atol=2e-6)
    expected = numeric_gradient(lambda x: kl_oracle(x.ravel(), log_q.ravel()), log_p)
    np.testing.assert_allclose(p_gradient, expected, rtol=1e-4, atol=1e-5)
    expected = numeric_gradient(lambda x: kl_oracle(log_p.ravel(), x.ravel()), log_q)
    np.testing.assert_allclose(q_gradient, expected, rtol=1e-4, atol=1e-5)


@given(LOGITS)
def test_kl_of_a_distribution_to_itself_is_exactly_zero(logits):
    log_p = log_softmax(logits).astype(np.float32)
    np.testing.assert_array_equal(kl_and_gradients(log_p, log_p)[0], np.zeros(T))


# ---- kl_clip_mask


def test_clip_mask_by_hand():
    token_kl = jnp.array([0.0, 0.999, 1.0, 1.001, INF, NAN])
    mask = losses.kl_clip_mask(token_kl, 1.0)
    assert mask.dtype == jnp.float32
    np.testing.assert_array_equal(mask, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(losses.kl_clip_mask(token_kl[:5], INF), np.ones(5))
    gradient = jax.grad(lambda kl: losses.kl_clip_mask(kl, 1.0).sum())(token_kl[:4])
    np.testing.assert_array_equal(gradient, np.zeros(4))


def test_the_scale_bounds_a_tokens_loss_by_delta():
    token_kl = jnp.array([0.0, -1e-8, 0.5, 1.0, 1.25, 4.0, INF])
    scale = losses.kl_clip_scale(token_kl, 1.0)
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, [1, 1, 1, 1, 0.8, 0.25, 0], rtol=1e-6)
    value, pull = jax.vjp(lambda x: losses.clipped_kl(x, 1.0, "scale"), token_kl)
    np.testing.assert_allclose(value, [0, -1e-8, 0.5, 1, 1, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(7))[0], scale, rtol=1e-6)
    np.testing.assert_array_equal(losses.clipped_kl(token_kl, 1.0, "none"), token_kl)
    np.testing.assert_array_equal(losses.clipped_kl(token_kl[:6], INF, "scale"), token_kl[:6])


@given(KLS, MASKS, floats(0.125, 2))
def test_a_scaled_distillation_equals_the_float64_oracle(token_kl, mask, delta):
    """The weight is a constant: the gradient is that of the KL times delta / KL, not 0 as that of min(KL, delta)."""
    wide = token_kl.astype(np.float64)
    weight = np.minimum(1.0, delta / np.maximum(wide, 1e-9))
    oracle = lambda x: (weight * x * mask).sum() / max(mask.sum(), 1)  # noqa: E731
    loss, gradient = scaled_distillation(token_kl, mask, delta)
    np.testing.assert_allclose(loss, oracle(wide), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, numeric_gradient(oracle, wide), rtol=1e-5, atol=1e-6)


scaled_distillation = jax.jit(jax.value_and_grad(lambda *x: losses.distillation_loss(*x, "scale")))


@given(KLS, MASKS, st.integers(0, 8))
def test_a_quantile_of_kls_equals_numpys(token_kl, mask, eighths):
    found = losses.kl_quantile(token_kl, mask, eighths / 8)
    expected = np.quantile(token_kl[mask].astype(np.float64), eighths / 8) if mask.any() else NAN
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# ---- select_target


@pytest.mark.parametrize(
    ("logp", "correct", "index", "found"),
    [
        ([-50.0, -10.0, -30.0, -5.0], [1, 0, 1, 0], 2, True),
        ([-50.0, -10.0, -30.0, -5.0], [1, 1, 1, 1], 3, True),
        ([-50.0, -10.0, -30.0, -5.0], [0, 0, 0, 0], 0, False),
        ([-3.0, -2.0, -2.0, -2.0], [1, 0, 1, 1], 2, True),  # the first of a tie
        ([-1.0, -INF, -2.0, -INF], [0, 1, 0, 1], 1, True),  # impossible, yet the only correct ones
        ([NAN, -9.0, NAN, -1.0], [1, 1, 1, 0], 1, True),
        ([NAN, -9.0, NAN, -1.0], [1, 0, 1, 0], 0, False),
        ([-1e30, -3e38, -1e38, 0.0], [0, 1, 1, 0], 2, True),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.float32, jnp.int32])
def test_target_by_hand(logp, correct, index, found, dtype):
    actual = losses.select_target(jnp.array(logp), jnp.array(correct, dtype))
    assert (actual[0].dtype, actual[1].dtype) == (jnp.int32, jnp.bool_)
    assert (int(actual[0]), bool(actual[1])) == (index, found)


select_target = jax.jit(losses.select_target)


@given(arrays(np.float32, G, elements=st.sampled_from([-INF, -100.0, -7.5, -7.0, -1.0, 0.0])), arrays(np.bool_, G))
def test_target_equals_the_oracle(logp, correct):
    candidates = [i for i in range(G) if correct[i]]
    expected = max(candidates, key=lambda i: (logp[i], -i), default=0)
    index, found = select_target(logp, correct)
    assert (int(index), bool(found)) == (expected, bool(candidates))


# ---- adaptive_weight


@pytest.mark.parametrize(
    ("p_auto", "p_guide", "expected"),
    [(0.0, 1.0, 0.8), (1.0, 1.0, 0.5 * 0.1 / 1.1), (1.0, 0.0, 0.0), (0.5, 0.75, 0.5 * 0.35 / 0.6), (0.0, 0.0, 0.5)],
)
def test_adaptive_weight_by_hand(p_auto, p_guide, expected):
    weight = losses.adaptive_weight(jnp.float32(p_auto), jnp.float32(p_guide))
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_adaptive_weight_without_limit():
    np.testing.assert_allclose(losses.adaptive_weight(0.0, 1.0, alpha_max=INF), 5.5, rtol=1e-6)
    np.testing.assert_allclose(losses.adaptive_weight(0.25, 0.5, alpha0=2.0, gamma=0.25, alpha_max=9.0), 2.0, rtol=1e-6)


adaptive_weight = jax.jit(losses.adaptive_weight)


@given(arrays(np.float32, (2, G), elements=floats(0, 1)), floats(0, 2), floats(0.0625, 1), floats(0, 1))
def test_adaptive_weight_equals_the_oracle(shares, alpha0, gamma, alpha_max):
    auto, guide = shares.astype(np.float64)
    expected = [
        min(max(alpha0 * (g - a + gamma) / (a + gamma), 0.0), alpha_max) for a, g in zip(auto, guide, strict=True)
    ]
    weight = adaptive_weight(*shares, alpha0, gamma, alpha_max)
    np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-5)


def test_adaptive_weight_has_no_gradient():
    gradients = jax.grad(losses.adaptive_weight, argnums=(0, 1))(jnp.float32(0.5), jnp.float32(0.75))
    assert gradients == (0.0, 0.0)


# ---- group_advantage_weight


@pytest.mark.parametrize(
    ("auto", "target", "expected"),
    [
        ([0] * 8, 1.0, math.sqrt(8)),
        ([1] * 7 + [0], 1.0, 1 / math.sqrt(8)),
        ([1] * 4 + [0] * 4, 1.0, 4 / math.sqrt(20)),
        ([1] * 4 + [0] * 4, 0.0, 0.0),
        ([1] * 8, 1.0, 0.0),
        ([0.1] * 24, 0.1, 0.0),  # the float32 mean of these is not 0.1
        ([0.7] * 7, 0.7, 0.0),
    ],
)
def test_group_advantage_weight_by_hand(auto, target, expected):
    for limit in (0.8, 10.0):
        weight = losses.group_advantage_weight(jnp.array(auto), jnp.float32(target), alpha_max=limit)
        assert weight.dtype == jnp.float32
        np.testing.assert_allclose(weight, min(expected, limit), rtol=1e-5)
    assert losses.group_advantage_weight(jnp.array(auto), jnp.float32(target)) <= np.float32(0.8)


group_advantage_weight = jax.jit(losses.group_advantage_weight)


@given(REWARDS, st.integers(-16, 16))
def test_group_advantage_weight_equals_the_oracle(auto, eighths):
    group = [*auto.astype(np.float64), eighths / 8]
    mean = sum(group) / len(group)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in group) / len(group))
    expected = min(max((group[-1] - mean) / (deviation + 1e-6), 0.0), 0.8)
    weight = group_advantage_weight(auto, np.float32(eighths / 8))
    np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-5)


def test_group_advantage_weight_has_no_gradient():
    gradients = jax.grad(lambda *args: losses.group_advantage_weight(*args, alpha_max=10.0), argnums=(0, 1))(
        jnp.array([0.0, 1.0, 0.0]), jnp.float32(1.0)
    )
    np.testing.assert_array_equal(gradients[0], np.zeros(3))
    assert gradients[1] == 0


# ---- shaped_likelihood, hpt_gate


def test_shaped_likelihood_by_hand():
    logp = jnp.log(jnp.array([0.1, 1.0, 0.4, 0.0]))
    np.testing.assert_allclose(losses.shaped_likelihood(logp), [-0.5, -1 / 1.1, -0.8, 0.0], rtol=1e-6)
    np.testing.assert_allclose(losses.shaped_likelihood(logp[:1], shaping=0.3), [-0.25], rtol=1e-6)


@given(arrays(np.float32, T, elements=floats(-30, 0)), st.sampled_from([0.1, 0.3, 0.5]))
def test_the_gradient_of_shaped_likelihood_is_luffys_weight(logp, shaping):
    gradient = jax.grad(lambda x: losses.shaped_likelihood(x, shaping).sum())(jnp.asarray(logp))
    p = np.exp(logp.astype(np.float64))
    np.testing.assert_allclose(gradient, -shaping * p / (p + shaping) ** 2, rtol=2e-5, atol=1e-12)
    numeric = numeric_gradient(lambda x: -(np.exp(x) / (np.exp(x) + shaping)).sum(), logp)
    np.testing.assert_allclose(gradient, numeric, atol=1e-6)


def test_impossible_demonstration_tokens_have_no_gradient_and_no_nan():
    gradient = jax.grad(lambda x: losses.shaped_likelihood(x).sum())(jnp.array([-INF, -1e30, -200.0]))
    np.testing.assert_allclose(gradient, np.zeros(3), atol=1e-30)


@pytest.mark.parametrize(
    ("rewards", "gate", "expected"),
    [([0, 0, 0, 0], 0.0, 0), ([0, 0, 0, 1], 0.0, 1), ([0, 0, 0, 1], 0.25, 0), ([0, 0, 1, 1], 0.25, 1)],
)
def test_the_demonstration_takes_over_up_to_the_gate(rewards, gate, expected):
    assert losses.hpt_gate(jnp.array(rewards), gate) == expected


@given(REWARDS)
def test_centred_advantages_are_not_divided_by_the_deviation(rewards):
    values = rewards.astype(np.float64)
    np.testing.assert_allclose(losses.group_advantages(rewards, scale=False), values - values.mean(), atol=1e-6)


# ---- sequence_mean


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int32, jnp.float32])
def test_sequence_mean_by_hand(dtype):
    x = jnp.array([1.0, 2.0, 6.0, NAN, INF, -INF])
    np.testing.assert_allclose(losses.sequence_mean(x, jnp.array([1, 1, 1, 0, 0, 0], dtype)), 3.0)
    np.testing.assert_allclose(losses.sequence_mean(x, jnp.array([1, 0, 1, 0, 0, 0], dtype)), 3.5)
    assert losses.sequence_mean(x, jnp.zeros(6, dtype)) == 0
    gradient = jax.grad(losses.sequence_mean)(x, jnp.array([1, 0, 1, 0, 0, 0], jnp.float32))
    np.testing.assert_array_equal(gradient, [0.5, 0, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(jax.grad(losses.sequence_mean)(x, jnp.zeros(6)), np.zeros(6))


sequence_mean = jax.jit(jax.value_and_grad(losses.sequence_mean))


@given(arrays(np.float32, T, elements=floats(-10, 10)), MASKS)
def test_sequence_mean_equals_the_oracle(x, mask):
    chosen = x[mask].astype(np.float64)
    expected = sum(chosen) / len(chosen) if len(chosen) else 0.0
    np.testing.assert_allclose(sequence_mean(x, mask)[0], expected, rtol=1e-5, atol=1e-5)


# ---- distillation_loss


def test_distillation_by_hand():
    # Kept: 0.2, 1.0 and 0.4 of five tokens; the last two positions are padding.
    token_kl = jnp.array([0.2, 1.0, 3.0, INF, 0.4, 0.1, NAN])
    mask = jnp.array([1, 1, 1, 1, 1, 0, 0])
    loss, gradient = jax.value_and_grad(losses.distillation_loss)(token_kl, mask, 1.0)
    np.testing.assert_allclose(loss, 1.6 / 5, rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.2, 0.2, 0, 0, 0.2, 0, 0], rtol=1e-6)
    assert losses.distillation_loss(token_kl, jnp.zeros(7), 1.0) == 0
    np.testing.assert_allclose(losses.distillation_loss(token_kl[:3], mask[:3], INF), 1.4, rtol=1e-6)
    assert losses.distillation_loss(token_kl, mask, INF) == INF


distillation = jax.jit(jax.value_and_grad(losses.distillation_loss))


def distillation_oracle(token_kl, mask, delta):
    kept = [kl for kl, inside in zip(token_kl, mask, strict=True) if inside and kl <= delta]
    return sum(kept) / max(sum(mask), 1)


@given(KLS, MASKS, floats(0.125, 2))
def test_distillation_equals_the_float64_oracle(token_kl, mask, delta):
    assume(np.abs(token_kl - delta).min() > 1e-4)
    loss, gradient = distillation(token_kl, mask, delta)
    wide = token_kl.astype(np.float64)
    np.testing.assert_allclose(loss, distillation_oracle(wide, mask, delta), rtol=1e-5, atol=1e-6)
    expected = numeric_gradient(lambda x: distillation_oracle(x, mask, delta), wide)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_an_infinite_kl_is_dropped_with_its_gradient():
    def loss(unguided):
        token_kl = losses.kl_divergence(jnp.array([P, P]), unguided)
        return losses.distillation_loss(token_kl, jnp.ones(2), 1.0)

    value, gradient = jax.value_and_grad(loss)(jnp.array([[0.0, -INF], Q]))
    np.testing.assert_allclose(value, 0.5 * 0.5108256, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [-0.25, -0.25]], rtol=1e-6)


# ---- the family of GRPO


@pytest.mark.parametrize("advantage", [1.5, -1.0])
def test_cispo_keeps_a_gradient_where_the_surrogate_has_none(advantage):
    """By hand: the ratio is a constant weight, clipped above at 1.28 and not below."""
    old = np.zeros(4, np.float32)
    logp = np.log(np.array([0.1, 0.9, 1.2, 4.0], np.float32))
    weight = np.array([0.1, 0.9, 1.2, 1.28])
    value, pull = jax.vjp(lambda x: losses.cispo(x, old, jnp.float32(advantage)), logp)
    np.testing.assert_allclose(value, -weight * advantage * logp, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(4))[0], -weight * advantage, rtol=1e-5)
    lower = losses.cispo(logp, old, jnp.float32(advantage), clip_low=0.5)
    np.testing.assert_allclose(lower[0], -0.5 * advantage * logp[0], rtol=1e-5)


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    difference = jnp.array([0.2, NAN, -0.4, 0.6, 1.0, 5.0])
    mask, owner = jnp.array([1, 0, 1, 1, 1, 0]), jnp.array([0, 0, 2, 2, 0, -1])
    found = losses.sequence_log_ratio(jnp.where(mask > 0, difference, 0.0), mask, owner, 3)
    np.testing.assert_allclose(found, [(0.2 + 1.0) / 2, 0.0, (-0.4 + 0.6) / 2], rtol=1e-6)


@given(arrays(np.float32, T, elements=floats(-6, 0)), arrays(np.float32, T, elements=floats(-6, 0)))
def test_k3_equals_the_float64_oracle_and_is_never_negative(logp, reference):
    def oracle(logp):
        ratio = np.float64(reference) - logp
        return (np.exp(ratio) - ratio - 1).sum()

    value, gradient = k3(logp, reference)
    assert (losses.k3_kl(logp, reference) >= 0).all()
    np.testing.assert_allclose(value, oracle(np.float64(logp)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, numeric_gradient(oracle, logp), rtol=1e-4, atol=1e-4)


k3 = jax.jit(jax.value_and_grad(lambda logp, reference: losses.k3_kl(logp, reference).sum()))


def test_k3_is_an_unbiased_estimate_of_the_kl_to_the_reference():
    log_s, log_t = jnp.log(jnp.array([0.7, 0.2, 0.1])), jnp.log(jnp.array([0.3, 0.3, 0.4]))
    expected = losses.kl_divergence(log_s, log_t)
    np.testing.assert_allclose((jnp.exp(log_s) * losses.k3_kl(log_s, log_t)).sum(), expected, rtol=1e-5)


def test_importance_weights_by_hand():
    log_ratio = jnp.log(jnp.array([0.25, 1.0, 2.0, 2.5]))
    np.testing.assert_allclose(losses.importance_weight(log_ratio, 2.0), [0.25, 1, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(losses.importance_weight(log_ratio[:2], 2.0, "mask"), [0.25, 1], rtol=1e-6)
    assert losses.importance_weight(log_ratio[3], 2.0, "mask") == 0
    assert jax.grad(lambda x: losses.importance_weight(x, 2.0).sum())(log_ratio).sum() == 0
    assert np.isfinite(losses.importance_weight(jnp.float32(1000.0), INF))


def test_the_penalty_of_length_by_hand():
    penalty = losses.overlong_penalty(np.array([1, 6, 7, 8, 10]), longest=10, buffer=4, penalty=0.5)
    np.testing.assert_allclose(penalty, [0, 0, -0.125, -0.25, -0.5], rtol=1e-6)
    assert (losses.overlong_penalty(np.array([1, 10]), longest=10, buffer=0) == 0).all()


# ---- padding, batches, shapes


@jax.jit
def surrogate_mean(logp, old, mask):
    """Loss of one response as the update forms it, and its gradient."""

    def loss(logp):
        return losses.sequence_mean(losses.clipped_surrogate(logp, old, jnp.float32(1.5)), mask)

    return jax.value_and_grad(loss)(logp)


def assert_padding_changes_nothing(function, inputs, mask, garbage):
    """Compares value and gradient of `function(*inputs, mask)` with those of longer, padded arrays."""
    value, gradient = function(*inputs, mask)
    longer = [np.concatenate(pair) for pair in zip(inputs, garbage, strict=True)]
    padding = np.zeros(len(garbage[0]))
    padded, padded_gradient = function(*longer, np.concatenate([mask, padding > 0]))
    np.testing.assert_allclose(padded, value, rtol=1e-6)
    np.testing.assert_allclose(padded_gradient, np.concatenate([gradient, padding]), rtol=1e-6)


ANYTHING = arrays(np.float32, (1, 4), elements=st.sampled_from([0.0, 7.0, 1e30, INF, -INF, NAN]))


@given(KLS, MASKS, ANYTHING)
def test_padding_of_any_content_changes_nothing(x, mask, garbage):
    assert_padding_changes_nothing(sequence_mean, [x], mask, garbage)
    assert_padding_changes_nothing(lambda x, mask: distillation(x, mask, 1.0), [x], mask, garbage)


@given(LOGPS, LOGPS, MASKS, arrays(np.float32, (2, 4), elements=st.sampled_from([0.0, -7.0, -1e3, -1e30])))
def test_padding_changes_nothing_in_the_surrogate(logp, old, mask, garbage):
    assert_padding_changes_nothing(surrogate_mean, [logp, old], mask, garbage)


def test_nan_behind_the_mask_does_not_reach_the_surrogate_loss():
    x, mask = jnp.array([-1.0, NAN, -2.0, -INF]), jnp.array([1, 0, 1, 0])
    value, gradient = surrogate_mean(x, x, mask)
    np.testing.assert_allclose(value, -1.5)
    np.testing.assert_allclose(gradient[::2], [-0.75, -0.75])


RNG = np.random.default_rng(0)
LOG_PROBS = np.log(RNG.dirichlet(np.ones(V), size=(3, T))).astype(np.float32)
FUNCTIONS = {
    "group_advantages": (losses.group_advantages, [RNG.integers(0, 2, (3, G)).astype(np.float32)]),
    "clipped_surrogate": (
        losses.clipped_surrogate,
        [-RNG.random((3, T), np.float32), -RNG.random((3, T), np.float32), RNG.normal(size=3).astype(np.float32)],
    ),
    "kl_divergence": (losses.kl_divergence, [LOG_PROBS, LOG_PROBS[::-1].copy()]),
    "kl_clip_mask": (lambda kl: losses.kl_clip_mask(kl, 1.0), [2 * RNG.random((3, T), np.float32)]),
    "select_target": (losses.select_target, [RNG.normal(size=(3, G)).astype(np.float32), RNG.random((3, G)) < 0.4]),
    "adaptive_weight": (losses.adaptive_weight, [RNG.random(3, np.float32), RNG.random(3, np.float32)]),
    "group_advantage_weight": (
        losses.group_advantage_weight,
        [RNG.integers(0, 2, (3, G)).astype(np.float32), np.ones(3, np.float32)],
    ),
    "shaped_likelihood": (losses.shaped_likelihood, [-5 * RNG.random((3, T), np.float32)]),
    "hpt_gate": (losses.hpt_gate, [RNG.integers(0, 2, (3, 1)).astype(np.float32)]),
    "sequence_mean": (losses.sequence_mean, [RNG.random((3, T), np.float32), RNG.random((3, T)) < 0.6]),
    "distillation_loss": (
        lambda kl, mask: losses.distillation_loss(kl, mask, 1.0),
        [2 * RNG.random((3, T), np.float32), RNG.random((3, T)) < 0.6],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_and_jit_give_what_one_at_a_time_gives(name):
    function, batch = FUNCTIONS[name]
    together = jax.jit(jax.vmap(function))(*batch)
    for i in range(3):
        alone = function(*(jnp.asarray(x[i]) for x in batch))
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(b[i], a, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float16_inputs_are_computed_in_float32(name):
    function, batch = FUNCTIONS[name]
    halves = [jnp.asarray(x[0], jnp.bfloat16 if x.dtype == np.float32 else None) for x in batch]
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in halves]
    for a, b in zip(jax.tree.leaves(function(*halves)), jax.tree.leaves(function(*wide)), strict=True):
        assert a.dtype == b.dtype
        assert a.dtype in (jnp.float32, jnp.int32, jnp.bool_)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (losses.group_advantages, [(2, G)]),
        (losses.group_advantages, [()]),
        (losses.clipped_surrogate, [(2, T), (2, T), ()]),
        (losses.clipped_surrogate, [(T,), (T,), (1,)]),
        (losses.clipped_surrogate, [(T,), (T,), (T, 1)]),
        (losses.clipped_surrogate, [(T,), (1,), ()]),
        (losses.kl_divergence, [(T, V), (V,)]),
        (losses.kl_divergence, [(T, V), (T, 1)]),
        (lambda kl: losses.kl_clip_mask(kl, 1.0), [(2, T)]),
        (losses.select_target, [(2, G), (2, G)]),
        (losses.select_target, [(G,), (1,)]),
        (losses.adaptive_weight, [(), (3,)]),
        (losses.group_advantage_weight, [(2, G), ()]),
        (losses.group_advantage_weight, [(G,), (1,)]),
        (losses.hpt_gate, [(2, G)]),
        (losses.sequence_mean, [(2, T), (2, T)]),
        (losses.sequence_mean, [(T,), (1,)]),
        (lambda kl, mask: losses.distillation_loss(kl, mask, 1.0), [(2, T), (2, T)]),
        (lambda kl, mask: losses.distillation_loss(kl, mask, 1.0), [(T,), (T - 1,)]),
    ],
)
def test_wrong_shapes_are_refused(function, shapes):
    with pytest.raises(AssertionError, match="rank|shape"):
        function(*(jnp.ones(shape) for shape in shapes))
