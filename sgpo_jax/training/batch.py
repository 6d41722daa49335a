"""From a step's rollouts to what the update reads: advantages, the weight of every target, and packing. On the host.

Rollouts come padded, a row for each response; packed, the update computes nothing for padding, for groups without a
target, or for targets without weight.

Axis key: B problems, G1 autonomous and G2 guided responses, P prompt length, T response tokens; packed: K
micro-batches, M rows of a micro-batch, S chunks of response tokens, J of a row in a chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from sgpo_jax import logprobs, losses
from sgpo_jax.policy.generation import Prompts
from sgpo_jax.sharding import BATCH
from sgpo_jax.training import packing
from sgpo_jax.training.packing import Packed

Array = Any  # numpy's on the host, JAX's in the update

# Losses on a target that need no guided distribution.
LIKELIHOODS = ("nll", "shaped")


class Group(NamedTuple):
    """One group of responses for each of B problems."""

    tokens: Array  # [B,G,T] int32, padded on the right
    lengths: Array  # [B,G] int32, the stop token included
    logp: Array  # [B,G,T] float32, the sampler's log-probabilities, nats
    rewards: Array  # [B,G] float32


class Batch(NamedTuple):
    """One step's rollouts, padded, in host memory. P and T of the two sides may differ."""

    prompts: Prompts  # problem only
    guided_prompts: Prompts | None  # strategy and problem; None where `guided` was not sampled from such prompts
    autonomous: Group  # sampled from `prompts`
    guided: Group | None  # sampled from `guided_prompts`, or the expert's demonstrations


class PackedBatch(NamedTuple):
    """What the update needs of a batch. R targets: one to be selected for each problem, or each guided response."""

    autonomous: Packed  # B * G1 responses after `prompts`
    autonomous_tokens: Array  # [K,S,M,J] int32
    sampler_logp: Array  # [K,S,M,J] float32, nats
    lengths: Array  # [B,G1] int32
    advantages: Array  # [B,G1] float32
    candidates: Packed | None  # correct guided responses after `prompts`, where there is a choice; None: none is made
    candidate_tokens: Array | None  # [K,S,M,J] int32
    targets: Packed | None  # room for R targets, after `prompts` and, for a KL, after `guided_prompts`
    guided_tokens: Array | None  # [B,G2,T] int32
    guided_lengths: Array | None  # [B,G2] int32
    correct: Array | None  # [B,G2] bool
    alpha: Array  # [R] float32, weight of a target in the mean over problems; 0 where there is none


