"""The stages of decoding, each with fewer slots, computed on the host from the lengths of the responses.

Axis key: W shards, Q responses of a shard, R slots of a shard.
"""

from typing import NamedTuple

import numpy as np

from sgpo_jax.rollout.stages import narrowed


class Stage(NamedTuple):
    """The decoding steps with the same number of slots."""

    width: int  # R
    refills: int  # number of times that free slots are refilled; 0 after the first stage
    steps: int  # decoding steps
    cached: float  # tokens in the cache of a shard's slots, one for an idle slot; mean over steps and shards


def schedule(lengths: np.ndarray, prompts: np.ndarray, slots: int) -> list[Stage]:
    """Computes the stages of one `generate`, the widest first.

    Args:
      lengths: `[W,Q]` tokens of each response, at least 1, in the order in which slots take them.
      prompts: `[W,Q]` tokens of each response's prompt.
      slots: R, slots of a shard.

    Returns:
      The stages, in the order in which `generate` runs them.
    """
    shards, responses = lengths.shape
    all_slots = width = min(slots, responses)
    response = np.full((shards, width), responses)  # of each slot; `responses` if the slot is free
    sampled = np.zeros((shards, width), np.int64)
    cache = np.zeros((shards, width), np.int64)  # tokens in a slot's cache
    queued = np.zeros(shards, np.int64)
    padded = np.concatenate([lengths, np.full((shards, 1), np.iinfo(np.int64).max)], axis=1)

    def busy(narrower: int) -> bool:
        return bool((queued < responses).any() or ((response < responses).sum(axis=1) > narrower).any())

    def refill() -> None:
        for shard, slot in np.argwhere(response == responses):
            if queued[shard] < responses:
                response[shard, slot] = queued[shard]
                sampled[shard, slot], cache[shard, slot] = 0, prompts[shard, queued[shard]] - 1
                queued[shard] += 1

    def refill_due() -> bool:
        return bool(((queued < responses)[:, None] & (response == responses)).any())

    stages = []
    while width:
        refills = steps = 0
        cached, narrower = 0.0, narrowed(width, all_slots)
        while busy(narrower):
            if width == all_slots and (not refills or refill_due()):
                refill()
                refills += 1
            # Only the counts change until the next response ends.
            remaining = np.take_along_axis(padded, response, axis=1) - sampled
            step_count = int(remaining[response < responses].min())
            active = response < responses
            reached = np.where(active, cache + (step_count + 1) / 2, 1)
            cached += step_count * reached.sum() / shards
            steps += step_count
            sampled += step_count
            cache += step_count * active
            response = np.where(active & (remaining == step_count), responses, response)
        stages.append(Stage(width, refills, steps, float(cached) / max(steps, 1)))
        if narrower:
            order = np.argsort(response == responses, axis=1, kind="stable")[:, :narrower]
            response, sampled, cache = (np.take_along_axis(x, order, axis=1) for x in (response, sampled, cache))
        width = narrower
    return stages
