"""From hidden states to per-token log-probability, entropy and KL without ever holding `[N, V]`.

The positions are visited in chunks, and the logits of a chunk live only inside its step. The backward pass, written by
hand, makes them anew and turns them into gradients at once. A loss that is a sum over tokens (`logprobs_loss`,
`kl_loss`) has its gradient made in the forward pass, from the same logits. Matrix products accumulate in float32.

On a mesh every device visits its part of each chunk's positions with its part of the vocabulary: the head is gathered
once for all chunks, and its gradient is summed over devices once, after the last. On one device the head of a tied
model is read where it stands, in the embedding.

Axis key: N token positions, D hidden, V vocabulary, S chunks, C positions of a chunk; a device's, inside `_on_devices`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sgpo_jax import divergences, output_head
from sgpo_jax.output_head import Head
from sgpo_jax.sharding import BATCH, fit_spec, platform, row_ways

# Positions per step on a device. An accelerator needs many to be kept busy (at V = 152k one float32 logits buffer is
# 311 MB); a CPU is as fast with few.
CHUNK, CPU_CHUNK = 512, 128
PARTS = 4  # in which a chunk adds to the head's gradient: at once, what it adds would be as large as that

Direction = Literal["forward", "reverse"]
TokenLoss = Callable[..., jax.Array]


def default_chunk(mesh: Mesh | None = None) -> int:
    """Positions whose logits are held at once where nothing else is said: over all devices of a mesh, or here."""
    kind = platform() if mesh is None else mesh.devices.flat[0].platform
    return (CPU_CHUNK if kind == "cpu" else CHUNK) * (1 if mesh is None else row_ways(mesh))


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token and entropy of its distribution, `softmax(hidden @ head / temperature)`.

    Args:
      hidden: `[N,D]` final hidden states, each predicting the token beside it in `targets`.
      head: `[D,V]` output projection.
      targets: `[N]` token ids in [0, V).
      temperature: divides the logits; must be positive.
      chunk: positions per step; the memory is O(chunk * V). None: `default_chunk`.

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
    chunk: int | None = None,
) -> jax.Array:
    """Exact full-vocabulary KL between the guided and the unguided next-token distribution. Eq. 2, 3.

    forward: `KL(sg[guided] || unguided)`; reverse: `KL(unguided || sg[guided])`.

    Args:
      hidden_guided: `[N,D]` hidden states of the response tokens in the guided context.
      hidden_unguided: `[N,D]` of the same tokens in the unguided context.
      head: `[D,V]` output projection, shared by both sides.
      direction: which distribution the expectation is under.
      chunk: positions per step; the memory is O(chunk * V). None: `default_chunk`.

    Returns:
      `[N]` float32, nats. The gradient reaches `hidden_unguided`, and `head` through the unguided side only.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction={direction!r}: must be 'forward' or 'reverse'")
    return token_divergence(hidden_guided, hidden_unguided, head, divergence=f"{direction}_kl", chunk=chunk)


def token_divergence(
    hidden_guided: jax.Array,
    hidden_unguided: jax.Array,
    head: jax.Array,
    *,
    divergence: str,
    beta: float = 0.5,
    k: int = 100,
    chunk: int | None = None,
) -> jax.Array:
    """`token_kl` for each of `divergences.DIVERGENCES`; `divergence`, `beta` and `k` as in `divergences.select`."""
    chex.assert_rank([hidden_guided, hidden_unguided, head], 2)
    chex.assert_equal_shape([hidden_guided, hidden_unguided])
    (guided, unguided), join = _split((hidden_guided, hidden_unguided), chunk)
    selected = divergences.select(divergence, beta, k)
    return join(chunked_kl(guided, unguided, head, guided.shape[0], selected))


