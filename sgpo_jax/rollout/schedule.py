"""How long the engine decodes in how many slots, worked out on the host from the lengths of the responses.

Axis key: W shards, Q responses of a shard, R slots of a shard.
"""

from typing import NamedTuple

import numpy as np

from sgpo_jax.rollout.engine import narrowed


class Stage(NamedTuple):
    """The decoding steps with one number of slots."""

    width: int  # R
    refills: int  # rounds of filling slots; only the first stage has any
    steps: int
    cached: float  # tokens in the cache of one shard's slots, idle ones included, mean over steps and shards


def schedule(lengths: np.ndarray, prompts: np.ndarray, slots: int) -> list[Stage]:
    """The stages of one `generate`, the widest first.

    Args:
      lengths: `[W,Q]` tokens of each response, at least 1, in the order in which slots take them.
      prompts: `[W,Q]` tokens of each response's prompt.
      slots: R.
    """
    shards, waiting = lengths.shape
    all_slots = width = min(slots, waiting)
    item = np.full((shards, width), waiting)
    sampled = np.zeros((shards, width), np.int64)
    held = np.zeros((shards, width), np.int64)  # tokens in a slot's cache
    queued = np.zeros(shards, np.int64)
    padded = np.concatenate([lengths, np.full((shards, 1), np.iinfo(np.int64).max)], axis=1)

    def busy(narrower: int) -> bool:
        return bool((queued < waiting).any() or ((item < waiting).sum(axis=1) > narrower).any())

    def refill() -> None:
        for shard, slot in np.argwhere(item == waiting):
            if queued[shard] < waiting:
                item[shard, slot] = queued[shard]
                sampled[shard, slot], held[shard, slot] = 0, prompts[shard, queued[shard]] - 1
                queued[shard] += 1

    def refill_due() -> bool:
        return bool(((queued < waiting)[:, None] & (item == waiting)).any())

    stages = []
    while width:
        refills = steps = 0
        cached, narrower = 0.0, narrowed(width, all_slots)
        while busy(narrower):
            if width == all_slots and (not refills or refill_due()):
                refill()
                refills += 1
            # Nothing changes but the counts until the next response ends.
            left = np.take_along_axis(padded, item, axis=1) - sampled
            run = int(left[item < waiting].min())
            active = item < waiting
            cached += run * (held.sum() + active.sum() * (run + 1) / 2) / shards
            steps += run
            sampled += run
            held += run * active
            item = np.where(active & (left == run), waiting, item)
        stages.append(Stage(width, refills, steps, float(cached) / max(steps, 1)))
        if narrower:
            order = np.argsort(item == waiting, axis=1, kind="stable")[:, :narrower]
            item, sampled, held = (np.take_along_axis(x, order, axis=1) for x in (item, sampled, held))
        width = narrower
    return stages
