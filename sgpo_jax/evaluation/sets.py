"""Sampling a set of problems and grading it: avg@k, pass@k and maj@k, every generation on disk, problem by problem.

The generations file is the state of an evaluation: whole problems that are in it are not sampled again. Noise depends
on seed, set, step, problem and sample alone, so it does not matter how often an evaluation was killed.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import data, rewards
from sgpo_jax.data import unsolvable
from sgpo_jax.evaluation.majority import _votes
from sgpo_jax.policy import Policy
from sgpo_jax.policy.generation import Graded, encode_prompts, grade, noise_key, pad_prompts, respond
from sgpo_jax.rollout import STOP, Rollout
from sgpo_jax.runtime import distributed, preemption
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.runtime.progress import progress_line
from sgpo_jax.stats import benchmark

_OUTCOMES: tuple[rewards.Outcome, ...] = ("correct", "wrong", *rewards.FAILURES)
_NUMBERS = ("reward", "tokens", "truncated", "outcome", "vote")  # of a line, outcome as an index
_PROGRESS_SECONDS = 5.0  # least time between two lines of progress


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
    slots: int = 0,
    path: Path,
    reward: str = "",
    model: str = "",
    restart: bool = False,
    **sampling: Any,
) -> dict[str, Any]:
    """Samples K responses to each problem and grades them, but for those that `path` has already.

    Args:
      policy, params: what is evaluated.
      rows: M problems.
      mesh: where it runs.
      name: of the set; with `seed`, `step` and `guided` it fixes the noise.
      guided: show the strategies.
      samples: K.
      batch: problems generated for at once.
      slots: responses decoded at once; 0 is all of a batch.
      path: JSONL file for every generation with its verdict; grows by a batch of problems at a time. What it was made
        with stands beside it, in a file that ends in .settings.json.
      reward: as in `rewards.judge`.
      model: name of what is evaluated, as the settings have it.
      restart: begin anew when `path` was made with other settings.
      sampling: max_new_tokens, temperature, top_p, top_k.

    Returns:
      What `summarize` says of all problems; if some are unsolvable as stated, under "solvable" what it says of the
      others.

    Raises:
      ValueError: `path` was made with other settings, and `restart` is not set; or the processes have read different
        problems.
    """
    settings = {
        "model": model, "set": name, "seed": seed, "step": step, "guided": guided, "samples": samples,
        "reward": reward, "instruction": policy.instruction, "dtype": jnp.dtype(policy.dtype).name, **sampling,
        "problems": _digest(rows),
    }  # fmt: skip
    distributed.agree({f"the content of the problems of {name}": settings["problems"]})
    kept = distributed.first(lambda: _resume(path, settings, rows, samples, restart))
    numbers = np.array(kept, np.float32)
    left = np.any(np.isnan(numbers), axis=(1, 2))

    prompts = encode_prompts(policy, rows, guided)
    length = max(map(len, prompts))
    key = noise_key(seed, f"{name}/{'guided' if guided else 'unguided'}", step)
    first_left, started, shown = int(left.sum()), time.monotonic(), time.monotonic()
    for start in range(0, len(rows), batch):
        part = slice(start, min(start + batch, len(rows)))
        if not left[part].any():
            continue
        preemption.check()
        # The last batch is filled up, so that every batch has one shape.
        ids = np.minimum(np.arange(start, start + batch), len(rows) - 1)
        padded = pad_prompts(policy, [prompts[i] for i in ids], length)
        rollout, _ = respond(policy, params, padded, ids, key, mesh, group=samples, slots=slots, **sampling)
        rollout = Rollout(*(field[: part.stop - start] for field in rollout))
        lines = _lines(rows[part], grade(policy, rollout, rows[part], reward), step)
        for i, group in zip(range(part.start, part.stop), lines, strict=True):
            if left[i]:
                numbers[i] = [_numbers(line) for line in group]
        if jax.process_index() == 0:
            _append(path, [line for i, group in enumerate(lines, part.start) if left[i] for line in group])
            now, done = time.monotonic(), first_left - int(left[part.stop :].sum())
            if now - shown >= _PROGRESS_SECONDS:
                seconds_left = (now - started) / done * (first_left - done)
                known = {"accuracy": float(np.nanmean(numbers[..., 0]))}
                line = progress_line(f"evaluating {name}", part.stop, len(rows), known, seconds_left)
                print(line, flush=True)
                shown = now
    solvable = np.array([unsolvable.reason(row["problem"]) is None for row in rows])
    result = summarize(numbers)
    return result if solvable.all() else result | {"solvable": summarize(numbers[solvable])}


def summarize(numbers: np.ndarray) -> dict[str, Any]:
    """Metrics of graded samples, `[M,K,5]` numbers of each line in the order of `_NUMBERS`.

    Returns:
      accuracy (avg@K); pass@k and maj@k for k = 1, 2, 4, ..., K; length (tokens); shares truncated, no_box, timeout,
      crash, invalid; "intervals": metric -> [low, high], 95 % by bootstrap over problems; the number of problems; and
      per_problem, `[M]` accuracies.
    """
    reward, tokens, truncated, outcome, vote = np.moveaxis(numbers.astype(np.float64), -1, 0)
    values = benchmark.per_problem(reward, vote.astype(int))
    values |= {"length": tokens.mean(axis=1), "truncated": truncated.mean(axis=1)}
    values |= {name: (outcome == _OUTCOMES.index(name)).mean(axis=1) for name in rewards.FAILURES}
    return {
        **{name: float(value.mean()) for name, value in values.items()},
        "intervals": {name: list(benchmark.bootstrap(value)) for name, value in values.items()},
        "problems": len(numbers),
        "per_problem": values["accuracy"].tolist(),
    }


def evaluate_sets(
    config: ConfigDict,
    folder: Path,
    policy: Policy,
    params: Any,
    mesh: Mesh,
    step: int,
    guided: bool = False,
    limit: int = 0,
    model: str = "",
    restart: bool = True,
) -> dict[str, dict[str, Any]]:
    """`evaluate` on every set of the config, or on the first `limit` problems of each; generations go to `folder`."""
    fields = config.eval
    sampling = {name: fields[name] for name in ("batch", "slots", "max_new_tokens", "temperature", "top_p", "top_k")}
    results = {}
    for name, chosen in fields.sets.items():
        rows = data.load(chosen.source)
        if guided:
            rows = [row for row in rows if "strategy" in row]
        if not rows:
            continue
        path = folder / f"{name}_{'guided' if guided else 'unguided'}_{step:06d}.jsonl"
        results[name] = evaluate(
            policy, params, rows[: limit or None], mesh, name=name, seed=config.seed, step=step, guided=guided,
            samples=chosen.samples, path=path, reward=config.rl.reward, model=model or config.model.source,
            restart=restart, **sampling,
        ) | {"available": len(rows)}  # fmt: skip
    return results


def _digest(rows: Sequence[dict]) -> str:
    shown = [[row["id"], row["problem"], row["answer"], row.get("strategy")] for row in rows]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def _resume(path: Path, settings: dict[str, Any], rows: Sequence[dict], samples: int, restart: bool) -> list:
    """`[M,K,5]` numbers of the problems that `path` has whole, NaN of the others; leaves the file with these alone."""
    beside = path.with_suffix(".settings.json")
    settings = json.loads(json.dumps(settings))
    if path.is_file() and beside.is_file():
        before = json.loads(beside.read_text(encoding="utf-8"))
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed and not restart:
            what = ", ".join(f"{name} {before.get(name)!r}, now {settings.get(name)!r}" for name in changed)
            raise ValueError(f"{path} was made with {what}; go on with the same, or choose another --out")
        kept = [] if changed else read_jsonl(path)
    else:
        kept = []
    numbers: np.ndarray = np.full((len(rows), samples, len(_NUMBERS)), np.nan, np.float32)
    place = {row["id"]: i for i, row in enumerate(rows)}
    for line in kept:
        numbers[place[line["id"]], line["sample"]] = _numbers(line)
    whole = ~np.isnan(numbers).any(axis=(1, 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, "".join(_text(line) for line in kept if whole[place[line["id"]]]))
    _replace(beside, json.dumps(settings, indent=1) + "\n")
    return numbers.tolist()


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _append(path: Path, lines: Sequence[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_text, lines))
        file.flush()
        os.fsync(file.fileno())


def _text(line: dict) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _numbers(line: dict) -> list[float]:
    return [_OUTCOMES.index(line[name]) if name == "outcome" else float(line[name]) for name in _NUMBERS]


def _lines(rows: Sequence[dict], graded: Graded, step: int) -> list[list[dict]]:
    """What the file says of each response, `[B][K]`."""
    votes = _votes(graded)
    return [
        [
            {
                "step": step,
                "id": row["id"],
                "sample": k,
                "problem": row["problem"],
                "answer": row["answer"],
                "response": text,
                "extracted": graded.verdicts[i][k].extracted,
                "outcome": graded.verdicts[i][k].outcome,
                "reward": float(graded.rewards[i, k]),
                "tokens": int(graded.rollout.lengths[i, k]),
                "truncated": bool(graded.rollout.finish[i, k] != STOP),
                "vote": votes[i][k],
            }
            for k, text in enumerate(graded.texts[i])
        ]
        for i, row in enumerate(rows)
    ]

