"""The jitted update of SGPO (Eq. 7) and of the methods it is compared with.

Axis key: B problems, G responses of a group, R targets, T response tokens; packed: K micro-batches, S chunks of
response tokens, M rows of a micro-batch, J tokens of a row in a chunk, C = M * J.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sgpo_jax import losses
from sgpo_jax.training.batch import PackedBatch
from sgpo_jax.training.forward import (
    Forward,
    MicroBatch,
    Tokens,
    listed,
    mean_share,
    response_logprobs,
    with_responses,
)
from sgpo_jax.training.gradients import Metrics, accumulate, apply_gradients, in_micro_batches
from sgpo_jax.training.objective import LIKELIHOODS, Objective, grpo_loss, kl_loss, likelihood_loss
from sgpo_jax.training.state import TrainState


def make_update(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    shardings: TrainState | None = None,
    watch: Callable[[Any], None] = lambda gradient: None,
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]:
    """Returns the jitted `update(state, batch) -> (state, metrics)` of Eq. 7; the state is donated.

    The loss is the mean over the problems' autonomous responses of the mean over tokens of `losses.clipped_surrogate`,
    plus the mean over problems of alpha times the mean over the target's tokens of the distillation loss.

    Args:
      forward: the model.
      optimizer: applied to the gradient of the mean loss over the B problems.
      objective: the coefficients of the loss.
      shardings: of the state, which stays where it is; None leaves it to the compiler.
      watch: sees every gradient while tracing, also that of an update that will be skipped.
    """
    target_loss = likelihood_loss if objective.distillation in LIKELIHOODS else kl_loss
    policy_loss = partial(grpo_loss, forward=forward, objective=objective)
    distillation_loss = partial(target_loss, forward=forward, objective=objective)

    def update(state, batch):
        autonomous, targets = jax.lax.stop_gradient(select(state.params, batch, forward, objective))

        def optimise(state, _):
            with jax.named_scope("autonomous"):
                gradient, metrics = accumulate(policy_loss, state.params, batch.autonomous.count, autonomous)
            metrics["loss"] = metrics["loss_grpo"] - objective.entropy_bonus * metrics["entropy"]
            if targets is not None:
                with jax.named_scope("targets"):
                    gradient, target_metrics = accumulate(
                        distillation_loss, state.params, batch.targets.count, targets, gradient
                    )
                metrics |= target_metrics | {"loss": metrics["loss"] + target_metrics["loss_kd"]}
            watch(gradient)
            measured = metrics["loss"], metrics["logp_mismatch"]
            state, grad_norm = apply_gradients(state, gradient, optimizer, measured)
            return state, metrics | {"grad_norm": grad_norm}

        state, measured = jax.lax.scan(optimise, state, None, length=objective.updates_per_batch)
        metrics = {name: values.max() if name.endswith("_max") else values.mean() for name, values in measured.items()}
        metrics["alpha"] = batch.alpha.sum() / batch.lengths.shape[0]
        if batch.correct is not None:
            metrics["target_found"] = batch.correct.any(axis=1).mean()
        return state.replace(step=state.step + 1), metrics | {"skipped": state.skipped}

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def select(
    params: Any, batch: PackedBatch, forward: Forward, objective: Objective
) -> tuple[MicroBatch, MicroBatch | None]:
    """Makes the micro-batches of both loss terms, with what stays fixed: old log-probabilities and o+ (Eq. 4).

    Returns:
      (those of the autonomous responses, those of the targets or None), with a leading axis K.
    """
    problems, count = batch.lengths.shape[0], batch.lengths.size
    packed = batch.autonomous
    share = mean_share(packed, batch.lengths.reshape(-1), count)
    weight = _weight(share, 1.0, objective.normaliser * count)
    advantage = batch.advantages.reshape(-1)[packed.owner]
    tokens = Tokens(*map(listed, (batch.autonomous_tokens, share, weight, advantage)))
    autonomous = MicroBatch(packed.contexts[0], packed.chunks, tokens)
    old_logp = None
    if objective.updates_per_batch > 1:
        with jax.named_scope("old_logp"):
            old_logp = in_micro_batches(
                lambda micro: response_logprobs(forward, params, micro)[0], packed.count, autonomous
            )
    tokens = tokens._replace(old_logp=old_logp, sampler_logp=listed(batch.sampler_logp))
    autonomous = autonomous._replace(tokens=tokens)
    if batch.targets is None:
        return autonomous, None

    packed = batch.targets
    lengths, responses = _select_targets(params, batch, forward)
    weighted = jnp.maximum((batch.alpha != 0).sum(), 1)
    share = mean_share(packed, lengths, weighted)
    weight = batch.alpha[packed.owner] * _weight(share, weighted / problems, objective.normaliser * count)
    ids = jnp.where(packed.owner >= 0, responses[packed.owner, packed.index], 0)
    rows, *guided_rows = (with_responses(rows, packed.owner, ids) for rows in packed.contexts)
    tokens = Tokens(*map(listed, (ids, share, weight)))
    return autonomous, MicroBatch(rows, packed.chunks, tokens, *guided_rows)


def _select_targets(params: Any, batch: PackedBatch, forward: Forward) -> tuple[jax.Array, jax.Array]:
    """Returns (lengths `[R]`, tokens `[R,T]`) of the targets of Eq. 4; without candidates, of all guided responses."""
    if batch.candidates is None:
        return batch.guided_lengths.reshape(-1), batch.guided_tokens.reshape(-1, batch.guided_tokens.shape[-1])
    packed = batch.candidates

    def scores(micro_and_owner):
        micro, owner = micro_and_owner
        logp = jnp.where(micro.tokens.share > 0, response_logprobs(forward, params, micro)[0], 0.0)
        return jax.ops.segment_sum(logp.reshape(-1), owner.reshape(-1), batch.correct.size)

    share = mean_share(packed, batch.guided_lengths.reshape(-1), 1)
    tokens = Tokens(*map(listed, (batch.candidate_tokens, share, share)))
    candidates = MicroBatch(packed.contexts[0], packed.chunks, tokens), listed(packed.owner)
    with jax.named_scope("candidates"):
        summed = in_micro_batches(scores, packed.count, candidates).sum(axis=0)
    index, _ = jax.vmap(losses.select_target)(summed.reshape(batch.correct.shape), batch.correct)
    problem = jnp.arange(len(index))
    return batch.guided_lengths[problem, index], batch.guided_tokens[problem, index]


def _weight(share: jax.Array, factor: Any, tokens: int) -> jax.Array:
    """Returns the weight of tokens in the loss: `factor` times their share of a mean, or 1 / `tokens` if not 0."""
    return jnp.where(share > 0, 1.0 / tokens, 0.0) if tokens else factor * share