def chunked_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunks: jax.Array | int, temperature: float = 1.0,
    tied: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`token_logprobs` of positions that come in chunks, of which only the first `chunks` are visited.

    Args:
      hidden: `[S,C,D]`.
      head: `[D,V]`.
      targets: `[S,C]`.
      chunks: how many of the S chunks are in use; may be traced. The others cost nothing and give 0.
      temperature: divides the logits.
      tied: the head is the embedding, `[V,D]`, of which no transposed copy is made on one device.

    Returns:
      (log-probability `[S,C]`, entropy `[S,C]`), float32, nats.
    """
    return _measured(partial(_logprobs, temperature=temperature), tied, (hidden, targets), head, chunks)


def chunked_kl(
    guided: jax.Array, unguided: jax.Array, head: jax.Array, chunks: jax.Array | int,
    divergence: divergences.Divergence = divergences.forward_kl,
) -> jax.Array:
    """Computes `token_divergence` of positions in chunks.

    Args:
      guided, unguided: `[S,C,D]` hidden states.
      head, chunks: see `chunked_logprobs`.
      divergence: see `divergences.select`.

    Returns:
      `[S,C]` float32, nats; 0 after the first `chunks`.
    """
    return _measured(partial(_kl, divergence=divergence), False, (unguided, guided), head, chunks)[0]


def logprobs_loss(
    token_loss: TokenLoss, hidden: jax.Array, head: jax.Array, targets: jax.Array, chunks: jax.Array | int, given: Any,
    tied: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
    """Sum over tokens of `token_loss(logp, entropy, given)`, with the gradient made in the forward pass.

    That takes three products with the head, where `chunked_logprobs`, which makes the logits again, takes four.

    Args:
      token_loss: elementwise, of float32 `[C]` and a chunk of `given`; it reads no other arrays.
      hidden, head, targets, chunks, tied: see `chunked_logprobs`.
      given: tree of `[S,C]`, what else the loss reads; there is no gradient of it.

    Returns:
      (loss `[]`, (log-probability, entropy) `[S,C]`, which are constants to a gradient).
    """
    return _loss(_logprobs, token_loss, tied, (hidden, targets), head, chunks, given)


def kl_loss(
    token_loss: TokenLoss,
    guided: jax.Array,
    unguided: jax.Array,
    head: jax.Array,
    chunks: jax.Array | int,
    data: Any,
    divergence: divergences.Divergence = divergences.forward_kl,
    tied: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Sums `token_loss(kl, data)` over tokens, like `logprobs_loss`; four products with the head in place of six.

    Args:
      token_loss, head, chunks, data, tied: see `logprobs_loss`.
      guided, unguided: `[S,C,D]` hidden states; no gradient reaches the guided side.
      divergence: see `divergences.select`.

    Returns:
      (loss `[]`, KL `[S,C]`, nats, a constant to a gradient).
    """
    measure = partial(_kl, divergence=divergence)
    loss, (kl,) = _loss(measure, token_loss, tied, (unguided, guided), head, chunks, data)
    return loss, kl


def _logprobs(head, hidden, targets, temperature=1.0):
    """(log-probability, entropy) `[C]`, and the function that makes `[C,V]`, the gradient of the logits, of theirs."""
    log_probs = output_head.log_softmax(hidden, head, temperature)
    place = output_head.place_in(head, targets)[:, None]
    logp = jnp.take_along_axis(log_probs, jnp.clip(place, 0, head.vocabulary - 1), axis=-1)
    logp = jnp.where((place >= 0) & (place < head.vocabulary), logp, 0.0)[:, 0]
    entropy = output_head.over_vocabulary(-jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))

    def backward(by_logp, by_entropy):
        # d logp / d z_k = [k is the target] - p_k, d entropy / d z_k = -p_k (log p_k + entropy)
        common = by_logp[:, None] + by_entropy[:, None] * (log_probs + entropy[:, None])
        is_target = jnp.arange(head.vocabulary) == place
        return (jnp.where(is_target, by_logp[:, None], 0.0) - jnp.exp(log_probs) * common) / temperature

    return (output_head.over_vocabulary(logp), entropy), backward


def _kl(head, unguided, guided, divergence):
    """The same of (KL `[C]`,), in which the guided side is a constant."""
    axis = "tensor" if output_head.on_a_device() else None
    kl, gradient = divergence(output_head.log_softmax(guided, head), output_head.log_softmax(unguided, head), axis)
    return (kl,), lambda by_kl: by_kl[:, None] * gradient


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _measured(measure, tied, inputs, head, chunks):
    """What `measure` finds `[S,C]` of `inputs`, of which the first are the hidden states that have a gradient."""
    return _measured_forward(measure, tied, inputs, head, chunks)[0]


def _measured_forward(measure, tied, inputs, head, chunks):
    def local(inputs, head, chunks):
        def step(s, found):
            values, _ = measure(head, *_at(inputs, s))
            return _set(found, s, values)

        return _visit(step, chunks, _values(measure, inputs, head))

    outputs = ("n",) * len(_values(measure, inputs, Head(head, tied)))
    return _on_devices(local, inputs, head, tied, chunks, outputs=outputs), (inputs, head, chunks)


def _measured_backward(measure, tied, saved, cotangents):
    inputs, head, chunks = saved

    def local(arrays, head, chunks):
        inputs, cotangents = arrays

        def step(s, gradients):
            _, backward = measure(head, *_at(inputs, s))
            return _through_head(backward(*_at(cotangents, s)), inputs[0], head, s, gradients)

        of_hidden, of_head = _visit(step, chunks, _no_gradients(inputs[0], head))
        return of_hidden, output_head.over_positions(of_head)

    of_hidden, of_head = _on_devices(local, (inputs, cotangents), head, tied, chunks, outputs=("h", "g"))
    of_head = (of_head.T if tied else of_head).astype(head.dtype)
    return (of_hidden, *(None for _ in inputs[1:])), of_head, None


