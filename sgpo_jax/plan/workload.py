"""Workload of a run: how often it calls its programs, and how long its responses are."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sgpo_jax.runtime import files

# Problems in the paper's evaluation sets. Other sets have Assumed.eval_problems.
SETS = {"MATH500": 500, "AMC23": 40, "OlympiadBench": 675, "AIME24": 30}


class Assumed(NamedTuple):
    """Assumptions about facts that a config does not contain."""

    response_tokens: float  # mean length of responses, also of the experts'; the lengths are exponential
    prompt_tokens: int  # length of prompts
    correct: float = 0.5  # share of the sampled responses that are correct
    problems: int = 8500  # rows of the training data; Sec. 4.1
    eval_problems: int = 500  # of a set that is not in SETS
    cut: float = 0.0  # share of the sampled responses that are cut at the limit
    acceptance: float = 0.25  # probability that a drafted token is right where those before it are


class Calls(NamedTuple):
    """Number of calls of the jitted programs in a whole run."""

    sft_steps: int
    sft_validations: int  # batches of the validation loss
    rl_steps: int
    own_strategies: int  # batches of problems to which the student writes strategies
    evaluations: dict[int, int]  # samples for each problem -> batches of problems


def calls(config: ConfigDict, assumed: Assumed) -> Calls:
    """Counts the calls of a run's stages, with 0 for stages that it does not have."""
    stages, sft, rl, fields = config.stages, config.sft, config.rl, config.eval
    rows = round(assumed.problems * (1.0 if sft.train else config.data.sft_share))
    held_out = round(rows * sft.validation_share)
    epoch = max((rows - held_out) // sft.batch, 1)
    sft_steps = (sft.steps or sft.epochs * epoch) * ("sft" in stages)
    validations = math.ceil(sft_steps / (sft.validate_every or epoch)) * math.ceil(held_out / sft.batch)

    rows = assumed.problems - (0 if sft.train else rows)
    rl_steps = (rl.steps or rl.epochs * max(rows // rl.batch, 1)) * ("rl" in stages)
    own = math.ceil(rows / rl.batch) if rl_steps and rl.guided and rl.guide == "self" else 0

    # Before and after RL, and again with strategies where the config asks for it. During RL without strategies.
    times = (1 + ("rl" in stages)) * (1 + fields.guided) * ("eval" in stages)
    times += math.ceil(rl_steps / rl.eval_every) if rl.eval_every else 0
    problems: dict[int, int] = {}  # sets of as many samples are sampled together
    for name, eval_set in fields.sets.items():
        problems[eval_set.samples] = problems.get(eval_set.samples, 0) + SETS.get(name, assumed.eval_problems)
    evaluations = {samples: times * math.ceil(count / fields.batch) for samples, count in problems.items() if times}
    return Calls(sft_steps, validations, rl_steps, own, evaluations)


def of_run(workdir: Path, limit: int) -> tuple[float, float]:
    """Reads (mean length of a response, share that was cut) from the rl.jsonl of a run, over all its steps.

    Args:
      workdir: folder of the run.
      limit: `rl.max_new_tokens` of the plan, which must be that of the run.

    Raises:
      ValueError: the folder has no steps of RL, or the run had another limit.
    """
    path = workdir / "rl.jsonl"
    rows = files.read_jsonl(path) if path.is_file() else []
    if not rows:
        raise ValueError(f"--lengths={workdir}: {path.name} must be there, and have the steps of RL")
    fields = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["rl"]
    if (most := fields["max_new_tokens"]) != limit:
        raise ValueError(f"--lengths={workdir}: rl.max_new_tokens of the run is {most}; must be the plan's, {limit}")
    groups = {"response_length": fields["autonomous"], "response_length_guided": fields["guided"]}
    values = [(row[name], size) for row in rows for name, size in groups.items() if name in row]
    tokens, sizes = np.array(values).T
    return float((tokens * sizes).sum() / sizes.sum()), float(np.mean([row["truncated"] for row in rows]))


def lengths(count: int, mean: float, most: int, cut: float = 0.0) -> np.ndarray:
    """Returns `[count]` lengths from 1 to `most` tokens in a random order.

    A share `cut` of them has `most` tokens. The others follow a truncated exponential distribution, so that all
    together have this mean, or the nearest that is possible.
    """
    if whole := round(cut * count):
        others = count - whole
        rest = lengths(others, max((mean * count - whole * most) / others, 1.0), most) if others else np.arange(0)
        return np.random.default_rng(0).permutation(np.concatenate([np.full(whole, most), rest]))
    quantiles = (np.arange(count) + 0.5) / count

    def spread(rate: float) -> np.ndarray:
        """Returns the quantiles of the truncated exponential with this rate on [0, most]."""
        scaled = quantiles if abs(rate) < 1e-6 else -np.log1p(quantiles * np.expm1(-rate)) / rate
        return np.clip(np.ceil(scaled * most), 1, most).astype(np.int64)

    low, high = -500.0, 1e6  # bisection over the rate: a larger rate gives shorter lengths
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spread(middle).mean() > min(mean, most) else (low, middle)
    return np.random.default_rng(0).permutation(spread(high))
