"""From problems to graded responses: prompts, sampling on the mesh, texts, verdicts."""

import zlib
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sgpo_jax import rewards, sharding
from sgpo_jax.policy import Policy
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.rollout import LENGTH, STOP, Prompts, Rollout, Sampling, generate
from sgpo_jax.runtime import distributed


class Graded(NamedTuple):
    """A rollout in host memory, with its texts and grades; `[B][G]` lists or `[B,G]` arrays."""

    rollout: Rollout
    texts: list[list[str]]
    verdicts: list[list[rewards.Verdict]]
    rewards: np.ndarray  # [B,G] float32; 0 for a response cut at the limit, whatever it says


def noise_key(seed: int, purpose: str, step: int) -> jax.Array:
    """Key of all noise for one purpose ("autonomous", "guided", an evaluation's name) at one step of a run."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(key, step)


def encode_prompts(policy: Policy, rows: Sequence[dict], guided: bool) -> list[list[int]]:
    """Token ids of each row's prompt, with its strategy if `guided`."""
    return [
        tokenizers.encode_prompt(
            policy.tokenizer, row["problem"], row["strategy"] if guided else None, policy.instruction
        )
        for row in rows
    ]


def encode_solution(policy: Policy, prompt: list[int], row: dict) -> list[int]:
    """Token ids of the expert's solution as a response to the prompt, closed by the stop token."""
    solution = tokenizers.continuation(policy.tokenizer, prompt, row["solution"])
    return tokenizers.encode_response(policy.tokenizer, solution, policy.stop_ids[0])


def demonstrate(policy: Policy, prompts: Sequence[list[int]], rows: Sequence[dict], length: int) -> Rollout:
    """The expert's solutions as groups of one, cut at `length` tokens as sampled responses are; no `logp`."""
    responses = [encode_solution(policy, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
    tokens, lengths = tokenizers.pad_right([response[:length] for response in responses], length, policy.pad_id)
    finish = np.array([STOP if len(response) <= length else LENGTH for response in responses], np.int32)
    return Rollout(tokens[:, None], np.zeros(tokens[:, None].shape, np.float32), lengths[:, None], finish[:, None])


def pad_prompts(policy: Policy, prompts: Sequence[list[int]], length: int) -> Prompts:
    return Prompts(*tokenizers.pad_left(prompts, length, policy.pad_id))


def respond(
    policy: Policy,
    params: Any,
    prompts: Prompts,
    ids: np.ndarray,
    key: jax.Array,
    mesh: Mesh,
    sampling: Sampling,
    group: int | tuple[int, ...],
) -> tuple[Rollout, int]:
    """Runs `rollout.generate` on the mesh.

    Args:
      policy, params, mesh: the model, and where it is.
      prompts: `[B,P]` prompts.
      ids: `[B]` integers that tell the prompts apart; with `key` they fix the noise.
      key, sampling, group: see `rollout.generate`.

    Returns:
      (rollout in host memory, slot-steps).
    """
    rollout, slot_steps = generate(
        params, policy.language_model, Prompts(*sharding.put_rows(tuple(prompts), mesh)), key,
        sharding.put_rows(ids.astype(np.uint32), mesh), sampling=sampling, group=group, shards=sharding.row_ways(mesh),
    )  # fmt: skip
    return sharding.fetch(rollout), int(slot_steps)


def respond_in_groups(
    policy: Policy,
    params: Any,
    prompts: Sequence[Sequence[list[int]]],
    keys: Sequence[jax.Array],
    mesh: Mesh,
    sampling: Sampling,
    groups: Sequence[int],
    length: int,
) -> tuple[list[Rollout], int]:
    """Samples for all kinds of prompts at once, so that the last responses of one kind do not decode alone.

    Args:
      policy, params, mesh: as in `respond`.
      prompts: token ids of B prompts of each kind.
      keys: one of each kind, for its noise; a prompt's place tells the prompts of a kind apart.
      sampling: as in `respond`.
      groups: G of each kind, responses to a prompt.
      length: P, tokens to which all prompts are padded.

    Returns:
      (for each kind the rollout `[B,G]`, slot-steps of all kinds together).
    """
    in_turn = [tokens for turn in zip(*prompts, strict=True) for tokens in turn]
    places = np.repeat(np.arange(len(prompts[0])), len(prompts))
    padded = pad_prompts(policy, in_turn, length)
    rollout, slot_steps = respond(policy, params, padded, places, jnp.stack(keys), mesh, sampling, tuple(groups))
    split = (np.split(field, np.cumsum(groups)[:-1], axis=1) for field in rollout)
    return [Rollout(*fields) for fields in zip(*split, strict=True)], slot_steps


def grade(policy: Policy, rollout: Rollout, rows: Sequence[dict], reward: str = "") -> Graded:
    """Texts and grades of a rollout for B problems; a response cut at the limit gets reward 0.

    The problems are split over the processes.

    Args:
      policy, rollout: where the tokens come from.
      rows: B problems.
      reward: as in `rewards.judge`: "" is the rewards.
    """
    size = rollout.lengths.shape[1]

    def texts_and_verdicts(problems):
        pairs = [(i, k) for i in problems for k in range(size)]
        texts = [tokenizers.decode(policy.tokenizer, rollout.tokens[at], rollout.lengths[at]) for at in pairs]
        verdicts = rewards.judge(texts, [rows[i] for i, _ in pairs], reward)
        graded = [(text, astuple(verdict)) for text, verdict in zip(texts, verdicts, strict=True)]
        return [graded[i : i + size] for i in range(0, len(graded), size)]

    groups = distributed.split(texts_and_verdicts, range(len(rows)))
    texts = [[text for text, _ in group] for group in groups]
    verdicts = [[rewards.Verdict(*verdict) for _, verdict in group] for group in groups]
    values = np.array([[verdict.reward for verdict in group] for group in verdicts], np.float32)
    return Graded(rollout, texts, verdicts, np.where(rollout.finish == STOP, values, 0.0).astype(np.float32))
