"""The rows that the stages train on: read, left out with an account, encoded and checked before any stage trains."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sgpo_jax import data, rewards
from sgpo_jax.data import filtering
from sgpo_jax.policy import Policy, Run, positions
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.generation import encode_prompts, encode_solution
from sgpo_jax.runtime import distributed
from sgpo_jax.strategies import self_written
from sgpo_jax.training import stage

Tokens = dict[str, list[int]]  # problem's id -> tokens of its prompt
Encoded = tuple[list[int], list[int]]  # prompt and response tokens of a row


class Demonstrations(NamedTuple):
    """The rows of the warm-up, whose solutions are the responses."""

    training: list[dict]
    validation: list[dict]
    encoded: dict[str, Encoded]  # id -> tokens, of both


class Problems(NamedTuple):
    """The rows of RL with what the method shows of them.

    Guided prompts are those with strategies or solutions, and are there only where the method shows them.
    """

    rows: list[dict]
    prompts: dict[str, Tokens]  # group -> their prompts
    solutions: dict[str, np.ndarray]  # id -> int32 tokens; only where the guided group is the expert's solution


def demonstrations(run: Run) -> Demonstrations:
    """Reads the rows of the warm-up; an account of those left out goes to `workdir`.

    Raises:
      ValueError: there are too few rows, or others than the run began with, or one exceeds the model's positions.
    """
    config, policy = run.config, run.policy
    sieve = sift(config, config.sft.train or config.data.train)
    if not config.sft.train:
        _, others = data.split_sft(sieve.rows, config.data.sft_share)
        sieve.leave_out("for RL", {row["id"]: "" for row in others})
    sieve.leave_out("without solution", {row["id"]: "" for row in sieve.rows if "solution" not in row})
    encoded = {row["id"]: _encode(config, policy, row) for row in sieve.rows}
    prompts, responses = ([encoded[row["id"]][part] for row in sieve.rows] for part in (0, 1))
    long_prompts = filtering.too_long(sieve.rows, prompts, config.data.max_prompt_tokens)
    long_responses = filtering.too_long(sieve.rows, responses, config.sft.max_response_tokens)
    sieve.leave_out("prompt too long", long_prompts)
    sieve.leave_out("response too long", long_responses)
    count_thoughts(sieve, policy, {id: prompt for id, (prompt, _) in encoded.items()})
    count_wrong(sieve, config.rl.reward, run.workdir)
    account(sieve, run.workdir, "sft")
    training, validation = data.split_validation(sieve.rows, config.sft.validation_share)
    print(f"SFT: {len(training)} rows for training, {len(validation)} for validation", flush=True)
    if len(training) < config.sft.batch or not validation:
        raise ValueError(
            f"SFT has {len(training)} rows for training and {len(validation)} for validation; "
            f"it needs sft.batch={config.sft.batch} and at least 1"
        )
    encoded = {row["id"]: encoded[row["id"]] for row in sieve.rows}
    limits = f"config.data.max_prompt_tokens={config.data.max_prompt_tokens}"
    limits += f", config.sft.max_response_tokens={config.sft.max_response_tokens}"
    positions.check_rows(policy, encoded, limits)
    return Demonstrations(training, validation, encoded)


def sift(config: ConfigDict, source: str) -> filtering.Sieve:
    """Runs `data.sift` against the evaluation sets of the config."""
    sets = {name: chosen.source for name, chosen in config.eval.sets.items()}
    fields = config.data
    return data.sift(source, sets, remove_duplicates=fields.remove_duplicates, decontaminate=fields.decontaminate)


def count_thoughts(sieve: filtering.Sieve, policy: Policy, prompts: Mapping[str, list[int]]) -> None:
    """Counts the rows whose solutions' thoughts are changed for the chat template, or have no end; all rows stay.

    Args:
      sieve: the rows, which have solutions.
      policy: its tokenizer is used.
      prompts: id -> prompt tokens of every row.
    """
    changes: dict[str, dict[str, str]] = {}  # what is changed -> its rows
    for row in sieve.rows:
        if change := tokenizers.thought_change(policy.tokenizer, prompts[row["id"]], row["solution"]):
            changes.setdefault(change, {})[row["id"]] = ""
    for change, ids in changes.items():
        sieve.leave_out(change, ids, keep=True)


def account(sieve: filtering.Sieve, workdir: Path, name: str) -> None:
    """Prints what became of the rows of a stage, and records it in `workdir`.

    Raises:
      ValueError: the stage has a checkpoint, but began with other rows; or the processes have read different ones.
    """
    rows = f"rows of the {name} stage"
    distributed.agree({f"the number of {rows}": len(sieve.rows), f"the content of {rows}": sieve.fingerprint()})
    if distributed.is_first():
        sieve.table(f"{name.upper()}: {len(sieve.rows)} rows of {sum(sieve.read.values())}")
        started = stage.has_begun(workdir, name)
        filtering.record(sieve, workdir, name, resuming=started)


def count_wrong(sieve: filtering.Sieve, reward: str, workdir: Path) -> None:
    """Counts the solutions that the reward of RL would not call correct, before the warm-up's first start; all stay.

    A solution without a box teaches the model to answer without one.

    Args:
      sieve: the rows, which have solutions.
      reward: as in `rewards.judge`.
      workdir: of the run.
    """
    if distributed.first(lambda: stage.has_begun(workdir, "sft")):
        return  # counted when it began

    def judged(rows):
        verdicts = rewards.judge([row["solution"] for row in rows], rows, reward)
        return [[verdict.outcome, verdict.extracted] for verdict in verdicts]

    wrong: dict[str, str] = {}
    for row, (outcome, box) in zip(sieve.rows, distributed.split(judged, sieve.rows), strict=True):
        if outcome != "correct":
            found = f"boxes {box!r:.40}" if box is not None else "no box"
            wrong[row["id"]] = f"{found}, answer {row['answer']!r:.40}"
    reason = "solution with a reward below 1" if reward else "solution without the right boxed answer"
    sieve.leave_out(reason, wrong, keep=True)


def _encode(config: ConfigDict, policy: Policy, row: dict) -> Encoded:
    strategy = row.get("strategy") if config.sft.use_strategy else None
    prompt = tokenizers.encode_prompt(policy.tokenizer, row["problem"], strategy, policy.instruction, policy.system)
    return prompt, encode_solution(policy, prompt, row)


def problems(run: Run) -> Problems:
    """Reads the problems of RL; an account of those left out goes to `workdir`.

    Raises:
      ValueError: there are fewer problems than a batch needs, or others than the run began with; or responses to them
        do not fit into the model's positions.
    """
    config, policy = run.config, run.policy
    sieve = sift(config, config.data.train)
    if not config.sft.train:
        warm_up, _ = data.split_sft(sieve.rows, config.data.sft_share)
        sieve.leave_out("for the warm-up", {row["id"]: "" for row in warm_up})
    hints = {"strategy": "strategy", "demonstration": "solution", "solution": "solution"}
    distils = config.rl.guided or config.rl.target == "own"
    needed = hints.get(config.rl.guide, "problem") if distils else "problem"
    sieve.leave_out(f"without {needed}", {row["id"]: "" for row in sieve.rows if needed not in row})
    ids = [row["id"] for row in sieve.rows]
    shown = needed != "problem" and config.rl.guide != "demonstration"
    names = ("autonomous", "guided") if shown else ("autonomous",)
    encoded = {name: encode_prompts(policy, sieve.rows, name == "guided", needed) for name in names}
    # The guided prompt is the longer one.
    long = filtering.too_long(sieve.rows, encoded[names[-1]], config.data.max_prompt_tokens)
    sieve.leave_out("prompt too long", long)
    demonstrated = config.rl.guided and config.rl.guide == "demonstration"
    if demonstrated:
        count_thoughts(sieve, policy, dict(zip(ids, encoded["autonomous"], strict=True)))
    account(sieve, run.workdir, "rl")
    if len(sieve.rows) < config.rl.batch:
        raise ValueError(f"RL has {len(sieve.rows)} problems, fewer than rl.batch={config.rl.batch}")
    prompts = {
        name: {id: tokens for id, tokens in zip(ids, encoded[name], strict=True) if id not in long} for name in names
    }
    check_lengths(run, prompts)
    solutions = {}
    for row in sieve.rows if demonstrated else []:
        solutions[row["id"]] = np.array(encode_solution(policy, prompts["autonomous"][row["id"]], row), np.int32)
    return Problems(sieve.rows, prompts, solutions)


def check_lengths(run: Run, prompts: Mapping[str, Tokens]) -> None:
    """Checks that prompts and responses fit into the model's positions.

    Raises:
      ValueError: they do not.
    """
    rl = run.config.rl
    kinds = {name: [*tokens.values()] for name, tokens in prompts.items()}
    if rl.target == "own" and rl.guide == "sibling":
        most = longest_sibling_prompt(longest(prompts["autonomous"]), rl.max_new_tokens)
        kinds["a response as a hint"] = [[0] * most]
    for name, tokens in kinds.items():
        positions.check_limit(run.policy, tokens, "rl.max_new_tokens", rl.max_new_tokens, f"RL, {name}")


def with_own_strategies(run: Run, problems: Problems, initial: Callable[[], Any]) -> Problems:
    """Returns the problems of RL with guided prompts of strategies that the student writes, where the method says so.

    Args:
      run: the run; the journal of the strategies is in its folder.
      problems: of `problems`.
      initial: returns what RL begins with. It writes the strategies, and is not read when they are there.
    """
    rl, done = run.config.rl, stage.find_step(run.config, run.workdir, "rl", "last") or 0
    if not rl.guided or rl.guide != "self" or done >= total_steps(rl, problems.rows):
        return problems
    params = None if done else stage.weights(run, initial())
    written = self_written.write(run, params, problems.rows, done)
    encoded = encode_prompts(run.policy, written, guided=True)
    guided = {row["id"]: tokens for row, tokens in zip(written, encoded, strict=True)}
    return problems._replace(prompts=problems.prompts | {"guided": guided})


def total_steps(rl: ConfigDict, rows: Sequence[dict]) -> int:
    """Returns the steps of RL on these problems."""
    return rl.steps or rl.epochs * data.steps_per_epoch(rows, rl.batch)


def longest_sibling_prompt(prompt: int, response: int) -> int:
    """Returns the limit in tokens of a prompt that shows a response; a longer one is not shown.

    Args:
      prompt: tokens of the longest unguided prompt.
      response: limit of a response.
    """
    return prompt + response + 32  # room for the heading


def longest(prompts: Tokens) -> int:
    """Returns the tokens of the longest prompt."""
    return max(map(len, prompts.values()))
