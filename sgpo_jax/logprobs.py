"""Per-token log-probability, entropy and KL from hidden states, without ever holding `[N,V]`.

Positions are processed in chunks, and the logits of a chunk live only inside its step. The hand-written backward pass
computes them again and turns them into gradients at once. For a loss that is a sum over tokens (`logprobs_loss`,
`kl_loss`), the gradient is computed in the forward pass, from the same logits. Matrix products accumulate in float32.

On a mesh, every device processes its part of each chunk's positions with its part of the vocabulary. The head is
gathered once for all chunks, and its gradient is summed over devices once, after the last chunk. On one device, the
head of a tied model is read directly from the embedding.

Axis key: N token positions, D hidden, V vocabulary, S chunks, C positions of a chunk. In the functions that run inside
`_on_devices`, these are a device's part.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sgpo_jax import divergences, output_head
from sgpo_jax.output_head import Head
from sgpo_jax.sharding import BATCH, SHARDS, fit_spec, platform, row_ways

# Positions per step on a device. An accelerator needs many to be kept busy (at V = 152k one float32 logits buffer is
# 311 MB); a CPU is as fast with few.
CHUNK, CPU_CHUNK = 512, 128

Direction = Literal["forward", "reverse"]
Heads = jax.Array | tuple[jax.Array, jax.Array]  # of both sides; or (unguided, guided): see `kl_loss`
TokenLoss = Callable[..., jax.Array]  # (float32 values `[C]` ..., a chunk of `data`) -> loss `[C]`


def default_chunk(mesh: Mesh | None = None) -> int:
    """Returns the default number of positions per step, over all devices of a mesh, or on one device without a mesh."""
    kind = platform() if mesh is None else mesh.devices.flat[0].platform
    return (CPU_CHUNK if kind == "cpu" else CHUNK) * (1 if mesh is None else row_ways(mesh))


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes each target's log-probability and the entropy under `softmax(hidden @ head / temperature)`.

    Args:
      hidden: `[N,D]` final hidden states; each predicts the token at the same index of `targets`.
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
    """Computes the exact full-vocabulary KL between the guided and the unguided next-token distribution. Eq. 2, 3.

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
    """Computes any of `divergences.DIVERGENCES` between the guided and the unguided next-token distribution.

    Args:
      hidden_guided, hidden_unguided, head, chunk: see `token_kl`.
      divergence, beta, k: see `divergences.select`.

    Returns:
      `[N]` float32, nats; with gradients as in `token_kl`.
    """
    chex.assert_rank([hidden_guided, hidden_unguided, head], 2)
    chex.assert_equal_shape([hidden_guided, hidden_unguided])
    (guided, unguided), join = _split((hidden_guided, hidden_unguided), chunk)
    selected = divergences.select(divergence, beta, k)
    return join(chunked_kl(guided, unguided, head, guided.shape[0], selected))


