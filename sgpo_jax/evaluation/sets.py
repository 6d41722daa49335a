"""Sampling a set of problems and grading it: avg@k, pass@k and maj@k, every generation on disk, problem by problem.

The file of the generations is the state of an evaluation: a finished problem in it is not sampled again. The noise
depends on seed, set, step, problem and sample alone, so it does not matter how often an evaluation was killed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sgpo_jax import data, rewards
from sgpo_jax.data import unsolvable
from sgpo_jax.evaluation import generations
from sgpo_jax.policy import Policy, Run, memory, positions
from sgpo_jax.policy.generation import encode_prompts, grade, noise_key, pad_prompts, respond
from sgpo_jax.rollout import Rollout, Sampling
from sgpo_jax.runtime import distributed, preemption
from sgpo_jax.runtime.files import append_text, jsonl
from sgpo_jax.runtime.progress import Progress
from sgpo_jax.stats import benchmark

SPEED = ("slots", "decode_ways", "draft", "watch")  # fields of the sampling that change no response


@dataclass(frozen=True)
class Settings:
    """Everything that the generations of an evaluation depend on, besides the parameters and the problems."""

    name: str  # of the set; with seed, step and guided it fixes the noise
    seed: int
    step: int
    guided: bool  # show the strategies
    samples: int  # K, responses to each problem
    sampling: Sampling
    batch: int  # problems sampled at once; changes no response
    reward: str = ""  # as in `rewards.judge`
    model: str = ""  # name of what is evaluated, for the record

    @property
    def context(self) -> str:
        """Returns "guided" or "unguided"."""
        return benchmark.CONTEXTS[self.guided]


def evaluate(
    policy: Policy,
    params: Any,
    rows: Sequence[dict],
    mesh: Mesh,
    settings: Settings,
    path: Path,
    restart: bool = False,
) -> dict[str, Any]:
    """Samples K responses to each problem and grades them, except for the problems that `path` already has.

    Args:
      policy, params: what is evaluated.
      rows: M problems.
      mesh: where it runs.
      settings: the set, K, the sampling.
      path: JSONL file for every generation with its verdict; it grows by a batch of problems at a time. The settings
        stand beside it, in a file that ends in .settings.json.
      restart: begin anew when `path` was made with other settings.

    Returns:
      The metrics of `summarize` over all problems. If some are unsolvable as stated, "solvable" has the metrics of the
      others.

    Raises:
      ValueError: `path` was made with other settings, and `restart` is not set; or the processes have read different
        problems.
    """
    sampling, problems = settings.sampling, generations.digest(rows)
    record = {
        "model": settings.model, "set": settings.name, "seed": settings.seed, "step": settings.step,
        "guided": settings.guided, "samples": settings.samples, "reward": settings.reward,
        "instruction": policy.instruction, "dtype": jnp.dtype(policy.dtype).name,
        **{name: value for name, value in asdict(sampling).items() if name not in SPEED},
        **({"system": policy.system} if policy.system else {}), "problems": problems,
    }  # fmt: skip
    distributed.agree({f"the content of the problems of {settings.name}": problems})
    finished = distributed.first(lambda: generations.resume(path, record, rows, settings.samples, restart).tolist())
    numbers = np.array(finished, np.float32)
    left = np.any(np.isnan(numbers), axis=(1, 2))

    prompts = encode_prompts(policy, rows, settings.guided)
    length = max(map(len, prompts))
    key = noise_key(settings.seed, f"{settings.name}/{settings.context}", settings.step)
    done = len(rows) - int(left.sum())
    progress = Progress(f"evaluating {settings.name}", len(rows), done, enabled=distributed.is_first())
    for start in range(0, len(rows), settings.batch):
        part = slice(start, min(start + settings.batch, len(rows)))
        if not left[part].any():
            continue
        preemption.check()
        # The last batch is filled up, so that every batch has one shape.
        ids = np.minimum(np.arange(start, start + settings.batch), len(rows) - 1)
        padded = pad_prompts(policy, [prompts[i] for i in ids], length)
        rollout, _ = respond(policy, params, padded, ids, key, mesh, sampling, settings.samples)
        rollout = Rollout(*(field[: part.stop - start] for field in rollout))
        lines = generations.lines_of(rows[part], grade(policy, rollout, rows[part], settings.reward), settings.step)
        unfinished = [(i, group) for i, group in enumerate(lines, part.start) if left[i]]
        for i, group in unfinished:
            numbers[i] = [generations.numbers_of(line) for line in group]
        if distributed.is_first():
            append_text(path, jsonl(line for _, group in unfinished for line in group))
        done += len(unfinished)
        progress.show(done, {"accuracy": float(np.nanmean(numbers[..., 0]))})
    solvable = np.array([unsolvable.reason(row["problem"]) is None for row in rows])
    result = summarize(numbers)
    return result if solvable.all() else result | {"solvable": summarize(numbers[solvable])}


def summarize(numbers: np.ndarray) -> dict[str, Any]:
    """Computes the metrics of graded samples.

    Args:
      numbers: `[M,K,5]`, `generations.NUMBERS` of each response.

    Returns:
      accuracy (avg@K); pass@k and maj@k for k = 1, 2, 4, ..., K; length (tokens); shares truncated, no_box, timeout,
      crash, invalid; "intervals": metric -> [low, high], 95 % by bootstrap over problems; the number of problems; and
      per_problem, `[M]` accuracies.
    """
    reward, tokens, truncated, outcome, vote = np.moveaxis(numbers.astype(np.float64), -1, 0)
    values = benchmark.per_problem(reward, vote.astype(int))
    values |= {"length": tokens.mean(axis=1), "truncated": truncated.mean(axis=1)}
    values |= {name: (outcome == generations.OUTCOMES.index(name)).mean(axis=1) for name in rewards.FAILURES}
    return {
        **{name: float(value.mean()) for name, value in values.items()},
        "intervals": {name: list(benchmark.bootstrap(value)) for name, value in values.items()},
        "problems": len(numbers),
        "per_problem": values["accuracy"].tolist(),
    }


def check_sets(run: Run, limit: int = 0) -> None:
    """Checks that prompts and responses of every set fit into the model's positions, and the slots into the memory.

    Args:
      run: the config, the policy and the mesh.
      limit: first problems of each set that are evaluated; 0 is `eval.limit` of the config.

    Raises:
      ValueError: `eval.max_new_tokens` or `eval.slots` is too large; see `positions.check_limit`, `memory.sampling`.
    """
    fields = run.config.eval
    for context in benchmark.contexts(fields.guided):
        for name, chosen in fields.sets.items():
            _sampling(run, chosen.samples)
            rows = _rows(chosen.source, guided=context == "guided")[: limit or fields.limit or None]
            prompts = encode_prompts(run.policy, rows, guided=context == "guided")
            what = f"{name}, {context}"
            positions.check_limit(run.policy, prompts, "eval.max_new_tokens", fields.max_new_tokens, what)


def _sampling(run: Run, samples: int) -> Sampling:
    batch = run.config.eval.batch
    return memory.sampling(run, "eval", batch * samples, batch)


def _rows(source: str, guided: bool) -> list[dict]:
    return [row for row in data.load(source) if "strategy" in row or not guided]


def evaluate_sets(
    run: Run,
    params: Any,
    folder: Path,
    step: int,
    guided: bool = False,
    limit: int = 0,
    model: str = "",
    restart: bool = True,
) -> dict[str, dict[str, Any]]:
    """Evaluates on every set of the config; the generations go to `folder`.

    Args:
      run, params: what is evaluated, and how.
      folder: for the generations.
      step: of the parameters.
      guided: show the strategies; rows without one are left out.
      limit: first problems of each set; 0 is `eval.limit` of the config.
      model: name of what is evaluated, for the record; "" is the config's.
      restart: begin anew where generations were made with other settings.

    Returns:
      Set -> the result of `evaluate`, and under "available" the number of its problems. A set without problems is left
      out.
    """
    config, fields = run.config, run.config.eval
    results = {}
    for name, chosen in fields.sets.items():
        rows = _rows(chosen.source, guided)
        if not rows:
            continue
        settings = Settings(
            name, config.seed, step, guided, chosen.samples, _sampling(run, chosen.samples), fields.batch,
            config.rl.reward, model or config.model.source,
        )  # fmt: skip
        path = folder / f"{name}_{settings.context}_{step:06d}.jsonl"
        first = rows[: limit or fields.limit or None]
        result = evaluate(run.policy, params, first, run.mesh, settings, path, restart)
        run.trackers.lines(f"{folder.parent.name}/{folder.name}/{name}_{settings.context}", step, path)
        results[name] = result | {"available": len(rows)}
    return results
