"""The jitted update of SGPO (Eq. 7) and of the methods it is compared with.

Axis key: B problems, G responses of a group, R targets, T response tokens; packed: K micro-batches, S chunks of
response tokens, M rows of a micro-batch, J tokens of a row in a chunk, C = M * J.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sgpo_jax import losses
from sgpo_jax.training.batch import PackedBatch, PackedGroup
from sgpo_jax.training.forward import (
    Forward,
    MicroBatch,
    Tokens,
    attached,
    listed,
    mean_share,
    response_logprobs,
    with_responses,
)
from sgpo_jax.training.gradients import Metrics, accumulate, apply_gradients, in_micro_batches
from sgpo_jax.training.objective import (
    EXPERT_TOKENS,
    LIKELIHOODS,
    Objective,
    Parts,
    grpo_loss,
    kl_loss,
    likelihood_loss,
    token_kls,
)
from sgpo_jax.training.state import TrainState
from sgpo_jax.training.teacher import LIVE, Teaching, follow, mixture


def make_update(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    teaching: Teaching = LIVE,
    shardings: TrainState | None = None,
    watch: Callable[[Any], None] = lambda gradient: None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted `update(state, batch, base=None) -> (state, metrics)` of Eq. 7; the state is donated.

    The loss is the mean over the problems' autonomous responses of the mean over tokens of `losses.clipped_surrogate`,
    plus the mean over problems of alpha times the mean over the target's tokens of the distillation loss. Other methods
    change these terms, or add one of the guided responses. With a `base`, the parameters of the state and of its
    teacher are adapters of it.

    Args:
      forward: the model.
      optimizer: applied to the gradient of the mean loss over the B problems.
      objective: the coefficients of the loss.
      teaching: the rule of the teacher, with which `init_state` made the state.
      shardings: of the state, which stays where it is; None leaves it to the compiler.
      watch: sees every gradient while tracing, also that of an update that will be skipped.
    """

    def update(state, batch, base=None):
        attach = partial(attached, forward, base)
        held = jax.lax.stop_gradient(select(seen(state, attach), batch, forward, objective, teaching))

        def optimise(state, _):
            gradient, metrics, loss = None, {}, None
            for name, (term, packed) in terms(seen(state, attach), batch, forward, objective, teaching).items():
                with jax.named_scope(name):
                    trained = partial(_of_trained, term, attach)
                    gradient, measured = accumulate(trained, state.params, packed.count, held[name], gradient)
                if EXPERT_TOKENS in measured:  # of the busiest expert of a layer, over the mean of its experts
                    load = measured.pop(EXPERT_TOKENS)
                    measured["expert_load_max"] = (load.max(axis=1) / jnp.maximum(load.mean(axis=1), 1)).max()
                part = term_loss(measured, objective if name == "autonomous" else replace(objective, entropy_bonus=0.0))
                loss = part if loss is None else loss + part
                metrics |= {f"{key}_guided": x for key, x in measured.items()} if name == "guided" else measured
            metrics["loss"] = loss
            watch(gradient)
            state, grad_norm = apply_gradients(state, gradient, optimizer, (loss, metrics["logp_mismatch"]))
            return state, metrics | {"grad_norm": grad_norm}

        state, measured = jax.lax.scan(optimise, state, None, length=objective.updates_per_batch)
        metrics = {name: values.max() if "_max" in name else values.mean() for name, values in measured.items()}
        metrics["alpha"] = batch.alpha.sum() / batch.lengths.shape[0]
        if batch.correct is not None:
            metrics["target_found"] = batch.correct.any(axis=1).mean()
        state = state.replace(step=state.step + 1)
        with jax.named_scope("teacher"):
            teacher = follow(state.teacher, state.params, state.step, batch.reward, teaching)
        return state.replace(teacher=teacher), metrics | {"skipped": state.skipped}

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def seen(state: TrainState, attach: Callable[[Any], Any]) -> TrainState:
    """Returns the state with parameters, also of its teacher, as the decoder takes them."""
    teacher = state.teacher
    if teacher is not None:
        reference, moving = (x if x is None else attach(x) for x in (teacher.reference, teacher.moving))
        teacher = teacher.replace(reference=reference, moving=moving)
    return state.replace(params=attach(state.params), teacher=teacher)


