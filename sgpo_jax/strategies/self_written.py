"""Strategies that the student writes itself, before the first step of RL, from its own correct responses.

Each problem is answered a few times without guidance. Where a response is correct, the student is shown the shortest
one and asked for the strategy behind it; the text must pass the checks of an extracted strategy. A journal has one
verdict for each problem, and problems that it has are not sampled again. Noise depends on seed and problem alone, so it
does not matter how often the writing was killed.
"""

import contextlib
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from sgpo_jax.policy import Policy, Run
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.generation import Graded, encode_prompts, grade, noise_key, pad_prompts, respond
from sgpo_jax.rollout import STOP, Rollout, Sampling
from sgpo_jax.runtime import distributed, preemption
from sgpo_jax.runtime.journal import Journal
from sgpo_jax.runtime.progress import progress_line
from sgpo_jax.strategies import leakage, parsing, prompts

_PROGRESS_SECONDS = 5.0  # least time between two lines of progress


def write(run: Run, params: Any, rows: Sequence[dict], step: int) -> list[dict]:
    """Has the student write the strategies of all problems that have no verdict yet.

    The journal rl/strategies.jsonl grows by a batch of problems at a time. A verdict has id, correct (how many of the
    responses are), response (the one shown), strategy, reason ("kept", or why there is none) and detail.

    Args:
      run, params: the student that RL begins with.
      rows: M problems.
      step: finished updates of `params`, after which nothing more may be written.

    Returns:
      The rows, each with the student's own strategy in place of the data's, or None where there is none.

    Raises:
      ValueError: strategies are missing after the first step, or the journal was made with other settings.
    """
    config, policy, mesh, seed = run.config, run.policy, run.mesh, run.config.seed
    tries, batch, reward = config.rl.self_tries, config.rl.batch, config.rl.reward
    max_prompt_tokens = config.data.max_prompt_tokens  # of a request, and of a problem with its strategy
    bare = config.model.tokenizer == "arithmetic"  # the embedded world has no words for a request
    sampling, path = Sampling.from_config(config.rl), run.workdir / "rl" / "strategies.jsonl"
    settings = {"seed": seed, "tries": tries, "prompts": prompts.PROMPT_VERSION}
    with Journal(path, settings) if jax.process_index() == 0 else contextlib.nullcontext() as journal:
        verdicts: list = distributed.first(lambda: [journal.verdict(row["id"]) for row in rows] if journal else [])
        missing = verdicts.count(None)
        if missing and step:
            raise ValueError(f"{path}: has no verdict on {missing} of {len(rows)} problems, but RL is at step {step}")
        unguided = encode_prompts(policy, rows, guided=False)
        length = max(map(len, unguided))

        def sample(some: Sequence[dict], tokens: list[list[int]], length: int, purpose: str, group: int) -> Rollout:
            """`group` responses to each problem of a batch, which is filled up so that every batch has one shape."""
            places = np.minimum(np.arange(batch), len(some) - 1)
            ids = np.array([zlib.crc32(some[i]["id"].encode()) for i in places], np.uint32)
            padded = pad_prompts(policy, [tokens[i] for i in places], length)
            key = noise_key(seed, purpose, 0)
            rollout, _ = respond(policy, params, padded, ids, key, mesh, sampling, group)
            return Rollout(*(field[: len(some)] for field in rollout))

        started = shown = time.monotonic()
        for start in range(0, len(rows), batch):
            part = slice(start, min(start + batch, len(rows)))
            if None not in verdicts[part]:
                continue
            preemption.check()
            some, own = rows[part], unguided[part]
            graded = grade(policy, sample(some, own, length, "own responses", tries), some, reward)
            drafts = [_draft(policy, row, graded, b, bare, max_prompt_tokens) for b, row in enumerate(some)]
            # What has no request keeps its place in the batch; the reply to it is not read.
            asked = [request or tokens for (_, request), tokens in zip(drafts, own, strict=True)]
            replies = sample(some, asked, max_prompt_tokens, "own strategies", 1)
            work = partial(_finish, policy, some, drafts, replies, max_prompt_tokens)
            for i, verdict in zip(range(part.start, part.stop), distributed.split(work, range(len(some))), strict=True):
                if verdicts[i] is None:
                    verdicts[i] = verdict
                    if journal:
                        journal.append(verdict)
            now, done = time.monotonic(), missing - verdicts.count(None)
            if now - shown >= _PROGRESS_SECONDS:
                seconds = (now - started) / done * (missing - done)
                print(progress_line("own strategies", part.stop, len(rows), {}, seconds), flush=True)
                shown = now
    counts = Counter(verdict["reason"] for verdict in verdicts).most_common()
    print(f"own strategies of {len(rows)} problems: {', '.join(f'{why} {n}' for why, n in counts)}", flush=True)
    return [row | {"strategy": verdict["strategy"]} for row, verdict in zip(rows, verdicts, strict=True)]


