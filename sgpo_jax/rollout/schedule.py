"""The stages of decoding, each with fewer slots, computed on the host from the lengths of the responses.

Axis key: W shards, N problems of a shard, Q responses of a shard, R slots of a shard.
"""

import bisect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sgpo_jax.rollout.pages import AHEAD
from sgpo_jax.rollout.stages import narrowed


class Pace(NamedTuple):
    """Tokens of a slot that a pass adds, in a stage."""

    known: float = 1.0  # while the response has tokens of an earlier rollout
    sampled: float = 1.0  # then: the token that is due, and the drafts that are right


class Going(NamedTuple):
    """The responses that earlier rollouts have begun, and when this one ends: see `engine.Begun`."""

    known: np.ndarray  # [W,Q] tokens of each so far
    age: np.ndarray  # [W,N] steps in which a problem has gone on; the oldest are taken first
    due: np.ndarray  # [W,N] bool, problems whose responses have to end
    enough: int  # the rollout ends when all responses to so many problems have ended, and to those due


class Pool(NamedTuple):
    """The pages that the slots of a shard share: see `pages`."""

    page: int  # tokens of a page
    pages: int  # of a shard, beside those of its prompts


class Stage(NamedTuple):
    """The passes with the same number of slots."""

    width: int  # R
    refills: float  # number of times that free slots are refilled; without a pool 0 after the first stage
    steps: float  # passes through the model
    cached: float  # tokens in the cache of a shard's slots, one for an idle slot; mean over passes and shards


class Schedule(NamedTuple):
    """The work of a rollout."""

    stages: list[Stage]  # in the order in which `generate` runs them, the widest first
    begun: float  # responses that slots took, of a shard; one that was put back counts again
    tokens: np.ndarray  # [W,Q] tokens of each response at the end


