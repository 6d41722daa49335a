"""Mixtures of experts, against a formula that computes every expert for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import CONFIGS, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_jax import models, sharding
from sgpo_jax.models import experts
from sgpo_jax.sharding import ROWS

D, F = 5, 7


def inputs(seed, batch, length, count):
    rng = np.random.default_rng(seed)
    shapes = ((batch, length, D), (count, D), (count, D, F), (count, D, F), (count, F, D))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def dense(x, router, gate, up, down, per_token, normalized):
    probabilities = jax.nn.softmax(jnp.einsum("btd,ed->bte", x, router))
    least = jnp.sort(probabilities)[..., -per_token, None]
    weights = jnp.where(probabilities >= least, probabilities, 0)
    weights = weights / weights.sum(-1, keepdims=True) if normalized else weights
    gated = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    return jnp.einsum("bte,btef,efd->btd", weights, gated, down)


def mixture(x, router, gate, up, down, per_token, normalized, places=(None, None), axes=()):
    chosen, weights = experts.route(x, router, per_token, normalized)
    return experts.mix(x, chosen, weights, experts.Kernels(gate, up, down), places, axes)


def assert_dense(arguments, per_token, normalized, **layout):
    weight = np.random.default_rng(9).normal(size=arguments[0].shape)

    def outcome(function, **more):
        def loss(*args):
            out = function(*args, per_token, normalized, **more)
            return (out * weight).sum(), out

        gradients, out = jax.jit(jax.grad(loss, argnums=range(5), has_aux=True))(*arguments)
        return out, *gradients

    for got, wanted in zip(outcome(mixture, **layout), outcome(dense), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * max(1, np.abs(wanted).max()))


@settings(max_examples=8)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.data())
def test_no_token_is_dropped_and_gradients_are_those_of_the_formula(seed, batch, length, count, data):
    per_token = data.draw(st.integers(1, count))
    assert_dense(inputs(seed, batch, length, count), per_token, data.draw(st.booleans()))


def test_all_tokens_at_one_expert():
    x, router, *kernels = inputs(0, 2, 30, 6)
    assert_dense((jnp.abs(x), jnp.zeros_like(router).at[4].set(9), *kernels), 1, False)


def test_the_grouped_product_of_tpus(monkeypatch):
    monkeypatch.setattr(experts, "platform", lambda: "tpu")
    arguments = inputs(1, 2, 11, 5)
    assert "ragged_dot" in str(jax.make_jaxpr(lambda *args: mixture(*args, 3, True))(*arguments))
    assert_dense(arguments, 3, True)


@pytest.mark.parametrize(("shape", "count"), [((2, 1, 2), 6), ((1, 2, 4), 4), ((1, 1, 8), 8), ((4, 2, 1), 3)])
def test_experts_split_over_a_mesh(shape, count):
    """4 rows, which the last mesh does not divide."""
    mesh = sharding.make_mesh(*shape, jax.devices()[: np.prod(shape)])
    with jax.set_mesh(mesh):
        places = sharding.fit_spec((4, 1), (ROWS, "context"))
        assert_dense(inputs(2, 4, 6, count), 2, True, places=places, axes=("tensor",))


def test_the_load_counts_the_real_tokens_of_each_expert():
    config = CONFIGS["qwen3moe"]
    params = jax.tree.map(lambda x: 0.3 * x, random_params(config))
    tokens = np.random.default_rng(0).integers(0, 151, (3, 9))
    positions, mask = np.broadcast_to(np.arange(9), (3, 9)), np.arange(9) < np.array([9, 4, 7])[:, None]
    count = jax.jit(models.expert_load, static_argnums=1)
    hidden, load = count(params, config, tokens, positions, mask)
    applied = jax.jit(models.apply, static_argnums=1)(params, config, tokens, positions, mask)[0]
    np.testing.assert_array_equal(hidden, applied)
    assert load.shape == (config.num_layers, config.experts)
    np.testing.assert_array_equal(load.sum(axis=1), 20 * config.experts_per_token)
    alone = [count(params, config, *(x[[row]] for x in (tokens, positions, mask)))[1] for row in range(3)]
    np.testing.assert_array_equal(load, sum(alone))
    assert len(np.unique(load)) > 2
