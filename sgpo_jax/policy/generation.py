"""Graded responses to problems: prompts, sampling on the mesh, texts and verdicts."""

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
from sgpo_jax.policy.prompts import user_turn
from sgpo_jax.rollout import LENGTH, STOP, Problems, Prompts, Rollout, Sampling, Steps, generate
from sgpo_jax.runtime import distributed
from sgpo_jax.runtime.profile import phase


class Kind(NamedTuple):
    """One kind of prompts to B problems, and the responses to sample to each."""

    prompts: Sequence[list[int]]  # B, token ids
    key: jax.Array  # of the noise; or `[B]`, one for each prompt
    group: int  # G
    expected: np.ndarray | None = None  # [B] float32, see `rollout.Problems`; of all kinds or of none


class Graded(NamedTuple):
    """A rollout in host memory with its texts and grades, as `[B][G]` lists and `[B,G]` arrays."""

    rollout: Rollout
    texts: list[list[str]]
    verdicts: list[list[rewards.Verdict]]
    rewards: np.ndarray  # [B,G] float32; always 0 for a response cut at the limit


def noise_key(seed: int, purpose: str, step: int | jax.Array) -> jax.Array:
    """Returns the key of all noise of a step for one purpose: "autonomous", "guided" or an evaluation's name."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(key, step)


def encode_prompts(policy: Policy, rows: Sequence[dict], guided: bool, hint: str = "strategy") -> list[list[int]]:
    """Returns the token ids of each row's prompt, with its strategy, or its solution as `hint`, if `guided`."""
    return [
        tokenizers.encode_turn(
            policy.tokenizer, user_turn(row["problem"], row[hint] if guided else None, policy.instruction, hint),
            policy.system,
        )
        for row in rows
    ]


