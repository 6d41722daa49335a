"""Algorithm 1: sample an autonomous and a guided group for each problem, grade them, update; again.

The methods that SGPO is compared with (`methods.py`) are the same loop with another guided group, or none.

Axis key: B problems, G responses of a group, T response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sgpo_jax import data, logprobs, rewards, sharding
from sgpo_jax.data import filtering
from sgpo_jax.evaluation import evaluate_sets
from sgpo_jax.policy import Run, positions
from sgpo_jax.policy.generation import Graded, demonstrate, encode_prompts, grade, noise_key, respond_in_groups
from sgpo_jax.rollout import STOP, Rollout, Sampling
from sgpo_jax.runtime.profile import phase
from sgpo_jax.strategies import self_written
from sgpo_jax.training import packing, stage
from sgpo_jax.training.batch import Batch, Contexts, Group, pack_batch, specs
from sgpo_jax.training.loop import Clock, Loop
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.train_step import make_update
from sgpo_jax.training.weighting import Weighting

Tokens = dict[str, list[int]]  # problem's id -> tokens of its prompt


def train(run: Run, initial: Callable[[], Any]) -> None:
    """Runs RL, or what is left of it; checkpoints, metrics and generations go to `workdir/rl`.

    Args:
      run: the config, the folder, the model and its mesh.
      initial: returns the parameters to begin with, where there is no checkpoint.
    """
    rl = run.config.rl
    rows, prompts = load_rows(run)
    for name, tokens in prompts.items():
        what = f"RL, {name}"
        positions.check_limit(run.policy, [*tokens.values()], "rl.max_new_tokens", rl.max_new_tokens, what)
    batches = data.batches(rows, rl.batch, run.config.seed)
    total = rl.steps or rl.epochs * data.steps_per_epoch(rows, rl.batch)
    weighting, objective = Weighting.from_config(rl), Objective.from_config(rl)
    chunk = logprobs.default_chunk(run.mesh)

    with Loop(run, "rl", total, partial(_evaluate, run), rl.eval_every, rl.updates_per_batch) as loop:
        update = make_update(loop.forward, loop.optimizer, objective, shardings=loop.shardings)
        update = phase("update")(update)
        state = loop.start(initial)
        if rl.guided and rl.guide == "self" and loop.first < total:
            prompts["guided"] = own_prompts(run, state.params, rows, loop.first)
        for step in loop.steps():
            clock, position = Clock(), loop.position(step)
            problems = batches[position]
            sampled, slot_steps = sample_groups(run, state.params, prompts, problems, position)
            groups = with_demonstrations(run, sampled, prompts, problems)
            clock.lap("rollout")
            graded = {name: grade(run.policy, rollout, problems, rl.reward) for name, rollout in groups.items()}
            clock.lap("reward")
            batch = make_batch(graded, prompts, problems)
            packed = pack_batch(batch, weighting, rl.distillation, micro_batch=rl.micro_batch, chunk=chunk)
            state, device_metrics = update(state, sharding.put(packed, specs(packed), run.mesh))
            metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
            clock.lap("update")
            metrics |= _rollout_metrics(graded["autonomous"], graded.get("guided"))
            metrics |= _speed(clock, sampled, slot_steps) | {"rows_filled": packing.filled_share(packed.autonomous)}
            state = loop.finish(state, metrics, problems, batch)


def sampled_groups(rl: ConfigDict) -> dict[str, int]:
    """Returns the groups that a step samples, and their sizes; a demonstration is not sampled."""
    guided = {"guided": rl.guided} if rl.guided and rl.guide != "demonstration" else {}
    return {"autonomous": rl.autonomous, **guided}


@phase("rollout")
def sample_groups(
    run: Run, params: Any, prompts: Mapping[str, Tokens], problems: Sequence[dict], position: int
) -> tuple[dict[str, Rollout], int]:
    """Samples every group of a step at once.

    Args:
      run, params: the policy that samples, and how.
      prompts: group -> prompts of all problems.
      problems: B problems.
      position: the step's place among the batches, which together with the run's seed fixes the noise.

    Returns:
      (group of `sampled_groups` -> its rollout `[B,G]`, slot-steps of all groups).
    """
    config, sizes = run.config, sampled_groups(run.config.rl)
    tokens = [[prompts[name][row["id"]] for row in problems] for name in sizes]
    longest = max(_longest(prompts[name]) for name in sizes)
    keys = [noise_key(config.seed, name, position) for name in sizes]
    rollouts, slot_steps = respond_in_groups(
        run.policy, params, tokens, keys, run.mesh, Sampling.from_config(config.rl), list(sizes.values()), longest
    )
    return dict(zip(sizes, rollouts, strict=True)), slot_steps


def with_demonstrations(
    run: Run, sampled: dict[str, Rollout], prompts: Mapping[str, Tokens], problems: Sequence[dict]
) -> dict[str, Rollout]:
    """Adds the expert's solutions as the guided group, where the method has a guided group and does not sample it."""
    rl = run.config.rl
    if not rl.guided or "guided" in sampled:
        return sampled
    tokens = [prompts["autonomous"][row["id"]] for row in problems]
    return sampled | {"guided": demonstrate(run.policy, tokens, problems, rl.max_new_tokens)}


