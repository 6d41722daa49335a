"""Divergences and their gradients by hand, in float64 over the whole vocabulary, and against JAX's derivatives."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracles import BETA, LOGITS, NAN, K, P, T, V, dense, log_softmax, numeric_gradient, oracle, wide_softmax
from hypothesis import given

from sgpo_jax import divergences
from sgpo_jax.divergences import DIVERGENCES

# ---- all of them


def oracle_from_logits(name, log_t, logits, **settings):
    """Computes `oracle` from the logits of S, which may be far apart."""
    return oracle(name, log_t, wide_softmax(logits), **settings)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(LOGITS, LOGITS)
def test_values_and_gradients_equal_the_float64_oracle(name, t_logits, s_logits):
    log_t, log_s = (log_softmax(x).astype(np.float32) for x in (t_logits, s_logits))
    value, gradient = divergences.select(name, BETA, K)(log_t, log_s)
    wide = log_t.astype(np.float64)
    assert value.shape == (T,) and gradient.shape == (T, V) and value.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(value, oracle_from_logits(name, wide, s_logits), rtol=1e-5, atol=3e-6)
    expected = numeric_gradient(lambda x: oracle_from_logits(name, wide, x).sum(), s_logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(LOGITS)
def test_equal_distributions_are_exactly_zero_apart(name, logits):
    log_p = log_softmax(logits).astype(np.float32)
    value, gradient = divergences.select(name, BETA, K)(log_p, log_p)
    np.testing.assert_array_equal(value, np.zeros(T))
    np.testing.assert_array_equal(gradient, np.zeros((T, V)))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_equal_jaxs_of_the_dense_computation(name):
    t_logits, s_logits = np.random.default_rng(0).normal(size=(2, 9, 40)).astype(np.float32)
    log_t = jax.nn.log_softmax(t_logits)
    expected = dense(name, log_t, jax.nn.log_softmax(s_logits))
    by_jax = jax.grad(lambda x: dense(name, log_t, jax.nn.log_softmax(x)).sum())(s_logits)
    value, gradient = divergences.select(name, BETA, K)(log_t, jax.nn.log_softmax(s_logits))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, by_jax, rtol=1e-4, atol=1e-6)


# T and S: certain of different tokens; the tail of T, of S, and of both without probability in float32.
FAR = {
    "apart": ([1e4, 0.0, -1e4, 3.0, -5e3], [-1e4, 1e4, 0.0, 5.0, 1e3]),
    "T certain": ([0.0, -200.0, -201.0, -203.0, -300.0], [0.0, -1.0, 0.5, 0.25, -2.0]),
    "S certain": ([0.0, -1.0, -2.0, -1.5, -3.0], [0.0, -200.0, -201.0, -199.5, -202.0]),
    "both certain": ([0.0, -200.0, -201.0, -203.0, -300.0], [0.0, -150.0, -152.0, -149.0, -150.0]),
    "small tails": ([0.0, -20.0, -21.0, -21.5, -25.0], [0.0, -23.0, -22.0, -24.0, -23.0]),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("case", FAR)
def test_distributions_far_apart_have_their_values_and_gradients(case, name):
    t_logits, s_logits = (np.array([x]) for x in FAR[case])
    log_t, log_s = wide_softmax(t_logits), wide_softmax(s_logits)
    value, gradient = divergences.select(name, BETA, 1)(*(jnp.asarray(x, jnp.float32) for x in (log_t, log_s)))
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    if case != "apart":  # where probabilities are 0 in float64 too
        # At -200 float32 is exact to 1e-5, and so is the probability of which it is the logarithm.
        np.testing.assert_allclose(value, oracle(name, log_t, log_s, k=1), rtol=3e-5, atol=1e-12)
        expected = numeric_gradient(lambda x: oracle_from_logits(name, log_t, x, k=1).sum(), s_logits)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nan_that_comes_in_goes_out(name):
    log_p = jnp.asarray(np.array([P, P]), jnp.float32)
    for sides in ((log_p.at[0].set(NAN), log_p), (log_p, log_p.at[0].set(NAN))):
        value, gradient = divergences.select(name, BETA, 1)(*sides)
        np.testing.assert_array_equal(np.isnan(value), [True, False])
        assert np.isnan(gradient[0]).all() and np.isfinite(gradient[1]).all()


@pytest.mark.parametrize("name", ["backward_kl", "", "forward", None])
def test_unknown_names_are_refused(name):
    allowed = "'forward_kl', 'reverse_kl', 'jensen_shannon', 'top_k_kl'"
    with pytest.raises(ValueError, match=f"^divergence={name!r}: must be one of {allowed}$"):
        divergences.select(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta=0.0: must be above 0 and below 1"),
        ({"beta": 1.0}, "beta=1.0: must be above 0 and below 1"),
        ({"beta": NAN}, "beta=nan: must be above 0 and below 1"),
        ({"k": 0}, "k=0: must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        divergences.select("forward_kl", **settings)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_unequal_shapes_are_refused(name):
    with pytest.raises(AssertionError, match="shape"):
        divergences.select(name, BETA, K)(jnp.zeros((2, 1)), jnp.zeros((2, 3)))


# ---- jensen_shannon


def test_jensen_shannon_by_hand():
    # T certain of one of two tokens of S: M = (0.85, 0.15) for beta = 0.7.
    log_t, log_s = jnp.array([0.0, -200.0]), jnp.log(jnp.array([0.5, 0.5]))
    value, gradient = divergences.jensen_shannon(log_t, log_s, beta=0.7)
    kl_s = 0.5 * math.log(0.5 / 0.85) + 0.5 * math.log(0.5 / 0.15)
    np.testing.assert_allclose(value, 0.3 * kl_s + 0.7 * math.log(1 / 0.85), rtol=1e-6)
    expected = [0.3 * 0.5 * (math.log(0.5 / m) - kl_s) for m in (0.85, 0.15)]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@given(LOGITS, LOGITS, st.floats(0.01, 0.99))
def test_jensen_shannon_is_bounded_by_the_entropy_of_the_mixture(t_logits, s_logits, beta):
    log_t, log_s = (log_softmax(x).astype(np.float32) for x in (t_logits, s_logits))
    value, _ = divergences.jensen_shannon(log_t, log_s, beta=beta)
    most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert most <= math.log(2) and (value > -1e-6).all() and (value < most + 1e-6).all()
    mirrored, _ = divergences.jensen_shannon(log_s, log_t, beta=1 - beta)
    np.testing.assert_allclose(value, mirrored, rtol=1e-5, atol=1e-6)
    half, swapped = (divergences.jensen_shannon(*x)[0] for x in ((log_t, log_s), (log_s, log_t)))
    np.testing.assert_allclose(half, swapped, rtol=1e-5, atol=1e-6)


def test_jensen_shannon_reaches_its_bound_where_the_sides_share_nothing():
    log_t, log_s = jnp.array([[0.0, -300.0], [0.0, -2e4]]), jnp.array([[-300.0, 0.0], [-2e4, 0.0]])
    for beta, most in ((0.5, math.log(2)), (0.2, 0.5004024235)):
        value, gradient = divergences.jensen_shannon(log_t, log_s, beta=beta)
        np.testing.assert_allclose(value, [most] * 2, rtol=1e-6)
        np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


def test_jensen_shannon_becomes_either_kl():
    t_logits, s_logits = np.random.default_rng(0).normal(size=(2, T, V))
    log_t, log_s = log_softmax(t_logits), log_softmax(s_logits)
    for name, beta, scale in (("forward_kl", 1e-3, 1e-3), ("reverse_kl", 0.999, 1e-3)):
        for mixed, plain in zip(
            divergences.jensen_shannon(jnp.array(log_t), jnp.array(log_s), beta=beta),
            divergences.select(name)(jnp.array(log_t), jnp.array(log_s)), strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(np.asarray(mixed) / scale, plain, rtol=1e-2, atol=5e-3)


# ---- top_k_kl


def test_top_k_by_hand():
    """T prefers the first two tokens; S finds the first one unlikely. The last two tokens are the tail."""
    t, s = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.4, 0.2, 0.3])
    value, gradient = divergences.top_k_kl(jnp.log(t), jnp.log(s), k=2)
    expected = 0.5 * math.log(5) + 0.3 * math.log(0.75) + 0.2 * math.log(0.2 / 0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.1 - 0.5, 0.4 - 0.3, 0.2 - 0.2 * 0.4, 0.3 - 0.3 * 0.4], rtol=1e-5)


@given(LOGITS, LOGITS)
def test_more_tokens_come_closer_to_the_kl_which_all_of_them_are(t_logits, s_logits):
    log_t, log_s = (log_softmax(x).astype(np.float32) for x in (t_logits, s_logits))
    whole = divergences.forward_kl(log_t, log_s)
    values = [divergences.top_k_kl(log_t, log_s, k=k)[0] for k in range(1, V)]
    for fewer, more in zip(values, [*values[1:], whole[0]], strict=True):
        assert (fewer > -1e-6).all() and (fewer <= more + 2e-6).all()
    for k in (V, 100):
        all_tokens = divergences.top_k_kl(log_t, log_s, k=k)
        jax.tree.map(np.testing.assert_array_equal, all_tokens, whole)


def test_tokens_that_tie_with_the_kth_are_taken_wherever_they_stand():
    t, s = np.array([0.1, 0.2, 0.3, 0.2, 0.2]), np.array([0.1, 0.3, 0.1, 0.25, 0.25])
    log_t, log_s = jnp.log(jnp.asarray(t, jnp.float32)), jnp.log(jnp.asarray(s, jnp.float32))
    whole = divergences.forward_kl(log_t, log_s)
    for k in (2, 3, 4):
        # One token is left in the tail, so the tail's KL is that token's KL.
        for actual, expected in zip(divergences.top_k_kl(log_t, log_s, k=k), whole, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
    assert abs(divergences.top_k_kl(log_t, log_s, k=1)[0] - whole[0]) > 1e-3
    order = np.array([3, 0, 4, 2, 1])
    value, gradient = divergences.top_k_kl(log_t[order], log_s[order], k=2)
    expected = divergences.top_k_kl(log_t, log_s, k=2)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected[1][order], rtol=1e-5, atol=1e-7)


def test_the_likeliest_are_found_without_sorting_the_vocabulary():
    log_p = jnp.zeros((8, 512))
    compiled = jax.jit(lambda t, s: divergences.top_k_kl(t, s, k=10)).lower(log_p, log_p).compile().as_text()
    assert "TopK" in compiled and " sort(" not in compiled
