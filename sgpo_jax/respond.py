"""From problems to graded responses: prompts, sampling on the mesh, texts, verdicts."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sgpo_jax import rewards, sharding
from sgpo_jax import tokenizer as tokenizers
from sgpo_jax.policy import Policy
from sgpo_jax.rollout import STOP, Rollout, generate
from sgpo_jax.train_step import Prompts


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


def pad_prompts(policy: Policy, prompts: Sequence[list[int]], length: int) -> Prompts:
    return Prompts(*tokenizers.pad_left(prompts, length, policy.pad_id))


def respond(
    policy: Policy, params: Any, prompts: Prompts, ids: np.ndarray, key: jax.Array, mesh: Mesh, **sampling: Any
) -> tuple[Rollout, int]:
    """`generate` on the mesh: the rollout in host memory, and its slot-steps. `sampling` is passed on."""
    tokens, mask = sharding.put_rows(tuple(prompts), mesh)
    rollout, slot_steps = generate(
        params, policy.config, tokens, mask, key, sharding.put_rows(ids.astype(np.uint32), mesh),
        stop_ids=policy.stop_ids, pad_id=policy.pad_id, dtype=policy.dtype,
        shards=mesh.shape["data"] * mesh.shape["fsdp"], **sampling,
    )  # fmt: skip
    return sharding.fetch(rollout), int(slot_steps)


def grade(policy: Policy, rollout: Rollout, rows: Sequence[dict], reward: str = "") -> Graded:
    """Texts and grades of a rollout for B problems; a response cut at the limit gets reward 0.

    Args:
      policy, rollout: where the tokens come from.
      rows: B problems.
      reward: as in `rewards.judge`: "" is the verifier.
    """
    texts = [
        [tokenizers.decode(policy.tokenizer, tokens, length) for tokens, length in zip(*group, strict=True)]
        for group in zip(rollout.tokens, rollout.lengths, strict=True)
    ]
    size = rollout.lengths.shape[1]
    flat = [text for group in texts for text in group]
    verdicts = rewards.judge(flat, [row for row in rows for _ in range(size)], reward)
    grouped = [verdicts[i : i + size] for i in range(0, len(verdicts), size)]
    values = np.array([[verdict.reward for verdict in group] for group in grouped], np.float32)
    return Graded(rollout, texts, grouped, np.where(rollout.finish == STOP, values, 0.0).astype(np.float32))