def make_batch(graded: Mapping[str, Graded], prompts: Mapping[str, Tokens], problems: Sequence[dict]) -> Batch:
    """Puts the graded groups and their prompts together."""
    contexts = {
        name: Contexts([tokens[row["id"]] for row in problems], _longest(tokens)) for name, tokens in prompts.items()
    }
    groups = {name: Group(g.rollout.tokens, g.rollout.lengths, g.rollout.logp, g.rewards) for name, g in graded.items()}
    return Batch(contexts["autonomous"], contexts.get("guided"), groups["autonomous"], groups.get("guided"))


def own_prompts(run: Run, params: Any, rows: Sequence[dict], step: int) -> Tokens:
    """Has the student write its own strategies, and returns the guided prompts with them."""
    written = self_written.write(run, params, rows, step)
    encoded = encode_prompts(run.policy, written, guided=True)
    return {row["id"]: tokens for row, tokens in zip(written, encoded, strict=True)}


def load_rows(run: Run) -> tuple[list[dict], dict[str, Tokens]]:
    """Reads the problems of RL; an account of those left out goes to `workdir`.

    Returns:
      (problems, group -> prompts). Guided prompts are those with the data's strategies, and are there only where the
      method shows them.

    Raises:
      ValueError: there are fewer problems than a batch needs, or others than the run began with.
    """
    config, policy = run.config, run.policy
    sieve = stage.sift(config, config.data.train)
    if not config.sft.train:
        warm_up, _ = data.split_sft(sieve.rows, config.data.sft_share)
        sieve.leave_out("for the warm-up", {row["id"]: "" for row in warm_up})
    needed = {"strategy": "strategy", "self": "problem", "demonstration": "solution"}[config.rl.guide]
    needed = needed if config.rl.guided else "problem"
    sieve.leave_out(f"without {needed}", {row["id"]: "" for row in sieve.rows if needed not in row})
    ids = [row["id"] for row in sieve.rows]
    names = ("autonomous", "guided") if needed == "strategy" else ("autonomous",)
    encoded = {name: encode_prompts(policy, sieve.rows, guided=name == "guided") for name in names}
    # The guided prompt is the longer one.
    long = filtering.too_long(sieve.rows, encoded[names[-1]], config.data.max_prompt_tokens)
    sieve.leave_out("prompt too long", long)
    if needed == "solution":
        stage.count_thoughts(sieve, policy, dict(zip(ids, encoded["autonomous"], strict=True)))
    stage.account(sieve, run.workdir, "rl")
    if len(sieve.rows) < config.rl.batch:
        raise ValueError(f"RL has {len(sieve.rows)} problems, fewer than rl.batch={config.rl.batch}")
    prompts = {
        name: {id: tokens for id, tokens in zip(ids, encoded[name], strict=True) if id not in long} for name in names
    }
    return sieve.rows, prompts


def _longest(prompts: Tokens) -> int:
    return max(map(len, prompts.values()))


@phase("evaluation")
def _evaluate(run: Run, params: Any, step: int) -> tuple[float, dict[str, float]]:
    """Returns (mean accuracy over the evaluation sets, metrics) after a step."""
    results = evaluate_sets(run, params, run.workdir / "rl" / "generations", step)
    accuracies = {f"accuracy_{name}": result["accuracy"] for name, result in results.items()}
    mean = float(np.mean(list(accuracies.values())))
    return mean, {"accuracy": mean} | accuracies


def _rollout_metrics(autonomous: Graded, guided: Graded | None) -> dict[str, float]:
    """Returns rewards of both groups; lengths and outcomes of the autonomous one, which is the policy in training."""
    outcomes = [verdict.outcome for group in autonomous.verdicts for verdict in group]
    metrics = {"reward_auto": float(autonomous.rewards.mean())}
    if guided is not None:
        metrics["reward_guided"] = float(guided.rewards.mean())
        metrics["response_length_guided"] = float(guided.rollout.lengths.mean())
    return {
        **metrics,
        "response_length": float(autonomous.rollout.lengths.mean()),
        "truncated": float((autonomous.rollout.finish != STOP).mean()),
        "identical": float(np.mean([len(set(group)) == 1 for group in autonomous.texts])),
        **{name: outcomes.count(name) / len(outcomes) for name in rewards.FAILURES},
    }


def _speed(clock: Clock, sampled: Mapping[str, Rollout], slot_steps: int) -> dict[str, float]:
    """Returns seconds and response tokens per second of each phase, and the share of slot-steps that made a token."""
    tokens = int(sum(rollout.lengths.sum() for rollout in sampled.values()))
    return {
        "tokens_per_second_rollout": tokens / clock.seconds["rollout"],
        "tokens_per_second_update": tokens / clock.seconds["update"],
        **{f"seconds_{phase}": seconds for phase, seconds in clock.seconds.items()},
        "seconds_step": clock.total,
        "slots_used": float(tokens / slot_steps),
    }
