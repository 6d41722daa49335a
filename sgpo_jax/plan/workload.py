"""Workload of a run: how often it calls its programs, and how long its responses are."""

import math
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

# Problems in the paper's evaluation sets. Other sets have Assumed.eval_problems.
SETS = {"MATH500": 500, "AMC23": 40, "OlympiadBench": 675, "AIME24": 30}


class Assumed(NamedTuple):
    """Assumptions about facts that a config does not contain."""

    response_tokens: float  # mean length of responses, also of the experts'; the lengths are exponential
    prompt_tokens: int  # length of prompts
    correct: float = 0.5  # share of the sampled responses that are correct
    problems: int = 8500  # rows of the training data; Sec. 4.1
    eval_problems: int = 500  # of a set that is not in SETS


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
    evaluations: dict[int, int] = {}
    for name, eval_set in fields.sets.items():
        batches = math.ceil(SETS.get(name, assumed.eval_problems) / fields.batch)
        evaluations[eval_set.samples] = evaluations.get(eval_set.samples, 0) + times * batches
    evaluations = {samples: count for samples, count in evaluations.items() if count}
    return Calls(sft_steps, validations, rl_steps, own, evaluations)


def lengths(count: int, mean: float, most: int) -> np.ndarray:
    """Returns `[count]` lengths from 1 to `most` tokens in a random order.

    They follow a truncated exponential distribution with this mean.
    """
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