def chunked_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunks: jax.Array | int, temperature: float = 1.0,
    tied: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes `token_logprobs` of positions that are already in chunks; only the first `chunks` are processed.

    Args:
      hidden: `[S,C,D]` hidden states.
      head: `[D,V]` output projection, or `[V,D]` if tied.
      targets: `[S,C]` token ids.
      chunks: number of the S chunks that are in use; may be traced. The others cost nothing and give 0.
      temperature: divides the logits.
      tied: the head is the embedding, `[V,D]`. On one device no transposed copy of it is made.

    Returns:
      (log-probability `[S,C]`, entropy `[S,C]`), float32, nats.
    """
    return _measure_chunks(partial(_logprobs, temperature=temperature), tied, (hidden, targets), _pair(head), chunks)


def chunked_kl(
    guided: jax.Array, unguided: jax.Array, head: Heads, chunks: jax.Array | int,
    divergence: divergences.Divergence = divergences.forward_kl, tied: bool = False,
) -> jax.Array:
    """Computes `token_divergence` of positions that are already in chunks; only the first `chunks` are processed.

    Args:
      guided, unguided, head: see `kl_loss`.
      chunks, tied: see `chunked_logprobs`.
      divergence: see `divergences.select`.

    Returns:
      `[S,C]` float32, nats; 0 after the first `chunks`.
    """
    return _measure_chunks(partial(_kl, divergence=divergence), tied, (unguided, guided), _pair(head), chunks)[0]


def logprobs_loss(
    token_loss: TokenLoss, hidden: jax.Array, head: jax.Array, targets: jax.Array, chunks: jax.Array | int, data: Any,
    tied: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
    """Sums `token_loss(logp, entropy, data)` over tokens; the gradient is computed in the forward pass.

    This takes three products with the head. With `chunked_logprobs`, which computes the logits twice, it takes four.

    Args:
      token_loss: elementwise function of float32 `[C]` values and a chunk of `data`; it reads no other arrays.
      hidden, head, targets, chunks, tied: see `chunked_logprobs`.
      data: tree of `[S,C]` arrays that the loss reads; no gradient flows into it.

    Returns:
      (loss `[]`, (log-probability, entropy) `[S,C]`, nats, constants to a gradient).
    """
    return _loss(_logprobs, token_loss, tied, (hidden, targets), _pair(head), chunks, data)


def kl_loss(
    token_loss: TokenLoss, guided: jax.Array, unguided: jax.Array, head: Heads, chunks: jax.Array | int, data: Any,
    divergence: divergences.Divergence = divergences.forward_kl, tied: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Sums `token_loss(kl, data)` over tokens, as `logprobs_loss` does: four products with the head, not six.

    Args:
      token_loss, chunks, data, tied: see `logprobs_loss`.
      guided, unguided: `[S,C,D]` hidden states; no gradient reaches the guided side.
      head: of both sides, as in `logprobs_loss`; or (unguided, guided) where the guided side has weights of its own.
        These may be `[E,V]` (`[V,E]` if tied), and its hidden states `[S,C,E]`.
      divergence: see `divergences.select`.

    Returns:
      (loss `[]`, KL `[S,C]`, nats, a constant to a gradient).
    """
    measure = partial(_kl, divergence=divergence)
    loss, (kl,) = _loss(measure, token_loss, tied, (unguided, guided), _pair(head), chunks, data)
    return loss, kl


def _pair(head: Heads) -> tuple[jax.Array, ...]:
    """Returns one head, or the two of an unguided and a guided side, as a tuple; the gradient is that of the first."""
    return head if isinstance(head, tuple) else (head,)


def _logprobs(heads, hidden, targets, temperature=1.0):
    """Returns (log-probability, entropy) `[C]`, and a function that turns their gradients into `d_logits` `[C,V]`."""
    head = heads[0]
    log_probs = output_head.log_softmax(hidden, head, temperature)
    column = output_head.local_index(head, targets)[:, None]
    logp = jnp.take_along_axis(log_probs, jnp.clip(column, 0, head.vocabulary - 1), axis=-1)
    logp = jnp.where((column >= 0) & (column < head.vocabulary), logp, 0.0)[:, 0]
    entropy = output_head.sum_over_vocabulary(-jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))

    def backward(d_logp, d_entropy):
        # d logp / d z_k = [k is the target] - p_k, d entropy / d z_k = -p_k (log p_k + entropy)
        common = d_logp[:, None] + d_entropy[:, None] * (log_probs + entropy[:, None])
        is_target = jnp.arange(head.vocabulary) == column
        return (jnp.where(is_target, d_logp[:, None], 0.0) - jnp.exp(log_probs) * common) / temperature

    return (output_head.sum_over_vocabulary(logp), entropy), backward


def _kl(heads, unguided, guided, divergence):
    """Like `_logprobs`, but returns the KL `[C]`; no gradient reaches the guided side."""
    axis = "tensor" if output_head.inside_shard_map() else None
    log_guided, log_unguided = output_head.log_softmax(guided, heads[-1]), output_head.log_softmax(unguided, heads[0])
    kl, gradient = divergence(log_guided, log_unguided, axis)
    return (kl,), lambda d_kl: d_kl[:, None] * gradient


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _measure_chunks(measure, tied, inputs, heads, chunks):
    """Returns the values `[S,C]` of `measure` for each chunk in use.

    `measure` is `_logprobs` or `_kl`. The first of `inputs` is the hidden states that get a gradient.
    """
    return _measure_chunks_forward(measure, tied, inputs, heads, chunks)[0]


