"""From hidden states to per-token log-probability, entropy and KL without ever holding `[N, V]`.

The N positions are visited in chunks; each chunk's logits live only inside its step and are recomputed in the backward
pass. Axis key: N token positions, D hidden, V vocabulary, C chunk. Matrix products accumulate in float32.
"""

from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from sgpo_jax import losses

CHUNK = 512  # positions per step: at V = 152k one float32 logits buffer is 311 MB


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token and entropy of its distribution, `softmax(hidden @ head / temperature)`.

    Args:
      hidden: `[N,D]` final hidden states, each predicting the token beside it in `targets`.
      head: `[D,V]` output projection.
      targets: `[N]` token ids in [0, V).
      temperature: divides the logits; must be positive.
      chunk: positions per step; the memory is O(chunk * V).

    Returns:
      (log-probability `[N]`, entropy `[N]`), float32, nats; differentiable in `hidden` and `head`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    chex.assert_rank([hidden, head, targets], [2, 2, 1])
    chex.assert_equal_shape_prefix([hidden, targets], 1)

    def step(rows, head):
        hidden, targets = rows
        log_probs = _log_softmax(hidden, head, temperature)
        logp = jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
        return logp, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    return _in_chunks(step, (hidden, targets), head, chunk)


def token_kl(
    hidden_guided: jax.Array,
    hidden_unguided: jax.Array,
    head: jax.Array,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    chunk: int = CHUNK,
) -> jax.Array:
    """Exact full-vocabulary KL between the guided and the unguided next-token distribution. Eq. 2, 3.

    forward: `KL(sg[guided] || unguided)`; reverse: `KL(unguided || sg[guided])`.

    Args:
      hidden_guided: `[N,D]` hidden states of the response tokens in the guided context.
      hidden_unguided: `[N,D]` of the same tokens in the unguided context.
      head: `[D,V]` output projection, shared by both sides.
      direction: which distribution the expectation is under.
      chunk: positions per step; the memory is O(chunk * V).

    Returns:
      `[N]` float32, nats. The gradient reaches `hidden_unguided`, and `head` through the unguided side only.
    """
    chex.assert_rank([hidden_guided, hidden_unguided, head], 2)
    chex.assert_equal_shape([hidden_guided, hidden_unguided])
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction={direction!r}: must be 'forward' or 'reverse'")

    def step(rows, head):
        guided = _log_softmax(rows[0], jax.lax.stop_gradient(head))
        unguided = _log_softmax(rows[1], head)
        if direction == "forward":
            return losses.kl_divergence(guided, unguided)
        return losses.kl_divergence(unguided, guided)

    return _in_chunks(step, (jax.lax.stop_gradient(hidden_guided), hidden_unguided), head, chunk)


def _log_softmax(hidden: jax.Array, head: jax.Array, temperature: float = 1.0) -> jax.Array:
    """`[C,D]`, `[D,V]` -> `[C,V]` float32."""
    logits = jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits / temperature, axis=-1)


def _in_chunks(step: Callable, rows: Any, head: jax.Array, chunk: int) -> Any:
    """Maps `step(rows, head)` over chunks of the leading axis N of `rows`, recomputing each in the backward pass."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1")
    count = jax.tree.leaves(rows)[0].shape[0]
    steps = max(-(-count // chunk), 1)
    size = -(-count // steps)

    def split(x):
        x = jnp.pad(x, [(0, steps * size - count)] + [(0, 0)] * (x.ndim - 1))
        # Strided, so that an N sharded over devices stays spread over them within every chunk.
        return jnp.swapaxes(x.reshape(size, steps, *x.shape[1:]), 0, 1)

    def join(x):
        return jnp.swapaxes(x, 0, 1).reshape(steps * size)[:count]

    step = jax.checkpoint(step, prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(lambda x: step(x, head), jax.tree.map(split, rows)))