def opens_thought(policy: Policy, prompt: list[int]) -> bool:
    """Returns True if a prompt ends with an opened thought, as some chat templates write it."""
    # The opening is at most as many tokens as characters.
    tail = policy.tokenizer.decode(prompt[-16:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(tail).rstrip().endswith("<think>")


def encode_solution(policy: Policy, prompt: list[int], row: dict) -> list[int]:
    """Returns the token ids of the expert's solution as a response to the prompt; the last one is the stop token.

    Prompt and solution together have one thought: see `tokenizer.continuation`.
    """
    solution = tokenizers.continuation(policy.tokenizer, prompt, row["solution"])
    return tokenizers.encode_response(policy.tokenizer, solution, policy.stop_ids[0])


def demonstrate(policy: Policy, responses: Sequence[np.ndarray], length: int) -> Rollout:
    """Returns the expert's responses as groups of one, cut at `length` tokens like sampled ones; `logp` is 0."""
    tokens, lengths = tokenizers.pad_right([response[:length] for response in responses], length, policy.pad_id)
    finish = np.array([STOP if len(response) <= length else LENGTH for response in responses], np.int32)
    return Rollout(tokens[:, None], np.zeros(tokens[:, None].shape, np.float32), lengths[:, None], finish[:, None])


def pad_prompts(policy: Policy, prompts: Sequence[list[int]], length: int) -> Prompts:
    """Pads prompts on the left to `length` tokens."""
    return Prompts(*tokenizers.pad_left(prompts, length, policy.pad_id))


def respond(
    policy: Policy,
    params: Any,
    prompts: Prompts,
    problems: np.ndarray | Problems,
    key: jax.Array,
    mesh: Mesh,
    sampling: Sampling,
    group: int | tuple[int, ...],
) -> tuple[Rollout, int | Steps]:
    """Runs `rollout.generate` on the mesh.

    Args:
      policy, params, mesh: the model and the mesh that holds its parameters.
      prompts: `[B,P]` prompts.
      problems: `[B]` integers that tell the prompts apart, or these and more; together with `key` they fix the noise.
      key, sampling, group: see `rollout.generate`.

    Returns:
      (rollout in host memory, slot-steps; with drafts or a pool `Steps` in host memory).
    """
    known = problems if isinstance(problems, Problems) else Problems(problems)
    known = sharding.put_rows(known._replace(ids=known.ids.astype(np.uint32)), mesh)
    with jax.set_mesh(sharding.decoding_mesh(mesh, sampling.decode_ways)):
        rollout, steps = generate(
            params, policy.language_model, Prompts(*sharding.put_rows(tuple(prompts), mesh)), key, known,
            sampling=sampling, group=group, shards=sharding.row_ways(mesh),
        )  # fmt: skip
    if isinstance(steps, Steps):
        return sharding.fetch(rollout), Steps(int(steps.slots), *sharding.fetch(steps[1:]))
    return sharding.fetch(rollout), int(steps)


def respond_in_groups(
    policy: Policy,
    params: Any,
    kinds: Sequence[Kind],
    mesh: Mesh,
    sampling: Sampling,
    length: int,
    known: Problems | None = None,
) -> tuple[list[Rollout], int | Steps]:
    """Samples responses to several kinds of prompts at once, so that the last ones of a kind do not decode alone.

    Args:
      policy, params, mesh, sampling: as in `respond`.
      kinds: prompts to the same B problems.
      length: P, tokens to which all prompts are padded.
      known: ids of the B problems, and what else is known but the expected lengths, which are those of the kinds; None:
        the ids are the places.

    Returns:
      (for each kind its rollout `[B,G]`, slot-steps or `Steps` of all kinds together).
    """
    interleaved = [tokens for problem in zip(*(kind.prompts for kind in kinds), strict=True) for tokens in problem]
    lengths = [kind.expected for kind in kinds if kind.expected is not None]
    expected = np.stack(lengths, axis=1).reshape(-1) if lengths else None
    known = Problems(np.arange(len(kinds[0].prompts))) if known is None else known
    problems = known._replace(ids=np.repeat(known.ids, len(kinds)), expected=expected)
    keys = jnp.stack([kind.key for kind in kinds], axis=-1).reshape(-1)
    groups = tuple(kind.group for kind in kinds)
    padded = pad_prompts(policy, interleaved, length)
    rollout, steps = respond(policy, params, padded, problems, keys, mesh, sampling, groups)
    split = (np.split(field, np.cumsum(groups)[:-1], axis=1) for field in rollout)
    return [Rollout(*fields) for fields in zip(*split, strict=True)], steps


@phase("reward")
def grade(policy: Policy, rollout: Rollout, rows: Sequence[dict], reward: str = "") -> Graded:
    """Decodes and grades a rollout; a response cut at the limit gets reward 0.

    If the chat template opens a thought, the verifier grades a response as if it had opened the thought itself: a box
    in a thought that does not end is no answer. The problems are split over the processes.

    Args:
      policy: the policy that sampled, for its tokenizer.
      rollout: responses to B problems.
      rows: the B problems.
      reward: name of the reward function, see `rewards.judge`; "" is the default.
    """
    size = rollout.lengths.shape[1]
    opening = ""
    if not reward and opens_thought(policy, tokenizers.encode_turn(policy.tokenizer, "problem")):
        opening = "<think>"

    def texts_and_verdicts(problems):
        pairs = [(i, k) for i in problems for k in range(size)]
        texts = [tokenizers.decode(policy.tokenizer, rollout.tokens[pair], rollout.lengths[pair]) for pair in pairs]
        verdicts = rewards.judge([opening + text for text in texts], [rows[i] for i, _ in pairs], reward)
        graded = [(text, astuple(verdict)) for text, verdict in zip(texts, verdicts, strict=True)]
        return [graded[i : i + size] for i in range(0, len(graded), size)]

    groups = distributed.split(texts_and_verdicts, range(len(rows)))
    texts = [[text for text, _ in group] for group in groups]
    verdicts = [[rewards.Verdict(*verdict) for _, verdict in group] for group in groups]
    values = np.array([[verdict.reward for verdict in group] for group in verdicts], np.float32)
    return Graded(rollout, texts, verdicts, np.where(rollout.finish == STOP, values, 0.0).astype(np.float32))
