"""Forward passes over packed micro-batches: log-probabilities and losses of the response tokens in them.

Axis key: K micro-batches, M rows of a micro-batch, S chunks of response tokens, J tokens of a row in a chunk,
C = M * J tokens of a chunk, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sgpo_jax import logprobs, models
from sgpo_jax.models import lora
from sgpo_jax.sharding import BATCH, constrain
from sgpo_jax.training.packing import Packed, Rows


@dataclass(frozen=True)
class Forward:
    """The decoder as training runs it."""

    config: models.ModelConfig
    dtype: Any = jnp.float32  # of activations and matrix products
    remat: str = "none"  # what the backward pass computes again: see `models.apply`
    scale: float = 1.0  # of adapters: see `lora.attach`; unused where all parameters are trained


def attached(forward: Forward, base: Any, params: Any) -> Any:
    """Returns the parameters that the decoder takes: `params`, or a frozen base with them as its adapters."""
    return params if base is None else lora.attach(base, params, forward.scale)


class Tokens(NamedTuple):
    """The response tokens of one micro-batch, in chunks. Positions without a token have share and weight 0.

    Stacked micro-batches have a leading axis K.
    """

    ids: jax.Array  # [S,C] int32
    share: jax.Array  # [S,C] float32, share of the token in the mean over sequences of their means over tokens
    weight: jax.Array  # [S,C] float32, factor of the token's loss in the sum that is minimised
    advantage: Any = None  # [S,C] float32; None for targets, as the two below
    old_logp: Any = None  # [S,C] float32, nats, before the first update; None: that of the current policy
    sampler_logp: Any = None  # [S,C] float32, nats, as the sampler computed it
    owner: Any = None  # [S,C] int32, response of the group, where its ratio is needed; -1 if there is no token
    log_ratio: Any = None  # [S,C] float32, nats, mean over the response's tokens of logp - old_logp
    kl_weight: Any = None  # [S,C] float32, factor of the KL to the reference
    reference_logp: Any = None  # [S,C] float32, nats, under the reference
    delta: Any = None  # [S,C] float32, nats, of a target's tokens; None: the objective's


class MicroBatch(NamedTuple):
    """Rows of packed sequences that are computed at once, and their response tokens."""

    rows: Rows
    chunks: jax.Array  # [] int32, chunks in use
    tokens: Tokens
    guided_rows: Rows | None = None  # the same responses after the guided prompts


def listed(values: jax.Array) -> jax.Array:
    """Reshapes values of response tokens `[K,S,M,J]` to `[K,S,C]`."""
    return values.reshape(*values.shape[:2], -1)


def with_responses(rows: Rows, owner: jax.Array, ids: jax.Array) -> Rows:
    """Writes response tokens to their places in the rows.

    Args:
      rows: of K micro-batches.
      owner: `[K,S,M,J]`, -1 where there is no token.
      ids: `[K,S,M,J]` token ids.
    """

    def write(row, places, owner, ids):
        places = jnp.where(owner >= 0, places, row.size)
        return row.at[places.reshape(-1)].set(ids.reshape(-1), mode="drop")

    by_row = jax.vmap(jax.vmap(write, in_axes=(0, 1, 1, 1)))
    return rows._replace(tokens=by_row(rows.tokens, rows.places, owner, ids))


def response_hidden(forward: Forward, params: Any, rows: Rows) -> jax.Array:
    """Computes the hidden states `[S,C,D]` that predict the response tokens of one micro-batch."""
    return counted_hidden(forward, params, rows)[0]


def counted_hidden(forward: Forward, params: Any, rows: Rows) -> tuple[jax.Array, jax.Array | None]:
    """Computes `response_hidden`, and the tokens `[L,E]` of each expert of the layers; None without experts."""
    arguments = params, forward.config, rows.tokens, rows.positions, rows.segments
    how = {"dtype": forward.dtype, "remat": forward.remat}
    if forward.config.experts:
        hidden, load = models.expert_load(*arguments, **how)
    else:
        hidden, load = models.apply(*arguments, **how)[0], None
    chunks, count, _ = rows.slots.shape
    picked = jnp.take_along_axis(hidden, rows.slots.swapaxes(0, 1).reshape(count, -1, 1), axis=1)
    picked = picked.reshape(count, chunks, -1, hidden.shape[-1]).swapaxes(0, 1)
    return constrain(picked.reshape(chunks, -1, hidden.shape[-1]), None, BATCH, None), load


def response_logprobs(forward: Forward, params: Any, micro: MicroBatch) -> tuple[jax.Array, jax.Array]:
    """Computes log-probability and entropy `[S,C]` of the response tokens; 0 in unused chunks."""
    hidden = response_hidden(forward, params, micro.rows)
    head = models.head_weight(params, forward.config)
    return logprobs.chunked_logprobs(
        hidden, head, micro.tokens.ids, micro.chunks, tied=forward.config.tie_embeddings
    )


def response_loss(
    forward: Forward, params: Any, micro: MicroBatch, token_loss: logprobs.TokenLoss, hidden: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums a loss over the response tokens.

    Args:
      forward, params, micro: the policy and its micro-batch.
      token_loss: `token_loss(logp, entropy, tokens) -> [C]` loss of one chunk.
      hidden: `[S,C,D]` of `response_hidden`, where it is known already.

    Returns:
      (loss `[]`, log-probability `[S,C]`, entropy `[S,C]`); no gradient flows through the latter two.
    """
    hidden = response_hidden(forward, params, micro.rows) if hidden is None else hidden
    head, tokens = models.head_weight(params, forward.config), micro.tokens
    loss, (logp, entropy) = logprobs.logprobs_loss(
        token_loss, hidden, head, tokens.ids, micro.chunks, tokens, forward.config.tie_embeddings
    )
    return loss, logp, entropy


def teacher_hidden(
    forward: Forward, parts: Sequence[tuple[float, Any]], rows: Rows
) -> tuple[jax.Array, jax.Array]:
    """Computes hidden states `[S,C,E]` of a teacher, and its head: their product is the weighted sum of its logits.

    Args:
      forward: the model.
      parts: (weight, parameters), see `teacher.mixture`; E is D times their number.
      rows: of one micro-batch, after the guided prompts.
    """
    hidden = [response_hidden(forward, params, rows) for _, params in parts]
    heads = [models.head_weight(params, forward.config) for _, params in parts]
    if len(parts) == 1:
        return hidden[0], heads[0]
    scaled = [weight * x for (weight, _), x in zip(parts, hidden, strict=True)]
    wide = jnp.result_type(*heads)
    head = jnp.concatenate([x.astype(wide) for x in heads], axis=1 if forward.config.tie_embeddings else 0)
    return jnp.concatenate(scaled, axis=-1), head


def mean_share(packed: Packed, lengths: jax.Array, count: Any) -> jax.Array:
    """Computes the share `[K,S,M,J]` of each token in the mean of `count` sequence means.

    Args:
      packed: the sequences.
      lengths: `[sequences]` tokens of each response.
      count: sequences whose means are averaged.
    """
    length = lengths[packed.owner]
    inside = (packed.owner >= 0) & (packed.index < length)
    return jnp.where(inside, 1.0 / (jnp.maximum(length, 1) * count), 0.0)
