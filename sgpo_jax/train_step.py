"""The jitted update of SGPO (Eq. 7), and the parts of it that the SFT warm-up shares.

Rollouts come padded, a row for each response, and are packed on the host (`pack_batch`), so that the update computes
nothing for padding, for groups without a target, or for targets without weight.

Axis key: B problems, G responses of a group, P prompt length, T response tokens, D hidden; packed: K micro-batches,
M rows of a micro-batch, L tokens of a row, S chunks of response tokens, J of a row in a chunk, C = M * J.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from sgpo_jax import logprobs, losses, models, packing
from sgpo_jax.packing import Packed, Rows
from sgpo_jax.sharding import BATCH, constrain

Array = Any  # numpy's on the host, JAX's in the update
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
    """One step's rollouts, padded, in host memory. P and T of the two sides may differ."""

    prompts: Prompts  # problem only
    guided_prompts: Prompts  # strategy and problem
    autonomous: Group  # sampled from `prompts`
    guided: Group  # sampled from `guided_prompts`


class PackedBatch(NamedTuple):
    """What the update needs of a batch: sequences packed, and numbers of each problem, group or response."""

    autonomous: Packed  # B * G1 responses after `prompts`
    autonomous_tokens: Array  # [K,S,M,J] int32
    sampler_logp: Array  # [K,S,M,J] float32, nats
    candidates: Packed  # correct guided responses after `prompts`, of problems where there is a choice
    candidate_tokens: Array  # [K,S,M,J] int32
    targets: Packed  # room for a target of each problem, after `prompts` and after `guided_prompts`
    guided_tokens: Array  # [B,G2,T] int32
    lengths: Array  # [B,G1] int32
    guided_lengths: Array  # [B,G2] int32
    rewards: Array  # [B,G1] float32
    correct: Array  # [B,G2] bool
    alpha: Array  # [B] float32, Eq. 6; 0 where no guided response is correct


def pack_batch(
    batch: Batch,
    *,
    micro_batch: int,
    alpha0: float = 0.5,
    gamma: float = 0.1,
    alpha_max: float = 0.8,
    chunk: int = logprobs.CHUNK,
) -> PackedBatch:
    """Packs a batch of rollouts, all in host memory.

    Args:
      batch: B problems.
      micro_batch: M, rows of packed tokens whose activations are held at once.
      alpha0, gamma, alpha_max: of `losses.adaptive_weight`.
      chunk: response tokens whose logits are held at once.
    """
    batch = jax.tree.map(np.asarray, batch)
    auto, guided = batch.autonomous, batch.guided
    problems, length = len(auto.rewards), batch.prompts.tokens.shape[1] + auto.tokens.shape[2]
    unguided_length = max(length, batch.prompts.tokens.shape[1] + guided.tokens.shape[2])
    guided_length = batch.guided_prompts.tokens.shape[1] + guided.tokens.shape[2]
    prompts, guided_prompts = (
        [tokens[mask] for tokens, mask in zip(*each, strict=True)] for each in (batch.prompts, batch.guided_prompts)
    )

    correct = guided.rewards >= 1
    p_auto, p_guide = (group.rewards.mean(axis=1) for group in (auto, guided))
    alpha = np.asarray(losses.adaptive_weight(p_auto, p_guide, alpha0, gamma, alpha_max))
    alpha = np.where(correct.any(axis=1), alpha, 0.0).astype(np.float32)

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

    autonomous, autonomous_tokens = pack_group(auto, np.ones_like(auto.rewards, bool), length)
    # A single candidate is the target, whatever its score.
    choice = correct & (correct.sum(axis=1) > 1)[:, None] & (alpha > 0)[:, None]
    candidates, candidate_tokens = pack_group(guided, choice, unguided_length)
    # Which candidate it is the update finds out; the longest fits.
    weighted = np.flatnonzero(alpha > 0)
    longest = np.where(correct, guided.lengths, 0).max(axis=1)
    contexts = [[each[b] for b in weighted] for each in (prompts, guided_prompts)]
    room = [np.zeros(longest[b], np.int32) for b in weighted]
    return PackedBatch(
        autonomous, autonomous_tokens, packing.of_sequence(auto.logp.reshape(auto.rewards.size, -1), autonomous),
        candidates, candidate_tokens, pack(weighted, contexts, room, [unguided_length, guided_length], problems),
        guided.tokens, auto.lengths, guided.lengths, auto.rewards, correct, alpha,
    )  # fmt: skip


def specs(batch: PackedBatch) -> PackedBatch:
    """PartitionSpecs of a packed batch."""

    def spec(field):
        return packing.specs(field) if isinstance(field, Packed) else P(None, None, BATCH) if field.ndim == 4 else P()

    return PackedBatch(*map(spec, batch))


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    # Two arrays, not one: a donated state must not hold a buffer twice.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step=step, params=params, opt_state=optimizer.init(params), skipped=skipped)


