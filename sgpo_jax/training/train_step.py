"""The jitted update of SGPO (Eq. 7) and of the methods it is compared with, and what of it the SFT warm-up shares.

Axis key: B problems, R targets, T response tokens, D hidden; packed: K micro-batches, M rows of a micro-batch, S chunks
of response tokens, J of a row in a chunk, C = M * J.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sgpo_jax import logprobs, losses, models
from sgpo_jax.sharding import BATCH, constrain
from sgpo_jax.training.batch import LIKELIHOODS, PackedBatch
from sgpo_jax.training.packing import Packed, Rows
from sgpo_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def make_update(
    config: models.ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    updates_per_batch: int = 1,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    delta: float = 1.0,
    distillation: str = "forward_kl",
    beta: float = 0.5,
    kl_top_k: int = 100,
    shaping: float = 0.1,
    normaliser: int = 0,
    entropy_bonus: float = 0.0,
    dtype: Any = jnp.float32,
    remat: str = "none",
    shardings: TrainState | None = None,
    watch: Callable[[Any], None] = lambda gradient: None,
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]:
    """The jitted `update(state, batch) -> (state, metrics)` of Eq. 7; the state is donated.

    The loss is the mean over the problems' autonomous responses of the mean over tokens of `losses.clipped_surrogate`,
    plus the mean over problems of alpha times the mean over the target's tokens of the distillation loss.

    Args:
      config: shape of the model.
      optimizer: applied to the gradient of the mean loss over the B problems.
      updates_per_batch: optimizer steps on the same batch; targets, weights and old log-probabilities stay fixed.
      clip_low, clip_high, delta, shaping: see `losses`.
      distillation: the loss on a target's token: one of `divergences.DIVERGENCES` between the guided and the unguided
        distribution, "nll" or "shaped" (LUFFY).
      beta: see `divergences.jensen_shannon`.
      kl_top_k: k of `divergences.top_k_kl`.
      normaliser: 0 divides the sum over a response's tokens by its length. Another number divides it by that, so that
        all tokens of a batch weigh the same, those of targets (times alpha) too: LUFFY, HPT.
      entropy_bonus: coefficient of the mean entropy of the autonomous responses' tokens, which is maximised.
      dtype, remat: see `models.apply`.
      shardings: of the state, which stays where it is; None leaves it to the compiler.
      watch: sees every gradient while tracing, also that of an update that will be skipped.
    """
    logprobs_of = partial(response_logprobs, config=config, dtype=dtype, remat=remat)
    loss_of = partial(response_loss, config=config, dtype=dtype, remat=remat)
    hidden_of = partial(response_hidden, config=config, dtype=dtype, remat=remat)

    def surrogate(logp, micro):
        old_logp = micro.get("old_logp", jax.lax.stop_gradient(logp))
        return micro["weight"] * losses.clipped_surrogate(logp, old_logp, micro["advantage"], clip_low, clip_high)

    def grpo_token(logp, entropy, micro):
        return surrogate(logp, micro) - entropy_bonus * micro["share"] * entropy

    def grpo_loss(params, micro):
        """L_GRPO (Eq. 1), summed over the micro-batch's tokens, each with its share of the mean; and metrics."""
        loss, logp, entropy = loss_of(grpo_token, params, micro)
        old_logp, advantage, share = micro.get("old_logp", logp), micro["advantage"], micro["share"]
        ratio = jnp.exp(logp - old_logp)
        clipped = jnp.where(advantage > 0, ratio > 1 + clip_high, ratio < 1 - clip_low)
        mismatch = jnp.where(share > 0, jnp.abs(old_logp - micro["sampler_logp"]), 0.0)
        means = {"entropy": entropy, "ratio": ratio, "clip_share": clipped, "logp_mismatch": mismatch}
        metrics = {name: jnp.sum(share * value) for name, value in means.items()}
        by_token = {name: value.reshape(-1) for name, value in _by_chunk(micro).items()}
        loss_grpo = jnp.sum(surrogate(logp.reshape(-1), by_token))
        return loss, metrics | {"loss_grpo": loss_grpo, "logp_mismatch_max": mismatch.max()}

    def likelihood_token(logp, _, micro):
        logp = jnp.where(micro["share"] > 0, logp, 0.0)
        return micro["weight"] * (-logp if distillation == "nll" else losses.shaped_likelihood(logp, shaping))

    def likelihood_loss(params, micro):
        """alpha * the loss of imitating the target, summed in the same way."""
        loss, logp, _ = loss_of(likelihood_token, params, micro)
        logp = jnp.where(micro["share"] > 0, logp, 0.0)
        return loss, {"loss_kd": loss, "target_nll": -jnp.sum(micro["share"] * logp)}

    def kl_token(kl, micro):
        kl = jnp.where(micro["share"] > 0, kl, 0.0)
        # Selected rather than multiplied, so that an infinite KL is dropped too instead of giving inf * 0.
        return micro["weight"] * jnp.where(losses.kl_clip_mask(kl, delta) > 0, kl, 0.0)

    def kl_loss(params, micro):
        """alpha * L_KD (Eq. 3, 5), summed in the same way; the metrics are over the targets that have weight."""
        unguided = hidden_of(params, micro["rows"])
        guided = hidden_of(jax.lax.stop_gradient(params), micro["guided_rows"])
        loss, token_kl = logprobs.kl_loss(
            kl_token, guided, unguided, models.head_weight(params, config), micro["chunks"], _by_chunk(micro),
            distillation, beta, kl_top_k, config.tie_embeddings,
        )  # fmt: skip
        share = micro["share"].reshape(-1)
        token_kl = jnp.where(share > 0, token_kl.reshape(-1), 0.0)
        dropped = 1 - losses.kl_clip_mask(token_kl, delta)
        metrics = {"token_kl": jnp.sum(share * token_kl), "token_kl_max": token_kl.max()}
        return loss, metrics | {"loss_kd": loss, "kl_clip_share": jnp.sum(share * dropped)}

    def select(params, batch):
        """Micro-batches of both losses, with what stays fixed for the batch: old log-probabilities and o+ (Eq. 4)."""
        problems, count = batch.lengths.shape[0], batch.lengths.size
        packed = batch.autonomous
        autonomous = _micro_batches(packed, batch.lengths.reshape(-1), count) | {
            "tokens": batch.autonomous_tokens,
            "sampler_logp": batch.sampler_logp,
            "advantage": batch.advantages.reshape(-1)[packed.owner],
        }
        autonomous["weight"] = _weight(autonomous["share"], 1.0, normaliser * count)
        if updates_per_batch > 1:
            with jax.named_scope("old_logp"):
                autonomous["old_logp"] = in_micro_batches(
                    lambda micro: logprobs_of(params, micro)[0], packed.count, autonomous
                )

        if batch.targets is None:
            return autonomous, None

        packed = batch.targets
        lengths, tokens = select_targets(params, batch)
        weighted = jnp.maximum((batch.alpha != 0).sum(), 1)
        targets = _micro_batches(packed, lengths, weighted)
        alpha = batch.alpha[packed.owner]
        targets["weight"] = alpha * _weight(targets["share"], weighted / problems, normaliser * count)
        targets["tokens"] = jnp.where(packed.owner >= 0, tokens[packed.owner, packed.index], 0)
        rows = (with_responses(rows, packed.owner, targets["tokens"]) for rows in packed.contexts)
        return autonomous, targets | dict(zip(("rows", "guided_rows"), rows, strict=False))

    def select_targets(params, batch):
        """(lengths `[R]`, tokens `[R,T]`) of the targets: those of Eq. 4, or, without candidates, all responses."""
        if batch.candidates is None:
            return batch.guided_lengths.reshape(-1), batch.guided_tokens.reshape(-1, batch.guided_tokens.shape[-1])

        def scores(micro):
            logp = jnp.where(micro["share"] > 0, logprobs_of(params, micro)[0], 0.0)
            return jax.ops.segment_sum(logp.reshape(-1), micro["owner"].reshape(-1), batch.correct.size)

        packed = batch.candidates
        candidates = _micro_batches(packed, batch.guided_lengths.reshape(-1), 1)
        candidates |= {"tokens": batch.candidate_tokens, "owner": packed.owner}
        with jax.named_scope("candidates"):
            summed = in_micro_batches(scores, packed.count, candidates).sum(axis=0)
        index, _ = jax.vmap(losses.select_target)(summed.reshape(batch.correct.shape), batch.correct)
        problem = jnp.arange(len(index))
        return batch.guided_lengths[problem, index], batch.guided_tokens[problem, index]

    def update(state, batch):
        autonomous, targets = jax.lax.stop_gradient(select(state.params, batch))

        def optimise(state, _):
            with jax.named_scope("autonomous"):
                grads, metrics = accumulate(grpo_loss, state.params, batch.autonomous.count, autonomous)
            metrics["loss"] = metrics["loss_grpo"] - entropy_bonus * metrics["entropy"]
            if targets is not None:
                target_loss = likelihood_loss if distillation in LIKELIHOODS else kl_loss
                with jax.named_scope("targets"):
                    grads, of_targets = accumulate(target_loss, state.params, batch.targets.count, targets, grads)
                metrics |= of_targets | {"loss": metrics["loss"] + of_targets["loss_kd"]}
            watch(grads)
            measured = metrics["loss"], metrics["logp_mismatch"]
            state, grad_norm = apply_gradients(state, grads, optimizer, measured)
            return state, metrics | {"grad_norm": grad_norm}

        state, measured = jax.lax.scan(optimise, state, None, length=updates_per_batch)
        metrics = {name: values.max() if name.endswith("_max") else values.mean() for name, values in measured.items()}
        metrics["alpha"] = batch.alpha.sum() / batch.lengths.shape[0]
        if batch.correct is not None:
            metrics["target_found"] = batch.correct.any(axis=1).mean()
        return state.replace(step=state.step + 1), metrics | {"skipped": state.skipped}

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def _micro_batches(packed: Packed, lengths: jax.Array, count: Any) -> dict[str, Any]:
    """What every loss reads of K micro-batches. A token's share of the mean of `count` sequence means is in `share`."""
    length = lengths[packed.owner]
    inside = (packed.owner >= 0) & (packed.index < length)
    share = jnp.where(inside, 1.0 / (jnp.maximum(length, 1) * count), 0.0)
    return {"rows": packed.contexts[0], "chunks": packed.chunks, "share": share}


