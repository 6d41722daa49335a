"""From hidden states to per-token log-probability, entropy and KL without ever holding `[N, V]`.

The positions are visited in chunks; the logits of a chunk live only inside its step, and the backward pass, written by
hand, makes them anew and turns them into gradients at once. Matrix products accumulate in float32.

On a mesh every device visits its part of each chunk's positions with its part of the vocabulary: the head is gathered
once for all chunks, and its gradient is summed over devices once, after the last.

Axis key: N token positions, D hidden, V vocabulary, S chunks, C positions of a chunk; a device's, inside `_on_devices`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sgpo_jax import losses
from sgpo_jax.sharding import BATCH, fitting

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
    def local(hidden, head, targets, chunks):
        def step(s, out):
            log_probs = _log_softmax(hidden[s], head, temperature)
            place = _place_in(head, targets[s])[:, None]
            logp = jnp.take_along_axis(log_probs, jnp.clip(place, 0, head.shape[1] - 1), axis=-1)
            logp = jnp.where((place >= 0) & (place < head.shape[1]), logp, 0.0)[:, 0]
            entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
            return tuple(x.at[s].set(_over_vocabulary(new)) for x, new in zip(out, (logp, entropy), strict=True))

        zeros = jnp.zeros(targets.shape, jnp.float32)
        with jax.named_scope("chunks"):
            return jax.lax.fori_loop(0, chunks, step, (zeros, zeros))

    logp, entropy = _on_devices(local, (hidden, head, targets, chunks), "hvn.", "nn")
    return (logp, entropy), (hidden, head, targets, chunks, entropy)


def _logprobs_backward(temperature, saved, cotangents):
    hidden, head, targets, chunks, entropy = saved

    def local(hidden, head, targets, chunks, entropy, by_logp, by_entropy):
        def logits_gradient(s):
            log_probs = _log_softmax(hidden[s], head, temperature)
            # d logp / d z_k = [k is the target] - p_k, d entropy / d z_k = -p_k (log p_k + entropy)
            common = by_logp[s][:, None] + by_entropy[s][:, None] * (log_probs + entropy[s][:, None])
            is_target = jnp.arange(head.shape[1]) == _place_in(head, targets[s])[:, None]
            return (jnp.where(is_target, by_logp[s][:, None], 0.0) - jnp.exp(log_probs) * common) / temperature

        return _through_head(logits_gradient, hidden, head, chunks)

    arguments = hidden, head, targets, chunks, entropy, *cotangents
    of_hidden, of_head = _on_devices(local, arguments, "hvn.nnn", "hg")
    return of_hidden, of_head.astype(head.dtype), None, None


chunked_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_kl(
    guided: jax.Array, unguided: jax.Array, head: jax.Array, chunks: jax.Array | int, direction: Direction = "forward"
) -> jax.Array:
    """`token_kl` of positions in chunks `[S,C,D]` -> `[S,C]`; the others than the first `chunks` give 0."""
    return _kl_forward(guided, unguided, head, chunks, direction)[0]


def _kl_forward(guided, unguided, head, chunks, direction):
    def local(guided, unguided, head, chunks):
        def step(s, out):
            log_p, log_q = _log_softmax(guided[s], head), _log_softmax(unguided[s], head)
            kl = losses.kl_divergence(log_p, log_q) if direction == "forward" else losses.kl_divergence(log_q, log_p)
            return out.at[s].set(_over_vocabulary(kl))

        with jax.named_scope("chunks"):
            return jax.lax.fori_loop(0, chunks, step, jnp.zeros(guided.shape[:2], jnp.float32))

    kl = _on_devices(local, (guided, unguided, head, chunks), "hhv.", "n")
    return kl, (guided, unguided, head, chunks, kl)


def _kl_backward(direction, saved, cotangent):
    guided, unguided, head, chunks, kl = saved

    def local(guided, unguided, head, chunks, kl, cotangent):
        def logits_gradient(s):
            log_p, log_q = _log_softmax(guided[s], head), _log_softmax(unguided[s], head)
            if direction == "forward":
                gradient = jnp.exp(log_q) - jnp.exp(log_p)
            else:
                gradient = jnp.exp(log_q) * (log_q - log_p - kl[s][:, None])
            return cotangent[s][:, None] * gradient

        return _through_head(logits_gradient, unguided, head, chunks)

    of_unguided, of_head = _on_devices(local, (guided, unguided, head, chunks, kl, cotangent), "hhv.nn", "hg")
    return jnp.zeros_like(guided), of_unguided, of_head.astype(head.dtype), None


chunked_kl.defvjp(_kl_forward, _kl_backward)


def _through_head(logits_gradient, hidden, head, chunks):
    """Gradients of `hidden` `[S,C,D]` and `head` `[D,V]` from those of the logits, `logits_gradient(s)` `[C,V]`."""

    def step(s, gradients):
        of_hidden, of_head = gradients
        of_logits = logits_gradient(s).astype(hidden.dtype)
        into_hidden = _over_vocabulary(jnp.dot(of_logits, head.T, preferred_element_type=jnp.float32))
        into_head = jnp.dot(hidden[s].T, of_logits, preferred_element_type=jnp.float32)
        return of_hidden.at[s].set(into_hidden.astype(hidden.dtype)), of_head + into_head

    zeros = jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)
    with jax.named_scope("chunks"):
        of_hidden, of_head = jax.lax.fori_loop(0, chunks, step, zeros)
    return of_hidden, _over_positions(of_head)


def _log_softmax(hidden: jax.Array, head: jax.Array, temperature: float = 1.0) -> jax.Array:
    """`[C,D]`, `[D,V]` -> `[C,V]` float32, normalised over the vocabulary of all devices."""
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32) / temperature
    largest = logits.max(axis=-1, keepdims=True)
    largest = jax.lax.pmax(largest, "tensor") if _on_a_device() else largest
    shifted = logits - largest
    return shifted - jnp.log(_over_vocabulary(jnp.exp(shifted).sum(axis=-1, keepdims=True)))


def _place_in(head: jax.Array, targets: jax.Array) -> jax.Array:
    """`[C]` token ids -> where they stand in this device's part of the vocabulary; others lie outside of [0, V)."""
    return targets - (jax.lax.axis_index("tensor") * head.shape[1] if _on_a_device() else 0)