def make_update(
    config: models.ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    updates_per_batch: int = 1,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    delta: float = 1.0,
    dtype: Any = jnp.float32,
    remat: bool = False,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]:
    """The jitted `update(state, batch) -> (state, metrics)` of Eq. 7; the state is donated.

    Args:
      config: shape of the model.
      optimizer: applied to the gradient of the mean loss over the B problems.
      updates_per_batch: optimizer steps on the same batch; targets, weights and old log-probabilities stay fixed.
      clip_low, clip_high, delta: see `losses`.
      dtype, remat: see `models.apply`.
      shardings: of the state, which stays where it is; None leaves it to the compiler.
    """
    logprobs_of = partial(response_logprobs, config=config, dtype=dtype, remat=remat)
    hidden_of = partial(response_hidden, config=config, dtype=dtype, remat=remat)

    def grpo_loss(params, micro):
        """L_GRPO (Eq. 1), summed over the micro-batch's tokens, each with its share of the mean; and metrics."""
        logp, entropy = logprobs_of(params, micro)
        old_logp = micro.get("old_logp", jax.lax.stop_gradient(logp))
        advantage, share = micro["advantage"], micro["share"]
        tokens = (x.reshape(-1) for x in (logp, old_logp, advantage))
        loss = jnp.sum(share.reshape(-1) * losses.clipped_surrogate(*tokens, clip_low, clip_high))
        ratio = jnp.exp(logp - old_logp)
        clipped = jnp.where(advantage > 0, ratio > 1 + clip_high, ratio < 1 - clip_low)
        mismatch = jnp.where(share > 0, jnp.abs(old_logp - micro["sampler_logp"]), 0.0)
        means = {"entropy": entropy, "ratio": ratio, "clip_share": clipped, "logp_mismatch": mismatch}
        metrics = {name: jnp.sum(share * value) for name, value in means.items()}
        return loss, metrics | {"loss_grpo": loss, "logp_mismatch_max": mismatch.max()}

    def distillation_loss(params, micro):
        """alpha * L_KD (Eq. 3, 5), summed in the same way; the metrics are over the targets that have weight."""
        unguided = hidden_of(params, micro["rows"])
        guided = hidden_of(jax.lax.stop_gradient(params), micro["guided_rows"])
        head = models.head(params, config)
        token_kl = logprobs.chunked_kl(guided, unguided, head, micro["chunks"]).reshape(micro["share"].shape)
        token_kl = jnp.where(micro["share"] > 0, token_kl, 0.0)
        kept = losses.kl_clip_mask(token_kl.reshape(-1), delta).reshape(token_kl.shape)
        # Selected rather than multiplied, so that an infinite KL is dropped too instead of giving inf * 0.
        loss = jnp.sum(micro["alpha"] * micro["share"] * jnp.where(kept > 0, token_kl, 0.0))
        metrics = {"token_kl": jnp.sum(micro["share"] * token_kl), "token_kl_max": token_kl.max()}
        return loss, metrics | {"loss_kd": loss, "kl_clip_share": jnp.sum(micro["share"] * (1 - kept))}

    def select(params, batch):
        """Micro-batches of both losses, with what stays fixed for the batch: advantages, o+ (Eq. 4), alpha (Eq. 6)."""
        problems, count = batch.alpha.shape[0], batch.rewards.size
        advantages = jax.vmap(losses.group_advantages)(batch.rewards).reshape(-1)
        packed = batch.autonomous
        autonomous = _micro_batches(packed, batch.lengths.reshape(-1), count) | {
            "tokens": batch.autonomous_tokens,
            "sampler_logp": batch.sampler_logp,
            "advantage": advantages[packed.owner],
        }
        if updates_per_batch > 1:
            autonomous["old_logp"] = in_micro_batches(
                lambda micro: logprobs_of(params, micro)[0], packed.count, autonomous
            )

        def scores(micro):
            logp = jnp.where(micro["share"] > 0, logprobs_of(params, micro)[0], 0.0)
            return jax.ops.segment_sum(logp.reshape(-1), micro["owner"].reshape(-1), batch.correct.size)

        packed = batch.candidates
        candidates = _micro_batches(packed, batch.guided_lengths.reshape(-1), count)
        candidates |= {"tokens": batch.candidate_tokens, "owner": packed.owner}
        summed = in_micro_batches(scores, packed.count, candidates).sum(axis=0)
        index, _ = jax.vmap(losses.select_target)(summed.reshape(batch.correct.shape), batch.correct)
        problem = jnp.arange(problems)
        tokens, lengths = batch.guided_tokens[problem, index], batch.guided_lengths[problem, index]

        packed = batch.targets
        weighted = jnp.maximum((batch.alpha > 0).sum(), 1)
        targets = _micro_batches(packed, lengths, weighted)
        chosen = tokens[packed.owner, packed.index]
        rows, guided_rows = (_with_responses(rows, packed.owner, chosen) for rows in packed.contexts)
        targets |= {"rows": rows, "guided_rows": guided_rows, "alpha": batch.alpha[packed.owner] * weighted / problems}
        return autonomous, targets

    def update(state, batch):
        autonomous, targets = jax.lax.stop_gradient(select(state.params, batch))

        def optimise(state, _):
            grpo_grads, grpo = accumulate(grpo_loss, state.params, batch.autonomous.count, autonomous)
            kd_grads, kd = accumulate(distillation_loss, state.params, batch.targets.count, targets)
            state, grad_norm = apply_gradients(state, jax.tree.map(jnp.add, grpo_grads, kd_grads), optimizer)
            return state, {**grpo, **kd, "grad_norm": grad_norm, "loss": grpo["loss_grpo"] + kd["loss_kd"]}

        state, measured = jax.lax.scan(optimise, state, None, length=updates_per_batch)
        metrics = {name: values.max() if name.endswith("_max") else values.mean() for name, values in measured.items()}
        metrics |= {"alpha": batch.alpha.mean(), "target_found": batch.correct.any(axis=1).mean()}
        return state.replace(step=state.step + 1), metrics | {"skipped": state.skipped}

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def _micro_batches(packed: Packed, lengths: jax.Array, count: Any) -> dict[str, Any]:
    """What every loss reads of K micro-batches. A token's share of the mean of `count` sequence means is in `share`."""
    length = lengths[packed.owner]
    inside = (packed.owner >= 0) & (packed.index < length)
    share = jnp.where(inside, 1.0 / (jnp.maximum(length, 1) * count), 0.0)
    return {"rows": packed.contexts[0], "chunks": packed.chunks, "share": share}


