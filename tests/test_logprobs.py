"""Chunked log-probabilities, entropy and KL against the dense computation in float64, and the memory they keep to."""

import contextlib
import math
import re
from functools import partial
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import xla_flags
from helpers.oracles import BETA, K, dense, numeric_gradient, oracle
from hypothesis import given
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec as P

from sgpo_jax import divergences, logprobs, output_head, sharding
from sgpo_jax.divergences import DIVERGENCES
from sgpo_jax.logprobs import token_divergence, token_kl, token_logprobs

N, D, V = 7, 4, 11
SETTINGS = {"beta": BETA, "k": K}
select = partial(divergences.select, **SETTINGS)
SIZES = [(7, 7), (7, 1), (7, 3), (7, 5), (7, 100), (16, 5), (1, 1), (1, 512), (0, 4)]  # positions, chunk


def inputs(count=N, seed=0, scale=1.5):
    """Guided and unguided hidden states `[N,D]`, head `[D,V]`, targets `[N]`."""
    rng = np.random.default_rng(seed)
    guided, unguided = rng.normal(scale=scale, size=(2, count, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    return guided, unguided, head, rng.integers(0, V, count)


def log_softmax(hidden, head, temperature=1.0):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def dense_logprobs(hidden, head, targets, temperature=1.0):
    log_probs = log_softmax(hidden, head, temperature)
    return log_probs[np.arange(len(targets)), targets], -(np.exp(log_probs) * log_probs).sum(-1)


def dense_kl(guided, unguided, head, name, guided_head=None):
    return oracle(name, log_softmax(guided, head if guided_head is None else guided_head), log_softmax(unguided, head))


# ---- values


def test_by_hand():
    # One-hot hidden states pick rows of the head.
    hidden = jnp.eye(2)
    head = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    logp, entropy = token_logprobs(hidden, head, jnp.array([1, 1]))
    np.testing.assert_allclose(logp, [math.log(0.5), math.log(0.1)], rtol=1e-6)
    np.testing.assert_allclose(entropy, [math.log(2), -0.9 * math.log(0.9) - 0.1 * math.log(0.1)], rtol=1e-6)
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    backward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    np.testing.assert_allclose(token_kl(hidden, hidden[::-1], head), [forward, backward], rtol=1e-6)
    np.testing.assert_allclose(
        token_kl(hidden, hidden[::-1], head, direction="reverse"), [backward, forward], rtol=1e-6
    )


@pytest.mark.parametrize(("count", "chunk"), SIZES)
def test_values_equal_the_dense_float64_ones(count, chunk):
    guided, unguided, head, targets = inputs(count)
    logp, entropy = token_logprobs(unguided, head, targets, chunk=chunk)
    expected_logp, expected_entropy = dense_logprobs(unguided, head, targets)
    assert logp.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logp, expected_logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    for name in DIVERGENCES:
        kl = token_divergence(guided, unguided, head, divergence=name, **SETTINGS, chunk=chunk)
        assert kl.dtype == jnp.float32
        np.testing.assert_allclose(kl, dense_kl(guided, unguided, head, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.6, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    _, hidden, head, targets = inputs()
    logp, entropy = token_logprobs(hidden, head, targets, temperature=temperature, chunk=3)
    expected_logp, expected_entropy = dense_logprobs(hidden, head, targets, temperature)
    np.testing.assert_allclose(logp, expected_logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-5)


HIDDEN = arrays(np.float32, (N, D), elements=st.floats(-4, 4, width=32, allow_subnormal=False))
HEAD = arrays(np.float32, (D, V), elements=st.floats(-2, 2, width=32, allow_subnormal=False))
logprobs_in_chunks = jax.jit(lambda *args: token_logprobs(*args, chunk=3))
kl_in_chunks = jax.jit(lambda *args: token_kl(*args, chunk=3))
mixture_in_chunks = jax.jit(lambda *args: token_divergence(*args, divergence="jensen_shannon", beta=BETA, chunk=3))


@given(HIDDEN, HIDDEN, HEAD, arrays(np.int32, N, elements=st.integers(0, V - 1)))
def test_any_input_equals_the_float64_oracle(guided, unguided, head, targets):
    logp, entropy = logprobs_in_chunks(unguided, head, targets)
    expected_logp, expected_entropy = dense_logprobs(unguided, head, targets)
    np.testing.assert_allclose(logp, expected_logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    kl = kl_in_chunks(guided, unguided, head)
    np.testing.assert_allclose(kl, dense_kl(guided, unguided, head, "forward_kl"), rtol=1e-5, atol=2e-5)
    apart = mixture_in_chunks(guided, unguided, head)
    np.testing.assert_allclose(apart, dense_kl(guided, unguided, head, "jensen_shannon"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("head_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_products_are_summed_in_float32(head_dtype):
    # Products of bfloat16 numbers are exact in float32, so only the rounding of the inputs is allowed to show.
    guided, unguided, head, targets = (jnp.asarray(x) for x in inputs(16))
    rounded = [np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)) for x in (guided, unguided, head)]
    guided, unguided, head = guided.astype(jnp.bfloat16), unguided.astype(jnp.bfloat16), head.astype(head_dtype)
    logp, entropy = token_logprobs(unguided, head, targets, chunk=5)
    assert logp.dtype == entropy.dtype == jnp.float32
    expected = dense_logprobs(rounded[1], rounded[2], targets)
    np.testing.assert_allclose(logp, expected[0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-5, atol=2e-5)
    kl = token_kl(guided, unguided, head, chunk=5)
    assert kl.dtype == jnp.float32
    np.testing.assert_allclose(kl, dense_kl(*rounded, "forward_kl"), rtol=1e-5, atol=2e-5)
    # A CPU adds in float32 whatever type is requested, so the test also checks the requested type.
    jaxpr = jax.make_jaxpr(lambda *args: (token_kl(*args), token_logprobs(*args[1:], targets)))(guided, unguided, head)
    products = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == "dot_general"]
    assert len(products) == 3
    assert all(equation.invars[0].aval.dtype == jnp.bfloat16 for equation in products)
    assert all(equation.outvars[0].aval.dtype == jnp.float32 for equation in products)


def test_equal_contexts_have_no_kl():
    guided, _, head, _ = inputs()
    for name in DIVERGENCES:
        kl = token_divergence(guided, guided, head, divergence=name, **SETTINGS, chunk=3)
        np.testing.assert_array_equal(kl, np.zeros(N))


def test_saturated_distributions_stay_finite():
    guided, unguided, head, targets = inputs(scale=1e4)

    def total(unguided, head):
        logp, entropy = token_logprobs(unguided, head, targets, chunk=3)
        kls = [token_divergence(guided, unguided, head, divergence=name, **SETTINGS, chunk=3) for name in DIVERGENCES]
        return (logp + entropy + sum(kls)).sum()

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(unguided, head)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


# ---- gradients

WEIGHTS = np.random.default_rng(1).normal(size=(2, 16))


@pytest.mark.parametrize(("count", "chunk", "temperature"), [(7, 3, 1.0), (7, 100, 0.7), (1, 1, 1.0)])
def test_gradients_of_logprobs_equal_finite_differences(count, chunk, temperature):
    _, hidden, head, targets = inputs(count)
    d_logp, d_entropy = WEIGHTS[:, :count]

    def total(hidden, head):
        logp, entropy = token_logprobs(hidden, head, targets, temperature=temperature, chunk=chunk)
        return (d_logp * logp + d_entropy * entropy).sum()

    def oracle(hidden, head):
        logp, entropy = dense_logprobs(hidden, head, targets, temperature)
        return (d_logp * logp + d_entropy * entropy).sum()

    hidden_gradient, head_gradient = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, head)
    expected = numeric_gradient(lambda x: oracle(x, head), hidden)
    np.testing.assert_allclose(hidden_gradient, expected, rtol=1e-4, atol=1e-5)
    expected = numeric_gradient(lambda x: oracle(hidden, x), head)
    np.testing.assert_allclose(head_gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("count", "chunk"), [(7, 3), (7, 100), (1, 1)])
def test_gradients_of_kl_equal_finite_differences_of_the_unguided_side(name, count, chunk):
    guided, unguided, head, _ = inputs(count)
    weights = WEIGHTS[0, :count]

    def total(guided, unguided, head):
        return (weights * token_divergence(guided, unguided, head, divergence=name, **SETTINGS, chunk=chunk)).sum()

    def oracle(unguided, head):
        return (weights * dense_kl(guided, unguided, head, name, guided_head=HELD)).sum()

    HELD = head
    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(guided, unguided, head)
    np.testing.assert_array_equal(gradients[0], np.zeros_like(guided))
    expected = numeric_gradient(lambda x: oracle(x, head), unguided)
    np.testing.assert_allclose(gradients[1], expected, rtol=1e-4, atol=1e-5)
    expected = numeric_gradient(lambda x: oracle(unguided, x), head)
    np.testing.assert_allclose(gradients[2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_of_kl_equal_those_of_the_dense_computation(name):
    guided, unguided, head, _ = inputs()

    def total(unguided, head, guided_head):
        return dense(name, jax.nn.log_softmax(guided @ guided_head), jax.nn.log_softmax(unguided @ head)).sum()

    def chunked_total(unguided, head):
        return token_divergence(guided, unguided, head, divergence=name, **SETTINGS, chunk=3).sum()

    expected = jax.grad(total, (0, 1))(unguided, head, head)
    actual = jax.grad(chunked_total, (0, 1))(unguided, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
    # The gradient of the guided side, which is held back, is not a small one.
    withheld = jax.grad(total, 2)(unguided, head, head)
    assert np.abs(withheld).max() > 0.1


def test_gradients_do_not_depend_on_the_chunk():
    guided, unguided, head, targets = inputs(16)

    def gradients(chunk):
        def total(unguided, head):
            logp, entropy = token_logprobs(unguided, head, targets, chunk=chunk)
            return (logp + entropy**2 + token_kl(guided, unguided, head, chunk=chunk)).sum()

        return jax.jit(jax.grad(total, (0, 1)))(unguided, head)

    whole = gradients(16)
    for chunk in (1, 3, 99):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients(chunk), whole)


# ---- memory


def equations(jaxpr):
    """All equations of a jaxpr, those inside scans, checkpoints, jits and custom derivatives included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def largest_array(function, *args):
    """Elements of the largest array that `function` computes."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return max(math.prod(out.aval.shape) for equation in equations(jaxpr) for out in equation.outvars)


def dense_jax(hidden, head, targets):
    return jax.nn.log_softmax(hidden @ head)[jnp.arange(len(targets)), targets]


BIG_N, CHUNK, BIG_V = 4099, 64, 512


def chunked(x):
    steps = -(-BIG_N // CHUNK)
    return jnp.pad(x, [(0, steps * CHUNK - BIG_N)] + [(0, 0)] * (x.ndim - 1)).reshape(steps, CHUNK, *x.shape[1:])


def summed_kl(guided, unguided, head, name):
    guided, unguided, weight = map(chunked, (guided, unguided, jnp.ones(BIG_N)))
    return logprobs.kl_loss(lambda kl, w: w * kl, guided, unguided, head, len(weight), weight, select(name))[0]


def summed_logprobs(guided, unguided, head, targets):
    hidden, targets, weight = map(chunked, (unguided, targets, jnp.ones(BIG_N)))
    return logprobs.logprobs_loss(lambda logp, h, w: w * (logp + h), hidden, head, targets, len(weight), weight)[0]


MEASURED = {
    "logprobs": lambda guided, unguided, head, targets: sum(token_logprobs(unguided, head, targets, chunk=CHUNK)),
    "loss of logprobs": summed_logprobs,
}
for divergence in DIVERGENCES:
    MEASURED |= {
        divergence: lambda guided, unguided, head, targets, name=divergence: token_divergence(
            guided, unguided, head, divergence=name, **SETTINGS, chunk=CHUNK
        ),
        f"loss of {divergence}": lambda guided, unguided, head, targets, name=divergence: summed_kl(
            guided, unguided, head, name
        ),
    }


def big_inputs():
    hidden = jnp.zeros((BIG_N, D))
    return hidden, hidden, jnp.zeros((D, BIG_V)), jnp.zeros(BIG_N, jnp.int32)


def with_gradient(function):
    return jax.value_and_grad(lambda *args: function(*args).sum(), argnums=(0, 1, 2))


def test_the_measure_sees_a_dense_computation():
    _, hidden, head, targets = big_inputs()
    assert largest_array(dense_jax, hidden, head, targets) == BIG_N * BIG_V
    nested = jax.jit(lambda *args: jax.checkpoint(dense_jax)(*args))
    assert largest_array(nested, hidden, head, targets) == BIG_N * BIG_V


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("transform", [lambda f: f, with_gradient])
def test_tokens_times_vocabulary_is_never_built(name, transform):
    # A chunk of logits is the largest array there is; hidden states and head are smaller here.
    assert largest_array(transform(MEASURED[name]), *big_inputs()) <= CHUNK * BIG_V


@pytest.mark.parametrize("name", MEASURED)
def test_the_compiled_gradient_needs_a_few_chunks_of_memory(name):
    compiled = jax.jit(with_gradient(MEASURED[name])).lower(*big_inputs()).compile()
    logits = 4 * BIG_N * BIG_V  # bytes
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4


@pytest.mark.parametrize("size", [1, 6, 7, 8])
def test_any_hidden_size_has_the_gradient_of_the_head(size):
    """Also a size that is not a multiple of the number of parts in which the gradient is added."""
    rng = np.random.default_rng(size)
    hidden = jnp.asarray(rng.normal(size=(N, size)), jnp.float32)
    head, targets = jnp.asarray(rng.normal(size=(size, V)), jnp.float32), rng.integers(0, V, N)
    actual = jax.grad(lambda head: token_logprobs(hidden, head, targets, chunk=3)[0].sum())(head)
    expected = jax.grad(lambda head: dense_jax(hidden, head, targets).sum())(head)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "parts"), [(24, 4), (25, 5), (23, 1), (7, 1)])
def test_a_vocabulary_in_parts_has_the_same_logits(monkeypatch, size, parts):
    monkeypatch.setattr(output_head, "WIDTH", 5)
    rng = np.random.default_rng(size)
    hidden, head = rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=(D, size)).astype(np.float32)

    def products(weight, tied):
        def logits(hidden):
            return output_head.logits(hidden, output_head.Head(weight, tied))

        np.testing.assert_allclose(logits(hidden), hidden @ head, rtol=1e-5, atol=1e-6)
        dots = [x for x in equations(jax.make_jaxpr(logits)(hidden).jaxpr) if x.primitive.name == "dot_general"]
        return {dot.outvars[0].aval.shape for dot in dots}

    for weight, tied in ((head, False), (jnp.asarray(head.T), True)):
        assert products(weight, tied) == {(N, size // parts)}, "the most parts that divide it, each at least as wide"
    monkeypatch.setattr(output_head, "platform", lambda: "tpu")
    assert products(head, False) == {(N, size)}, "a single product where it copies nothing"


def loss_of_two_heads(hidden, head, guided, guided_head, weight, tied):
    """Both functions that take a head of the guided side."""
    heads = head, guided_head
    one, _ = logprobs.kl_loss(lambda kl, w: w * kl, guided, hidden, heads, 2, weight, tied=tied)
    return one + (weight * logprobs.chunked_kl(guided, hidden, heads, 2, tied=tied)).sum()


@pytest.mark.parametrize(("shape", "tied"), [(None, False), ((2, 2, 2), False), ((2, 2, 2), True)])
def test_a_teacher_may_have_its_own_head_and_width(shape, tied):
    rng = np.random.default_rng(3)
    hidden, guided = (rng.normal(size=(3, 8, width)).astype(np.float32) for width in (16, 32))
    head, guided_head = (rng.normal(size=(width, 24)).astype(np.float32) for width in (16, 32))
    weight = rng.normal(size=(3, 8)).astype(np.float32)

    def expected_loss(hidden, head):
        log_t, log_s = log_softmax(guided[:2], guided_head), log_softmax(hidden[:2], head)
        return 2 * (weight[:2] * (np.exp(log_t) * (log_t - log_s)).sum(-1)).sum()

    wide = np.float64(hidden), np.float64(head)
    expected = (
        expected_loss(*wide),
        numeric_gradient(lambda x: expected_loss(x, wide[1]), wide[0]),
        numeric_gradient(lambda x: expected_loss(wide[0], x), wide[1]),
    )
    function = jax.jit(jax.value_and_grad(loss_of_two_heads, argnums=(0, 1)), static_argnums=5)
    turned = [x.T.copy() if tied else x for x in (head, guided_head)]
    devices = jax.devices()[: math.prod(shape or ())]
    with jax.set_mesh(sharding.make_mesh(*shape, devices=devices)) if shape else contextlib.nullcontext():
        value, (d_hidden, d_head) = function(hidden, turned[0], guided, turned[1], weight, tied)
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    same(value, expected[0])
    same(d_hidden, expected[1])
    same(d_head.T if tied else d_head, expected[2])


def loss_of_head(hidden, guided, targets, weight, head, tied):
    """Combines every function that takes a tied head into one loss."""
    logp, entropy = logprobs.chunked_logprobs(hidden, head, targets, 2, 0.7, tied)
    one, _ = logprobs.logprobs_loss(lambda logp, h, w: w * logp * h, hidden, head, targets, 2, weight, tied)
    two, _ = logprobs.kl_loss(lambda kl, w: w * kl, guided, hidden, head, 2, weight, tied=tied)
    return (weight * (logp + entropy)).sum() + one + 3 * two


@pytest.mark.parametrize("shape", [None, (1, 1, 1), (2, 2, 2)])
def test_a_tied_head_is_its_transpose(shape):
    rng = np.random.default_rng(1)
    hidden, guided = (rng.normal(size=(3, 8, 16)).astype(np.float32) for _ in range(2))
    targets, weight = rng.integers(0, 24, (3, 8)), rng.normal(size=(3, 8)).astype(np.float32)
    head = rng.normal(size=(16, 24)).astype(np.float32)
    function = jax.jit(jax.value_and_grad(loss_of_head, argnums=(0, 4)), static_argnums=5)
    value, (d_hidden, d_head) = function(hidden, guided, targets, weight, head, False)
    devices = jax.devices()[: math.prod(shape or ())]
    with jax.set_mesh(sharding.make_mesh(*shape, devices=devices)) if shape else contextlib.nullcontext():
        tied = function(hidden, guided, targets, weight, head.T.copy(), True)
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    same(tied[0], value)
    same(tied[1][0], d_hidden)
    same(tied[1][1], d_head.T)


@pytest.mark.parametrize("shape", [None, (1, 1, 1)])
def test_on_one_device_no_transposed_copy_of_a_tied_head_is_made(shape):
    size, vocabulary = 256, 2 * output_head.WIDTH
    hidden, numbers = jnp.zeros((4, 4, size)), jnp.zeros((4, 4), jnp.int32)

    def loss(embedding, tied):
        head = embedding if tied else embedding.T
        return logprobs.logprobs_loss(lambda logp, h, w: logp + w, hidden, head, numbers, 4, numbers, tied)[0]

    mesh = jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])) if shape else contextlib.nullcontext()
    with mesh:
        function = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        compiled = [function.lower(jnp.zeros((vocabulary, size)), tied).compile() for tied in (True, False)]
    tied, untied = (program.memory_analysis().temp_size_in_bytes / (4 * size * vocabulary) for program in compiled)
    assert 1 < tied < 1.1, "the gradient of the head and little else"
    assert untied > 1.4


def test_positions_at_once_are_those_of_the_device():
    assert logprobs.default_chunk() == logprobs.CPU_CHUNK == 128
    assert logprobs.default_chunk(sharding.make_mesh(2, 2, 2)) == 4 * 128
    chips = np.array([SimpleNamespace(platform="tpu")] * 8).reshape(1, 4, 2)
    mesh = SimpleNamespace(devices=chips, empty=False, shape=dict(data=1, fsdp=2, context=2, tensor=2))
    assert logprobs.default_chunk(mesh) == 4 * 512


# ---- losses that are sums over tokens


def surrogate(logp, entropy, data):
    """Returns a made-up loss that is not linear, has an edge, and differs from token to token."""
    return data["weight"] * jnp.where(logp > data["edge"], logp**2, jnp.exp(logp)) + entropy * data["weight"] ** 2


@pytest.mark.parametrize("kind", ["logprobs", *DIVERGENCES])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sum_of_token_losses_has_the_gradient_of_the_losses(dtype, kind):
    rng = np.random.default_rng(1)
    guided, unguided = (jnp.asarray(rng.normal(size=(3, 5, D)), dtype) for _ in range(2))
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = rng.integers(0, V, (3, 5))
    data = {"weight": rng.normal(size=(3, 5)).astype(np.float32), "edge": np.full((3, 5), -2.4, np.float32)}

    def plain(unguided, head, used):
        visited = (jnp.arange(3) < used)[:, None]
        if kind == "logprobs":
            values = logprobs.chunked_logprobs(unguided, head, targets, used)
        else:
            values = (logprobs.chunked_kl(guided, unguided, head, used, select(kind)),) * 2
        return 3 * jnp.where(visited, surrogate(*values, data), 0.0).sum(), values

    def fused(unguided, head, used):
        if kind == "logprobs":
            loss, values = logprobs.logprobs_loss(surrogate, unguided, head, targets, used, data)
        else:
            def token_loss(kl, data):
                return surrogate(kl, kl, data)

            loss, kl = logprobs.kl_loss(token_loss, guided, unguided, head, used, data, select(kind))
            values = kl, kl
        return 3 * loss, values

    exact = partial(jax.jit, compiler_options=xla_flags.EXACT)
    plain, fused = (exact(jax.value_and_grad(loss, (0, 1), has_aux=True)) for loss in (plain, fused))
    for used in (1, 2, 3):
        (expected, values), gradients = plain(unguided, head, used)
        (actual, fused_values), fused_gradients = fused(unguided, head, used)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
        np.testing.assert_array_equal(fused_values, values)
        assert [x.dtype for x in fused_gradients] == [x.dtype for x in gradients] == [dtype, jnp.float32]
        for gradient, reference in zip(fused_gradients, gradients, strict=True):
            error = np.linalg.norm((gradient - reference).astype(np.float32).ravel())
            # In bfloat16 the two round different numbers: one before, one after the factor 3.
            size = np.linalg.norm(reference.astype(np.float32).ravel())
            assert error <= (1e-5 if dtype == jnp.float32 else 1e-2) * size
        assert not np.asarray(gradients[0][used:], np.float32).any()


def test_values_and_data_of_a_sum_of_token_losses_are_constants():
    guided, unguided, head, targets = (x[None] if i != 2 else x for i, x in enumerate(inputs()))
    weight = jnp.ones((1, N))

    def through_values(unguided, guided, weight):
        _, values = logprobs.logprobs_loss(lambda logp, h, w: w * logp, unguided, head, targets, 1, weight)
        loss, kl = logprobs.kl_loss(lambda kl, w: w * kl, guided, unguided, head, 1, weight)
        return sum(value.sum() for value in (*values, kl)), loss

    value_gradients = jax.grad(lambda *x: through_values(*x)[0], (0, 1, 2))(unguided, guided, weight)
    loss_gradients = jax.grad(lambda *x: through_values(*x)[1], (0, 1, 2))(unguided, guided, weight)
    assert not any(np.asarray(x).any() for x in (*value_gradients, *loss_gradients[1:]))
    assert np.asarray(loss_gradients[0]).all()


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_head_costs_no_product_for_its_gradient(tied):
    guided, unguided, head, targets = (x[None] if i != 2 else x for i, x in enumerate(inputs()))
    head = head.T if tied else head

    def loss(hidden, head):
        weight = jnp.ones((1, N))
        likelihood, _ = logprobs.logprobs_loss(lambda logp, h, w: w * logp, hidden, head, targets, 1, weight, tied)
        return likelihood + logprobs.kl_loss(lambda kl, w: w * kl, guided, hidden, head, 1, weight, tied=tied)[0]

    alone, both = jax.grad(loss), jax.grad(loss, (0, 1))
    np.testing.assert_array_equal(alone(unguided, head), both(unguided, head)[0])
    products = [str(jax.make_jaxpr(gradient)(unguided, head)).count("dot_general") for gradient in (alone, both)]
    assert products == [5, 7], "three products with logits of one or two sides, two for d_hidden, two for d_head"


# ---- refusals


@pytest.mark.parametrize("name", ["backward_kl", "", "forward", None])
def test_unknown_divergences_are_refused_everywhere(name):
    guided, unguided, head, _ = inputs()
    chunks = guided[None], unguided[None], head, 1
    for call in (
        lambda: token_divergence(guided, unguided, head, divergence=name),
        lambda: logprobs.chunked_kl(*chunks, divergences.select(name)),
        lambda: logprobs.kl_loss(lambda kl, w: w * kl, *chunks, jnp.ones((1, N)), divergences.select(name)),
    ):
        with pytest.raises(ValueError, match=f"divergence={name!r}: must be one of 'forward_kl', 'reverse_kl'"):
            call()


@pytest.mark.parametrize(("setting", "value"), [("beta", 1.0), ("k", 0)])
def test_impossible_settings_of_divergences_are_refused(setting, value):
    guided, unguided, head, _ = inputs()
    with pytest.raises(ValueError, match=f"{setting}={value}: must be"):
        token_divergence(guided, unguided, head, divergence="forward_kl", **{setting: value})


@pytest.mark.parametrize("direction", ["backward", "", "Forward", "forward_kl", None])
def test_unknown_directions_are_refused(direction):
    guided, unguided, head, _ = inputs()
    with pytest.raises(ValueError, match=f"direction={direction!r}.*'forward'.*'reverse'"):
        token_kl(guided, unguided, head, direction=direction)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_below_one_are_refused(chunk):
    guided, unguided, head, targets = inputs()
    with pytest.raises(ValueError, match=f"chunk={chunk}: must be at least 1"):
        token_kl(guided, unguided, head, chunk=chunk)
    with pytest.raises(ValueError, match=f"chunk={chunk}: must be at least 1"):
        token_logprobs(unguided, head, targets, chunk=chunk)


@pytest.mark.parametrize(
    "shapes",
    [((N, D), (D, V), (N - 1,)), ((N, D), (D, V), (N, 1)), ((N, 1, D), (D, V), (N,)), ((N, D), (1, D, V), (N,))],
)
def test_wrong_shapes_of_logprobs_are_refused(shapes):
    hidden, head, targets = (jnp.ones(shape, jnp.int32 if i == 2 else None) for i, shape in enumerate(shapes))
    with pytest.raises(AssertionError, match="rank|shape"):
        token_logprobs(hidden, head, targets)


@pytest.mark.parametrize("shapes", [((N, D), (N - 1, D), (D, V)), ((N, D), (D,), (D, V)), ((N, D), (N, D), (V,))])
def test_wrong_shapes_of_kl_are_refused(shapes):
    with pytest.raises(AssertionError, match="rank|shape"):
        token_kl(*(jnp.ones(shape) for shape in shapes))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}: must be above 0"):
        token_logprobs(jnp.ones((2, 3)), jnp.ones((3, 5)), jnp.zeros(2, jnp.int32), temperature=temperature)


# ---- on a mesh


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 4, 2), (1, 8, 1)))]
)
def test_devices_share_positions_and_vocabulary(shape):
    """Values and gradients are those of one device; the head is gathered, and its gradient summed, outside of loops."""
    rng = np.random.default_rng(0)
    chunks, count, size, vocabulary = 3, 8, 16, 24
    guided, unguided = (rng.normal(size=(chunks, count, size)).astype(np.float32) for _ in range(2))
    head = rng.normal(size=(size, vocabulary)).astype(np.float32)
    targets = rng.integers(0, vocabulary, (chunks, count)).astype(np.int32)
    # The last k is more than a device's part of the vocabulary.
    settings = [*((name, BETA, K) for name in DIVERGENCES), ("top_k_kl", BETA, 20)]
    weight = rng.normal(size=(2 + len(settings), chunks, count)).astype(np.float32)
    used = 2

    def loss(unguided, head):
        logp, entropy = logprobs.chunked_logprobs(unguided, head, targets, used, 0.7)
        kls = [logprobs.chunked_kl(guided, unguided, head, used, divergences.select(*setting)) for setting in settings]
        per_token = sum((w * x).sum() for w, x in zip(weight, (logp, entropy, *kls), strict=True))
        sums = [
            logprobs.logprobs_loss(lambda logp, h, w: w * logp * h, unguided, head, targets, used, weight[0]),
            *(
                logprobs.kl_loss(
                    lambda kl, w: w * kl**2, guided, unguided, head, used, weight[1], divergences.select(*setting)
                )
                for setting in settings
            ),
        ]  # fmt: skip
        return per_token + sum(loss for loss, _ in sums), (logp, entropy, *kls, sums)

    function = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    expected = function(unguided, head)
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        placed = sharding.put((unguided, head), (P(None, sharding.BATCH), P("fsdp", "tensor")), mesh)
        compiled = function.lower(*placed).compile()
        actual = compiled(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
    inside = [line for line in compiled.as_text().splitlines() if "while/body" in line and " all-" in line]
    assert not [line for line in inside if f"{size},{vocabulary // shape[2]}]" in line]
    # A device sends no more than its likeliest tokens of each position, or the mass of its tail.
    parts = {1, *(min(k, vocabulary // shape[2]) for _, _, k in settings)}
    gathered = {int(re.search(r"= f32\[\d+,(\d+)]", line)[1]) for line in inside if "all-gather" in line}
    assert gathered <= {shape[2] * part for part in parts}