def _weight(share: jax.Array, of_mean: Any, tokens: int) -> jax.Array:
    """Weight of tokens in the loss: `of_mean` times their share of a mean, or 1 in `tokens`, if that is not 0."""
    return jnp.where(share > 0, 1.0 / tokens, 0.0) if tokens else of_mean * share


def with_responses(rows: Rows, owner: jax.Array, tokens: jax.Array) -> Rows:
    """The rows with `tokens` `[K,S,M,J]` where the response tokens stand: after the slots that predict them."""

    def write(row, slots, owner, tokens):
        places = jnp.where(owner >= 0, slots + 1, row.size)
        return row.at[places.reshape(-1)].set(tokens.reshape(-1), mode="drop")

    by_row = jax.vmap(jax.vmap(write, in_axes=(0, 1, 1, 1)))
    return rows._replace(tokens=by_row(rows.tokens, rows.slots, owner, tokens))


def response_hidden(params: Any, rows: Rows, *, config: models.ModelConfig, dtype: Any, remat: str) -> jax.Array:
    """Hidden states `[S,C,D]` that predict the response tokens of one micro-batch."""
    hidden, _ = models.apply(params, config, rows.tokens, rows.positions, rows.segments, dtype=dtype, remat=remat)
    chunks, count, _ = rows.slots.shape
    picked = jnp.take_along_axis(hidden, rows.slots.swapaxes(0, 1).reshape(count, -1, 1), axis=1)
    picked = picked.reshape(count, chunks, -1, hidden.shape[-1]).swapaxes(0, 1)
    return constrain(picked.reshape(chunks, -1, hidden.shape[-1]), None, BATCH, None)


