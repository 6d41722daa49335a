"""The loss terms of the update: the policy loss of autonomous tokens, and the losses on a target's tokens.

Each term is a function of the parameters and one micro-batch. The formulas are in `losses`.

Axis key: S chunks of response tokens, C tokens of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sgpo_jax import divergences, logprobs, losses, models
from sgpo_jax.training.forward import (
    Forward,
    MicroBatch,
    Tokens,
    counted_hidden,
    response_hidden,
    response_loss,
    teacher_hidden,
)
from sgpo_jax.training.gradients import Metrics

Parts = Sequence[tuple[float, Any]]  # of the teacher: see `teacher.mixture`; none is the student itself
EXPERT_TOKENS = "expert_tokens"
# Losses on a target that need no guided distribution.
LIKELIHOODS = ("nll", "shaped")


@dataclass(frozen=True)
class Objective:
    """The coefficients of the loss. Units and sources are in `config.base`; the defaults are those of the paper."""

    updates_per_batch: int = 1  # optimizer steps on one batch; targets, weights and old log-probabilities stay fixed
    clip_low: float = 0.2  # Eq. 1
    clip_high: float = 0.28  # Eq. 1
    delta: float = 1.0  # nats; Eq. 5
    delta_quantile: float = 0.0  # above 0: delta is this quantile of the KLs of the batch's target tokens
    token_rule: str = "mask"  # what delta does to a token: see `losses.clipped_kl`
    distillation: str = "forward_kl"  # one of `divergences.DIVERGENCES` or of LIKELIHOODS
    beta: float = 0.5  # of "jensen_shannon"
    kl_top_k: int = 100  # of "top_k_kl"
    shaping: float = 0.1  # of "shaped": LUFFY
    surrogate: str = "clipped"  # policy loss of a token: Eq. 1; or "sequence" (GSPO), "cispo"
    # "sequence" averages the loss over a response's tokens, and these means over responses; "tokens" over all tokens of
    # the batch; "constant" divides the sum over a response by max_new_tokens. Targets (times alpha) too.
    normaliser: str = "sequence"
    max_new_tokens: int = 1  # of "constant"
    entropy_bonus: float = 0.0  # coefficient of the mean entropy of the autonomous tokens, which is maximised
    importance: str = "none"  # weight of trainer over sampler probabilities: or of a "token", of a "sequence"
    importance_cap: float = 2.0  # largest weight
    importance_rule: str = "truncate"  # what is above the cap is cut to it; or "mask", dropped
    guided_grpo: float = 0.0  # coefficient of the policy loss of the guided responses, after the guided prompts
    reference_kl: float = 0.0  # coefficient of the KL to the policy that RL began with
    reference_kl_kind: str = "k3"  # its estimator on the sampled tokens; or "full", over the vocabulary
    reference_kl_on: str = "guided"  # after guided prompts; or "all", after both kinds

    @classmethod
    def from_config(cls, rl: ConfigDict) -> "Objective":
        """Reads the section `rl` of a config."""
        return cls(**{field.name: rl[field.name] for field in fields(cls)})


def surrogate(logp: jax.Array, tokens: Tokens, objective: Objective) -> jax.Array:
    """Computes the weighted policy loss `[C]` of Eq. 1, or of the method that replaces it."""
    old_logp = jax.lax.stop_gradient(logp) if tokens.old_logp is None else tokens.old_logp
    if tokens.log_ratio is not None:  # the ratio is that of the response, and its gradient that of the token
        old_logp = jax.lax.stop_gradient(logp) - tokens.log_ratio
    limits = objective.clip_low, objective.clip_high
    if objective.surrogate == "cispo":
        return tokens.weight * losses.cispo(logp, old_logp, tokens.advantage, *limits)
    return tokens.weight * losses.clipped_surrogate(logp, old_logp, tokens.advantage, *limits)


def grpo_loss(
    params: Any, micro: MicroBatch, *, forward: Forward, objective: Objective, reference: Any = None, responses: int = 0
) -> tuple[jax.Array, Metrics]:
    """Sums L_GRPO (Eq. 1) over a micro-batch's tokens, each with its share of the mean; and measures.

    Args:
      params, micro, forward, objective: the policy, its micro-batch, and the coefficients.
      reference: parameters of the reference policy, for a full KL to it.
      responses: number of the group's responses.

    Returns:
      (loss `[]`, metrics): shares of means over the group's tokens, and maxima; with experts also EXPERT_TOKENS, those
      of each `[L,E]`, prompts included.
    """

    def token_loss(logp, entropy, tokens):
        loss = surrogate(logp, tokens, objective) - objective.entropy_bonus * tokens.share * entropy
        if tokens.reference_logp is None:
            return loss
        return loss + tokens.kl_weight * losses.k3_kl(logp, tokens.reference_logp)

    hidden, load = counted_hidden(forward, params, micro.rows)
    if micro.tokens.owner is not None and micro.tokens.old_logp is not None:
        micro = micro._replace(tokens=_with_log_ratio(forward, params, micro, hidden, responses))
    loss, logp, entropy = response_loss(forward, params, micro, token_loss, hidden)
    tokens = micro.tokens
    reference_metrics: Metrics = {}
    if tokens.kl_weight is not None:
        if tokens.reference_logp is None:
            total, kl = _reference_kl(forward, params, micro, hidden, reference)
            loss += total
        else:
            flat = logp.reshape(-1), tokens.reference_logp.reshape(-1)
            kl = losses.k3_kl(*flat).reshape(logp.shape)
            total = jnp.sum(tokens.kl_weight * kl)
        reference_metrics = {"loss_reference": total, "reference_kl": jnp.sum(tokens.share * kl)}
    old_logp = logp if tokens.old_logp is None else tokens.old_logp
    ratio = jnp.exp(logp - old_logp)
    clipped = jnp.where(tokens.advantage > 0, ratio > 1 + objective.clip_high, ratio < 1 - objective.clip_low)
    mismatch = jnp.where(tokens.share > 0, jnp.abs(old_logp - tokens.sampler_logp), 0.0)
    means = {"entropy": entropy, "ratio": ratio, "clip_share": clipped, "logp_mismatch": mismatch}
    metrics = {name: jnp.sum(tokens.share * value) for name, value in means.items()}
    flat = jax.tree.map(lambda x: x.reshape(-1), tokens)
    loss_grpo = jnp.sum(surrogate(logp.reshape(-1), flat, objective))
    metrics |= reference_metrics | {"loss_grpo": loss_grpo, "logp_mismatch_max": mismatch.max()}
    return loss, metrics if load is None else metrics | {EXPERT_TOKENS: load}


def _with_log_ratio(forward: Forward, params: Any, micro: MicroBatch, hidden: jax.Array, responses: int) -> Tokens:
    """Returns the tokens with the logarithm of their response's ratio: see `losses.sequence_log_ratio`."""
    tokens, head = micro.tokens, models.head_weight(params, forward.config)
    logp, _ = logprobs.chunked_logprobs(
        hidden, head, tokens.ids, micro.chunks, tied=forward.config.tie_embeddings
    )
    # A response lies in one micro-batch as a whole.
    difference, inside, owner = (x.reshape(-1) for x in (logp - tokens.old_logp, tokens.share > 0, tokens.owner))
    means = losses.sequence_log_ratio(difference, inside, owner, responses)
    return tokens._replace(log_ratio=jax.lax.stop_gradient(means)[tokens.owner])


