"""Strategies that the student writes itself, before the first step of RL, from its own correct responses.

The student answers each problem a few times without guidance. If a response is correct, it is shown the shortest
correct one and asked for the strategy behind it, which must pass the checks of an extracted strategy. A journal has one
verdict for each problem, and problems with a verdict are not sampled again. The noise depends only on the seed and the
problem, so a killed and resumed run gives the same strategies.
"""

import contextlib
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from sgpo_jax.policy import Policy, Run, memory
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.generation import Graded, encode_prompts, grade, noise_key, pad_prompts, respond
from sgpo_jax.rollout import STOP, Rollout
from sgpo_jax.runtime import distributed, preemption
from sgpo_jax.runtime.journal import Journal
from sgpo_jax.runtime.progress import Progress
from sgpo_jax.strategies import leakage, parsing, prompts


def write(run: Run, params: Any, rows: Sequence[dict], step: int) -> list[dict]:
    """Has the student write strategies for all problems that have no verdict yet.

    The verdicts of each batch of problems are appended to the journal rl/strategies.jsonl. A verdict has id, correct
    (number of correct responses), response (the one shown), strategy, reason ("kept", or why there is none) and detail.

    Args:
      run: the run, with the policy.
      params: parameters of the student with which RL begins.
      rows: M problems.
      step: finished updates of `params`; after the first one no strategy may be written.

    Returns:
      The rows, each with the student's own strategy in place of the data's, or None if it has none.

    Raises:
      ValueError: strategies are missing after the first step, or the journal was made with other settings.
    """
    config, policy, mesh, seed = run.config, run.policy, run.mesh, run.config.seed
    tries, batch, reward = config.rl.self_tries, config.rl.batch, config.rl.reward
    # For a request, and for a problem with its strategy; each is followed by a response.
    room = policy.config.max_positions - config.rl.max_new_tokens
    max_prompt_tokens = min(config.data.max_prompt_tokens, room)
    bare = config.model.tokenizer == "arithmetic"  # the vocabulary of the embedded world has no words for a request
    sampling, path = memory.sampling(run, "rl", batch * tries, batch), run.workdir / "rl" / "strategies.jsonl"
    settings = {"seed": seed, "tries": tries, "prompts": prompts.PROMPT_VERSION}
    with Journal(path, settings) if distributed.is_first() else contextlib.nullcontext() as journal:
        verdicts: list = distributed.first(lambda: [journal.verdict(row["id"]) for row in rows] if journal else [])
        missing = verdicts.count(None)
        if missing and step:
            raise ValueError(f"{path}: has no verdict on {missing} of {len(rows)} problems, but RL is at step {step}")
        unguided = encode_prompts(policy, rows, guided=False)
        length = max(map(len, unguided))

        def sample(problems: Sequence[dict], tokens: list[list[int]], length: int, purpose: str, group: int) -> Rollout:
            """Samples `group` responses to each problem; the batch is filled up, so that all batches have one shape."""
            places = np.minimum(np.arange(batch), len(problems) - 1)
            ids = np.array([zlib.crc32(problems[i]["id"].encode()) for i in places], np.uint32)
            padded = pad_prompts(policy, [tokens[i] for i in places], length)
            key = noise_key(seed, purpose, 0)
            rollout, _ = respond(policy, params, padded, ids, key, mesh, sampling, group)
            return Rollout(*(field[: len(problems)] for field in rollout))

        progress = Progress("own strategies", len(rows), len(rows) - missing, enabled=distributed.is_first())
        for start in range(0, len(rows), batch):
            part = slice(start, start + batch)
            if None not in verdicts[part]:
                continue
            preemption.check()
            problems, prompt_tokens = rows[part], unguided[part]
            responses = sample(problems, prompt_tokens, length, "own responses", tries)
            graded = grade(policy, responses, problems, reward)
            drafts = [_draft(policy, row, graded, b, bare, max_prompt_tokens) for b, row in enumerate(problems)]
            # A problem without a request keeps its place in the batch; the reply to it is not read.
            requests = [request or tokens for (_, request), tokens in zip(drafts, prompt_tokens, strict=True)]
            replies = sample(problems, requests, config.data.max_prompt_tokens, "own strategies", 1)
            finish = partial(_finish, policy, problems, drafts, replies, max_prompt_tokens)
            for i, verdict in enumerate(distributed.split(finish, range(len(problems))), start):
                if verdicts[i] is None:
                    verdicts[i] = verdict
                    if journal:
                        journal.append(verdict)
            progress.show(len(rows) - verdicts.count(None))
    counts = Counter(verdict["reason"] for verdict in verdicts).most_common()
    print(f"own strategies of {len(rows)} problems: {', '.join(f'{why} {n}' for why, n in counts)}", flush=True)
    return [row | {"strategy": verdict["strategy"]} for row, verdict in zip(rows, verdicts, strict=True)]


