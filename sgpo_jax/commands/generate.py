"""Asks a model: one question or a file of them, with and without a strategy.

    sgpo generate --workdir=RUN[:best|last|STEP] 'QUESTION'
    sgpo generate --model=FOLDER --file=questions.jsonl --samples=4 --to=answers.jsonl

The prompts are those of the training: question, instruction and chat template. The responses are sampled by the rollout
engine. Each depends on the seed, the question, its strategy and the number of the sample alone, and not on what else is
asked. They go to the terminal while they are sampled, and as JSONL to the file that --to names ("-" is the standard
output), with a verdict where the question has an answer.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sgpo_jax import cli, config_checks, rewards, sharding
from sgpo_jax.commands import trained
from sgpo_jax.commands.stream import Stream
from sgpo_jax.policy import Policy, Run
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.generation import encode_prompts, grade, noise_key, pad_prompts, respond
from sgpo_jax.rollout import STOP, Rollout, Sampling
from sgpo_jax.runtime import jsonl, mirror, read_jsonl, write_text
from sgpo_jax.training import stage

TOKENS = 1024  # largest limit of a response that is not asked for by a flag


def read_questions(path: Path, guided: bool) -> list[dict[str, Any]]:
    """Reads the questions of a JSONL file.

    Args:
      path: each line is an object with a "problem" and what else is to stand in the output.
      guided: every line must have a "strategy".

    Raises:
      ValueError: there is no such file, or a line is wrong; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"--file={path}: there is no such file")
    rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"--file={path}: there are no questions in it")
    for number, row in enumerate(rows, start=1):
        for name in ("problem", "strategy") if guided else ("problem",):
            if not (isinstance(row.get(name), str) and row[name].strip()):
                raise ValueError(
                    f"--file={path}, line {number}: {name} is {row.get(name)!r}; allowed: a text "
                    f"(the line has {', '.join(row)})"
                )
    return rows


