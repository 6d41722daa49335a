"""Algorithm 1: sample an autonomous and a guided group for each problem, grade them, update; again.

The methods SGPO is compared with (`methods.py`) are the same loop with another guided group, or none.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import data, logprobs, rewards, sharding
from sgpo_jax.data import filtering
from sgpo_jax.evaluation import evaluate_sets
from sgpo_jax.policy import Policy
from sgpo_jax.policy.generation import (
    Graded,
    Prompts,
    demonstrate,
    encode_prompts,
    grade,
    noise_key,
    pad_prompts,
    respond_in_groups,
)
from sgpo_jax.report import page
from sgpo_jax.rollout import STOP, Rollout
from sgpo_jax.runtime import preemption
from sgpo_jax.runtime.metric_writer import Writer
from sgpo_jax.strategies import self_written
from sgpo_jax.training import collapse, packing, rollback, stage
from sgpo_jax.training.batch import Batch, Group, pack_batch, specs
from sgpo_jax.training.train_step import make_update


def train(config: ConfigDict, workdir: Path, policy: Policy, initial: Callable[[], Any], mesh: Mesh) -> None:
    """Runs RL, or what is left of it; checkpoints, metrics and generations go to `workdir/rl`."""
    while _train_until_rollback(config, workdir, policy, initial, mesh):
        pass  # what is on disk now is resumed


def _train_until_rollback(
    config: ConfigDict, workdir: Path, policy: Policy, initial: Callable[[], Any], mesh: Mesh
) -> bool:
    """Runs RL to its end, or until it has gone back to before a collapse; whether it has."""
    rl = config.rl
    rows, prompts = load_rows(config, workdir, policy)
    batches = data.batches(rows, rl.batch, config.seed)
    total = rl.steps or rl.epochs * data.steps_per_epoch(rows, rl.batch)

    tx, rate = stage.optimizer(config, "rl", total * rl.updates_per_batch)
    _, shardings = stage.state_shardings(policy, tx, mesh)
    of_batch, of_update = method(rl)
    chunk = logprobs.default_chunk(mesh)
    update = make_update(
        policy.config, tx, **of_update, dtype=policy.dtype, remat=config.model.remat, shardings=shardings
    )

    rollbacks = rollback.read(workdir)
    with stage.checkpoints(config, workdir, "rl") as saved, jax.set_mesh(mesh):
        state = stage.start(saved, initial, policy, tx, mesh)
        first = int(state.step)
        if first >= total:
            return False
        if rl.guided and rl.guide == "self":
            written = self_written.write(
                policy, state.params, rows, mesh, path=workdir / "rl" / "strategies.jsonl", step=first,
                seed=config.seed, tries=rl.self_tries, batch=rl.batch, reward=rl.reward, **_sampling(rl),
                max_prompt_tokens=config.data.max_prompt_tokens, bare=config.model.tokenizer == "arithmetic",
            )  # fmt: skip
            encoded = encode_prompts(policy, written, guided=True)
            prompts[True] = {row["id"]: tokens for row, tokens in zip(written, encoded, strict=True)}
        watch = collapse_watch(config.monitor, rollback.recent_rows(workdir, first, config.monitor.window))
        show = page.live(workdir, config.report_seconds * (jax.process_index() == 0), "RL", total)
        with Writer(workdir, total, "rl", resume_step=first, enabled=jax.process_index() == 0) as writer:
            for step in range(first, total):
                position = step + rollback.passed(rollbacks)
                batch_rows = batches[position]
                times = [time.perf_counter()]
                sampled, slot_steps = sample_groups(config, policy, state.params, prompts, batch_rows, position, mesh)
                unguided_prompts, autonomous = sampled["autonomous"]
                guided_prompts, guided = sampled.get("guided", (None, None))
                own = [rollout for _, rollout in sampled.values()]
                if rl.guided and guided is None:
                    tokens = [prompts[False][row["id"]] for row in batch_rows]
                    guided = demonstrate(policy, tokens, batch_rows, rl.max_new_tokens)
                times.append(time.perf_counter())
                graded_auto = grade(policy, autonomous, batch_rows, rl.reward)
                graded_guided = grade(policy, guided, batch_rows, rl.reward) if guided else None
                times.append(time.perf_counter())
                groups = _group(graded_auto), _group(graded_guided) if graded_guided else None
                batch = Batch(unguided_prompts, guided_prompts, *groups)
                packed = pack_batch(batch, micro_batch=rl.micro_batch, chunk=chunk, **of_batch)
                state, device_metrics = update(state, sharding.put(packed, specs(packed), mesh))
                metrics = {name: float(value) for name, value in device_metrics.items()}
                times.append(time.perf_counter())

                done = step + 1
                stage.watch_skipped(config, workdir, "rl", done, int(metrics["skipped"]), batch_rows, batch)
                metrics |= _rollout_metrics(graded_auto, graded_guided) | _speed(times, *own)
                metrics["rows_filled"] = packing.filled(packed.autonomous)
                if step == first:
                    stage.advise_packing(config, "rl", metrics["rows_filled"], mesh)
                metrics["slots_used"] = float(sum(each.lengths.sum() for each in own) / slot_steps)
                metrics["learning_rate"] = float(rate(step * rl.updates_per_batch))
                score = None
                if rl.eval_every and (done % rl.eval_every == 0 or done == total):
                    scores = evaluate_sets(config, workdir / "rl" / "generations", policy, state.params, mesh, done)
                    score = float(np.mean([result["accuracy"] for result in scores.values()]))
                    metrics["accuracy"] = score
                    metrics |= {f"accuracy_{name}": result["accuracy"] for name, result in scores.items()}
                writer.write(done, metrics)
                collapsed = watch(metrics)
                if collapsed and config.monitor.action == "rollback" and len(rollbacks) < config.monitor.most_rollbacks:
                    if rollback.go_back(workdir, saved, config.monitor, config.checkpoint.every, done, collapsed):
                        preemption.check()
                        return True
                preempted = preemption.requested()
                if score is not None or done % config.checkpoint.every == 0 or done == total or preempted or collapsed:
                    saved.save(done, state, score)
                if preempted:
                    preemption.check()
                if collapsed:
                    after = f" after {len(rollbacks)} rollbacks" * bool(rollbacks)
                    raise FloatingPointError(f"step {done}: {collapsed}; stopped{after}, as monitor.action asks")
                show(done)
    return False


def sampled_groups(rl: ConfigDict) -> dict[str, int]:
    """The groups that a step samples, and their sizes; a demonstration is none."""
    guided = {"guided": rl.guided} if rl.guided and rl.guide != "demonstration" else {}
    return {"autonomous": rl.autonomous, **guided}


def sample_groups(
    config: ConfigDict,
    policy: Policy,
    params: Any,
    prompts: dict[bool, dict[str, list[int]]],
    rows: Sequence[dict],
    position: int,
    mesh: Mesh,
) -> tuple[dict[str, tuple[Prompts, Rollout]], int]:
    """Samples every group of a step at once.

    Args:
      config: of the run.
      policy, params, mesh: what samples, and where.
      prompts: guided? -> problem's id -> tokens, of all problems.
      rows: B problems.
      position: the step's among the batches, which together with the run's seed decides the noise.

    Returns:
      (group of `sampled_groups` -> its prompts and its rollout `[B,G]`, slot-steps of all).
    """
    sizes = sampled_groups(config.rl)
    of_group = [prompts[name == "guided"] for name in sizes]
    tokens = [[each[row["id"]] for row in rows] for each in of_group]
    longest = [max(map(len, each.values())) for each in of_group]
    keys = [noise_key(config.seed, name, position) for name in sizes]
    rollouts, slot_steps = respond_in_groups(
        policy, params, tokens, max(longest), keys, mesh, list(sizes.values()), **_sampling(config.rl)
    )
    padded = [pad_prompts(policy, *each) for each in zip(tokens, longest, strict=True)]
    return dict(zip(sizes, zip(padded, rollouts, strict=True), strict=True)), slot_steps


def _sampling(rl: ConfigDict) -> dict[str, Any]:
    return {name: rl[name] for name in ("slots", "max_new_tokens", "temperature", "top_p", "top_k")}


def method(rl: ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `pack_batch` and `make_update` are told about the method."""
    weights = ("advantage", "weight", "alpha0", "gamma", "alpha_max", "gate", "sft_weight")
    terms = (
        "updates_per_batch", "clip_low", "clip_high", "delta", "distillation", "beta", "kl_top_k", "shaping",
        "entropy_bonus",
    )  # fmt: skip
    of_batch = {name: rl[name] for name in ("guide", "target", "distillation", *weights)}
    of_update = {name: rl[name] for name in terms}
    return of_batch, of_update | {"normaliser": rl.max_new_tokens if rl.normaliser == "constant" else 0}


