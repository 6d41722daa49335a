"""Families on a mesh of 8 devices, against one device: training, prefill and decoding, with adapters too.

Other tests of meshes run Qwen2 and Qwen3, and the decoder of Llama has no part of its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import CONFIGS, random_adapters, random_params

from sgpo_jax import models, sharding
from sgpo_jax.models import lora
from sgpo_jax.models.lora import Lora

SIZES = dict(vocab_size=48, hidden_size=16, mlp_size=24)  # that every axis of the mesh divides
TOKENS = np.random.default_rng(0).integers(0, 48, (8, 10)).astype(np.int32)
ADAPTERS = Lora(2, 3.0, ".*", False)


def weights(config):
    params = jax.tree.map(lambda x: 0.3 * x, random_params(config))
    return params, random_adapters(config, ADAPTERS)


def train(config, params, adapters):
    """Returns the loss of packed rows with adapters, and its gradients."""
    segments = np.where(np.arange(10) < 4, 1, 2) * (np.arange(10) < 9) * np.ones((8, 1), np.int32)
    positions = np.where(np.arange(10) < 4, np.arange(10), np.arange(10) - 4) * np.ones((8, 1), np.int32)

    def loss(params, adapters):
        attached = lora.attach(params, adapters, ADAPTERS.scale)
        hidden, _ = models.apply(attached, config, TOKENS, positions, segments, remat="full")
        return jnp.sin(hidden * (segments != 0)[..., None]).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, adapters)


def sample(config, params, split):
    """Returns the hidden states of a prefill of 4 tokens and of 5 decoded ones, `[8,9,D]`."""

    @jax.jit
    def run(params):
        inside = jnp.ones((8, 4), bool)
        cache = models.init_cache(config, 8, 12)
        positions = jnp.broadcast_to(jnp.arange(4), (8, 4))
        first, cache = models.apply(params, config, TOKENS[:, :4], positions, inside, cache)

        def step(cache, tokens):
            hidden, cache = models.decode(params, config, tokens, jnp.ones(8, bool), cache, split=split)
            return cache, hidden

        _, rest = jax.lax.scan(step, cache, TOKENS[:, 4:9].T)
        return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)

    return run(params)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family == "gemma3" else pytest.mark.slow)  # the most rules of its own
        for family in sorted(CONFIGS.keys() - {"qwen2", "qwen3", "llama"})
    ],
)
def test_eight_devices_compute_what_one_does(family):
    config = dataclasses.replace(CONFIGS[family], **SIZES)
    params, adapters = weights(config)
    loss, gradients = train(config, params, adapters)
    hidden = sample(config, params, ("tensor",))
    positions = np.broadcast_to(np.arange(9), (8, 9))
    trained, _ = models.apply(params, config, TOKENS[:, :9], positions, np.ones((8, 9), bool))
    np.testing.assert_allclose(hidden, trained, atol=2e-5)  # decoding is the training path

    mesh = sharding.make_mesh(2, 2, 2, jax.devices())
    placed, beside = (sharding.place(tree, sharding.tree_shardings(tree, mesh)) for tree in (params, adapters))
    with jax.set_mesh(mesh):
        split_loss, split_gradients = train(config, placed, beside)
        sampled = sample(config, placed, ("tensor", "fsdp", "data"))
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5, atol=1e-4)
    for got, wanted in zip(jax.tree.leaves(split_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max() + 1e-6)
    np.testing.assert_allclose(sampled, hidden, atol=2e-5)
