"""Algorithm 1: sample an autonomous and a guided group for each problem, grade them, update; again.

The methods that SGPO is compared with (`methods.py`) are the same loop with another guided group, or none.

Axis key: B problems, G responses of a group, T response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sgpo_jax import data, rewards, sharding
from sgpo_jax.evaluation import evaluate_sets
from sgpo_jax.policy import Run, memory
from sgpo_jax.policy.generation import Graded, Kind, demonstrate, encode_prompts, grade, noise_key, respond_in_groups
from sgpo_jax.rollout import STOP, Rollout, Sampling, Steps
from sgpo_jax.rollout import Problems as Known
from sgpo_jax.runtime.profile import phase
from sgpo_jax.training import carried, earlier, packing
from sgpo_jax.training.batch import Batch, Contexts, Group, packer, specs
from sgpo_jax.training.inputs import Problems, Tokens, longest, longest_sibling_prompt, total_steps
from sgpo_jax.training.loop import Clock, Loop
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.train_step import make_update


@dataclass(frozen=True)
class Sampler:
    """The settings and prompts with which every step samples, besides the parameters."""

    run: Run
    problems: Problems
    sampling: Sampling
    known: earlier.Earlier | None = None  # responses of earlier epochs, which change none of later ones
    in_flight: carried.Carried | None = None  # problems that go on in the next step; None: none does


class Sampled(NamedTuple):
    """The graded groups of a step."""

    problems: Sequence[dict]  # B
    graded: dict[str, Graded]  # group -> responses
    tokens: int  # sampled for it, those of replaced problems included
    slot_steps: int | Steps  # the same; `Steps` with drafts or a pool
    staleness: Mapping[str, float] = MappingProxyType({})  # metrics of tokens that earlier steps sampled


def train(run: Run, initial: Callable[[], Any], problems: Problems, sampling: Sampling) -> None:
    """Runs RL, or what is left of it; checkpoints, metrics and generations go to `workdir/rl`.

    Args:
      run: the config, the folder, the model and its mesh.
      initial: returns the parameters to begin with, where there is no checkpoint.
      problems: to train on, and their prompts.
      sampling: of a step: `step_sampling`.
    """
    rl, rows = run.config.rl, problems.rows
    # The second sequence has the problems that replace others: see `fill`.
    batches = [data.batches(rows, rl.batch, (run.config.seed + i) % 2**32) for i in range(2)]
    total = total_steps(rl, rows)
    objective = Objective.from_config(rl)
    pack = packer(rl, run.mesh)

    with Loop(run, "rl", total, partial(_evaluate, run), rl.eval_every, rl.updates_per_batch) as loop:
        update = make_update(
            loop.forward, loop.optimizer, objective, teaching=loop.teaching, shardings=loop.shardings
        )
        update = phase("update")(update)
        state = loop.start(initial)
        known = make_earlier(run, rows, sampling) if loop.first < total else None
        sampler = Sampler(run, problems, sampling, known, make_carried(run, total))
        for step in loop.steps():
            clock, position = Clock(), loop.position(step)
            sampled = sample_and_grade(sampler, loop.weights(state), batches, position, clock)
            graded = sampled.graded
            if known is not None:
                remember(known, position, sampled, problems.prompts)
            batch = make_batch(run, graded, problems.prompts, sampled.problems)
            packed = pack(batch)
            state, device_metrics = update(state, sharding.put(packed, specs(packed), run.mesh), loop.base)
            metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
            clock.lap("update")
            metrics |= _rollout_metrics(graded["autonomous"], graded.get("guided"))
            metrics |= _speed(clock, sampled) | {"rows_filled": packing.filled_share(packed.autonomous)}
            state = loop.finish(state, metrics, sampled.problems, batch)


def sampled_groups(rl: ConfigDict) -> dict[str, int]:
    """Returns the groups that a step samples, and their sizes; a demonstration is not sampled."""
    guided = {"guided": rl.guided} if rl.guided and rl.guide != "demonstration" else {}
    return {"autonomous": rl.autonomous, **guided}


def step_sampling(run: Run) -> Sampling:
    """Returns the sampling of a step of RL.

    Raises:
      ValueError: its slots do not fit into the memory of the devices; see `policy.memory.sampling`.
    """
    rl, sizes = run.config.rl, sampled_groups(run.config.rl)
    problems = rl.batch + carried.extra(rl)
    return memory.sampling(run, "rl", problems * sum(sizes.values()), problems * len(sizes))


def make_earlier(run: Run, rows: Sequence[dict], sampling: Sampling) -> earlier.Earlier | None:
    """Returns the store of earlier epochs' responses; None where neither drafts nor slots have a use for it."""
    rl, saved = run.config.rl, run.config.checkpoint
    some_wait = bool(sampling.pool) or 0 < sampling.slots < rl.batch * sum(sampled_groups(rl).values())
    if not sampling.draft and not some_wait:
        return None
    size = min(4 * rl.max_new_tokens, earlier.MOST) if sampling.draft else 0
    # A run that resumes at the oldest checkpoint finds the epoch before it.
    keep = 2 * data.steps_per_epoch(rows, rl.batch) + (saved.keep + 1) * saved.every
    return earlier.Earlier(run.workdir / "rl" / "earlier", size, keep)