def collapse_watch(limits: ConfigDict, before: Sequence[dict[str, Any]]) -> Callable[[dict[str, float]], str]:
    """A function of each step's metrics that prints a sign of a collapse when it appears, and returns why not to go on.

    `before` are the rows of the steps before, which it knows already.
    """
    rows: deque[dict[str, Any]] = deque(before, maxlen=limits.window)
    known = set(collapse.signs(list(rows), limits))

    def watch(metrics: dict[str, float]) -> str:
        rows.append(metrics)
        found = collapse.signs(list(rows), limits)
        for field in found.keys() - known:
            print(f"warning: {found[field]}", flush=True)
        known.clear()
        known.update(found)
        return "; ".join(found.values()) if limits.action != "warn" else ""

    return watch


def load_rows(config: ConfigDict, workdir: Path, policy: Policy) -> tuple[list[dict], dict[bool, dict[str, list[int]]]]:
    """(problems, guided? -> id -> prompt tokens) of RL; an account of those left out goes to `workdir`.

    Guided prompts are those with the data's strategies, and are there only where the method shows them.

    Raises:
      ValueError: there are fewer problems than a batch needs, or others than the run began with.
    """
    sieve = stage.sift(config, config.data.train)
    if not config.sft.train:
        warm_up, _ = data.split_sft(sieve.rows, config.data.sft_share)
        sieve.leave_out("for the warm-up", {row["id"]: "" for row in warm_up})
    needed = {"strategy": "strategy", "self": "problem", "demonstration": "solution"}[config.rl.guide]
    needed = needed if config.rl.guided else "problem"
    sieve.leave_out(f"without {needed}", {row["id"]: "" for row in sieve.rows if needed not in row})
    ids = [row["id"] for row in sieve.rows]
    kinds = (False, True) if needed == "strategy" else (False,)
    encoded = {guided: encode_prompts(policy, sieve.rows, guided) for guided in kinds}
    # The guided prompt is the longer one.
    long = filtering.too_long(sieve.rows, encoded[kinds[-1]], config.data.max_prompt_tokens)
    sieve.leave_out("prompt too long", long)
    stage.account(sieve, workdir, "rl")
    if len(sieve.rows) < config.rl.batch:
        raise ValueError(f"RL has {len(sieve.rows)} problems, fewer than rl.batch={config.rl.batch}")
    prompts = {
        guided: {id: tokens for id, tokens in zip(ids, encoded[guided], strict=True) if id not in long}
        for guided in encoded
    }
    return sieve.rows, prompts


def _group(graded: Graded) -> Group:
    rollout = graded.rollout
    return Group(rollout.tokens, rollout.lengths, rollout.logp, graded.rewards)


def _rollout_metrics(autonomous: Graded, guided: Graded | None) -> dict[str, float]:
    """Rewards of both groups; length and outcomes of the autonomous one, which is the policy that is being trained."""
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


def _speed(times: list[float], *rollouts: Any) -> dict[str, float]:
    """Seconds and response tokens per second of each phase."""
    tokens = int(sum(rollout.lengths.sum() for rollout in rollouts))
    generating, grading, updating = (end - start for start, end in zip(times, times[1:], strict=False))
    return {
        "tokens_per_second_rollout": tokens / generating,
        "tokens_per_second_update": tokens / updating,
        "seconds_rollout": generating,
        "seconds_reward": grading,
        "seconds_update": updating,
        "seconds_step": times[-1] - times[0],
    }