def schedule(
    lengths: np.ndarray,
    prompts: np.ndarray,
    slots: int,
    pace: Callable[[int], Pace] = lambda width: Pace(),
    going: Going | None = None,
    pool: Pool | None = None,
) -> Schedule:
    """Computes the stages of one `generate`.

    Args:
      lengths: `[W,Q]` tokens of each response, at least 1, in the order in which slots take them, or with `going` in
        the order of the problems.
      prompts: `[W,Q]` tokens of each response's prompt.
      slots: R, slots of a shard.
      pace: of a stage, from its number of slots.
      going: the responses that go on; None where all begin and all end.
      pool: of which responses take pages as they grow; None where each slot has a cache for the longest.
    """
    shards, responses = lengths.shape
    known = np.zeros_like(lengths) if going is None else going.known
    done = known == lengths
    queue = np.broadcast_to(np.arange(responses), lengths.shape)
    if going is not None:
        age = np.repeat(going.age, responses // going.age.shape[1], axis=1)
        queue = np.argsort(-age, axis=1, kind="stable")
    waiting, begun = ~np.take_along_axis(done, queue, axis=1), 0  # in the order of the queue
    all_slots = width = min(slots, responses)
    response = np.full((shards, width), responses)  # of each slot; `responses` if the slot is free
    fed, sampled = np.zeros((2, shards, width))  # known tokens of a slot's response that have been fed, and new ones
    held = np.zeros((shards, width), int)  # pages of a slot's own; those of a response that has ended, until a refill
    tokens = known.astype(float)

    def of_slots(values: np.ndarray, idle: float) -> np.ndarray:
        padded = np.concatenate([values, np.full((shards, 1), idle)], axis=1)
        return np.take_along_axis(padded, response, axis=1)

    def cached() -> np.ndarray:
        return of_slots(prompts, 1) - 1 + fed + sampled

    def grown(tokens: np.ndarray) -> np.ndarray:
        """Returns the pages of its own that each slot has for so many tokens in its cache."""
        assert pool is not None
        own = np.ceil(tokens / pool.page - 1e-9) - (of_slots(prompts, 1) - 1) // pool.page
        return np.where(response < responses, np.maximum(own, held), 0).astype(int)

    def before(passes: float) -> np.ndarray:
        """Returns the pages that each slot has before the pass after so many: those of the tokens that it feeds."""
        fast, slow = pace(width)
        left = of_slots(lengths, 0) - of_slots(known, 0) - sampled
        most = cached() + of_slots(known, 0) - fed + np.maximum(left, 0)
        again = np.ceil((of_slots(known, 0) - fed) / fast)
        now = cached() + np.minimum(of_slots(known, 0) - fed, passes * fast) + np.maximum(passes - again, 0) * slow
        return grown(np.minimum(now + fast, most))

    def room(needed: np.ndarray) -> np.ndarray:
        """Returns how many responses of a shard may begin: see `pages.room`."""
        assert pool is not None
        active = response < responses
        left = pool.pages - np.where(active, np.maximum(needed, held), 0).sum(axis=1) - AHEAD * active.sum(axis=1)
        first_pass = 1 + math.ceil((pace(width).known - 1) / pool.page)
        return np.maximum((left + AHEAD) // (first_pass + AHEAD), 0)

    def short(needed: np.ndarray) -> np.ndarray:
        """Returns whether a shard has too few pages for the next pass."""
        assert pool is not None
        return np.maximum(needed, held).sum(axis=1) > pool.pages

    def reached() -> bool:
        if going is None:
            return False
        complete = done.reshape(*going.due.shape, -1).all(axis=2)
        return bool(complete.sum() >= going.enough and (complete | ~going.due).all())

    def busy(narrower: int) -> bool:
        active = (response < responses).sum(axis=1)
        return bool(waiting.any() or (active > narrower).any()) and not reached()

    def put_back() -> None:
        """Takes the pages of what has ended, and puts back the youngest responses, until the others can go on."""
        assert pool is not None
        held[response == responses] = 0
        needed = before(0)
        for shard in np.flatnonzero(short(needed)):
            oldest = np.argsort(np.where(response[shard] < responses, -sampled[shard] - fed[shard], 1), kind="stable")
            own, more = held[shard, oldest], (needed - held)[shard, oldest]
            free = pool.pages - held[shard].sum()
            for slot in oldest[np.cumsum(more) > free + own.sum() - np.cumsum(own)]:
                if (index := response[shard, slot]) < responses:
                    waiting[shard, queue[shard] == index] = True
                    # What it had stays, unless it begins again.
                    tokens[shard, index] = known[shard, index] + np.floor(sampled[shard, slot] + 1e-9)
                    held[shard, slot], response[shard, slot] = 0, responses

    def refill() -> None:
        nonlocal begun
        most = np.full(shards, responses)
        if pool is not None:
            put_back()
            most = room(before(0))
        for shard in range(shards):
            free = np.flatnonzero(response[shard] == responses)
            first = np.flatnonzero(waiting[shard])[: most[shard]]
            for slot, place in zip(free, first, strict=False):
                response[shard, slot], waiting[shard, place] = queue[shard, place], False
                fed[shard, slot] = sampled[shard, slot] = 0
                held[shard, slot], begun = pool is not None, begun + 1

    def refill_due() -> bool:
        free = waiting.any(axis=1) & (response == responses).any(axis=1)
        if pool is None:
            return bool(free.any())
        needed = before(0)
        return bool((free & (room(needed) > 0) | short(needed)).any())

    stages = []
    while width:
        refills, steps, read, narrower = 0, 0, 0.0, narrowed(width, all_slots)
        fast, slow = pace(width)
        while busy(narrower):
            if (pool is not None or width == all_slots) and (not refills or refill_due()):
                refill()
                refills += 1
                if not busy(narrower):
                    break
            # Only the counts change until the next response ends.
            active = response < responses
            old = of_slots(known, 0) - fed
            new = of_slots(lengths - known, 0) - sampled
            again = np.ceil(old / fast)
            passes = again + np.ceil(new / slow - 1e-9)
            count = int(passes[active].min())
            if pool is not None:  # or until the pages run out
                count = 1 + bisect.bisect_left(range(1, count), True, key=lambda more: bool(short(before(more)).any()))
                held = np.maximum(held, before(count - 1))
            fed_now = np.minimum(old, count * fast)
            sampled_now = np.minimum(new, np.maximum(count - again, 0) * slow)
            read += count * np.where(active, cached() + (fed_now + sampled_now + 1) / 2, 1).sum() / shards
            steps += count
            fed, sampled = fed + fed_now, sampled + sampled_now
            ended = active & (passes == count)
            place = np.nonzero(ended)[0], response[ended]
            done[place], tokens[place], response = True, lengths[place], np.where(ended, responses, response)
        running = response < responses
        place = np.nonzero(running)[0], response[running]
        tokens[place] = known[place] + np.floor(sampled[running] + 1e-9)
        stages.append(Stage(width, refills, steps, float(read) / max(steps, 1)))
        if narrower:
            order = np.argsort(response == responses, axis=1, kind="stable")[:, :narrower]
            response, fed, sampled, held = (
                np.take_along_axis(x, order, axis=1) for x in (response, fed, sampled, held)
            )
        width = narrower
    return Schedule(stages, begun / shards, tokens.astype(lengths.dtype))
