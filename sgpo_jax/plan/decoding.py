"""The passes of a planned rollout, from assumed lengths and an assumed acceptance of drafts.

Axis key: W shards, N problems in flight, G responses to a problem, P problems of several steps.
"""

from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from sgpo_jax.plan import workload
from sgpo_jax.plan.phases import Scopes
from sgpo_jax.plan.workload import Assumed
from sgpo_jax.rollout import drafts
from sgpo_jax.rollout.schedule import Going, Pace, Pool, Schedule, Stage, schedule
from sgpo_jax.training import carried

STEPS = 12  # of a run in which problems go on that are simulated
SETTLED = 4  # of these, the first ones, which have fewer problems that go on


def lengths(fields: ConfigDict, assumed: Assumed, count: int) -> np.ndarray:
    """Returns `[count]` lengths of responses of a section of the config."""
    return workload.lengths(count, assumed.response_tokens, fields.max_new_tokens, assumed.cut)


def passes(
    fields: ConfigDict, assumed: Assumed, each: int, beyond: int, shards: int, slots: int, pool: Pool | None = None
) -> Schedule:
    """Returns the work of a rollout on the platform of the mesh.

    Args:
      fields: section of the config.
      assumed: lengths, and the acceptance of drafts.
      each: G.
      beyond: problems in flight beyond those of a batch; then the work is that of a mean step.
      shards: W.
      slots: of a shard.
      pool: the pages that the slots share, if they do.
    """

    def pace_of(width: int) -> Pace:
        return pace(drafts.most_drafted(fields.draft, width, slots), assumed.acceptance)

    if beyond:
        problems = STEPS * fields.batch + beyond
        sampled = lengths(fields, assumed, problems * each).reshape(problems, each)
        return mean_step(sampled, assumed.prompt_tokens, fields, shards, slots, pace_of, pool)
    waiting = lengths(fields, assumed, fields.batch * each).reshape(shards, -1)
    return schedule(waiting, np.full_like(waiting, assumed.prompt_tokens), slots, pace_of, pool=pool)


def pace(drafted: int, acceptance: float) -> Pace:
    """Returns the tokens that a pass adds to a response.

    Args:
      drafted: tokens that are drafted for it.
      acceptance: probability that a drafted token is right where those before it are.
    """
    return Pace(drafted + 1, sum(acceptance**i for i in range(drafted + 1)))


def mean_step(
    lengths: np.ndarray,
    prompt: int,
    rl: ConfigDict,
    shards: int,
    slots: int,
    pace_of: Callable[[int], Pace],
    pool: Pool | None,
) -> Schedule:
    """Simulates steps of which each leaves problems to the next, and returns their mean.

    Args:
      lengths: `[P,G]` tokens of the responses, for STEPS steps and the problems in flight after them.
      prompt: tokens of a prompt.
      rl: the section of the config.
      shards: W.
      slots: of a shard.
      pace_of: of a stage, from its slots.
      pool: as in `passes`.
    """
    known, first, in_flight = np.zeros_like(lengths), np.zeros(len(lengths), int), np.arange(0)
    found: list[Schedule] = []
    for position in range(STEPS):
        begun = position * rl.batch + len(in_flight)
        new = np.arange(begun, (position + 1) * rl.batch + carried.extra(rl))
        first[new], in_flight = position, np.concatenate([in_flight, new])
        dealt = in_flight.reshape(-1, shards).T  # as `carried.spread` does
        age, size = position - first[dealt], (shards, dealt.shape[1] * lengths.shape[1])
        going = Going(known[dealt].reshape(size), age, age >= rl.carry_most, rl.batch)
        found.append(schedule(lengths[dealt].reshape(size), np.full(size, prompt), slots, pace_of, going, pool))
        known[dealt] = found[-1].tokens.reshape(*dealt.shape, -1)
        complete = in_flight[(known == lengths)[in_flight].all(axis=1)]
        in_flight = in_flight[~np.isin(in_flight, complete[: rl.batch])]
    settled = found[SETTLED:]
    stages = [_mean(same) for same in zip(*(one.stages for one in settled), strict=True)]
    return Schedule(stages, float(np.mean([one.begun for one in settled])), settled[-1].tokens)


def _mean(stages: Sequence[Stage]) -> Stage:
    refills, steps, tokens = np.mean([(one.refills, one.steps, one.steps * one.cached) for one in stages], axis=0)
    return Stage(stages[0].width, float(refills), float(steps), float(tokens / max(steps, 1e-9)))


def scopes(work: Schedule, reads: Sequence[int], at_once: Sequence[int], token_bytes: int) -> Scopes:
    """Returns the trip counts of the engine's loops, and the bytes that the kernel reads from a layer's cache.

    Args:
        work: from the engine's schedule.
        reads: how often a pass reads the cache of a row, in each stage.
        at_once: cached tokens of a row that the kernel reads in one round of its loop, in each stage.
        token_bytes: keys and values of a token in one layer on a device.
    """
    refills = float(work.stages[0].refills)
    trips, sizes = [("refill/while$", refills), ("refill/while/body/while$", work.begun / refills)], []
    for stage, times, tokens in zip(work.stages, reads, at_once, strict=True):
        kernel = rf"decode_{stage.width}/.*(paged|decode)_attention"
        # With a pool the later stages refill too, in loops of the same name as the first one's.
        steps = stage.steps / (refills if stage.refills else 1)
        trips += [(kernel, stage.cached / stage.width / tokens), (f"decode_{stage.width}/while$", steps)]
        sizes.append((kernel, times * stage.cached * token_bytes))
    return Scopes("prefill", (("decode_", "decode"), ("refill", "refill")), tuple(trips), tuple(sizes))