def response_logprobs(
    params: Any, micro: dict[str, Any], *, config: models.ModelConfig, dtype: Any, remat: str
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy `[S,M,J]` of the response tokens `micro["tokens"]`; 0 in unused chunks."""
    hidden = response_hidden(params, micro["rows"], config=config, dtype=dtype, remat=remat)
    targets = micro["tokens"].reshape(hidden.shape[:2])
    logp, entropy = logprobs.chunked_logprobs(
        hidden, models.head_weight(params, config), targets, micro["chunks"], tied=config.tie_embeddings
    )
    return logp.reshape(micro["tokens"].shape), entropy.reshape(micro["tokens"].shape)


def response_loss(
    token_loss: logprobs.TokenLoss, params: Any, micro: dict[str, Any], *, config: models.ModelConfig, dtype: Any,
    remat: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Sum of `token_loss(logp, entropy, micro)` over response tokens, and what `response_logprobs` gives, as constants.

    The loss sees a chunk `[C]` of what the micro-batch says of its tokens.
    """
    hidden = response_hidden(params, micro["rows"], config=config, dtype=dtype, remat=remat)
    given = _by_chunk(micro)
    head, targets = models.head_weight(params, config), given.pop("tokens")
    loss, (logp, entropy) = logprobs.logprobs_loss(
        token_loss, hidden, head, targets, micro["chunks"], given, config.tie_embeddings
    )
    return loss, logp.reshape(micro["tokens"].shape), entropy.reshape(micro["tokens"].shape)


def _by_chunk(micro: dict[str, Any]) -> dict[str, jax.Array]:
    """What a micro-batch says of its tokens `[S,M,J]`, as `[S,C]`."""
    of_tokens = {name: value for name, value in micro.items() if isinstance(value, jax.Array) and value.ndim == 3}
    return {name: value.reshape(len(value), -1) for name, value in of_tokens.items()}


def accumulate(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Metrics]],
    params: Any,
    count: jax.Array,
    micro_batches: Any,
    gradient: Any = None,
) -> tuple[Any, Metrics]:
    """Gradient of the sum of `loss_fn(params, micro) -> (loss, metrics)` over the first `count` micro-batches.

    It is added to `gradient`, a tree like `params`, or to zeros: layer by layer and in place, so that there is never a
    second one.

    Returns (gradient, metrics): each metric is summed, or, when its name ends in "_max", the largest.
    """
    sums = jax.tree.map(jax.new_ref, jax.tree.map(jnp.zeros_like, params) if gradient is None else gradient)

    def add(k, measured):
        loss, backward, metrics = jax.vjp(lambda params: loss_fn(params, _at(micro_batches, k)), params, has_aux=True)
        backward.with_refs(sums)(jnp.ones_like(loss))
        return {
            name: (jnp.maximum if name.endswith("_max") else jnp.add)(measured[name], value)
            for name, value in metrics.items()
        }

    metrics = jax.eval_shape(loss_fn, params, _at(micro_batches, 0))[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), metrics)
    metrics = jax.lax.fori_loop(0, count, add, zeros)
    return jax.tree.map(jax.freeze, sums), metrics