def _with_responses(rows: Rows, owner: jax.Array, tokens: jax.Array) -> Rows:
    """The rows with `tokens` `[K,S,M,J]` where the response tokens stand: after the slots that predict them."""

    def write(row, slots, owner, tokens):
        places = jnp.where(owner >= 0, slots + 1, row.size)
        return row.at[places.reshape(-1)].set(tokens.reshape(-1), mode="drop")

    by_row = jax.vmap(jax.vmap(write, in_axes=(0, 1, 1, 1)))
    return rows._replace(tokens=by_row(rows.tokens, rows.slots, owner, tokens))


def response_hidden(params: Any, rows: Rows, *, config: models.ModelConfig, dtype: Any, remat: bool) -> jax.Array:
    """Hidden states `[S,C,D]` that predict the response tokens of one micro-batch."""
    hidden, _ = models.apply(params, config, rows.tokens, rows.positions, rows.segments, dtype=dtype, remat=remat)
    chunks, count, _ = rows.slots.shape
    picked = jnp.take_along_axis(hidden, rows.slots.swapaxes(0, 1).reshape(count, -1, 1), axis=1)
    picked = picked.reshape(count, chunks, -1, hidden.shape[-1]).swapaxes(0, 1)
    return constrain(picked.reshape(chunks, -1, hidden.shape[-1]), None, BATCH, None)


def response_logprobs(
    params: Any, micro: dict[str, Any], *, config: models.ModelConfig, dtype: Any, remat: bool
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy `[S,M,J]` of the response tokens `micro["tokens"]`; 0 in unused chunks."""
    hidden = response_hidden(params, micro["rows"], config=config, dtype=dtype, remat=remat)
    targets = micro["tokens"].reshape(hidden.shape[:2])
    logp, entropy = logprobs.chunked_logprobs(hidden, models.head(params, config), targets, micro["chunks"])
    return logp.reshape(micro["tokens"].shape), entropy.reshape(micro["tokens"].shape)


def accumulate(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Metrics]], params: Any, count: jax.Array, micro_batches: Any
) -> tuple[Any, Metrics]:
    """Float32 gradient of the sum of `loss_fn(params, micro) -> (loss, metrics)` over the first `count` micro-batches.

    Returns (gradient, metrics): each metric is summed, or, when its name ends in "_max", the largest.
    """

    def add(k, sums):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, _at(micro_batches, k))
        merged = {
            name: (jnp.maximum if name.endswith("_max") else jnp.add)(sums[1][name], metrics[name]) for name in metrics
        }
        return jax.tree.map(jnp.add, sums[0], grads), merged

    metrics = jax.eval_shape(loss_fn, params, _at(micro_batches, 0))[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (params, metrics))
    return jax.lax.fori_loop(0, count, add, zeros)


def in_micro_batches(fn: Callable[[Any], jax.Array], count: jax.Array, micro_batches: Any) -> jax.Array:
    """`fn(micro)` of the first `count` micro-batches, without gradient: `[K,...]`, 0 in the others."""
    one = jax.eval_shape(fn, _at(micro_batches, 0))
    total = jax.tree.leaves(micro_batches)[0].shape[0]
    out = jnp.zeros((total, *one.shape), one.dtype)
    return jax.lax.fori_loop(0, count, lambda k, out: out.at[k].set(fn(_at(micro_batches, k))), out)


def _at(micro_batches: Any, k: Any) -> Any:
    return jax.tree.map(lambda x: x[k], micro_batches)


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