def weigh(
    auto: Array,
    guided: Array,
    *,
    advantage: str,
    weight: str,
    alpha0: float,
    gamma: float,
    alpha_max: float,
    gate: float,
    sft_weight: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages `[B,G1]` of the autonomous responses, weight `[B]` of each problem's target), float32.

    Args:
      auto: `[B,G1]` rewards.
      guided: `[B,G2]` rewards; G2 = 0 makes all weights 0.
      advantage: "group" (Eq. 1); "mixed": centred in the group that the demonstration joins (LUFFY); "gated": centred,
        and 0 where the demonstration takes over (HPT); "none".
      weight: "adaptive" (Eq. 6), "group_advantage" (Eq. 8), "fixed" (1); "mixed": the demonstration's advantage
        (LUFFY); "gated": `sft_weight` where it takes over (HPT).
      alpha0, gamma, alpha_max, gate: see `losses`.
      sft_weight: HPT's coefficient of the imitation loss.
    """
    centred = jax.vmap(partial(losses.group_advantages, scale=False))
    rl = jax.vmap(partial(losses.hpt_gate, gate=gate))
    size = auto.shape[1]

    def mixed():
        return np.asarray(centred(np.concatenate([auto, guided], axis=1)))

    advantages = {
        "group": lambda: jax.vmap(losses.group_advantages)(auto),
        "mixed": lambda: mixed()[:, :size],
        "gated": lambda: centred(auto) * rl(auto)[:, None],
        "none": lambda: np.zeros_like(auto),
    }
    weights = {
        "adaptive": lambda: losses.adaptive_weight(auto.mean(axis=1), guided.mean(axis=1), alpha0, gamma, alpha_max),
        "group_advantage": lambda: jax.vmap(partial(losses.group_advantage_weight, alpha_max=alpha_max))(
            auto, guided.max(axis=1)
        ),
        "fixed": lambda: np.ones(len(auto)),
        "mixed": lambda: mixed()[:, size],
        "gated": lambda: sft_weight * (1 - rl(auto)),
    }
    alpha = weights[weight]() if guided.size else np.zeros(len(auto))
    return np.asarray(advantages[advantage](), np.float32), np.asarray(alpha, np.float32)


def pack_batch(
    batch: Batch,
    *,
    micro_batch: int,
    guide: str = "strategy",
    target: str = "reachable",
    distillation: str = "forward_kl",
    advantage: str = "group",
    weight: str = "adaptive",
    alpha0: float = 0.5,
    gamma: float = 0.1,
    alpha_max: float = 0.8,
    gate: float = 0.0,
    sft_weight: float = 1.0,
    chunk: int | None = None,
) -> PackedBatch:
    """Packs a batch of rollouts, all in host memory.

    Args:
      batch: B problems.
      micro_batch: M, rows of packed tokens whose activations are held at once.
      guide: "strategy" or "self": the guided responses are sampled with the strategy, and only the correct ones may be
        targets; "demonstration": they are the expert's, and are targets as they are.
      target: "reachable" selects one for each problem (Eq. 4), "mean" takes all with equal parts of the weight (Eq. 2).
      distillation: as in `train_step.make_update`.
      advantage, weight, alpha0, gamma, alpha_max, gate, sft_weight: as in `weigh`.
      chunk: response tokens whose logits are held at once, over all devices; None: `logprobs.default_chunk`.
    """
    batch = jax.tree.map(np.asarray, batch)
    if batch.guided_prompts is None and batch.guided is not None and distillation not in LIKELIHOODS:
        raise ValueError(f"distillation={distillation!r}: must be one of {LIKELIHOODS} without guided prompts")
    auto, guided = batch.autonomous, batch.guided
    problems, length = len(auto.rewards), batch.prompts.tokens.shape[1] + auto.tokens.shape[2]
    advantages, alpha = weigh(
        auto.rewards, auto.rewards[:, :0] if guided is None else guided.rewards, advantage=advantage, weight=weight,
        alpha0=alpha0, gamma=gamma, alpha_max=alpha_max, gate=gate, sft_weight=sft_weight,
    )  # fmt: skip

    chunk = logprobs.default_chunk() if chunk is None else chunk

    def unpadded(prompts):
        return [tokens[mask] for tokens, mask in zip(*prompts, strict=True)]

    def pack(owners, contexts, responses, lengths, most):
        return packing.pack(
            contexts, responses, owners, lengths=lengths, micro_batch=min(micro_batch, most), most=most, chunk=chunk
        )

    def pack_group(group, wanted, length):
        owners = np.flatnonzero(wanted)
        rows = np.unravel_index(owners, wanted.shape)
        responses = [group.tokens[b, i, : group.lengths[b, i]] for b, i in zip(*rows, strict=True)]
        packed = pack(owners, [[prompts[b] for b in rows[0]]], responses, [length], wanted.size)
        return packed, packing.of_sequence(group.tokens.reshape(wanted.size, -1), packed)

    prompts = unpadded(batch.prompts)
    autonomous, tokens = pack_group(auto, np.ones_like(auto.rewards, bool), length)
    sampler_logp = packing.of_sequence(auto.logp.reshape(auto.rewards.size, -1), autonomous)
    ours = autonomous, tokens, sampler_logp, auto.lengths, advantages
    if guided is None:
        return PackedBatch(*ours, None, None, None, None, None, None, alpha)

    lengths = [max(length, batch.prompts.tokens.shape[1] + guided.tokens.shape[2])]
    contexts = [prompts]
    if distillation not in LIKELIHOODS and batch.guided_prompts is not None:
        lengths.append(batch.guided_prompts.tokens.shape[1] + guided.tokens.shape[2])
        contexts.append(unpadded(batch.guided_prompts))
    sampled = guide != "demonstration"
    correct = guided.rewards >= 1 if sampled else np.ones_like(guided.rewards, bool)
    has_target = correct.any(axis=1)
    if batch.guided_prompts is not None:
        # Without a strategy both contexts are the same: there is nothing to distil.
        pairs = zip(prompts, unpadded(batch.guided_prompts), strict=True)
        has_target &= np.array([not np.array_equal(*pair) for pair in pairs])
    alpha = np.where(has_target, alpha, 0.0).astype(np.float32)

    candidates = candidate_tokens = None
    if sampled and target == "reachable":
        # A single candidate is the target, whatever its score.
        choice = correct & (correct.sum(axis=1) > 1)[:, None] & (alpha != 0)[:, None]
        candidates, candidate_tokens = pack_group(guided, choice, lengths[0])
        # Which candidate it is the update finds out; the longest fits.
        room = np.where(correct, guided.lengths, 0).max(axis=1)
        problem = np.arange(problems)
    else:
        alpha = (correct * (alpha / np.maximum(correct.sum(axis=1), 1))[:, None]).astype(np.float32).reshape(-1)
        room = guided.lengths.reshape(-1)
        problem = np.repeat(np.arange(problems), guided.lengths.shape[1])
    weighted = np.flatnonzero(alpha != 0)
    owners = [[each[problem[r]] for r in weighted] for each in contexts]
    targets = pack(weighted, owners, [np.zeros(room[r], np.int32) for r in weighted], lengths, len(alpha))
    return PackedBatch(*ours, candidates, candidate_tokens, targets, guided.tokens, guided.lengths, correct, alpha)


def specs(batch: PackedBatch) -> PackedBatch:
    """PartitionSpecs of a packed batch."""

    def spec(field):
        if field is None:
            return None
        return packing.specs(field) if isinstance(field, Packed) else P(None, None, BATCH) if field.ndim == 4 else P()

    return PackedBatch(*map(spec, batch))
