"""Sampling a set of problems and grading it: avg@k, pass@k and maj@k, every generation on disk, problem by problem.

The file of the generations is the state of an evaluation: a finished problem in it is not sampled again. The noise
depends on seed, set, step, problem and sample alone, so it does not matter how often an evaluation was killed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

SPEED = ("slots", "decode_ways", "draft", "pool", "page", "watch")  # fields of the sampling that change no response


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


class Chosen(NamedTuple):
    """A set that is evaluated."""

    rows: Sequence[dict]  # M problems
    settings: Settings
    path: Path  # JSONL file for every generation with its verdict; the settings stand beside it, in .settings.json


def evaluate(
    policy: Policy, params: Any, chosen: Sequence[Chosen], mesh: Mesh, restart: bool = False
) -> list[dict[str, Any]]:
    """Samples K responses to each problem and grades them, except for the problems that the files already have.

    Sets of one K are sampled together: a batch goes on with the next set where a set ends, so only the last batch of
    all is filled up, and so few wait for their longest response. It changes no response.

    Args:
      policy, params: what is evaluated.
      chosen: the sets. Their files grow by a batch of problems at a time.
      mesh: where it runs.
      restart: begin a file anew that was made with other settings.

    Returns:
      For each set, the metrics of `summarize` over all problems. If some are unsolvable as stated, "solvable" has the
      metrics of the others.

    Raises:
      ValueError: a file was made with other settings, and `restart` is not set; or the processes have read different
        problems.
    """
    numbers = [_finished(policy, *each, restart) for each in chosen]
    together: dict[tuple, list[int]] = {}
    for i, (_, settings, _) in enumerate(chosen):
        common = settings.samples, settings.sampling, settings.batch, settings.reward, settings.step
        together.setdefault(common, []).append(i)
    for members in together.values():
        _sample(policy, params, [chosen[i] for i in members], [numbers[i] for i in members], mesh)
    results = []
    for (rows, *_), graded in zip(chosen, numbers, strict=True):
        solvable = np.array([unsolvable.reason(row["problem"]) is None for row in rows])
        result = summarize(graded)
        results.append(result if solvable.all() else result | {"solvable": summarize(graded[solvable])})
    return results


def _finished(policy: Policy, rows: Sequence[dict], settings: Settings, path: Path, restart: bool) -> np.ndarray:
    """Returns `[M,K,5]` `generations.NUMBERS` of the problems that the file has, NaN for the others."""
    problems = generations.digest(rows)
    record = {
        "model": settings.model, "set": settings.name, "seed": settings.seed, "step": settings.step,
        "guided": settings.guided, "samples": settings.samples, "reward": settings.reward,
        "instruction": policy.instruction, "dtype": jnp.dtype(policy.dtype).name,
        **{name: value for name, value in asdict(settings.sampling).items() if name not in SPEED},
        **({"system": policy.system} if policy.system else {}), "problems": problems,
    }  # fmt: skip
    distributed.agree({f"the content of the problems of {settings.name}": problems})
    finished = distributed.first(lambda: generations.resume(path, record, rows, settings.samples, restart).tolist())
    return np.array(finished, np.float32)


def _sample(
    policy: Policy, params: Any, chosen: Sequence[Chosen], numbers: Sequence[np.ndarray], mesh: Mesh
) -> None:
    """Samples and grades what is left of sets that are sampled and graded alike; fills in their `numbers`."""
    samples, sampling, size = (getattr(chosen[0].settings, name) for name in ("samples", "sampling", "batch"))
    prompts = [encode_prompts(policy, rows, settings.guided) for rows, settings, _ in chosen]
    keys = [
        noise_key(settings.seed, f"{settings.name}/{settings.context}", settings.step) for _, settings, _ in chosen
    ]
    length = max(len(tokens) for each in prompts for tokens in each)
    problems = [(i, row) for i, (rows, *_) in enumerate(chosen) for row in range(len(rows))]
    left = {(i, row) for i, row in problems if np.isnan(numbers[i][row]).any()}
    what = ", ".join(dict.fromkeys(settings.name for _, settings, _ in chosen))
    done = len(problems) - len(left)
    progress = Progress(f"evaluating {what}", len(problems), done, enabled=distributed.is_first())
    for start in range(0, len(problems), size):
        batch = problems[start : start + size]
        if left.isdisjoint(batch):
            continue
        preemption.check()
        # The last batch is filled up, so that every batch has one shape.
        filled = batch + [batch[-1]] * (size - len(batch))
        padded = pad_prompts(policy, [prompts[i][row] for i, row in filled], length)
        noise = jnp.stack([keys[i] for i, _ in filled])
        ids = np.array([row for _, row in filled])
        rollout, _ = respond(policy, params, padded, ids, noise, mesh, sampling, samples)
        rollout = Rollout(*(field[: len(batch)] for field in rollout))
        rows = [chosen[i].rows[row] for i, row in batch]
        graded = grade(policy, rollout, rows, chosen[0].settings.reward)
        lines = generations.lines_of(rows, graded, chosen[0].settings.step)
        new = [(problem, group) for problem, group in zip(batch, lines, strict=True) if problem in left]
        for (i, row), group in new:
            numbers[i][row] = [generations.numbers_of(line) for line in group]
        for i, (_, _, path) in enumerate(chosen):
            content = jsonl(line for (owner, _), group in new if owner == i for line in group)
            if content and distributed.is_first():
                append_text(path, content)
        left -= set(batch)
        rewards_so_far = np.concatenate([each[..., 0].ravel() for each in numbers])
        progress.show(len(problems) - len(left), {"accuracy": float(np.nanmean(rewards_so_far))})


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
    names, chosen, available = [], [], []
    for name, about in fields.sets.items():
        rows = _rows(about.source, guided)
        if rows:
            settings = Settings(
                name, config.seed, step, guided, about.samples, _sampling(run, about.samples), fields.batch,
                config.rl.reward, model or config.model.source,
            )  # fmt: skip
            path = folder / f"{name}_{settings.context}_{step:06d}.jsonl"
            names.append(name)
            chosen.append(Chosen(rows[: limit or fields.limit or None], settings, path))
            available.append(len(rows))
    results = evaluate(run.policy, params, chosen, run.mesh, restart)
    for _, settings, path in chosen:
        run.trackers.lines(f"{folder.parent.name}/{folder.name}/{settings.name}_{settings.context}", step, path)
    return {
        name: result | {"available": count} for name, result, count in zip(names, results, available, strict=True)
    }