def make_carried(run: Run, total: int) -> carried.Carried | None:
    """Returns the problems that go on in the next step of `total`; None where a step waits for all of its own."""
    rl, saved = run.config.rl, run.config.checkpoint
    if not carried.extra(rl):
        return None
    # A run that resumes at the oldest checkpoint finds the step before it.
    keep, pad = (saved.keep + 1) * saved.every, run.policy.pad_id
    return carried.Carried(run.workdir / "rl" / "carried", rl, sampled_groups(rl), total, pad, keep)


def remember(known: earlier.Earlier, position: int, sampled: Sampled, prompts: Mapping[str, Tokens]) -> None:
    """Adds the responses of a step to the store of earlier epochs."""
    ids = [row["id"] for row in sampled.problems]
    kinds = [name for name in sampled.graded if name in prompts]
    rollouts = [sampled.graded[name].rollout for name in kinds]
    known.add(position, ids, rollouts, [[prompts[name][id] for id in ids] for name in kinds])


def sample_and_grade(
    sampler: Sampler, params: Any, batches: Sequence[Any], position: int, clock: Clock
) -> Sampled:
    """Samples every group of a step and grades it; in up to `rl.resample` more rounds it replaces idle problems.

    Args:
      sampler, params, position: as in `sample_groups`.
      batches: the problems of every position; and those of every round of every position.
      clock: of the step; its phases are "rollout" and "reward".
    """
    policy, rl = sampler.run.policy, sampler.run.config.rl
    rounds = rl.resample

    def graded(rows, sampled):
        groups = sampled
        if rl.guided and "guided" not in sampled:
            solutions = [sampler.problems.solutions[row["id"]] for row in rows]
            groups = sampled | {"guided": demonstrate(policy, solutions, rl.max_new_tokens)}
        clock.lap("rollout")
        verdicts = {name: grade(policy, rollout, rows, rl.reward) for name, rollout in groups.items()}
        clock.lap("reward")
        return verdicts

    def sample(rows, number=0):
        sampled, steps = sample_groups(sampler, params, rows, position, number)
        return Sampled(rows, graded(rows, sampled), token_count(sampled), steps)

    if sampler.in_flight is not None:
        flight = sampler.in_flight.begin(position, sharding.row_ways(sampler.run.mesh))
        rows = carried.rows_of(flight, batches[0], rl.batch)
        rollouts, steps = sample_groups(sampler, params, rows, position, flight=flight)
        trained, staleness = sampler.in_flight.end(position, flight, rollouts)
        rows, sampled = [rows[i] for i in trained], carried.take(rollouts, trained)
        tokens = token_count(rollouts) - token_count(flight.rollouts)
        return Sampled(rows, graded(rows, sampled), tokens, steps, staleness)
    sampled = sample(batches[0][position])
    for number in range(1, rounds + 1):
        if not has_spread(sampled).all():
            sampled = fill(sampled, sample(batches[1][position * rounds + number - 1], number))
    return sampled


def token_count(rollouts: Mapping[str, Rollout]) -> int:
    """Returns the tokens of all groups."""
    return int(sum(rollout.lengths.sum() for rollout in rollouts.values()))


