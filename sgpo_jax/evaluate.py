"""Sampling a set of problems and grading it: avg@k and pass@k with bootstrap intervals, every generation on disk."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import data
from sgpo_jax.policy import Policy
from sgpo_jax.respond import Graded, encode_prompts, grade, noise_key, pad_prompts, respond
from sgpo_jax.rollout import STOP, Rollout

RESAMPLES = 2000  # of the bootstrap


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of per-problem values `[M]`, resampling problems."""
    count = len(values)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    low, high = np.percentile(draws @ values / count, [2.5, 97.5])
    return float(low), float(high)


def evaluate(
    policy: Policy,
    params: Any,
    rows: Sequence[dict],
    mesh: Mesh,
    *,
    name: str,
    seed: int,
    step: int,
    guided: bool,
    samples: int,
    batch: int,
    path: Path,
    **sampling: Any,
) -> dict[str, Any]:
    """Samples k responses to each problem and grades them.

    Args:
      policy, params: what is evaluated.
      rows: M problems.
      mesh: where it runs.
      name: of the set; with `seed`, `step` and `guided` it fixes the noise.
      guided: show the strategies.
      samples: k.
      batch: problems generated for at once.
      path: JSONL file for every generation with its verdict; written when all are done.
      sampling: max_new_tokens, temperature, top_p, top_k.

    Returns:
      accuracy (avg@k) with low and high (95 % bootstrap over problems), pass_at_k, mean length in tokens, shares
      truncated and of each outcome, and per_problem: `[M]` accuracies.
    """
    prompts = encode_prompts(policy, rows, guided)
    length = max(map(len, prompts))
    key = noise_key(seed, f"{name}/{'guided' if guided else 'unguided'}", step)
    graded: list[Graded] = []
    for start in range(0, len(rows), batch):
        # The last batch is filled up, so that every batch has one shape.
        ids = np.minimum(np.arange(start, start + batch), len(rows) - 1)
        padded = pad_prompts(policy, [prompts[i] for i in ids], length)
        rollout = respond(policy, params, padded, ids, key, mesh, group=samples, **sampling)
        real = min(batch, len(rows) - start)
        rollout = Rollout(*(field[:real] for field in rollout))
        graded.append(grade(policy, rollout, [row["answer"] for row in rows[start : start + real]]))
    if jax.process_index() == 0:
        _write_generations(path, rows, graded, step)
    reward = np.concatenate([g.rewards for g in graded])
    outcomes = [verdict.outcome for g in graded for group in g.verdicts for verdict in group]
    per_problem = reward.mean(axis=1)
    low, high = bootstrap(per_problem)
    shares = {outcome: outcomes.count(outcome) / len(outcomes) for outcome in ("no_box", "timeout", "crash")}
    return {
        "accuracy": float(per_problem.mean()),
        "low": low,
        "high": high,
        "pass_at_k": float(reward.max(axis=1).mean()),
        "length": float(np.mean(np.concatenate([g.rollout.lengths for g in graded]))),
        "truncated": float(np.mean(np.concatenate([g.rollout.finish for g in graded]) != STOP)),
        **shares,
        "per_problem": per_problem.tolist(),
    }


def evaluate_sets(
    config: ConfigDict, folder: Path, policy: Policy, params: Any, mesh: Mesh, step: int, guided: bool = False
) -> dict[str, dict[str, Any]]:
    """`evaluate` on every set of the config; generations go to `folder`."""
    fields = config.eval
    sampling = {name: fields[name] for name in ("batch", "max_new_tokens", "temperature", "top_p", "top_k")}
    results = {}
    for name, chosen in fields.sets.items():
        rows = data.load(chosen.source)
        if guided:
            rows = [row for row in rows if "strategy" in row]
        if not rows:
            continue
        path = folder / f"{name}_{'guided' if guided else 'unguided'}_{step:06d}.jsonl"
        results[name] = evaluate(
            policy, params, rows, mesh, name=name, seed=config.seed, step=step, guided=guided,
            samples=chosen.samples, path=path, **sampling,
        )  # fmt: skip
    return results


def _write_generations(path: Path, rows: Sequence[dict], graded: Sequence[Graded], step: int) -> None:
    """One line per response, in a file that appears only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    remaining = iter(rows)
    with unfinished.open("w", encoding="utf-8") as file:
        for part in graded:
            for i, group in enumerate(part.texts):
                row = next(remaining)
                for sample, text in enumerate(group):
                    verdict = part.verdicts[i][sample]
                    line = {
                        "step": step,
                        "id": row["id"],
                        "sample": sample,
                        "problem": row["problem"],
                        "answer": row["answer"],
                        "response": text,
                        "extracted": verdict.extracted,
                        "outcome": verdict.outcome,
                        "reward": float(part.rewards[i, sample]),
                        "tokens": int(part.rollout.lengths[i, sample]),
                        "truncated": bool(part.rollout.finish[i, sample] != STOP),
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)