def shortest_correct(graded: Graded, b: int) -> str | None:
    """The text of problem b's shortest response (in tokens) with reward 1, the first of equals; None without one."""
    correct = np.flatnonzero(graded.rewards[b] >= 1)
    if not correct.size:
        return None
    return graded.texts[b][min(correct, key=lambda i: graded.rollout.lengths[b, i])]


def _draft(
    policy: Policy, row: dict, graded: Graded, b: int, bare: bool, max_prompt_tokens: int
) -> tuple[dict[str, Any], list[int]]:
    """(problem b's verdict as far as it stands, tokens of what the student is asked; none where it is not asked)."""
    verdict = {"kind": "verdict", "id": row["id"], "correct": int((graded.rewards[b] >= 1).sum())}
    response = shortest_correct(graded, b)
    if response is None:
        return verdict | {"response": None, "strategy": None, "reason": "no_correct", "detail": ""}, []
    # A long thought says no more about the way than the solution after it.
    verdict["response"] = parsing.visible(response) or response
    request = prompts.own_strategy(row["problem"], verdict["response"], bare)
    tokens = tokenizers.encode_turn(policy.tokenizer, request)
    if len(tokens) > max_prompt_tokens:
        return verdict | {"strategy": None, "reason": "prompt_too_long", "detail": f"{len(tokens)} tokens"}, []
    return verdict, tokens


def _finish(
    policy: Policy,
    rows: Sequence[dict],
    drafts: Sequence[tuple[dict[str, Any], list[int]]],
    replies: Rollout,
    max_prompt_tokens: int,
    problems: Sequence[int],
) -> list[dict[str, Any]]:
    """The verdicts on some problems of a batch, from the drafts of all and the student's replies `[B,1]`."""
    verdicts = []
    for b in problems:
        verdict, request = drafts[b]
        if request:
            reply = tokenizers.decode(policy.tokenizer, np.asarray(replies.tokens)[b, 0], int(replies.lengths[b, 0]))
            finish = "stop" if replies.finish[b, 0] == STOP else "length"
            found = read(reply, finish, rows[b]["problem"], rows[b]["answer"], verdict["response"])
            (guided,) = encode_prompts(policy, [rows[b] | {"strategy": found.strategy}], guided=True)
            if len(guided) > max_prompt_tokens:
                found = parsing.Parsed(None, "prompt_too_long", f"{len(guided)} tokens")
            verdict |= found._asdict() | {"reason": found.reason or "kept"}
        verdicts.append(verdict)
    return verdicts


def read(reply: str, finish: str, problem: str, answer: str, solution: str) -> parsing.Parsed:
    """The strategy in a reply, on one line if the reply is; or why there is none, a leak being one of the reasons."""
    parsed = parsing.parse(reply, finish)
    if parsed.strategy is None:
        return parsed
    reason, detail = leakage.find(parsed.strategy, problem, answer, solution)
    one_line = "\n" not in reply.strip()
    text = " ".join(parsed.strategy.splitlines()) if one_line else parsed.strategy
    return parsing.Parsed(None if reason else text, reason, detail)