def _of_trained(term: Callable, attach: Callable[[Any], Any], params: Any, micro: MicroBatch) -> Any:
    return term(attach(params), micro)


def terms(
    state: TrainState, batch: PackedBatch, forward: Forward, objective: Objective, teaching: Teaching
) -> dict[str, tuple[Callable[[Any, MicroBatch], tuple[jax.Array, Metrics]], Any]]:
    """Returns the terms of the loss: name -> (function of parameters and a micro-batch, its packed responses)."""
    reference = None if state.teacher is None else state.teacher.reference
    policy = partial(grpo_loss, forward=forward, reference=reference, responses=batch.lengths.size)
    found: dict[str, Any] = {"autonomous": (partial(policy, objective=objective), batch.autonomous)}
    if batch.guided is not None:
        # The entropy bonus is for the policy that acts without guidance.
        guided = partial(policy, objective=replace(objective, entropy_bonus=0.0), responses=batch.guided.lengths.size)
        found["guided"] = guided, batch.guided.packed
    if batch.targets is not None:
        distil = partial(likelihood_loss, forward=forward, objective=objective)
        if objective.distillation not in LIKELIHOODS:
            teacher = mixture(state.teacher, state.params, teaching)
            distil = partial(kl_loss, forward=forward, objective=objective, teacher=teacher)
        found["targets"] = distil, batch.targets
    return found


def term_loss(measured: Metrics, objective: Objective) -> jax.Array:
    """Returns the part of the loss that the metrics of a term add up to."""
    if "loss_kd" in measured:
        return measured["loss_kd"]
    loss = measured["loss_grpo"] - objective.entropy_bonus * measured["entropy"]
    return loss + measured["loss_reference"] if "loss_reference" in measured else loss


def select(
    state: TrainState, batch: PackedBatch, forward: Forward, objective: Objective, teaching: Teaching
) -> dict[str, MicroBatch]:
    """Makes the micro-batches of the loss terms, with what stays fixed: old log-probabilities, delta, and o+ (Eq. 4).

    Returns:
      Name of a term -> its micro-batches, with a leading axis K.
    """
    reference = None if state.teacher is None else state.teacher.reference
    make = partial(policy_batch, state.params, forward=forward, objective=objective, reference=reference)
    group = PackedGroup(
        batch.autonomous, batch.autonomous_tokens, batch.sampler_logp, batch.lengths, batch.advantages
    )
    both = objective.reference_kl_on == "all"
    held = {"autonomous": make(group, 1.0, objective.reference_kl if both else 0.0)}
    if batch.guided is not None:
        with jax.named_scope("of_guided"):  # a plan tells its loops from those of the autonomous group
            held["guided"] = make(batch.guided, objective.guided_grpo, objective.reference_kl)
    if batch.targets is not None:
        teacher = mixture(state.teacher, state.params, teaching)
        held["targets"] = target_batch(state.params, batch, forward, objective, teacher)
    return held