def answer(
    run: Run, params: Any, rows: Sequence[dict], sampling: Sampling, samples: int, guided: bool, show: bool
) -> list[dict[str, Any]]:
    """Samples responses to questions.

    Args:
      run: the policy, the mesh, and the config, whose seed is that of the sampling.
      params: of the policy.
      rows: the questions, each with a "problem"; with a "strategy" too if `guided`.
      sampling: limit, temperature and filters.
      samples: G, responses to each question.
      guided: show the strategies.
      show: print the responses while they are sampled.

    Returns:
      A line for each response: the fields of its row, sample, response, tokens, finish ("stop", or "length" for one
      that was cut), and reward, outcome and extracted where every row has an "answer".
    """
    policy, config, mesh = run.policy, run.config, run.mesh
    ways = sharding.row_ways(mesh)
    batch = min(config.eval.batch, -(-len(rows) // ways) * ways)
    encoded = encode_prompts(policy, [{"strategy": None, **row} for row in rows], guided)
    length = max(map(len, encoded))
    key = noise_key(config.seed, "generate", 0)
    lines: list[dict[str, Any]] = []
    for start in range(0, len(rows), batch):
        part = [min(i, len(rows) - 1) for i in range(start, start + batch)]  # the last batch is filled up
        ids = np.array([_noise_id(rows[i], guided) for i in part], np.uint32)
        count = min(batch, len(rows) - start)
        stream = Stream(policy, [rows[i] for i in part[:count]], samples, ways, batch) if show else None
        watching = dataclasses.replace(sampling, watch=stream.watch) if stream else sampling
        padded = pad_prompts(policy, [encoded[i] for i in part], length)
        with jax.set_mesh(mesh):
            rollout, _ = respond(policy, params, padded, ids, key, mesh, watching, samples)
        if stream:
            jax.effects_barrier()
            stream.end()
        rollout = Rollout(*(field[:count] for field in rollout))
        lines += _lines(policy, rollout, rows[start : start + count], config.rl.reward)
    return lines


def _noise_id(row: dict, guided: bool) -> int:
    """Returns the number that tells the noise of a question from that of others, wherever it stands."""
    text = "\0".join([row["problem"], row["strategy"]] if guided else [row["problem"]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _lines(policy: Policy, rollout: Rollout, rows: Sequence[dict], reward: str) -> list[dict[str, Any]]:
    graded = None
    if all("answer" in row for row in rows):
        graded = grade(policy, rollout, [{**row, "answer": str(row["answer"])} for row in rows], reward)
    lines = []
    for i, row in enumerate(rows):
        for k, length in enumerate(rollout.lengths[i].tolist()):
            text = tokenizers.decode(policy.tokenizer, rollout.tokens[i, k], length)
            finish = "stop" if rollout.finish[i, k] == STOP else "length"
            line = {**row, "sample": k, "response": text, "tokens": length, "finish": finish}
            if graded:
                verdict = graded.verdicts[i][k]
                line |= {"reward": float(graded.rewards[i, k]), "outcome": verdict.outcome}
                line["extracted"] = verdict.extracted
            lines.append(line)
    return lines


def main(config: ConfigDict, given: Any) -> None:
    """Checks the config and the flags, and asks."""
    if bool(given.workdir) == bool(given.model):
        raise ValueError("--workdir and --model: give one of them")
    if bool(given.questions) == bool(given.file):
        raise ValueError("a question or --file: give one of them; sgpo generate --model=smollm2 'What is 3 + 4?'")
    if given.guided and not given.file:
        raise ValueError("--guided: shows the strategies of --file; a question takes --strategy=TEXT")
    if given.temperature == 0 and given.samples > 1:
        raise ValueError(f"--samples={given.samples}: must be 1 with --temperature=0, which always says the same")
    guided = given.guided or bool(given.strategy)
    if given.file:
        rows = read_questions(cli.existing_file("file", given.file), given.guided)
        rows = [{**row, "strategy": given.strategy} for row in rows] if given.strategy else rows
    else:
        shown = {"strategy": given.strategy} if given.strategy else {}
        rows = [{"problem": text, **shown} for text in given.questions]
    config.model.source = given.model or config.model.source
    seed, config.seed = config.seed, given.seed
    if given.temperature is not None:
        config.eval.temperature = given.temperature
    config.eval.slots = 0
    with config.unlocked():  # the questions are the evaluation set
        config.eval.sets = ConfigDict({"questions": {"source": "questions", "samples": given.samples}})
    config.stages, config.data.train, config.sft.train, config.eval.guided = ("eval",), "", "", False
    config_checks.check(config)
    if given.to and given.to != "-":
        to = cli.file("to", given.to)
    rewards.check(config.rl.reward)
    mesh = sharding.make_mesh(**config.mesh)
    config_checks.check_mesh(config, mesh)

    place = trained.find(config, "workdir", given.workdir) if given.workdir else None
    run, initial = stage.open_run(config, place[0] if place else Path(), mesh, seed)
    policy = run.policy
    longest = max(map(len, encode_prompts(policy, [{"strategy": None, **row} for row in rows], guided)))
    room = policy.config.reach - longest
    limit = given.max_new_tokens or min(config.eval.max_new_tokens, TOKENS, max(room, 1))
    if limit > room:
        raise ValueError(
            f"--max_new_tokens={limit}: the model has {policy.config.reach} positions, and the longest prompt "
            f"takes {longest}; must be at most {room}"
        )
    params = stage.weights_at(run, *place[1:]) if place else stage.weights(run, initial())
    what = mirror.shown(f"{place[0]} after {place[1]} step {place[2]}") if place else config.model.source
    _tell(f"{what}; {len(rows)} question{'s' * (len(rows) > 1)}, temperature {config.eval.temperature:g}, seed "
          f"{config.seed}, at most {limit} tokens")  # fmt: skip
    if given.show_prompt:
        for tokens in encode_prompts(policy, [{"strategy": None, **row} for row in rows], guided):
            _tell(policy.tokenizer.decode(tokens, skip_special_tokens=False))
    sampling = dataclasses.replace(Sampling.from_config(config.eval), max_new_tokens=limit, often=False)
    lines = answer(run, params, rows, sampling, given.samples, guided, show=given.to != "-")
    lines = [{**line, "model": what, "seed": config.seed, "guided": guided} for line in lines]
    cut = sum(line["finish"] == "length" for line in lines)
    if cut:
        _tell(f"{cut} of {len(lines)} responses were cut at {limit} tokens; --max_new_tokens raises the limit")
    if given.to == "-":
        print(jsonl(lines), end="", flush=True)
    elif given.to:
        write_text(to, jsonl(lines))
        _tell(f"{len(lines)} responses: {given.to}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
