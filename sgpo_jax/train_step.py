"""The jitted update of SGPO (Eq. 7), and the parts of it that the SFT warm-up shares.

Axis key: B problems, G responses of a group, R rows (one response each), P prompt length, T response tokens,
N = R * T token positions, D hidden. Prompts are padded on the left and responses on the right, so that in every row the
response begins at index P: the guided and the unguided context of a response are aligned by construction.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from sgpo_jax import logprobs, losses, models
from sgpo_jax.sharding import BATCH, constrain

Array = jax.Array | np.ndarray
Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """Everything an update changes; checkpointed as a whole."""

    step: jax.Array  # [] int32, batches consumed; also the data position and what is folded into the seed
    params: Any
    opt_state: optax.OptState
    skipped: jax.Array  # [] int32, updates in a row that were skipped for a non-finite gradient


class Group(NamedTuple):
    """One group of responses for each of B problems."""

    tokens: Array  # [B,G,T] int32, padded on the right
    lengths: Array  # [B,G] int32, the stop token included
    logp: Array  # [B,G,T] float32, the sampler's log-probabilities, nats
    rewards: Array  # [B,G] float32


class Prompts(NamedTuple):
    """One prompt for each of B problems."""

    tokens: Array  # [B,P] int32, padded on the left
    mask: Array  # [B,P] bool, True on real tokens


class Batch(NamedTuple):
    """One step's rollouts. P and T of the two sides may differ."""

    prompts: Prompts  # problem only
    guided_prompts: Prompts  # strategy and problem
    autonomous: Group  # sampled from `prompts`
    guided: Group  # sampled from `guided_prompts`


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    # Two arrays, not one: a donated state must not hold a buffer twice.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step=step, params=params, opt_state=optimizer.init(params), skipped=skipped)


def make_update(
    config: models.ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    micro_batch: int,
    updates_per_batch: int = 1,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    delta: float = 1.0,
    alpha0: float = 0.5,
    gamma: float = 0.1,
    alpha_max: float = 0.8,
    dtype: Any = jnp.float32,
    remat: bool = False,
    chunk: int = logprobs.CHUNK,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted `update(state, batch) -> (state, metrics)` of Eq. 7; the state is donated.

    Args:
      config: shape of the model.
      optimizer: applied to the gradient of the mean loss over the B problems.
      micro_batch: rows whose activations are held at once; it divides B * G1, B * G2 and B, or exceeds them.
      updates_per_batch: optimizer steps on the same batch; targets, weights and old log-probabilities stay fixed.
      clip_low, clip_high, delta, alpha0, gamma, alpha_max: see `losses`.
      dtype, remat: see `models.apply`.
      chunk: token positions whose logits are held at once.
      shardings: of the state, which stays where it is; None leaves it to the compiler.
    """
    hidden_states = partial(response_hidden, config=config, dtype=dtype, remat=remat)
    sequence_mean = jax.vmap(losses.sequence_mean)

    def unguided_logprobs(params, rows):
        """Log-probability and entropy `[R,T]` of each response token without the strategy, and the mask `[R,T]`."""
        hidden, mask = hidden_states(params, rows["prompts"], rows)
        flat = hidden.reshape(-1, hidden.shape[-1])
        head = models.head(params, config)
        logp, entropy = logprobs.token_logprobs(flat, head, rows["tokens"].reshape(-1), chunk=chunk)
        return logp.reshape(mask.shape), entropy.reshape(mask.shape), mask

    def grpo_loss(params, rows):
        """L_GRPO (Eq. 1) of each autonomous response `[R]`, and metrics `[R]`."""
        logp, entropy, mask = unguided_logprobs(params, rows)
        old_logp = rows.get("old_logp", jax.lax.stop_gradient(logp))
        surrogate = partial(losses.clipped_surrogate, clip_low=clip_low, clip_high=clip_high)
        loss = sequence_mean(jax.vmap(surrogate)(logp, old_logp, rows["advantage"]), mask)
        ratio = jnp.exp(logp - old_logp)
        clipped = jnp.where(rows["advantage"][:, None] > 0, ratio > 1 + clip_high, ratio < 1 - clip_low)
        mismatch = jnp.where(mask, jnp.abs(old_logp - rows["sampler_logp"]), 0.0)
        return loss, {
            "loss_grpo": loss,
            "entropy": sequence_mean(entropy, mask),
            "ratio": sequence_mean(ratio, mask),
            "clip_share": sequence_mean(clipped, mask),
            "logp_mismatch": sequence_mean(mismatch, mask),
            "logp_mismatch_max": mismatch.max(axis=-1),
        }

    def distillation_loss(params, rows):
        """alpha * L_KD (Eq. 3, 5) of each target `[R]`, zero where none was found, and metrics `[R]`."""
        unguided, mask = hidden_states(params, rows["prompts"], rows)
        guided, _ = hidden_states(jax.lax.stop_gradient(params), rows["guided_prompts"], rows)
        guided, unguided = (hidden.reshape(-1, hidden.shape[-1]) for hidden in (guided, unguided))
        token_kl = logprobs.token_kl(guided, unguided, models.head(params, config), chunk=chunk).reshape(mask.shape)
        loss = jax.vmap(partial(losses.distillation_loss, delta=delta))(token_kl, mask)
        loss = jnp.where(rows["found"], rows["alpha"] * loss, 0.0)
        return loss, {
            "loss_kd": loss,
            "token_kl": sequence_mean(token_kl, mask),
            "token_kl_max": jnp.where(mask, token_kl, 0.0).max(axis=-1),
            "kl_clip_share": sequence_mean(token_kl > delta, mask),
        }

    def select(params, batch):
        """Rows for both losses, with what stays fixed for the batch: advantages, o+ (Eq. 4), alpha (Eq. 6)."""
        auto, guided = batch.autonomous, batch.guided
        autonomous = _rows(batch.prompts, auto)
        autonomous["sampler_logp"] = auto.logp.reshape(autonomous["tokens"].shape)
        autonomous["advantage"] = jax.vmap(losses.group_advantages)(auto.rewards).reshape(-1)
        if updates_per_batch > 1:
            autonomous["old_logp"] = in_micro_batches(
                lambda rows: unguided_logprobs(params, rows)[0], autonomous, micro_batch
            )

        def sequence_logp(rows):
            logp, _, mask = unguided_logprobs(params, rows)
            return jnp.where(mask, logp, 0.0).sum(axis=-1)

        scores = in_micro_batches(sequence_logp, _rows(batch.prompts, guided), micro_batch)
        index, found = jax.vmap(losses.select_target)(scores.reshape(guided.lengths.shape), guided.rewards >= 1)
        problem = jnp.arange(index.shape[0])
        targets = {
            "prompts": batch.prompts,
            "guided_prompts": batch.guided_prompts,
            "tokens": guided.tokens[problem, index],
            "length": guided.lengths[problem, index],
            "found": found,
            "alpha": losses.adaptive_weight(
                auto.rewards.mean(axis=1), guided.rewards.mean(axis=1), alpha0, gamma, alpha_max
            ),
        }
        return autonomous, targets

    def update(state, batch):
        autonomous, targets = jax.lax.stop_gradient(select(state.params, batch))

        def optimise(state, _):
            grpo_grads, grpo = accumulate(grpo_loss, state.params, autonomous, micro_batch)
            kd_grads, kd = accumulate(distillation_loss, state.params, targets, micro_batch)
            state, grad_norm = apply_gradients(state, jax.tree.map(jnp.add, grpo_grads, kd_grads), optimizer)
            return state, {**grpo, **kd, "grad_norm": grad_norm}

        state, measured = jax.lax.scan(optimise, state, None, length=updates_per_batch)
        metrics = _summary(measured, targets["found"]) | {
            "alpha": jnp.where(targets["found"], targets["alpha"], 0.0).mean(),
            "target_found": targets["found"].mean(),
            "skipped": state.skipped,
        }
        return state.replace(step=state.step + 1), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def _rows(prompts: Prompts, group: Group) -> dict[str, Any]:
    """The responses of B groups as R = B * G rows, each with its problem's prompt."""
    size = group.lengths.shape[1]
    return {
        "prompts": jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), prompts),
        "tokens": group.tokens.reshape(-1, group.tokens.shape[-1]),
        "length": group.lengths.reshape(-1),
    }


