"""The responses of a rollout so far, and what a pass of the slots adds to them.

Axis key: W shards of the rows, B problems, G responses to a problem, Q responses of a shard, R slots of a shard, T new
tokens, J tokens of a slot in a pass.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sgpo_jax.rollout.stages import Slots

Array = Any  # JAX's, or numpy's on the host

# Finish reasons: ended by a stop token, cut at the limit, or none, because the rollout ended before the response.
STOP, LENGTH, RUNNING = 0, 1, 2


class Rollout(NamedTuple):
    """The responses, G to each prompt. With prompts of C kinds, G is the sum over the kinds, and B counts problems."""

    tokens: Array  # [B,G,T] int32, the stop token included, padded after it
    logp: Array  # [B,G,T] float32, log-probability of each token at temperature 1 without filters, nats; then 0
    lengths: Array  # [B,G] int32, tokens in each response, the stop token included
    finish: Array  # [B,G] int32, STOP or LENGTH; RUNNING only where the rollout need not wait for all: see `Begun`


class Steps(NamedTuple):
    """The work of a rollout with drafts or a pool. All but one of a pass's tokens were drafted, or known."""

    slots: Array  # [] int32, slot-steps: passes through the model, summed over slots
    passes: Array  # [B,G] int32, passes that sampled a token of a response; as many as tokens if no draft was right
    drafted: Array  # [B,G] int32, tokens that were drafted
    # [B,G] int32, how often a response was put back into the queue, after which its passes and drafts count anew; None
    # without a pool.
    put_back: Array | None = None
    pool_used: Array | None = None  # [] float32, the greatest share of a shard's pages that was in use at once


def record(out: Rollout, slots: Slots, token: jax.Array, logp: jax.Array, stopped: jax.Array) -> Rollout:
    """Writes each slot's token into its response; the index of a free slot is out of range, so its token is dropped."""

    def record(out, response, count, token, logp, stopped):
        tokens, logps, lengths, finish = out
        return Rollout(
            tokens.at[response, count].set(token, mode="drop"),
            logps.at[response, count].set(logp, mode="drop"),
            lengths.at[response].set(count + 1, mode="drop"),
            finish.at[response].set(jnp.where(stopped, STOP, LENGTH), mode="drop"),
        )

    return jax.vmap(record)(out, slots.response, slots.sampled, token, logp, stopped)


def record_several(out: Rollout, slots: Slots, token: Any, logp: Any, kept: Any, stopped: Any) -> Rollout:
    """Writes the first `kept` `[W,R]` of each slot's tokens `[W,R,J]` into its response."""

    def record(out, response, count, token, logp, kept, stopped):
        index = jnp.arange(token.shape[1])
        rows, places = jnp.where(index < kept[:, None], response[:, None], len(out.lengths)), count[:, None] + index
        return Rollout(
            out.tokens.at[rows, places].set(token, mode="drop"),
            out.logp.at[rows, places].set(logp, mode="drop"),
            out.lengths.at[response].set(count + kept, mode="drop"),
            out.finish.at[response].set(jnp.where(stopped, STOP, LENGTH), mode="drop"),
        )

    return jax.vmap(record)(out, *slots[:2], token, logp, kept, stopped)


def count(steps: Steps, slots: Slots, passes: Any, drafted: jax.Array) -> Steps:
    """Adds a pass of all slots: 1, or `[W,R]` whether it sampled a token, and the drafted tokens `[W,R]`."""

    def add(total, response, counted):
        return total.at[response].add(counted, mode="drop")

    totals = [jax.vmap(add, in_axes=(0, 0, 0 if jnp.ndim(new) else None))(total, slots.response, new)
              for total, new in ((steps.passes, passes), (steps.drafted, drafted))]  # fmt: skip
    passes, drafted = totals
    return Steps(steps.slots + slots.response.size, passes, drafted, steps.put_back)


def put_back(counts: Any, response: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the counts of `Steps`, each `[W,Q]`, when responses `[W,R]` are put back; Q or more is none."""

    def again(passes, drafted, times, response):
        passes, drafted = (x.at[response].set(0, mode="drop") for x in (passes, drafted))
        return passes, drafted, times.at[response].add(1, mode="drop")

    passes, drafted, times = counts
    return jax.vmap(again)(passes, drafted, times, response)


def recall(out: Rollout, lengths: jax.Array, slots: Slots, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns which of the next `count` tokens of each slot are known `[W,R,J]`, these tokens, and their logp.

    `lengths` `[W,Q]` are the known tokens of each response.
    """
    responses, limit = out.tokens.shape[1:]
    places, index = slots.sampled[..., None] + jnp.arange(count), jnp.minimum(slots.response, responses - 1)

    def look_up(tokens, logp, lengths, response, places):
        at = response[:, None], jnp.minimum(places, limit - 1)
        return places < lengths[at[0]], tokens[at], logp[at]

    known, *stored = jax.vmap(look_up)(out.tokens, out.logp, lengths, index, places)
    return known & (slots.response < responses)[..., None], *stored


def cut(out: Rollout, pad_id: int) -> Rollout:
    """Returns the responses without what stands after their ends: where one was longer before it was put back."""
    inside = jnp.arange(out.tokens.shape[2]) < out.lengths[..., None]
    return out._replace(tokens=jnp.where(inside, out.tokens, pad_id), logp=jnp.where(inside, out.logp, 0.0))


def ended(out: Rollout, limit: int) -> jax.Array:
    """Returns `[W,Q]`, whether a response has ended."""
    return (out.finish == STOP) | (out.lengths == limit)
