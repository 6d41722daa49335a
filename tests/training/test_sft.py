"""The warm-up's loss and gradient against a dense computation, one response at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sgpo_jax import models, sharding
from sgpo_jax.training import sft
from sgpo_jax.training.forward import Forward
from sgpo_jax.training.state import init_state

LENGTHS = {"a": (3, 5), "b": (1, 2), "c": (6, 1), "d": (2, 7), "e": (4, 4)}  # of prompt and response


@pytest.fixture(scope="module")
def encoded():
    rng = np.random.default_rng(0)
    return {id: tuple(rng.integers(0, 64, n).tolist() for n in lengths) for id, lengths in LENGTHS.items()}


@pytest.fixture(scope="module")
def dense(tiny, encoded):
    """Summed negative log-likelihood of the responses of `ids`, from one padded batch."""
    tokens = np.zeros((len(LENGTHS), 10), np.int32)
    answers = np.zeros(tokens.shape, bool)
    for row, (prompt, response) in enumerate(encoded.values()):
        tokens[row, : len(prompt) + len(response)] = prompt + response
        answers[row, len(prompt) : len(prompt) + len(response)] = True

    @jax.jit
    def loss(params, wanted):
        mask = jnp.ones(tokens.shape, bool)
        hidden, _ = models.apply(params, tiny, tokens, models.positions_of(mask), mask)
        log_probs = jax.nn.log_softmax(hidden[:, :-1] @ models.head(params, tiny))
        logp = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(logp * answers[:, 1:] * wanted[:, None])

    return lambda params, ids: loss(params, jnp.array([id in ids for id in LENGTHS], jnp.float32))


def rows(ids):
    return [{"id": id} for id in ids]


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_the_update_is_the_gradient_of_the_mean_over_response_tokens(tiny, tiny_params, encoded, dense, micro_batch):
    tx = optax.sgd(1.0)
    batch = sft.encode_batch(rows("abcde"), encoded, batch=5, micro_batch=micro_batch)
    state, metrics = sft.make_update(Forward(tiny), tx)(init_state(jax.tree.map(jnp.copy, tiny_params), tx), batch)
    count = sum(response for _, response in LENGTHS.values())
    loss, gradient = jax.value_and_grad(lambda params: dense(params, "abcde") / count)(tiny_params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics["tokens"] == count and state.step == 1
    actual = jax.tree.map(jnp.subtract, tiny_params, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, gradient)


@pytest.mark.parametrize("batch", [2, 5])
def test_the_validation_loss_is_the_mean_over_response_tokens(tiny, tiny_params, encoded, dense, batch):
    def encode(part):
        return sft.encode_batch(part, encoded, batch=batch, micro_batch=2)

    loss_of = sft.make_losses(Forward(tiny))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    actual = sft.validation_loss(loss_of, tiny_params, rows("abcde"), encode, batch, mesh)
    count = sum(response for _, response in LENGTHS.values())
    np.testing.assert_allclose(actual, dense(tiny_params, "abcde") / count, rtol=1e-5)


def test_two_responses_share_a_row(encoded):
    """9 and 3 tokens fit into 13; 8, 8 and 7 have a row each."""
    packed, _ = sft.encode_batch(rows("abcde"), encoded, batch=5, micro_batch=1)
    assert packed.contexts[0].tokens.shape == (5, 1, 13) and packed.count == 4
