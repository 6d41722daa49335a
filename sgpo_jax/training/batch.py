"""From a step's rollouts to what the update reads: advantages, the weight of every target, and packing. On the host.

Responses come padded, a row for each; packed, the update computes nothing for padding, for groups without a target, or
for targets without weight.

Axis key: B problems, G1 autonomous and G2 guided responses, T response tokens; packed: K micro-batches, M rows of a
micro-batch, S chunks of response tokens, J tokens of a row in a chunk.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sgpo_jax import logprobs, losses
from sgpo_jax.training import packing
from sgpo_jax.training.objective import LIKELIHOODS
from sgpo_jax.training.packing import Packed
from sgpo_jax.training.shared_prompts import most_rows, pack_shared
from sgpo_jax.training.weighting import Weighting, weigh

Array = Any  # numpy's on the host, JAX's in the update


class Group(NamedTuple):
    """One group of responses for each of B problems."""

    tokens: Array  # [B,G,T] int32, padded on the right
    lengths: Array  # [B,G] int32, the stop token included
    logp: Array  # [B,G,T] float32, the sampler's log-probabilities, nats
    rewards: Array  # [B,G] float32
    cut: Array = None  # [B,G] bool, whether the response was cut at the limit; None: not known


class Contexts(NamedTuple):
    """The prompt of each of B problems, as tokens of its own length."""

    tokens: Sequence[Sequence[int] | np.ndarray]  # B prompts
    longest: int  # tokens of the longest prompt of all problems, so that all batches have the same shapes


class Batch(NamedTuple):
    """One step's rollouts in host memory. T of the two groups may differ."""

    prompts: Contexts  # problem only
    # Strategy and problem; None where `guided` was not sampled from such prompts. Where the student's own responses are
    # the targets, one for each of the B * G1 autonomous responses.
    guided_prompts: Contexts | None
    autonomous: Group  # sampled from `prompts`
    guided: Group | None  # sampled from `guided_prompts`, or the expert's demonstrations


class PackedGroup(NamedTuple):
    """One group of responses as the policy loss reads it."""

    packed: Packed  # B * G responses after their prompts
    tokens: Array  # [K,S,M,J] int32
    sampler_logp: Array  # [K,S,M,J] float32, nats
    lengths: Array  # [B,G] int32
    advantages: Array  # [B,G] float32


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
    guided: PackedGroup | None = None  # the guided responses after `guided_prompts`, where they have a policy loss
    reward: Array = None  # [] float32, mean of the autonomous responses, for a gated teacher


def packer(rl: ConfigDict, mesh: jax.sharding.Mesh) -> Callable[..., PackedBatch]:
    """Returns `pack(batch)`, which is `pack_batch` by the fields of `config.rl`; keywords change them."""
    return partial(
        pack_batch, weighting=Weighting.from_config(rl), distillation=rl.distillation, micro_batch=rl.micro_batch,
        chunk=logprobs.default_chunk(mesh), context=mesh.shape["context"], share=rl.share_prompt,
    )  # fmt: skip


