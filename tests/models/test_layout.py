"""The layout of parameters for decoding on a CPU; test_products_gpu.py has that on GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import CONFIGS, random_params

from sgpo_jax import models
from sgpo_jax.models import layout, quantised


def decoded(params, config, apart):
    """Returns the hidden states of five tokens of each row, and the program of a step."""
    cache, hidden = models.init_cache(config, 4, 8), []

    def step(params, *arguments):
        return models.decode(models.for_decoding(params, ("tensor",), True) if apart else params, config, *arguments)

    step = jax.jit(step)
    active = jnp.array([True, True, False, True])
    for tokens in np.random.default_rng(0).integers(0, config.vocab_size, (5, 4), np.int32):
        out, cache = step(params, tokens, active, cache)
        hidden.append(out)
    return np.stack(hidden), str(jax.make_jaxpr(step)(params, tokens, active, cache))


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_with_arrays_of_their_own_decode_as_those_of_a_stack(monkeypatch, family):
    monkeypatch.setattr(layout, "LARGE", 0)
    config, params = CONFIGS[family], random_params(CONFIGS[family])
    (apart, program), (stacked, scanned) = (decoded(params, config, way) for way in (True, False))
    np.testing.assert_allclose(apart, stacked, atol=2e-5 * np.abs(stacked).max())
    over_layers = "num_carry=3\n"  # a scan that carries tokens, keys and values takes kernels from their stacks
    assert over_layers in scanned and over_layers not in program


def test_several_tokens_of_a_row_at_once(monkeypatch):
    monkeypatch.setattr(layout, "LARGE", 0)
    config, params = CONFIGS["qwen2"], random_params(CONFIGS["qwen2"])
    cache, tokens = models.init_cache(config, 2, 8), np.array([[3, 5, 7], [2, 4, 6]])
    apart, stacked = (
        models.decode(tree, config, tokens, jnp.ones(2, bool), cache)[0]
        for tree in (models.for_decoding(params, ("tensor",), True), params)
    )
    np.testing.assert_allclose(apart, stacked, atol=2e-5 * np.abs(stacked).max())


def test_codes_of_8_bits_too(monkeypatch):
    pytest.importorskip("qwix", reason="the quantised extra is not installed")
    monkeypatch.setattr(layout, "LARGE", 0)
    config = CONFIGS["qwen3"]
    params = quantised.by_column(random_params(config))
    (apart, _), (stacked, _) = (decoded(params, config, way) for way in (True, False))
    np.testing.assert_allclose(apart, stacked, atol=2e-5 * np.abs(stacked).max())


def test_only_large_layers_are_apart_and_only_where_the_program_runs_often(monkeypatch):
    config = CONFIGS["qwen2"]
    params = random_params(config)
    size = sum(leaf[0].size for leaf in jax.tree.leaves(params["layers"]))
    for large, often in ((layout.LARGE, True), (size + 1, True), (size, False)):
        monkeypatch.setattr(layout, "LARGE", large)
        assert models.for_decoding(params, ("tensor",), often) is params
    apart = models.for_decoding(params, ("tensor",), often=True)
    assert apart.keys() == {"embed", "head", "norm", "layer_0", "layer_1", "layer_2"}
    np.testing.assert_array_equal(apart["layer_1"]["q"]["kernel"], params["layers"]["q"]["kernel"][1])
