"""From a step's rollouts to what the update reads: advantages, the weight of every target, and packing. On the host.

Responses come padded, a row for each; packed, the update computes nothing for padding, for groups without a target, or
for targets without weight.

Axis key: B problems, G1 autonomous and G2 guided responses, T response tokens; packed: K micro-batches, M rows of a
micro-batch, S chunks of response tokens, J tokens of a row in a chunk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from sgpo_jax import logprobs
from sgpo_jax.sharding import BATCH
from sgpo_jax.training import packing
from sgpo_jax.training.objective import LIKELIHOODS
from sgpo_jax.training.packing import Packed
from sgpo_jax.training.weighting import Weighting, weigh

Array = Any  # numpy's on the host, JAX's in the update


class Group(NamedTuple):
    """One group of responses for each of B problems."""

    tokens: Array  # [B,G,T] int32, padded on the right
    lengths: Array  # [B,G] int32, the stop token included
    logp: Array  # [B,G,T] float32, the sampler's log-probabilities, nats
    rewards: Array  # [B,G] float32


class Contexts(NamedTuple):
    """The prompt of each of B problems, as tokens of its own length."""

    tokens: Sequence[Sequence[int] | np.ndarray]  # B prompts
    longest: int  # tokens of the longest prompt of all problems, so that all batches have the same shapes


class Batch(NamedTuple):
    """One step's rollouts in host memory. T of the two groups may differ."""

    prompts: Contexts  # problem only
    guided_prompts: Contexts | None  # strategy and problem; None where `guided` was not sampled from such prompts
    autonomous: Group  # sampled from `prompts`
    guided: Group | None  # sampled from `guided_prompts`, or the expert's demonstrations


class PackedBatch(NamedTuple):
    """A batch as the update reads it. R targets: one to be selected for each problem, or each guided response."""

    autonomous: Packed  # B * G1 responses after `prompts`
    autonomous_tokens: Array  # [K,S,M,J] int32
    sampler_logp: Array  # [K,S,M,J] float32, nats
    lengths: Array  # [B,G1] int32
    advantages: Array  # [B,G1] float32
    alpha: Array  # [R] float32, weight of a target in the mean over problems; 0 where there is none
    targets: Packed | None = None  # room for R targets, after `prompts` and, for a KL, after `guided_prompts`
    guided_tokens: Array = None  # [B,G2,T] int32
    guided_lengths: Array = None  # [B,G2] int32
    correct: Array = None  # [B,G2] bool
    candidates: Packed | None = None  # correct guided responses after `prompts`; None: there is no choice
    candidate_tokens: Array = None  # [K,S,M,J] int32


def pack_batch(
    batch: Batch,
    weighting: Weighting,
    distillation: str = "forward_kl",
    *,
    micro_batch: int,
    chunk: int | None = None,
) -> PackedBatch:
    """Packs a batch of rollouts.

    Args:
      batch: B problems.
      weighting: the rules for advantages, targets and their weights.
      distillation: as in `Objective`; it decides whether targets are needed after the guided prompts too.
      micro_batch: M, rows of packed tokens whose activations are held at once.
      chunk: response tokens whose logits are held at once, over all devices; None: `logprobs.default_chunk`.

    Raises:
      ValueError: the distillation needs guided prompts, and there are none.
    """
    if batch.guided_prompts is None and batch.guided is not None and distillation not in LIKELIHOODS:
        raise ValueError(f"distillation={distillation!r}: must be one of {LIKELIHOODS} without guided prompts")
    auto = Group(*map(np.asarray, batch.autonomous))
    guided = None if batch.guided is None else Group(*map(np.asarray, batch.guided))
    chunk = logprobs.default_chunk() if chunk is None else chunk
    guided_rewards = auto.rewards[:, :0] if guided is None else guided.rewards
    advantages, alpha = weigh(auto.rewards, guided_rewards, weighting)

    def pack(owners, contexts, responses, lengths, most):
        rows = min(micro_batch, most)
        return packing.pack(contexts, responses, owners, lengths=lengths, micro_batch=rows, most=most, chunk=chunk)

    def pack_group(group, chosen, length):
        owners = np.flatnonzero(chosen)
        places = list(zip(*np.unravel_index(owners, chosen.shape), strict=True))
        responses = [group.tokens[b, i, : group.lengths[b, i]] for b, i in places]
        packed = pack(owners, [[batch.prompts.tokens[b] for b, _ in places]], responses, [length], chosen.size)
        return packed, packing.gather(group.tokens.reshape(chosen.size, -1), packed)

    length = batch.prompts.longest + auto.tokens.shape[2]
    packed, tokens = pack_group(auto, np.ones_like(auto.rewards, bool), length)
    sampler_logp = packing.gather(auto.logp.reshape(auto.rewards.size, -1), packed)
    autonomous = PackedBatch(packed, tokens, sampler_logp, auto.lengths, advantages, alpha)
    if guided is None:
        return autonomous

    contexts, lengths = [batch.prompts.tokens], [max(length, batch.prompts.longest + guided.tokens.shape[2])]
    if distillation not in LIKELIHOODS and batch.guided_prompts is not None:
        contexts.append(batch.guided_prompts.tokens)
        lengths.append(batch.guided_prompts.longest + guided.tokens.shape[2])
    sampled = weighting.guide != "demonstration"
    correct = guided.rewards >= 1 if sampled else np.ones_like(guided.rewards, bool)
    has_target = correct.any(axis=1)
    if batch.guided_prompts is not None:
        # Without a strategy both contexts are the same: there is nothing to distil.
        pairs = zip(batch.prompts.tokens, batch.guided_prompts.tokens, strict=True)
        has_target &= np.array([not np.array_equal(*pair) for pair in pairs])
    alpha = np.where(has_target, alpha, 0.0).astype(np.float32)

    candidates = candidate_tokens = None
    if sampled and weighting.target == "reachable":
        # A single candidate is the target, whatever its score.
        choice = correct & (correct.sum(axis=1) > 1)[:, None] & (alpha != 0)[:, None]
        candidates, candidate_tokens = pack_group(guided, choice, lengths[0])
        # The update finds out which candidate it is; the longest fits.
        room = np.where(correct, guided.lengths, 0).max(axis=1)
        problem = np.arange(len(alpha))
    else:
        alpha = (correct * (alpha / np.maximum(correct.sum(axis=1), 1))[:, None]).astype(np.float32).reshape(-1)
        room = guided.lengths.reshape(-1)
        problem = np.repeat(np.arange(len(guided.lengths)), guided.lengths.shape[1])
    weighted = np.flatnonzero(alpha != 0)
    prompts = [[context[problem[r]] for r in weighted] for context in contexts]
    targets = pack(weighted, prompts, [np.zeros(room[r], np.int32) for r in weighted], lengths, len(alpha))
    return autonomous._replace(
        alpha=alpha, targets=targets, guided_tokens=guided.tokens, guided_lengths=guided.lengths, correct=correct,
        candidates=candidates, candidate_tokens=candidate_tokens,
    )  # fmt: skip


def specs(batch: PackedBatch) -> PackedBatch:
    """Returns the PartitionSpecs of a packed batch."""

    def spec(field):
        if isinstance(field, Packed):
            return packing.specs(field)
        return P(None, None, BATCH) if field.ndim == 4 else P()

    return jax.tree.map(spec, batch, is_leaf=lambda x: isinstance(x, Packed))