def pack_batch(
    batch: Batch,
    weighting: Weighting,
    distillation: str = "forward_kl",
    *,
    micro_batch: int,
    chunk: int | None = None,
    context: int = 1,
    share: int = 1,
) -> PackedBatch:
    """Packs a batch of rollouts.

    Args:
      batch: B problems.
      weighting: the rules for advantages, targets and their weights.
      distillation: as in `Objective`; it decides whether targets are needed after the guided prompts too.
      micro_batch: M, rows of packed tokens whose activations are held at once.
      chunk: response tokens whose logits are held at once, over all devices; None: `logprobs.default_chunk`.
      context: ways that the mesh splits the tokens of a row.
      share: above 1, responses of a group that follow one copy of their prompts, see `pack_shared`; context is then 1.

    Raises:
      ValueError: the distillation needs guided prompts, and there are none; or share and context are both above 1; or
        a group has more kinds of guided prompts than its guide gives it.
    """
    if share > 1 and context > 1:
        raise ValueError(f"share={share}: must be 1 with context={context}")
    if batch.guided_prompts is None and batch.guided is not None and distillation not in LIKELIHOODS:
        raise ValueError(f"distillation={distillation!r}: must be one of {LIKELIHOODS} without guided prompts")
    auto, guided = jax.tree.map(np.asarray, (batch.autonomous, batch.guided))
    chunk = logprobs.default_chunk() if chunk is None else chunk
    guided_rewards = auto.rewards[:, :0] if guided is None else guided.rewards
    longest = auto.tokens.shape[2]
    penalty = losses.overlong_penalty(auto.lengths, longest, weighting.overlong_buffer, weighting.overlong_penalty)
    advantages, alpha = weigh(auto.rewards, guided_rewards, weighting, np.asarray(penalty))
    if weighting.mask_cut:
        advantages = np.where(auto.cut, np.float32(0.0), advantages)

    def pack(owners, contexts, responses, lengths, room, kinds=1):
        """Packs sequences of B groups, for which there are [B,G,T] tokens of room, with these kinds of prompts each."""
        problems, size, tokens = room
        if (together := min(share, size)) > 1:
            most = most_rows(problems, size, together, kinds)
            shape = -(-most // micro_batch), min(micro_batch, most)
            return pack_shared(
                contexts, responses, owners, lengths=lengths, longest=tokens, share=together, shape=shape, chunk=chunk
            )
        most = problems * size
        return packing.pack(
            contexts, responses, owners, lengths=lengths, micro_batch=min(micro_batch, most), most=most, chunk=chunk,
            context=context,
        )  # fmt: skip

    def pack_group(group, chosen, length, prompts=batch.prompts):
        owners = np.flatnonzero(chosen)
        places = list(zip(*np.unravel_index(owners, chosen.shape), strict=True))
        responses = [group.tokens[b, i, : group.lengths[b, i]] for b, i in places]
        packed = pack(owners, [[prompts.tokens[b] for b, _ in places]], responses, [length], group.tokens.shape)
        return packed, packing.gather(group.tokens.reshape(chosen.size, -1), packed)

    length = batch.prompts.longest + auto.tokens.shape[2]
    packed, tokens = pack_group(auto, np.ones_like(auto.rewards, bool), length)
    sampler_logp = packing.gather(auto.logp.reshape(auto.rewards.size, -1), packed)
    autonomous = PackedBatch(packed, tokens, sampler_logp, auto.lengths, advantages, alpha)
    if weighting.teacher == "gated":
        autonomous = autonomous._replace(reward=np.float32(auto.rewards.mean()))
    if weighting.target == "own":
        assert batch.guided_prompts is not None
        plain = [tokens for tokens in batch.prompts.tokens for _ in range(auto.rewards.shape[1])]
        hinted = [not np.array_equal(*pair) for pair in zip(plain, batch.guided_prompts.tokens, strict=True)]
        owners = np.flatnonzero(hinted).tolist()
        responses = [auto.tokens.reshape(-1, longest)[r, : auto.lengths.reshape(-1)[r]] for r in owners]
        both = [[side[r] for r in owners] for side in (plain, batch.guided_prompts.tokens)]
        # With responses as hints, all of a group read the same one, but for the one that it is.
        kinds = 2 if weighting.guide == "sibling" else 1
        lengths = [length, batch.guided_prompts.longest + longest]
        targets = pack(owners, both, responses, lengths, auto.tokens.shape, kinds)
        alpha = np.where(hinted, 1.0 / auto.rewards.shape[1], 0.0).astype(np.float32)
        return autonomous._replace(
            alpha=alpha, targets=targets, guided_tokens=auto.tokens, guided_lengths=auto.lengths
        )
    if guided is None:
        return autonomous

    contexts, lengths = [batch.prompts.tokens], [max(length, batch.prompts.longest + guided.tokens.shape[2])]
    if distillation not in LIKELIHOODS and batch.guided_prompts is not None:
        contexts.append(batch.guided_prompts.tokens)
        lengths.append(batch.guided_prompts.longest + guided.tokens.shape[2])
    sampled = weighting.guide != "demonstration"
    if batch.guided_prompts is not None and (weighting.guided_grpo or weighting.reference_kl):
        autonomous = autonomous._replace(guided=_guided_group(pack_group, guided, batch.guided_prompts))
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
    shape = len(guided.lengths), len(alpha) // len(guided.lengths), guided.tokens.shape[2]
    targets = pack(weighted, prompts, [np.zeros(room[r], np.int32) for r in weighted], lengths, shape)
    return autonomous._replace(
        alpha=alpha, targets=targets, guided_tokens=guided.tokens, guided_lengths=guided.lengths, correct=correct,
        candidates=candidates, candidate_tokens=candidate_tokens,
    )  # fmt: skip


def _guided_group(pack_group: Callable, guided: Group, prompts: Contexts) -> PackedGroup:
    """Packs all guided responses after the guided prompts, with advantages among themselves (Eq. 1)."""
    packed, tokens = pack_group(
        guided, np.ones_like(guided.rewards, bool), prompts.longest + guided.tokens.shape[2], prompts
    )
    logp = packing.gather(guided.logp.reshape(guided.rewards.size, -1), packed)
    advantages = np.asarray(jax.vmap(losses.group_advantages)(guided.rewards), np.float32)
    return PackedGroup(packed, tokens, logp, guided.lengths, advantages)


def specs(batch: PackedBatch) -> PackedBatch:
    """Returns the PartitionSpecs of a packed batch."""

    def spec(field):
        if isinstance(field, Packed):
            return packing.specs(field)
        return packing.LISTED if np.ndim(field) == 4 else P()

    return jax.tree.map(spec, batch, is_leaf=lambda x: isinstance(x, Packed))
