"""From hidden states to per-token log-probability, entropy and KL without ever holding `[N, V]`.

The positions are visited in chunks; the logits of a chunk live only inside its step, and the backward pass, written by
hand, makes them anew and turns them into gradients at once. Matrix products accumulate in float32.

Axis key: N token positions, D hidden, V vocabulary, S chunks, C positions of a chunk.
"""

from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from sgpo_jax import losses

CHUNK = 512  # positions per step: at V = 152k one float32 logits buffer is 311 MB

Direction = Literal["forward", "reverse"]


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
    (hidden, targets), join = _split((hidden, targets), chunk)
    logp, entropy = chunked_logprobs(hidden, head, targets, hidden.shape[0], temperature)
    return join(logp), join(entropy)


def token_kl(
    hidden_guided: jax.Array,
    hidden_unguided: jax.Array,
    head: jax.Array,
    *,
    direction: Direction = "forward",
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
    (guided, unguided), join = _split((hidden_guided, hidden_unguided), chunk)
    return join(chunked_kl(guided, unguided, head, guided.shape[0], direction))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunks: jax.Array | int, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs` of positions that come in chunks, of which only the first `chunks` are visited.

    Args:
      hidden: `[S,C,D]`.
      head: `[D,V]`.
      targets: `[S,C]`.
      chunks: how many of the S chunks are in use; may be traced. The others cost nothing and give 0.
      temperature: divides the logits.

    Returns:
      (log-probability `[S,C]`, entropy `[S,C]`), float32, nats.
    """
    return _logprobs_forward(hidden, head, targets, chunks, temperature)[0]


def _logprobs_forward(hidden, head, targets, chunks, temperature):
    def step(s, out):
        log_probs = _log_softmax(hidden[s], head, temperature)
        logp = jnp.take_along_axis(log_probs, targets[s][:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return tuple(x.at[s].set(new) for x, new in zip(out, (logp, entropy), strict=True))

    zeros = jnp.zeros(targets.shape, jnp.float32)
    with jax.named_scope("chunks"):
        logp, entropy = jax.lax.fori_loop(0, chunks, step, (zeros, zeros))
    return (logp, entropy), (hidden, head, targets, chunks, entropy)


def _logprobs_backward(temperature, saved, cotangents):
    hidden, head, targets, chunks, entropy = saved
    by_logp, by_entropy = cotangents

    def logits_gradient(s):
        log_probs = _log_softmax(hidden[s], head, temperature)
        # d logp / d z_k = [k is the target] - p_k, d entropy / d z_k = -p_k (log p_k + entropy)
        common = by_logp[s][:, None] + by_entropy[s][:, None] * (log_probs + entropy[s][:, None])
        is_target = jnp.arange(head.shape[1]) == targets[s][:, None]
        return (jnp.where(is_target, by_logp[s][:, None], 0.0) - jnp.exp(log_probs) * common) / temperature

    return *_through_head(logits_gradient, hidden, head, chunks), None, None


chunked_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_kl(
    guided: jax.Array, unguided: jax.Array, head: jax.Array, chunks: jax.Array | int, direction: Direction = "forward"
) -> jax.Array:
    """`token_kl` of positions in chunks `[S,C,D]` -> `[S,C]`; the others than the first `chunks` give 0."""
    return _kl_forward(guided, unguided, head, chunks, direction)[0]


def _kl_forward(guided, unguided, head, chunks, direction):
    def step(s, out):
        log_p, log_q = _log_softmax(guided[s], head), _log_softmax(unguided[s], head)
        kl = losses.kl_divergence(log_p, log_q) if direction == "forward" else losses.kl_divergence(log_q, log_p)
        return out.at[s].set(kl)

    with jax.named_scope("chunks"):
        kl = jax.lax.fori_loop(0, chunks, step, jnp.zeros(guided.shape[:2], jnp.float32))
    return kl, (guided, unguided, head, chunks, kl)


def _kl_backward(direction, saved, cotangent):
    guided, unguided, head, chunks, kl = saved

    def logits_gradient(s):
        log_p, log_q = _log_softmax(guided[s], head), _log_softmax(unguided[s], head)
        if direction == "forward":
            gradient = jnp.exp(log_q) - jnp.exp(log_p)
        else:
            gradient = jnp.exp(log_q) * (log_q - log_p - kl[s][:, None])
        return cotangent[s][:, None] * gradient

    return jnp.zeros_like(guided), *_through_head(logits_gradient, unguided, head, chunks), None


chunked_kl.defvjp(_kl_forward, _kl_backward)


def _through_head(logits_gradient, hidden, head, chunks):
    """Gradients of `hidden` `[S,C,D]` and `head` `[D,V]` from those of the logits, `logits_gradient(s)` `[C,V]`."""

    def step(s, gradients):
        of_hidden, of_head = gradients
        of_logits = logits_gradient(s).astype(hidden.dtype)
        weights = head.astype(hidden.dtype)
        into_hidden = jnp.dot(of_logits, weights.T, preferred_element_type=jnp.float32)
        into_head = jnp.dot(hidden[s].T, of_logits, preferred_element_type=jnp.float32)
        return of_hidden.at[s].set(into_hidden.astype(hidden.dtype)), of_head + into_head

    zeros = jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)
    with jax.named_scope("chunks"):
        of_hidden, of_head = jax.lax.fori_loop(0, chunks, step, zeros)
    return of_hidden, of_head.astype(head.dtype)


def _log_softmax(hidden: jax.Array, head: jax.Array, temperature: float = 1.0) -> jax.Array:
    """`[C,D]`, `[D,V]` -> `[C,V]` float32."""
    logits = jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits / temperature, axis=-1)


def _split(rows: Any, chunk: int) -> tuple[Any, Any]:
    """(rows `[N,...]` as chunks `[S,C,...]`, function that joins `[S,C]` to `[N]`)."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1")
    count = jax.tree.leaves(rows)[0].shape[0]
    steps = max(-(-count // chunk), 1)
    size = -(-count // steps)

    def split(x):
        x = jnp.pad(x, [(0, steps * size - count)] + [(0, 0)] * (x.ndim - 1))
        # Strided, so that an N sharded over devices stays spread over them within every chunk.
        return jnp.swapaxes(x.reshape(size, steps, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, rows), lambda x: jnp.swapaxes(x, 0, 1).reshape(steps * size)[:count]