_measured.defvjp(_measured_forward, _measured_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(measure, token_loss, tied, inputs, head, chunks, given):
    """(sum of `token_loss` over what `measure` finds, and that); the gradient is made in the forward pass."""
    return _loss_forward(measure, token_loss, tied, inputs, head, chunks, given)[0]


def _loss_forward(measure, token_loss, tied, inputs, head, chunks, given):
    def local(arrays, head, chunks):
        inputs, given = arrays

        def step(s, carry):
            found, total, *gradients = carry
            values, backward = measure(head, *_at(inputs, s))
            loss, pull = jax.vjp(lambda *values: token_loss(*values, _at(given, s)), *values)
            gradients = _through_head(backward(*pull(jnp.ones_like(loss))), inputs[0], head, s, gradients)
            return _set(found, s, values), total.at[s].set(loss), *gradients

        found = _values(measure, inputs, head)
        start = found, jnp.zeros_like(found[0]), *_no_gradients(inputs[0], head)
        found, total, of_hidden, of_head = _visit(step, chunks, start)
        return found, total, of_hidden, output_head.over_positions(of_head)

    outputs = ("n",) * len(_values(measure, inputs, Head(head, tied))), "n", "h", "g"
    found, total, *gradients = _on_devices(local, (inputs, given), head, tied, chunks, outputs=outputs)
    return (total.sum(), found), (*gradients, jnp.zeros((), head.dtype))


def _loss_backward(measure, token_loss, tied, saved, cotangents):
    of_hidden, of_head, of_type = saved
    of_head = of_head.T if tied else of_head
    by_loss, _ = cotangents
    of_hidden = (by_loss * of_hidden).astype(of_hidden.dtype)
    return (of_hidden, None), (by_loss * of_head).astype(of_type.dtype), None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _visit(step: Callable, chunks: jax.Array | int, start: Any) -> Any:
    with jax.named_scope("chunks"):
        return jax.lax.fori_loop(0, chunks, step, start)


def _at(tree: Any, s: Any) -> Any:
    return jax.tree.map(lambda x: x[s], tree)


def _set(found: Sequence[jax.Array], s: Any, values: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(x.at[s].set(value) for x, value in zip(found, values, strict=True))


def _values(measure: Callable, inputs: Any, head: Head) -> tuple[jax.Array, ...]:
    """Zeros `[S,C]` for each of the values that `measure` finds."""
    found = jax.eval_shape(lambda inputs: measure(head, *inputs)[0], _at(inputs, 0))
    return tuple(jnp.zeros(inputs[0].shape[:2], jnp.float32) for _ in found)


def _no_gradients(hidden: jax.Array, head: Head) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(hidden), jnp.zeros((hidden.shape[-1], head.vocabulary), jnp.float32)


def _through_head(of_logits, hidden, head, s, gradients):
    """`gradients` of `hidden` `[S,C,D]` and the head `[D,V]` with those of chunk s; those of its logits are `[C,V]`."""
    of_hidden, of_head = gradients
    of_logits = of_logits.astype(hidden.dtype)
    into_hidden = output_head.over_vocabulary(jnp.dot(of_logits, head.columns().T, preferred_element_type=jnp.float32))
    # Written out transposed: on CPU the product takes two thirds of the time, and no copy of the logits' gradient.
    transposed = jax.lax.optimization_barrier(hidden[s].T)
    parts = PARTS if len(of_head) % PARTS == 0 else 1
    size = len(of_head) // parts

    def add(i, of_head):
        rows = partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        grown = rows(of_head) + jnp.dot(rows(transposed), of_logits, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(of_head, grown, i * size, axis=0)

    return of_hidden.at[s].set(into_hidden.astype(hidden.dtype)), jax.lax.fori_loop(0, parts, add, of_head)


_SPECS = {"h": P(None, BATCH, None), "n": P(None, BATCH), "v": P(None, "tensor"), "g": P("fsdp", "tensor")}


def _on_devices(
    local: Callable, arrays: Any, head: jax.Array, tied: bool, chunks: jax.Array | int, outputs: Any
) -> Any:
    """`local(arrays, head, chunks)` with each device's part of positions and vocabulary; with all where that is none.

    `arrays` are hidden states `[S,C,D]` and numbers `[S,C]`; the head is cast to the type of the first.
    `outputs` has a letter for each result: h hidden states, n numbers, g the gradient of the head `[D,V]`.
    """
    arrays = jax.tree.map(jnp.asarray, arrays)
    head = jnp.asarray(head, jax.tree.leaves(arrays)[0].dtype)
    parts = jax.tree.map(lambda x: _SPECS["h" if x.ndim == 3 else "n"], arrays)
    across = head.T if tied else head
    placed = [*zip(jax.tree.leaves(arrays), jax.tree.leaves(parts), strict=True), *((across, _SPECS[x]) for x in "vg")]
    alone = jax.sharding.get_abstract_mesh().size == 1
    if alone or any(fit_spec(x.shape, tuple(part)) != tuple(part) for x, part in placed):
        return local(arrays, Head(head, tied), chunks)

    def on_a_device(arrays, head, chunks):
        return local(arrays, Head(head, False), chunks)

    in_specs, out_specs = (parts, _SPECS["v"], P()), jax.tree.map(_SPECS.get, outputs)
    return jax.shard_map(on_a_device, in_specs=in_specs, out_specs=out_specs, check_vma=False)(arrays, across, chunks)


def _split(rows: Any, chunk: int | None) -> tuple[Any, Any]:
    """(rows `[N,...]` as chunks `[S,C,...]`, function that joins `[S,C]` to `[N]`)."""
    chunk = default_chunk() if chunk is None else chunk
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