def _reference_kl(
    forward: Forward, params: Any, micro: MicroBatch, hidden: jax.Array, reference: Any
) -> tuple[jax.Array, jax.Array]:
    """Sums KL(policy || reference) over the vocabulary and the tokens; returns (sum `[]`, KL `[S,C]`)."""
    other, other_head = teacher_hidden(forward, ((1.0, reference),), micro.rows)
    heads = models.head_weight(params, forward.config), other_head
    return logprobs.kl_loss(
        lambda kl, tokens: tokens.kl_weight * kl, other, hidden, heads, micro.chunks, micro.tokens,
        divergences.reverse_kl, forward.config.tie_embeddings,
    )  # fmt: skip


def likelihood_loss(
    params: Any, micro: MicroBatch, *, forward: Forward, objective: Objective, teacher: Parts = ()
) -> tuple[jax.Array, Metrics]:
    """Sums alpha times the loss of imitating the target: its negative log-likelihood, or LUFFY's shaped likelihood."""

    def token_loss(logp, _, tokens):
        logp = jnp.where(tokens.share > 0, logp, 0.0)
        nll = objective.distillation == "nll"
        return tokens.weight * (-logp if nll else losses.shaped_likelihood(logp, objective.shaping))

    loss, logp, _ = response_loss(forward, params, micro, token_loss)
    logp = jnp.where(micro.tokens.share > 0, logp, 0.0)
    return loss, {"loss_kd": loss, "target_nll": -jnp.sum(micro.tokens.share * logp)}


def kl_loss(
    params: Any, micro: MicroBatch, *, forward: Forward, objective: Objective, teacher: Parts = ()
) -> tuple[jax.Array, Metrics]:
    """Sums alpha times L_KD (Eq. 3, 5) over the targets' tokens; the teacher, on the guided side, is a constant."""

    def token_loss(kl, tokens):
        delta = objective.delta if tokens.delta is None else tokens.delta
        return tokens.weight * losses.clipped_kl(jnp.where(tokens.share > 0, kl, 0.0), delta, objective.token_rule)

    unguided, guided, heads, divergence = _two_sides(params, micro, forward, objective, teacher)
    loss, token_kl = logprobs.kl_loss(
        token_loss, guided, unguided, heads, micro.chunks, micro.tokens, divergence, forward.config.tie_embeddings
    )
    share = micro.tokens.share.reshape(-1)
    token_kl = jnp.where(share > 0, token_kl.reshape(-1), 0.0)
    delta = objective.delta if micro.tokens.delta is None else micro.tokens.delta.reshape(-1)
    masked = 1 - losses.kl_clip_mask(token_kl, delta)
    metrics = {"token_kl": jnp.sum(share * token_kl), "token_kl_max": token_kl.max()}
    return loss, metrics | {"loss_kd": loss, "kl_clip_share": jnp.sum(share * masked)}


def token_kls(params: Any, micro: MicroBatch, *, forward: Forward, objective: Objective, teacher: Parts) -> jax.Array:
    """Computes the divergence `[S,C]` of the targets' tokens, nats; 0 in unused chunks."""
    unguided, guided, heads, divergence = _two_sides(params, micro, forward, objective, teacher)
    return logprobs.chunked_kl(guided, unguided, heads, micro.chunks, divergence, forward.config.tie_embeddings)


def _two_sides(params: Any, micro: MicroBatch, forward: Forward, objective: Objective, teacher: Parts) -> tuple:
    """Returns hidden states of the unguided and of the guided side, the heads of both, and the divergence."""
    assert micro.guided_rows is not None  # a KL has two contexts
    unguided = response_hidden(forward, params, micro.rows)
    divergence = divergences.select(objective.distillation, objective.beta, objective.kl_top_k)
    head = models.head_weight(params, forward.config)
    if not teacher:
        return unguided, response_hidden(forward, jax.lax.stop_gradient(params), micro.guided_rows), head, divergence
    guided, guided_head = teacher_hidden(forward, teacher, micro.guided_rows)
    return unguided, guided, (head, guided_head), divergence