def shortest_correct(graded: Graded, b: int) -> str | None:
    """Returns the text of problem b's shortest response with reward 1, the first of equals; None without one.

    Length is counted in tokens.
    """
    correct = np.flatnonzero(graded.rewards[b] >= 1)
    if not correct.size:
        return None
    return graded.texts[b][min(correct, key=lambda i: graded.rollout.lengths[b, i])]


def _draft(
    policy: Policy, row: dict, graded: Graded, b: int, bare: bool, max_prompt_tokens: int
) -> tuple[dict[str, Any], list[int]]:
    """Returns (the unfinished verdict on problem b, tokens of the request to the student; empty without a request)."""
    verdict = {"kind": "verdict", "id": row["id"], "correct": int((graded.rewards[b] >= 1).sum())}
    response = shortest_correct(graded, b)
    if response is None:
        return verdict | {"response": None, "strategy": None, "reason": "no_correct", "detail": ""}, []
    # The solution after a long thought has all that a strategy needs.
    verdict["response"] = parsing.visible(response) or response
    request = prompts.own_strategy(row["problem"], verdict["response"], bare)
    tokens = tokenizers.encode_turn(policy.tokenizer, request)
    if len(tokens) > max_prompt_tokens:
        return verdict | _too_long(tokens, max_prompt_tokens)._asdict(), []
    return verdict, tokens


def _finish(
    policy: Policy,
    rows: Sequence[dict],
    drafts: Sequence[tuple[dict[str, Any], list[int]]],
    replies: Rollout,
    max_prompt_tokens: int,
    places: Sequence[int],
) -> list[dict[str, Any]]:
    """Returns the verdicts on the problems at these places of a batch, from the drafts and the replies `[B,1]`."""
    verdicts = []
    for b in places:
        verdict, request = drafts[b]
        if request:
            reply = tokenizers.decode(policy.tokenizer, np.asarray(replies.tokens)[b, 0], int(replies.lengths[b, 0]))
            finish = "stop" if replies.finish[b, 0] == STOP else "length"
            parsed = read(reply, finish, rows[b]["problem"], rows[b]["answer"], verdict["response"])
            (guided,) = encode_prompts(policy, [rows[b] | {"strategy": parsed.strategy}], guided=True)
            if len(guided) > max_prompt_tokens:
                parsed = _too_long(guided, max_prompt_tokens)
            verdict |= parsed._asdict() | {"reason": parsed.reason or "kept"}
        verdicts.append(verdict)
    return verdicts


def _too_long(tokens: Sequence[int], most: int) -> parsing.Parsed:
    return parsing.Parsed(None, "prompt_too_long", f"{len(tokens)} tokens; at most {most} fit")


def read(reply: str, finish: str, problem: str, answer: str, solution: str) -> parsing.Parsed:
    """Returns the strategy of a student's reply, or why there is none, for example because it leaks the answer.

    Args:
      reply: the student's text; the strategy is on one line if the reply is.
      finish: why the student stopped, as in `parsing.parse`.
      problem, answer, solution: as in `leakage.find`; the solution is the response that was shown.
    """
    parsed = parsing.parse(reply, finish)
    if parsed.strategy is None:
        return parsed
    reason, detail = leakage.find(parsed.strategy, problem, answer, solution)
    one_line = "\n" not in reply.strip()
    text = " ".join(parsed.strategy.splitlines()) if one_line else parsed.strategy
    return parsing.Parsed(None if reason else text, reason, detail)