def policy_batch(
    params: Any,
    group: PackedGroup,
    coefficient: float,
    kl: float,
    *,
    forward: Forward,
    objective: Objective,
    reference: Any,
) -> MicroBatch:
    """Makes the micro-batches of a group that the policy loss is for.

    Args:
      params, group, forward, objective: the policy before the update, and the group.
      coefficient: of the policy loss.
      kl: coefficient of the KL to the reference; 0 leaves it out.
      reference: parameters of the reference; None if there is none.
    """
    packed, count = group.packed, group.lengths.size
    share = mean_share(packed, group.lengths.reshape(-1), count)
    weight = _weight(share, 1.0, objective, count, lambda: group.lengths.sum())
    advantage = group.advantages.reshape(-1)[packed.owner]
    scaled = weight if coefficient == 1.0 else coefficient * weight
    tokens = Tokens(*map(listed, (group.tokens, share, scaled, advantage)))
    micro = MicroBatch(packed.contexts[0], packed.chunks, tokens)
    old_logp = reference_logp = None
    if objective.updates_per_batch > 1 or objective.importance != "none":
        with jax.named_scope("old_logp"):
            old_logp = in_micro_batches(
                lambda micro: response_logprobs(forward, params, micro)[0], packed.count, micro
            )
    tokens = tokens._replace(old_logp=old_logp, sampler_logp=listed(group.sampler_logp))
    if objective.importance != "none":
        tokens = tokens._replace(advantage=tokens.advantage * _importance(tokens, packed, objective, count))
    if objective.surrogate == "sequence":
        tokens = tokens._replace(owner=listed(packed.owner))
    if kl:
        if objective.reference_kl_kind == "k3":
            with jax.named_scope("reference_logp"):
                reference_logp = in_micro_batches(
                    lambda micro: response_logprobs(forward, reference, micro)[0], packed.count, micro
                )
        tokens = tokens._replace(kl_weight=kl * listed(weight), reference_logp=reference_logp)
    return micro._replace(tokens=tokens)


def _importance(tokens: Tokens, packed: Any, objective: Objective, responses: int) -> jax.Array:
    """Returns the weights `[K,S,C]` of trainer over sampler probabilities, of tokens or of whole responses."""
    difference = jnp.where(tokens.share > 0, tokens.old_logp - tokens.sampler_logp, 0.0)
    if objective.importance == "sequence":
        owner = listed(packed.owner)
        difference = jax.ops.segment_sum(difference.reshape(-1), owner.reshape(-1), responses)[owner]
    return losses.importance_weight(difference, objective.importance_cap, objective.importance_rule)


def target_batch(
    params: Any, batch: PackedBatch, forward: Forward, objective: Objective, teacher: Parts = ()
) -> MicroBatch:
    """Makes the micro-batches of the targets."""
    problems, packed = batch.lengths.shape[0], batch.targets
    assert packed is not None
    lengths, responses = _select_targets(params, batch, forward)
    weighted = jnp.maximum((batch.alpha != 0).sum(), 1)
    share = mean_share(packed, lengths, weighted)
    weight = batch.alpha[packed.owner] * _weight(
        share, weighted / problems, objective, batch.lengths.size, lambda: jnp.where(batch.alpha != 0, lengths, 0).sum()
    )
    ids = jnp.where(packed.owner >= 0, responses[packed.owner, packed.index], 0)
    rows, *guided_rows = (with_responses(rows, packed.owner, ids) for rows in packed.contexts)
    tokens = Tokens(*map(listed, (ids, share, weight)))
    chosen = MicroBatch(rows, packed.chunks, tokens, *guided_rows)
    if objective.delta_quantile:
        with jax.named_scope("target_kl"):
            measure = partial(token_kls, params, forward=forward, objective=objective, teacher=teacher)
            token_kl = in_micro_batches(measure, packed.count, chosen)
        delta = losses.kl_quantile(token_kl, tokens.share, objective.delta_quantile)
        chosen = chosen._replace(tokens=tokens._replace(delta=jnp.full_like(tokens.share, delta)))
    return chosen


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


def _weight(
    share: jax.Array, factor: Any, objective: Objective, responses: int, tokens: Callable[[], jax.Array]
) -> jax.Array:
    """Returns the weight of tokens in the loss, by `rl.normaliser`.

    Args:
      share: of each token in a mean of sequence means.
      factor: of the mean.
      objective: "sequence" is `factor` times the share; "tokens" is `factor / tokens()`, the same for all; "constant"
        is `1 / (responses * max_new_tokens)`.
      responses: of the group; for targets, the autonomous ones.
      tokens: returns the number of tokens `[]` that the mean is over.
    """
    if objective.normaliser == "sequence":
        return factor * share
    if objective.normaliser == "tokens":
        return jnp.where(share > 0, factor / jnp.maximum(tokens(), 1), 0.0)
    return jnp.where(share > 0, 1.0 / (objective.max_new_tokens * responses), 0.0)