def _over_vocabulary(x: jax.Array) -> jax.Array:
    """Sum over the devices that share positions."""
    return jax.lax.psum(x, "tensor") if _on_a_device() else x


def _over_positions(of_head: jax.Array) -> jax.Array:
    """Sum over the devices that share a part of the vocabulary, of which each keeps the rows that are its own."""
    if not _on_a_device():
        return of_head
    return jax.lax.psum_scatter(jax.lax.psum(of_head, "data"), "fsdp", scatter_dimension=0, tiled=True)


def _on_a_device() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


_PARTS = {"h": P(None, BATCH, None), "n": P(None, BATCH), "v": P(None, "tensor"), "g": P("fsdp", "tensor"), ".": P()}


def _on_devices(local: Callable, arguments: Sequence[Any], inputs: str, outputs: str) -> Any:
    """`local(*arguments)` with each device's part of positions and vocabulary; with all where there is no such part.

    `inputs` and `outputs` have a letter for each array: h hidden states `[S,C,D]`, n numbers `[S,C]`, v the head
    `[D,V]`, which is cast to the type of the hidden states, g its gradient, . a scalar.
    """
    dtype = arguments[0].dtype
    arguments = [jnp.asarray(x, dtype if kind == "v" else None) for x, kind in zip(arguments, inputs, strict=True)]
    head = arguments[inputs.index("v")]
    shapes = zip([*map(jnp.shape, arguments), head.shape], inputs + "g", strict=True)
    if any(fitting(shape, tuple(_PARTS[kind])) != tuple(_PARTS[kind]) for shape, kind in shapes):
        return local(*arguments)
    in_specs, parts = (tuple(_PARTS[kind] for kind in kinds) for kinds in (inputs, outputs))
    out_specs = parts if len(parts) > 1 else parts[0]
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)


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
