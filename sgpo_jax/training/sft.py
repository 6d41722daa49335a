"""SFT warm-up: the expert's responses, the loss on a held-out part, and the best checkpoint for RL to start from."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sgpo_jax import data, logprobs, sharding
from sgpo_jax.policy import Run
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.runtime.profile import phase
from sgpo_jax.training import packing, stage
from sgpo_jax.training.forward import Forward, MicroBatch, Tokens, attached, listed, response_logprobs, response_loss
from sgpo_jax.training.gradients import Metrics, accumulate, apply_gradients, in_micro_batches
from sgpo_jax.training.inputs import Demonstrations, Encoded
from sgpo_jax.training.loop import Clock, Loop
from sgpo_jax.training.packing import Packed
from sgpo_jax.training.state import TrainState


def train(run: Run, initial: Callable[[], Any], demonstrations: Demonstrations) -> None:
    """Runs the warm-up, or what is left of it; checkpoints and metrics go to `workdir/sft`.

    Args:
      run: the config, the folder, the model and its mesh.
      initial: returns the parameters to begin with, where there is no checkpoint.
      demonstrations: to train on.
    """
    sft, mesh = run.config.sft, run.mesh
    training, validation, encoded = demonstrations
    batches = data.batches(training, sft.batch, run.config.seed)
    epoch = data.steps_per_epoch(training, sft.batch)
    total = sft.steps or sft.epochs * epoch
    encode = partial(
        encode_batch, encoded=encoded, batch=sft.batch, micro_batch=sft.micro_batch,
        chunk=logprobs.default_chunk(mesh), context=mesh.shape["context"],
    )  # fmt: skip
    loss_of = make_losses(stage.forward(run))

    def validate(params, step):
        loss = validation_loss(loss_of, params, validation, encode, sft.batch, mesh)
        return loss, {"validation_loss": loss}

    with Loop(run, "sft", total, validate, sft.validate_every or epoch) as loop:
        update = phase("update")(make_update(loop.forward, loop.optimizer, shardings=loop.shardings))
        state = loop.start(initial)
        for step in loop.steps():
            clock, rows = Clock(), batches[step]
            batch = encode(rows)
            state, device_metrics = update(state, put(batch, mesh), loop.base)
            metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
            clock.lap("step")
            metrics["tokens_per_second"] = metrics.pop("tokens") / clock.total
            metrics |= {"seconds_step": clock.total, "rows_filled": packing.filled_share(batch[0])}
            state = loop.finish(state, metrics, rows, batch)


def encode_batch(
    rows: Sequence[dict], encoded: dict[str, Encoded], *, batch: int, micro_batch: int, chunk: int | None = None,
    context: int = 1,
) -> tuple[Packed, np.ndarray]:  # fmt: skip
    """Packs the responses of some rows after their prompts, in shapes that are the same in the whole stage.

    Args:
      rows: at most `batch` rows.
      encoded: id -> prompt and response tokens, of all rows of the stage.
      batch: rows of a full batch.
      micro_batch: M, rows of packed tokens whose activations are held at once.
      chunk: response tokens whose logits are held at once, over all devices; None: `logprobs.default_chunk`.
      context: ways that the mesh splits the tokens of a row.

    Returns:
      (the packed sequences, response tokens `[K,S,M,J]`).
    """
    prompts, responses = zip(*(encoded[row["id"]] for row in rows), strict=True)
    longest = [max(map(len, part)) for part in zip(*encoded.values(), strict=True)]
    packed = packing.pack(
        [prompts], responses, range(len(rows)), lengths=[sum(longest)], micro_batch=min(micro_batch, batch), most=batch,
        chunk=logprobs.default_chunk() if chunk is None else chunk, context=context,
    )  # fmt: skip
    tokens, _ = tokenizers.pad_right(responses, longest[1], 0)
    return packed, packing.gather(tokens, packed)


def _micro_batches(packed: Packed, tokens: jax.Array) -> MicroBatch:
    """Returns K micro-batches in which every response token has weight 1."""
    weight = jnp.where(packed.owner >= 0, 1.0, 0.0)
    return MicroBatch(packed.contexts[0], packed.chunks, Tokens(*map(listed, (tokens, weight, weight))))


def make_update(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    *,
    shardings: TrainState | None = None,
    watch: Callable[[Any], None] = lambda gradient: None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted `update(state, (packed, tokens), base=None) -> (state, metrics)` on the mean loss per token.

    It donates the state. `watch` sees the gradient, also that of an update that is skipped. With a `base`, the
    parameters of the state are adapters of it.
    """

    def token_loss(logp, _, tokens):
        return -jnp.where(tokens.weight > 0, logp, 0.0)

    def update(state, batch, base=None):
        packed, tokens = batch
        count = (packed.owner >= 0).sum()

        def loss_fn(params, micro):
            loss, *_ = response_loss(forward, attached(forward, base, params), micro, token_loss)
            loss = loss / jnp.maximum(count, 1)
            return loss, {"loss": loss}

        with jax.named_scope("responses"):
            gradient, metrics = accumulate(loss_fn, state.params, packed.count, _micro_batches(packed, tokens))
        watch(gradient)
        state, grad_norm = apply_gradients(state, gradient, optimizer, metrics["loss"])
        metrics |= {"grad_norm": grad_norm, "skipped": state.skipped, "tokens": count}
        return state.replace(step=state.step + 1), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def make_losses(forward: Forward) -> Callable[[Any, Any], jax.Array]:
    """Returns the jitted `loss(params, (packed, tokens)) -> []`: the summed loss of the responses' tokens, nats."""

    @jax.jit
    def loss(params, batch):
        packed, tokens = batch

        def summed(micro):
            logp, _ = response_logprobs(forward, params, micro)
            return -jnp.where(micro.tokens.weight > 0, logp, 0.0).sum()

        with jax.named_scope("responses"):
            return in_micro_batches(summed, packed.count, _micro_batches(packed, tokens)).sum()

    return loss


def validation_loss(
    loss_of: Callable, params: Any, rows: Sequence[dict], encode: Callable, batch: int, mesh: Mesh
) -> float:
    """Computes the mean loss per response token over `rows`, nats."""
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        encoded = encode(rows[start : start + batch])
        total += float(loss_of(params, put(encoded, mesh)))
        tokens += int((encoded[0].owner >= 0).sum())
    return total / tokens


def put(batch: tuple[Packed, np.ndarray], mesh: Mesh) -> tuple[Packed, jax.Array]:
    """Places a batch on the mesh."""
    packed, _ = batch
    specs = packing.specs(packed)
    return sharding.put(batch, (specs, specs.owner), mesh)