def fill(sampled: Sampled, other: Sampled) -> Sampled:
    """Replaces problems whose autonomous rewards are all the same, from which the policy loss learns nothing. DAPO.

    Problems of `other` that are of use, and not in the batch yet, take their places in order. Places that are left stay
    as they are.
    """
    ids = {row["id"] for row in sampled.problems}
    useful = [i for i, row in enumerate(other.problems) if has_spread(other)[i] and row["id"] not in ids]
    idle = np.flatnonzero(~has_spread(sampled)).tolist()
    source = dict(zip(idle, useful, strict=False))  # place -> problem that takes it
    rows = range(len(sampled.problems))

    def merged(mine, others):
        return [others[source[i]] if i in source else mine[i] for i in rows]

    def merge(mine: Graded, others: Graded) -> Graded:
        rollout = Rollout(*(np.stack(merged(*pair)) for pair in zip(mine.rollout, others.rollout, strict=True)))
        texts, verdicts = merged(mine.texts, others.texts), merged(mine.verdicts, others.verdicts)
        return Graded(rollout, texts, verdicts, np.stack(merged(mine.rewards, others.rewards)))

    graded = {name: merge(sampled.graded[name], other.graded[name]) for name in sampled.graded}
    steps = added(sampled.slot_steps, other.slot_steps)
    return Sampled(merged(sampled.problems, other.problems), graded, sampled.tokens + other.tokens, steps)


def added(first: Any, second: Any) -> Any:
    """Returns the slot-steps, or the `Steps`, of two rollouts together."""
    if not isinstance(first, Steps):
        return first + second
    counts = jax.tree.map(lambda a, b: np.concatenate([a.ravel(), b.ravel()]), first[1:], second[1:])
    return Steps(first.slots + second.slots, *counts)


def has_spread(sampled: Sampled) -> np.ndarray:
    """Returns `[B]`, whether a problem's autonomous responses have different rewards."""
    rewards = sampled.graded["autonomous"].rewards
    return (rewards != rewards[:, :1]).any(axis=1)


@phase("rollout")
def sample_groups(
    sampler: Sampler,
    params: Any,
    rows: Sequence[dict],
    position: int,
    number: int = 0,
    flight: carried.Flight | None = None,
) -> tuple[dict[str, Rollout], int | Steps]:
    """Samples every group of a step at once.

    Args:
      sampler, params: the policy that samples, and how.
      rows: B problems.
      position: the step's place among the batches, which together with the run's seed fixes the noise.
      number: of the round, for problems that replace others; it has noise of its own.
      flight: the problems, where some go on and some need not end: each has the noise of its own batch.

    Returns:
      (group of `sampled_groups` -> its rollout `[B,G]`, slot-steps of all groups, or `Steps`).
    """
    run, prompts, known = sampler.run, sampler.problems.prompts, sampler.known
    config, sizes = run.config, sampled_groups(run.config.rl)
    tokens = [[prompts[name][row["id"]] for row in rows] for name in sizes]
    length = max(longest(prompts[name]) for name in sizes)
    purposes = [f"{name}, round {number}" if number else name for name in sizes]
    keys = [noise_key(config.seed, purpose, position) for purpose in purposes]
    found = known.known(position, [row["id"] for row in rows], len(sizes)) if known else None
    expected = None if found is None else found.expected
    about = Known(np.arange(len(rows)), None, None if found is None else found.texts)
    if flight is not None:
        batch, ids = np.divmod(flight.numbers, config.rl.batch)
        keys = [jax.vmap(partial(noise_key, config.seed, purpose))(jnp.asarray(batch)) for purpose in purposes]
        expected = carried.in_line(flight, position, expected, config.rl.max_new_tokens)
        about = about._replace(ids=ids, begun=carried.begun(flight, position, config.rl))
    by_kind = [None] * len(sizes) if expected is None else expected.T
    kinds = [Kind(*fields) for fields in zip(tokens, keys, sizes.values(), by_kind, strict=True)]
    rollouts, steps = respond_in_groups(run.policy, params, kinds, run.mesh, sampler.sampling, length, about)
    return dict(zip(sizes, rollouts, strict=True)), steps


def make_batch(
    run: Run, graded: Mapping[str, Graded], prompts: Mapping[str, Tokens], problems: Sequence[dict]
) -> Batch:
    """Puts the graded groups and their prompts together."""
    contexts = {
        name: Contexts([tokens[row["id"]] for row in problems], longest(tokens)) for name, tokens in prompts.items()
    }
    if run.config.rl.target == "own":
        contexts["guided"] = own_contexts(run, graded["autonomous"], prompts, problems)
    groups = {
        name: Group(g.rollout.tokens, g.rollout.lengths, g.rollout.logp, g.rewards, g.rollout.finish != STOP)
        for name, g in graded.items()
    }
    return Batch(contexts["autonomous"], contexts.get("guided"), groups["autonomous"], groups.get("guided"))


