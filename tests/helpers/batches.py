"""A small model, and batches of random rollouts for it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sgpo_jax import models
from sgpo_jax.training.batch import Batch, Contexts, Group

CONFIG = models.ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=31, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=6, mlp_size=24, rope_theta=1e4, norm_eps=1e-6, qkv_bias=True, tie_embeddings=False, max_positions=64,
)  # fmt: skip
B, G1, G2, P, PG, T = 4, 4, 3, 5, 9, 7


@partial(jax.jit, static_argnames="config")
def make_params(seed=0, config=CONFIG):
    params = models.init(jax.random.key(seed), config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def make_batch(seed=0, all_wrong=(2,)):
    """Random rollouts; the guided group of the problems in `all_wrong` has no correct response."""
    rng = np.random.default_rng(seed)

    def prompts(length):
        return Contexts([tokens[2:] for tokens in rng.integers(0, 31, (B, length)).astype(np.int32)], length)

    def group(size):
        rewards = (rng.random((B, size)) < 0.7).astype(np.float32)
        return Group(
            jnp.asarray(rng.integers(0, 31, (B, size, T)), jnp.int32),
            jnp.asarray(rng.choice([3, T], (B, size)), jnp.int32),  # few lengths: the reference compiles for each
            jnp.asarray(rng.normal(-3, 1, (B, size, T)), jnp.float32),
            jnp.asarray(rewards),
        )

    guided = group(G2)
    guided = guided._replace(rewards=guided.rewards.at[jnp.asarray(all_wrong, jnp.int32)].set(0.0))
    return Batch(prompts(P), prompts(PG), group(G1), guided)


def log_probs(params, prompts, b, tokens, length):
    """Computes `[length,V]` next-token log-probabilities of one response, without any padding."""
    return _log_probs(params, np.asarray(prompts.tokens[b]), tokens[:length])


@jax.jit
def _log_probs(params, prompt, response):
    sequence = jnp.concatenate([prompt, response])[None]
    positions = jnp.arange(sequence.shape[1])[None]
    hidden, _ = models.apply(params, CONFIG, sequence, positions, jnp.ones_like(sequence, bool))
    return jax.nn.log_softmax(hidden[0, len(prompt) - 1 : -1] @ models.head(params, CONFIG))


def assert_trees_close(a, b, tolerance):
    jax.tree_util.tree_map_with_path(
        lambda path, x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance, err_msg=str(path)), a, b
    )