def in_micro_batches(fn: Callable[[Any], jax.Array], count: jax.Array, micro_batches: Any) -> jax.Array:
    """`fn(micro)` of the first `count` micro-batches, without gradient: `[K,...]`, 0 in the others."""
    one = jax.eval_shape(fn, _at(micro_batches, 0))
    total = jax.tree.leaves(micro_batches)[0].shape[0]
    out = jnp.zeros((total, *one.shape), one.dtype)
    return jax.lax.fori_loop(0, count, lambda k, out: out.at[k].set(fn(_at(micro_batches, k))), out)


def _at(micro_batches: Any, k: Any) -> Any:
    return jax.tree.map(lambda x: x[k], micro_batches)


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, measured: Any
) -> tuple[TrainState, jax.Array]:
    """One optimizer step, or none when the gradient, the state or `measured` is not finite.

    Args:
      state, grads, optimizer: what is changed, and how.
      measured: scalars that say that the batch is sound: the loss, how far the sampler's log-probabilities are off.

    Returns:
      (state, gradient norm before clipping).
    """
    grad_norm = optax.tree.norm(grads)
    # What the change of the parameters is made of; it would itself have to be held to be looked at.
    held = [x for x in jax.tree.leaves((state.params, state.opt_state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.isfinite(jnp.stack(jax.tree.leaves((grad_norm, optax.tree.norm(held), measured)))).all()

    def step(i, state):
        # Tied to the loop, out of which XLA would move what needs the gradient alone, and hold it.
        tied, _ = jax.lax.optimization_barrier((grads, i))
        updates, opt_state = optimizer.update(tied, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    # One step or none, in place: to choose between old and new values would be to hold both.
    with jax.named_scope("optimizer"):
        state = jax.lax.fori_loop(0, finite.astype(jnp.int32), step, state)
    return state.replace(skipped=jnp.where(finite, 0, state.skipped + 1)), grad_norm
