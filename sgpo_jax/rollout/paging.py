"""Refilling of slots that share the pages of a pool.

Axis key: as in `pages`; P prompt length, T most tokens of a response.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sgpo_jax import models
from sgpo_jax.models.attention import cache_shape
from sgpo_jax.rollout import drafts, pages, records
from sgpo_jax.rollout.cache import constrain_cache, copy_pages, in_pages
from sgpo_jax.rollout.pages import Pages, Sizes
from sgpo_jax.rollout.records import Steps
from sgpo_jax.rollout.sampling import Sampling
from sgpo_jax.rollout.stages import Refilling, Slots
from sgpo_jax.sharding import BATCH, fit_spec, per_device


class Starts(NamedTuple):
    """The beginning of each response, and the order in which they begin."""

    prompt: jax.Array  # [W,Q] index of its prompt in the shard
    cached: jax.Array  # [W,Q] tokens of its prompt in the cache: all but the last one
    token: jax.Array  # [W,Q] the last one
    order: jax.Array  # [W,Q] responses, the first one first


def sizes(sampling: Sampling, prompts: int, length: int, shards: int, head: int) -> Sizes:
    """Returns the sizes of a pool.

    Args:
      sampling: with a pool.
      prompts: B.
      length: P.
      shards: W.
      head: size of a head.

    Raises:
      ValueError: the kernel of the platform takes no such pages, or a shard has too few of them for its prompts and one
        response of the greatest length.
    """
    page, multiple = sampling.page, cache_shape(1, head)[0]
    if page < 1 or page % multiple:
        raise ValueError(f"page={page}: must be a multiple of {multiple}, the tokens that the kernel reads at once")
    longest, most = (-(-tokens // page) for tokens in (length - 1, length - 1 + sampling.max_new_tokens))
    if (least := least_tokens(sampling, prompts, length, shards)) > sampling.pool:
        raise ValueError(f"pool={sampling.pool}: must be at least {least}, see least_tokens")
    return Sizes(page, longest, most, sampling.pool // page // shards)


def least_tokens(sampling: Sampling, prompts: int, length: int, shards: int) -> int:
    """Returns the fewest tokens of a pool: in each shard its prompts and one response of the greatest length.

    Args:
      sampling, prompts, length, shards: as in `sizes`.
    """
    page = sampling.page
    longest, most = (-(-tokens // page) for tokens in (length - 1, length - 1 + sampling.max_new_tokens))
    return (prompts * longest + most) * page * shards


def pooled(prefilled: models.Cache, size: Sizes, shards: int, slots: int) -> tuple[models.Cache, Pages]:
    """Returns a pool whose first pages are the prompts', and the pages of R slots without responses."""
    cache = constrain_cache(in_pages(prefilled, shards, size.page, size.total))
    own = pages.start(prefilled["length"].reshape(shards, -1), size, slots)
    return cache | {"length": jnp.zeros(shards * slots, jnp.int32)}, own


def make(sampling: Sampling, size: Sizes, starts: Starts, width: int) -> tuple[Refilling, Callable[[Any], Any]]:
    """Returns the functions that refill slots, and one that gives them the pages of a pass; all are of the state.

    The queue is a mask `[W,Q]` of the responses that wait. Where a shard has too few pages for the next pass, a refill
    first puts responses back.

    Args:
      sampling: with a pool.
      size: of the pool.
      starts: of all responses.
      width: R of the first stage.
    """
    shards, responses = starts.prompt.shape
    (rows,) = fit_spec((shards,), (BATCH,))

    def by_shard(local):
        # Left to itself, the partitioner gathers what it indexes from all shards, at every pass.
        return per_device(local, P(rows), P(rows))

    def each(slots):
        return 1 + drafts.most_drafted(sampling.draft, slots.response.shape[1], width)

    def missing(response, sampled, lengths, taken, each):
        """Returns the pages `[W,R]` that the slots take before the next pass."""
        tokens = lengths.reshape(sampled.shape) + jnp.minimum(each, sampling.max_new_tokens - sampled)
        return pages.missing(taken, jnp.where(response < responses, tokens, 0), size.page)

    def needed(slots):
        return missing(slots.response, slots.sampled, slots.cache["length"], slots.pages.taken, each(slots))

    def first_pass(each):
        """Returns the most pages that a response takes before its first pass."""
        return min(1 + -(-(each - 1) // size.page), size.most)

    def due(state):
        waiting, slots, *_ = state
        active, new = slots.response < responses, needed(slots)
        room = pages.room(slots.pages, new, active, first_pass(each(slots)))
        begins = waiting.any(axis=1) & ~active.all(axis=1) & (room > 0)
        return jnp.any(begins | (new.sum(axis=1) > slots.pages.left))

    def grow(state):
        queue, slots, *rest = state
        take = by_shard(partial(pages.take, most=-(-each(slots) // size.page)))
        return queue, slots._replace(pages=take(slots.pages, needed(slots))), *rest

    def put_back(waiting, own, slots, counts, each):
        """Takes the pages of slots without a response, and puts back the responses that cannot go on."""
        response, sampled, _, lengths = slots
        active = response < responses
        own = pages.release(own, ~active)
        goes_on = pages.going_on(own, missing(response, sampled, lengths, own.taken, each), sampled, active)
        put = jnp.where(goes_on, responses, response)
        own = pages.release(own, active & ~goes_on)
        waiting = jax.vmap(lambda mask, put: mask.at[put].set(True, mode="drop"))(waiting, put)
        return waiting, own, jnp.where(goes_on, response, responses), records.put_back(counts, put)

    def begin(waiting, own, slots, counts, starts, each):
        waiting, own, response, counts = put_back(waiting, own, slots, counts, each)
        active, (_, sampled, token, lengths) = response < responses, slots
        room = pages.room(own, missing(response, sampled, lengths, own.taken, each), active, first_pass(each))
        refilled, place = pages.next_ones(jnp.take_along_axis(waiting, starts.order, axis=1), ~active, room)
        chosen = jnp.take_along_axis(starts.order, place, axis=1)
        begun = jnp.where(refilled, chosen, responses)
        waiting = jax.vmap(lambda mask, begun: mask.at[begun].set(False, mode="drop"))(waiting, begun)
        prompt, cached, last = (jnp.take_along_axis(x, chosen, axis=1) for x in starts[:3])
        own = pages.begin(own, refilled, prompt, cached, size)
        new = chosen, jnp.zeros_like(sampled), last, cached
        slots = [jnp.where(refilled, *pair) for pair in zip(new, (response, sampled, token, lengths), strict=True)]
        return waiting, own, slots, counts, (*pages.last_page(own, prompt, size.longest), refilled)

    def refill(state):
        waiting, slots, out, steps = state
        lengths = slots.cache["length"].reshape(slots.response.shape)
        run = by_shard(partial(begin, each=each(slots)))
        waiting, own, (*by_slot, lengths), counts, copies = run(
            waiting, slots.pages, (*slots[:3], lengths), steps[1:4], starts
        )
        cache = slots.cache | {"length": lengths.reshape(-1)}
        if size.longest:
            cache = copy_pages(cache, *copies)
        return waiting, Slots(*by_slot, cache, own), out, Steps(steps.slots, *counts)

    return Refilling(lambda state: state[0].any(), due, refill), grow
