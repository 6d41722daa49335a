"""Refilling of slots that share the pages of a pool.

Axis key: as in `pages`; P prompt length, T most tokens of a response.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sgpo_jax import models
from sgpo_jax.models.attention import cache_shape
from sgpo_jax.rollout import drafts, pages, records
from sgpo_jax.rollout.cache import constrain_cache, copy_pages, in_pages
from sgpo_jax.rollout.pages import Pages, Sizes
from sgpo_jax.rollout.sampling import Sampling
from sgpo_jax.rollout.stages import Refilling, Slots


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
    shard = jnp.arange(shards)[:, None]

    def each(slots):
        return 1 + drafts.most_drafted(sampling.draft, slots.response.shape[1], width)

    def missing(slots):
        """Returns the pages `[W,R]` that the slots take before the next pass."""
        new = jnp.minimum(each(slots), sampling.max_new_tokens - slots.sampled)
        tokens = jnp.where(slots.response < responses, slots.cache["length"].reshape(new.shape) + new, 0)
        return pages.missing(slots.pages, tokens, size.page)

    def room(slots):
        """Returns how many responses `[W]` may begin."""
        first_pass = min(1 + -(-(each(slots) - 1) // size.page), size.most)
        return pages.room(slots.pages, missing(slots), slots.response < responses, first_pass)

    def due(state):
        waiting, slots, *_ = state
        free = slots.response == responses
        begins = waiting.any(axis=1) & free.any(axis=1) & (room(slots) > 0)
        return jnp.any(begins | (missing(slots).sum(axis=1) > slots.pages.left))

    def grow(state):
        queue, slots, *rest = state
        grown = pages.take(slots.pages, missing(slots), -(-each(slots) // size.page))
        return queue, slots._replace(pages=grown), *rest

    def put_back(state):
        """Takes the pages of slots without a response, and puts back the responses that cannot go on."""
        waiting, slots, out, steps = state
        active = slots.response < responses
        own = pages.release(slots.pages, ~active)
        goes_on = pages.going_on(own, missing(slots), slots.sampled, active)
        put = jnp.where(goes_on, responses, slots.response)
        slots = slots._replace(
            response=jnp.where(goes_on, slots.response, responses), pages=pages.release(own, active & ~goes_on)
        )
        return waiting.at[shard, put].set(True, mode="drop"), slots, out, records.put_back(steps, put)

    def refill(state):
        waiting, slots, out, steps = put_back(state)
        in_order = jnp.take_along_axis(waiting, starts.order, axis=1)
        refilled, place = pages.next_ones(in_order, slots.response == responses, room(slots))
        response = jnp.take_along_axis(starts.order, place, axis=1)
        waiting = waiting.at[shard, jnp.where(refilled, response, responses)].set(False, mode="drop")
        prompt, cached, token = (jnp.take_along_axis(x, response, axis=1) for x in starts[:3])
        own = pages.begin(slots.pages, refilled, prompt, cached, size)
        lengths = jnp.where(refilled, cached, slots.cache["length"].reshape(cached.shape))
        cache = slots.cache | {"length": lengths.reshape(-1)}
        if size.longest:
            cache = copy_pages(cache, *pages.last_page(own, prompt, size.longest), refilled)
        response, sampled, token = (
            jnp.where(refilled, *pair) for pair in zip((response, 0, token), slots[:3], strict=True)
        )
        return waiting, Slots(response, sampled, token, cache, own), out, steps

    return Refilling(lambda state: state[0].any(), due, refill), grow