def _measure_chunks_forward(measure, tied, inputs, heads, chunks):
    def local(inputs, heads, chunks):
        def step(s, outputs):
            values, _ = measure(heads, *_chunk(inputs, s))
            return _store(outputs, s, values)

        return _for_each_chunk(step, chunks, _zero_values(measure, inputs, heads))

    outputs = ("n",) * len(_zero_values(measure, inputs, [Head(head, tied) for head in heads]))
    return _on_devices(local, inputs, heads, tied, chunks, outputs=outputs), (inputs, heads, chunks)


def _measure_chunks_backward(measure, tied, saved, cotangents):
    inputs, heads, chunks = saved

    def local(arrays, heads, chunks):
        inputs, cotangents = arrays

        def step(s, gradients):
            _, backward = measure(heads, *_chunk(inputs, s))
            return output_head.add_gradients(backward(*_chunk(cotangents, s)), inputs[0], heads[0], s, gradients)

        d_hidden, d_head = _for_each_chunk(step, chunks, output_head.zero_gradients(inputs[0], heads[0]))
        return d_hidden, output_head.sum_over_positions(d_head)

    d_hidden, d_head = _on_devices(local, (inputs, cotangents), heads, tied, chunks, outputs=("h", "g"))
    d_head = (d_head.T if tied else d_head).astype(heads[0].dtype)
    return (d_hidden, *(None for _ in inputs[1:])), (d_head, *(None for _ in heads[1:])), None


