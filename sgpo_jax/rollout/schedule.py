"""The stages of decoding, each with fewer slots, computed on the host from the lengths of the responses.

Axis key: W shards, N problems of a shard, Q responses of a shard, R slots of a shard.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

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


class Stage(NamedTuple):
    """The passes with the same number of slots."""

    width: int  # R
    refills: float  # number of times that free slots are refilled; 0 after the first stage
    steps: float  # passes through the model
    cached: float  # tokens in the cache of a shard's slots, one for an idle slot; mean over passes and shards


class Schedule(NamedTuple):
    """The work of a rollout."""

    stages: list[Stage]  # in the order in which `generate` runs them, the widest first
    begun: float  # responses that slots took, of a shard
    tokens: np.ndarray  # [W,Q] tokens of each response at the end


def schedule(
    lengths: np.ndarray,
    prompts: np.ndarray,
    slots: int,
    pace: Callable[[int], Pace] = lambda width: Pace(),
    going: Going | None = None,
) -> Schedule:
    """Computes the stages of one `generate`.

    Args:
      lengths: `[W,Q]` tokens of each response, at least 1, in the order in which slots take them, or with `going` in
        the order of the problems.
      prompts: `[W,Q]` tokens of each response's prompt.
      slots: R, slots of a shard.
      pace: of a stage, from its number of slots.
      going: the responses that go on; None where all begin and all end.
    """
    shards, responses = lengths.shape
    known = np.zeros_like(lengths) if going is None else going.known
    done = known == lengths
    queue = np.broadcast_to(np.arange(responses), lengths.shape)
    if going is not None:
        age = np.repeat(going.age, responses // going.age.shape[1], axis=1)
        queue = np.argsort(np.where(done, -np.inf, -age), axis=1, kind="stable")  # what has ended counts as taken
    already = done.sum(axis=1)
    queued = already.copy()
    all_slots = width = min(slots, responses)
    response = np.full((shards, width), responses)  # of each slot; `responses` if the slot is free
    fed, sampled = np.zeros((2, shards, width))  # known tokens of a slot's response that have been fed, and new ones
    tokens = known.astype(float)

    def of_slots(values: np.ndarray, idle: float) -> np.ndarray:
        padded = np.concatenate([values, np.full((shards, 1), idle)], axis=1)
        return np.take_along_axis(padded, response, axis=1)

    def reached() -> bool:
        if going is None:
            return False
        complete = done.reshape(*going.due.shape, -1).all(axis=2)
        return bool(complete.sum() >= going.enough and (complete | ~going.due).all())

    def busy(narrower: int) -> bool:
        waiting = (queued < responses).any() or ((response < responses).sum(axis=1) > narrower).any()
        return bool(waiting) and not reached()

    def refill() -> None:
        for shard, slot in np.argwhere(response == responses):
            if queued[shard] < responses:
                response[shard, slot] = queue[shard, queued[shard]]
                fed[shard, slot] = sampled[shard, slot] = 0
                queued[shard] += 1

    def refill_due() -> bool:
        return bool(((queued < responses)[:, None] & (response == responses)).any())

    stages = []
    while width:
        refills, steps, cached, narrower = 0, 0, 0.0, narrowed(width, all_slots)
        fast, slow = pace(width)
        while busy(narrower):
            if width == all_slots and (not refills or refill_due()):
                refill()
                refills += 1
            # Only the counts change until the next response ends.
            active = response < responses
            old = of_slots(known, 0) - fed
            new = of_slots(lengths - known, 0) - sampled
            again = np.ceil(old / fast)
            passes = again + np.ceil(new / slow - 1e-9)
            count = int(passes[active].min())
            fed_now = np.minimum(old, count * fast)
            sampled_now = np.minimum(new, np.maximum(count - again, 0) * slow)
            before = of_slots(prompts, 0) - 1 + fed + sampled
            cached += count * np.where(active, before + (fed_now + sampled_now + 1) / 2, 1).sum() / shards
            steps += count
            fed, sampled = fed + fed_now, sampled + sampled_now
            ended = active & (passes == count)
            place = np.nonzero(ended)[0], response[ended]
            done[place], tokens[place], response = True, lengths[place], np.where(ended, responses, response)
        running = response < responses
        place = np.nonzero(running)[0], response[running]
        tokens[place] = known[place] + np.floor(sampled[running] + 1e-9)
        stages.append(Stage(width, refills, steps, float(cached) / max(steps, 1)))
        if narrower:
            order = np.argsort(response == responses, axis=1, kind="stable")[:, :narrower]
            response, fed, sampled = (np.take_along_axis(x, order, axis=1) for x in (response, fed, sampled))
        width = narrower
    return Schedule(stages, float((queued - already).mean()), tokens.astype(lengths.dtype))