def _summary(measured: Metrics, found: jax.Array) -> Metrics:
    """Scalars from per-row metrics `[updates,R]`; those of the KL are over problems that have a target."""
    metrics = {name: value.max() if name.endswith("_max") else value.mean() for name, value in measured.items()}
    for name in ("token_kl", "token_kl_max", "kl_clip_share"):
        value = jnp.where(found, measured[name], 0.0)
        metrics[name] = value.max() if name.endswith("_max") else value.mean(0).sum() / jnp.maximum(found.sum(), 1)
    metrics["loss"] = metrics["loss_grpo"] + metrics["loss_kd"]
    return metrics


def response_hidden(
    params: Any, prompts: Prompts, rows: dict[str, Any], *, config: models.ModelConfig, dtype: Any, remat: bool
) -> tuple[jax.Array, jax.Array]:
    """Hidden states `[R,T,D]` that predict each response token after its prompt, and the response mask `[R,T]`."""
    mask = jnp.arange(rows["tokens"].shape[1]) < rows["length"][:, None]
    tokens = jnp.concatenate([prompts.tokens, rows["tokens"]], axis=1)
    seen = jnp.concatenate([prompts.mask, mask], axis=1)
    hidden, _ = models.apply(params, config, tokens, models.positions_of(seen), seen, dtype=dtype, remat=remat)
    return hidden[:, prompts.tokens.shape[1] - 1 : -1], mask


def accumulate(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Metrics]], params: Any, rows: Any, micro_batch: int
) -> tuple[Any, Metrics]:
    """Float32 gradient of the mean of `loss_fn(params, rows) -> (losses [R], metrics [R])`, one micro-batch at a time.

    Equal to the gradient over all rows at once. Returns (gradient, metrics `[R]`).
    """
    count = jax.tree.leaves(rows)[0].shape[0]

    def total(params, micro):
        loss, metrics = loss_fn(params, micro)
        return loss.sum() / count, metrics

    def add(sums, micro):
        grads, metrics = jax.grad(total, has_aux=True)(params, micro)
        return jax.tree.map(jnp.add, sums, grads), metrics

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    grads, metrics = jax.lax.scan(add, zeros, _split(rows, micro_batch))
    return grads, _join(metrics)


def in_micro_batches(fn: Callable[[Any], Any], rows: Any, micro_batch: int) -> Any:
    """`fn(rows)` over micro-batches of the leading axis, without gradient."""
    return _join(jax.lax.map(fn, _split(rows, micro_batch)))


def _split(rows: Any, micro_batch: int) -> Any:
    count = jax.tree.leaves(rows)[0].shape[0]
    size = min(micro_batch, count)
    if count % size:
        raise ValueError(f"micro_batch={micro_batch} must divide the number of rows, {count}")

    def split(x):
        # Strided, so that rows sharded over devices stay spread over them within every micro-batch.
        return constrain(x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1), None, BATCH)

    return jax.tree.map(split, rows)


def _join(rows: Any) -> Any:
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """One optimizer step, or none when the gradient is not finite. Returns (state, gradient norm before clipping)."""
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def keep(new, old):
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

    state = state.replace(
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    return state, grad_norm