_measure_chunks.defvjp(_measure_chunks_forward, _measure_chunks_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(measure, token_loss, tied, inputs, heads, chunks, data):
    """Returns (sum of `token_loss` over the values of `measure`, these values `[S,C]`)."""
    return _loss_and_gradients(measure, token_loss, tied, inputs, heads, chunks, data, trained=False)[0]


def _loss_forward(measure, token_loss, tied, *arguments):
    trained = arguments[1][0].perturbed  # not where the head is frozen: then a third of the products is left out
    values = jax.tree.map(lambda x: x.value, arguments)
    return _loss_and_gradients(measure, token_loss, tied, *values, trained=trained)


def _loss_and_gradients(measure, token_loss, tied, inputs, heads, chunks, data, trained):
    def local(arrays, heads, chunks):
        inputs, data = arrays

        def step(s, carry):
            outputs, total, *gradients = carry
            values, backward = measure(heads, *_chunk(inputs, s))
            loss, pull = jax.vjp(lambda *values: token_loss(*values, _chunk(data, s)), *values)
            d_logits = backward(*pull(jnp.ones_like(loss)))
            gradients = output_head.add_gradients(d_logits, inputs[0], heads[0], s, gradients)
            return _store(outputs, s, values), total.at[s].set(loss), *gradients

        outputs = _zero_values(measure, inputs, heads)
        start = outputs, jnp.zeros_like(outputs[0]), *output_head.zero_gradients(inputs[0], heads[0], trained)
        outputs, total, d_hidden, d_head = _for_each_chunk(step, chunks, start)
        return outputs, total, d_hidden, output_head.sum_over_positions(d_head) if trained else None

    numbers = _zero_values(measure, inputs, [Head(head, tied) for head in heads])
    outputs = ("n",) * len(numbers), "n", "h", "g" if trained else None
    values, total, *gradients = _on_devices(local, (inputs, data), heads, tied, chunks, outputs=outputs)
    # Scalars tell the backward pass the number of heads, and the type of the first.
    return (total.sum(), values), (*gradients, [jnp.zeros((), head.dtype) for head in heads])


def _loss_backward(measure, token_loss, tied, saved, cotangents):
    d_hidden, d_head, (head_type, *others) = saved
    d_loss = 0.0 if isinstance(cotangents[0], SymbolicZero) else cotangents[0]
    d_hidden = (d_loss * d_hidden).astype(d_hidden.dtype)
    if d_head is not None:
        d_head = d_head.T if tied else d_head
        d_head = (d_loss * d_head).astype(head_type.dtype)
    return (d_hidden, None), (d_head, *(None for _ in others)), None, None


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _for_each_chunk(step: Callable, chunks: jax.Array | int, start: Any) -> Any:
    with jax.named_scope("chunks"):
        return jax.lax.fori_loop(0, chunks, step, start)


def _chunk(tree: Any, s: Any) -> Any:
    return jax.tree.map(lambda x: x[s], tree)


def _store(outputs: Sequence[jax.Array], s: Any, values: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Writes the values `[C]` of chunk s into the outputs `[S,C]`."""
    return tuple(x.at[s].set(value) for x, value in zip(outputs, values, strict=True))


def _zero_values(measure: Callable, inputs: Any, heads: Sequence[Head]) -> tuple[jax.Array, ...]:
    """Returns zeros `[S,C]` for each of the values that `measure` returns."""
    values = jax.eval_shape(lambda inputs: measure(heads, *inputs)[0], _chunk(inputs, 0))
    return tuple(jnp.zeros(inputs[0].shape[:2], jnp.float32) for _ in values)


_SPECS = {"h": P(None, BATCH, None), "n": P(None, BATCH), "v": P(None, "tensor"), "g": P(SHARDS, "tensor")}


def _on_devices(
    local: Callable, arrays: Any, heads: Sequence[jax.Array], tied: bool, chunks: jax.Array | int, outputs: Any
) -> Any:
    """Calls `local(arrays, heads, chunks)` on every device with its part of the positions and the vocabulary.

    On one device, or where the mesh does not divide the shapes, `local` is called once with whole arrays. `arrays` are
    hidden states `[S,C,D]` and numbers `[S,C]`; the heads are cast to the type of the first. `outputs` has a letter for
    each result: h hidden states, n numbers, g the gradient of the head `[D,V]`.
    """
    arrays = jax.tree.map(jnp.asarray, arrays)
    heads = [jnp.asarray(head, jax.tree.leaves(arrays)[0].dtype) for head in heads]
    parts = jax.tree.map(lambda x: _SPECS["h" if x.ndim == 3 else "n"], arrays)
    weights = [head.T if tied else head for head in heads]
    placed = [*zip(jax.tree.leaves(arrays), jax.tree.leaves(parts), strict=True), (weights[0], _SPECS["g"])]
    placed += [(weight, _SPECS["v"]) for weight in weights]
    one_device = jax.sharding.get_abstract_mesh().size == 1
    if one_device or any(fit_spec(x.shape, tuple(part)) != tuple(part) for x, part in placed):
        return local(arrays, [Head(head, tied) for head in heads], chunks)

    def on_device(arrays, weights, chunks):
        return local(arrays, [Head(weight, False) for weight in weights], chunks)

    in_specs, out_specs = (parts, [_SPECS["v"]] * len(weights), P()), jax.tree.map(_SPECS.get, outputs)
    return jax.shard_map(on_device, in_specs=in_specs, out_specs=out_specs, check_vma=False)(arrays, weights, chunks)


def _split(rows: Any, chunk: int | None) -> tuple[Any, Any]:
    """Returns (rows `[N,...]` as chunks `[S,C,...]`, a function that turns `[S,C]` back into `[N]`)."""
    chunk = default_chunk() if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1")
    count = jax.tree.leaves(rows)[0].shape[0]
    steps = max(-(-count // chunk), 1)
    size = -(-count // steps)

    def split(x):
        x = jnp.pad(x, [(0, steps * size - count)] + [(0, 0)] * (x.ndim - 1))
        # Strided, so that every chunk has rows of every device over which N is sharded.
        return jnp.swapaxes(x.reshape(size, steps, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, rows), lambda x: jnp.swapaxes(x, 0, 1).reshape(steps * size)[:count]