def own_contexts(
    run: Run, autonomous: Graded, prompts: Mapping[str, Tokens], problems: Sequence[dict]
) -> Contexts:
    """Makes the guided prompt of each of the B * G1 autonomous responses, in which the teacher reads it.

    The hint is the data's strategy or solution; or, with `rl.guide="sibling"`, the first other correct response to the
    same problem, without its thought. A response without one has the unguided prompt, which teaches nothing.
    """
    rl, size = run.config.rl, autonomous.rewards.shape[1]
    if rl.guide != "sibling":
        tokens = [prompts["guided"][row["id"]] for row in problems for _ in range(size)]
        return Contexts(tokens, longest(prompts["guided"]))
    most, tokens = longest_sibling_prompt(longest(prompts["autonomous"]), rl.max_new_tokens), []
    for row, texts, scores in zip(problems, autonomous.texts, autonomous.rewards, strict=True):
        plain = prompts["autonomous"][row["id"]]
        correct = [i for i in range(size) if scores[i] >= 1][:2]  # two, so that each response has another
        shown = [row | {"solution": texts[i].rpartition("</think>")[2].strip()} for i in correct]
        encoded = dict(zip(correct, encode_prompts(run.policy, shown, guided=True, hint="solution"), strict=True))
        for i in range(size):
            hints = [encoded[j] for j in correct if j != i and len(encoded[j]) <= most]
            tokens.append(hints[0] if hints else plain)
    return Contexts(tokens, most)


@phase("evaluation")
def _evaluate(run: Run, params: Any, step: int) -> tuple[float, dict[str, float]]:
    """Returns (mean accuracy over the evaluation sets, metrics) after a step."""
    results = evaluate_sets(run, params, run.workdir / "rl" / "generations", step)
    accuracies = {f"accuracy_{name}": result["accuracy"] for name, result in results.items()}
    mean = float(np.mean(list(accuracies.values())))
    return mean, {"accuracy": mean} | accuracies


def _rollout_metrics(autonomous: Graded, guided: Graded | None) -> dict[str, float]:
    """Returns rewards of both groups; lengths and outcomes of the autonomous one, which is the policy in training.

    "guidance" is what guidance adds to the reward, "solved" the share of problems with a correct response: pass@G1.
    """
    outcomes = [verdict.outcome for group in autonomous.verdicts for verdict in group]
    metrics = {"reward_auto": float(autonomous.rewards.mean())}
    metrics["solved"] = float((autonomous.rewards >= 1).any(axis=1).mean())
    if guided is not None:
        metrics["reward_guided"] = float(guided.rewards.mean())
        metrics["guidance"] = metrics["reward_guided"] - metrics["reward_auto"]
        metrics["response_length_guided"] = float(guided.rollout.lengths.mean())
    return {
        **metrics,
        "response_length": float(autonomous.rollout.lengths.mean()),
        "truncated": float((autonomous.rollout.finish != STOP).mean()),
        "identical": float(np.mean([len(set(group)) == 1 for group in autonomous.texts])),
        **{name: outcomes.count(name) / len(outcomes) for name in rewards.FAILURES},
    }


def _speed(clock: Clock, sampled: Sampled) -> dict[str, float]:
    """Returns seconds and response tokens per second of each phase, and the share of slot-steps with a response.

    With drafts, also how many tokens of a response were drafted, how many of these were right, and how many passes
    through the model a response took. With a pool, also how often a response was put back into the queue, and the
    greatest share of the pages that was in use.
    """
    tokens, steps, drafting = sampled.tokens, sampled.slot_steps, dict[str, float]()
    if isinstance(steps, Steps):
        passes, responses = int(steps.passes.sum()), steps.passes.size
        used = passes / max(steps.slots, 1)
        counts = {"drafted": int(steps.drafted.sum()), "accepted": tokens - passes, "passes": passes}
        if steps.put_back is not None:
            counts["put_back"] = int(steps.put_back.sum())
        drafting = {name: count / responses for name, count in counts.items()}
        if steps.pool_used is not None:
            drafting["pool_used"] = float(np.max(steps.pool_used))
    else:
        used = tokens / steps
    return {
        "tokens_per_second_rollout": tokens / clock.seconds["rollout"],
        "tokens_per_second_update": tokens / clock.seconds["update"],
        **{f"seconds_{phase}": seconds for phase, seconds in clock.seconds.items()},
        "seconds_step": clock.total,
        "slots_used": float(used),
        **drafting,
        **sampled.staleness,
    }
