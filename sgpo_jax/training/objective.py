"""The loss terms of the update: the policy loss of autonomous tokens, and the losses on a target's tokens.

Each term is a function of the parameters and one micro-batch. The formulas are in `losses`.

Axis key: S chunks of response tokens, C tokens of a chunk.
"""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sgpo_jax import divergences, logprobs, losses, models
from sgpo_jax.training.forward import Forward, MicroBatch, Tokens, response_hidden, response_loss
from sgpo_jax.training.gradients import Metrics

# Losses on a target that need no guided distribution.
LIKELIHOODS = ("nll", "shaped")


@dataclass(frozen=True)
class Objective:
    """The coefficients of the loss. Units and sources are in `config.base`; the defaults are those of the paper."""

    updates_per_batch: int = 1  # optimizer steps on one batch; targets, weights and old log-probabilities stay fixed
    clip_low: float = 0.2  # Eq. 1
    clip_high: float = 0.28  # Eq. 1
    delta: float = 1.0  # nats; Eq. 5
    distillation: str = "forward_kl"  # one of `divergences.DIVERGENCES` or of LIKELIHOODS
    beta: float = 0.5  # of "jensen_shannon"
    kl_top_k: int = 100  # of "top_k_kl"
    shaping: float = 0.1  # of "shaped": LUFFY
    # 0 averages the loss over a response's tokens. Another number divides their sum by it, so that all tokens of a
    # batch weigh the same, those of targets (times alpha) too: LUFFY, HPT.
    normaliser: int = 0
    entropy_bonus: float = 0.0  # coefficient of the mean entropy of the autonomous tokens, which is maximised

    @classmethod
    def from_config(cls, rl: ConfigDict) -> "Objective":
        """Reads the section `rl` of a config."""
        values = {field.name: rl[field.name] for field in fields(cls)}
        return cls(**values | {"normaliser": rl.max_new_tokens if rl.normaliser == "constant" else 0})


def surrogate(logp: jax.Array, tokens: Tokens, objective: Objective) -> jax.Array:
    """Computes the weighted policy loss `[C]` of Eq. 1."""
    old_logp = jax.lax.stop_gradient(logp) if tokens.old_logp is None else tokens.old_logp
    loss = losses.clipped_surrogate(logp, old_logp, tokens.advantage, objective.clip_low, objective.clip_high)
    return tokens.weight * loss


def grpo_loss(
    params: Any, micro: MicroBatch, *, forward: Forward, objective: Objective
) -> tuple[jax.Array, Metrics]:
    """Sums L_GRPO (Eq. 1) over a micro-batch's tokens, each with its share of the mean; and measures.

    Returns:
      (loss `[]`, metrics): shares of means over the autonomous tokens, and maxima.
    """

    def token_loss(logp, entropy, tokens):
        return surrogate(logp, tokens, objective) - objective.entropy_bonus * tokens.share * entropy

    loss, logp, entropy = response_loss(forward, params, micro, token_loss)
    tokens = micro.tokens
    old_logp = logp if tokens.old_logp is None else tokens.old_logp
    ratio = jnp.exp(logp - old_logp)
    clipped = jnp.where(tokens.advantage > 0, ratio > 1 + objective.clip_high, ratio < 1 - objective.clip_low)
    mismatch = jnp.where(tokens.share > 0, jnp.abs(old_logp - tokens.sampler_logp), 0.0)
    means = {"entropy": entropy, "ratio": ratio, "clip_share": clipped, "logp_mismatch": mismatch}
    metrics = {name: jnp.sum(tokens.share * value) for name, value in means.items()}
    flat = jax.tree.map(lambda x: x.reshape(-1), tokens)
    loss_grpo = jnp.sum(surrogate(logp.reshape(-1), flat, objective))
    return loss, metrics | {"loss_grpo": loss_grpo, "logp_mismatch_max": mismatch.max()}


def likelihood_loss(
    params: Any, micro: MicroBatch, *, forward: Forward, objective: Objective
) -> tuple[jax.Array, Metrics]:
    """Sums alpha times the loss of imitating the target: its negative log-likelihood, or LUFFY's shaped likelihood."""

    def token_loss(logp, _, tokens):
        logp = jnp.where(tokens.share > 0, logp, 0.0)
        nll = objective.distillation == "nll"
        return tokens.weight * (-logp if nll else losses.shaped_likelihood(logp, objective.shaping))

    loss, logp, _ = response_loss(forward, params, micro, token_loss)
    logp = jnp.where(micro.tokens.share > 0, logp, 0.0)
    return loss, {"loss_kd": loss, "target_nll": -jnp.sum(micro.tokens.share * logp)}


def kl_loss(params: Any, micro: MicroBatch, *, forward: Forward, objective: Objective) -> tuple[jax.Array, Metrics]:
    """Sums alpha times L_KD (Eq. 3, 5) over the targets' tokens; the guided side is a constant."""

    def token_loss(kl, tokens):
        return tokens.weight * losses.clipped_kl(jnp.where(tokens.share > 0, kl, 0.0), objective.delta)

    assert micro.guided_rows is not None  # a KL has two contexts
    unguided = response_hidden(forward, params, micro.rows)
    guided = response_hidden(forward, jax.lax.stop_gradient(params), micro.guided_rows)
    divergence = divergences.select(objective.distillation, objective.beta, objective.kl_top_k)
    loss, token_kl = logprobs.kl_loss(
        token_loss, guided, unguided, models.head_weight(params, forward.config), micro.chunks, micro.tokens,
        divergence, forward.config.tie_embeddings,
    )  # fmt: skip
    share = micro.tokens.share.reshape(-1)
    token_kl = jnp.where(share > 0, token_kl.reshape(-1), 0.0)
    masked = 1 - losses.kl_clip_mask(token_kl, objective.delta)
    metrics = {"token_kl": jnp.sum(share * token_kl), "token_kl_max": token_kl.max()}
    return loss, metrics | {"loss_kd": loss, "kl_clip_share": jnp.sum(share * masked)}
