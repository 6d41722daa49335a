"""SFT warm-up: the expert's responses, the loss on a held-out part, and the best checkpoint for RL to start from."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import data, logprobs, models, packing, sharding, stage
from sgpo_jax import tokenizer as tokenizers
from sgpo_jax.metrics import Writer
from sgpo_jax.packing import Packed
from sgpo_jax.policy import Policy
from sgpo_jax.train_step import Metrics, TrainState, accumulate, apply_gradients, in_micro_batches, response_logprobs

Encoded = tuple[list[int], list[int]]  # prompt and response tokens of a row


def train(config: ConfigDict, workdir: Path, policy: Policy, initial: Callable[[], Any], mesh: Mesh) -> None:
    """Runs the warm-up, or what is left of it; checkpoints and metrics go to `workdir/sft`."""
    training, validation, encoded = load_rows(config, policy)
    batches = data.batches(training, config.sft.batch, config.seed)
    epoch = data.steps_per_epoch(training, config.sft.batch)
    total = config.sft.steps or config.sft.epochs * epoch
    validate_every = config.sft.validate_every or epoch

    tx, rate = stage.optimizer(config, "sft", total)
    _, shardings = stage.state_shardings(policy, tx, mesh)
    settings = {"dtype": policy.dtype, "remat": config.model.remat}
    update = make_update(policy.config, tx, shardings=shardings, **settings)
    loss_of = make_losses(policy.config, **settings)
    encode = partial(encode_batch, encoded=encoded, batch=config.sft.batch, micro_batch=config.sft.micro_batch)

    with stage.checkpoints(config, workdir, "sft") as saved, jax.set_mesh(mesh):
        state = stage.start(saved, initial, policy, tx, mesh)
        first = int(state.step)
        if first >= total:
            return
        with Writer(workdir, total, "sft", resume_step=first, enabled=jax.process_index() == 0) as writer:
            for step in range(first, total):
                started = time.perf_counter()
                batch = encode(batches[step])
                state, device_metrics = update(state, put(batch, mesh))
                metrics = {name: float(value) for name, value in device_metrics.items()}
                seconds = time.perf_counter() - started
                stage.watch_skipped(workdir / "sft", step + 1, int(metrics["skipped"]), config.max_skipped, batch)
                metrics |= {"learning_rate": float(rate(step)), "seconds_step": seconds}
                metrics["tokens_per_second"] = metrics.pop("tokens") / seconds

                done, score = step + 1, None
                if done % validate_every == 0 or done == total:
                    score = validation_loss(loss_of, state.params, validation, encode, config.sft.batch, mesh)
                    metrics["validation_loss"] = score
                writer.write(done, metrics)
                if score is not None or done % config.checkpoint.every == 0:
                    saved.save(done, state, score)


def load_rows(config: ConfigDict, policy: Policy) -> tuple[list[dict], list[dict], dict[str, Encoded]]:
    """(training rows, validation rows, id -> prompt and response tokens) of the warm-up; says what was left out.

    Raises:
      ValueError: there are too few rows.
    """
    if config.sft.train:
        rows = data.load(config.sft.train)
    else:
        rows, _ = data.split_sft(data.load(config.data.train), config.data.sft_share)
    solved = [row for row in rows if "solution" in row]
    shown = [row.get("strategy") if config.sft.use_strategy else None for row in solved]
    prompts = [
        tokenizers.encode_prompt(policy.tokenizer, row["problem"], strategy, policy.instruction)
        for row, strategy in zip(solved, shown, strict=True)
    ]
    responses = [tokenizers.encode_response(policy.tokenizer, row["solution"], policy.stop_ids[0]) for row in solved]
    limits = {
        "prompt": (prompts, config.data.max_prompt_tokens),
        "response": (responses, config.sft.max_response_tokens),
    }
    kept, counts = data.filter_by_length(solved, **limits)
    print(f"SFT: {len(rows)} rows, without solution {len(rows) - len(solved)}, {counts}", flush=True)
    training, validation = data.split_validation(kept, config.sft.validation_share)
    if len(training) < config.sft.batch or not validation:
        raise ValueError(
            f"SFT has {len(training)} rows for training and {len(validation)} for validation; "
            f"it needs sft.batch={config.sft.batch} and at least 1"
        )
    tokens = dict(zip((row["id"] for row in solved), zip(prompts, responses, strict=True), strict=True))
    return training, validation, {row["id"]: tokens[row["id"]] for row in kept}


def encode_batch(
    rows: Sequence[dict], encoded: dict[str, Encoded], *, batch: int, micro_batch: int
) -> tuple[Packed, np.ndarray]:
    """At most `batch` responses after their prompts, packed in shapes that are those of the stage; and their tokens."""
    prompts, responses = zip(*(encoded[row["id"]] for row in rows), strict=True)
    longest = [max(map(len, part)) for part in zip(*encoded.values(), strict=True)]
    packed = packing.pack(
        [prompts], responses, range(len(rows)), lengths=[sum(longest)], micro_batch=min(micro_batch, batch), most=batch,
        chunk=logprobs.CHUNK,
    )  # fmt: skip
    tokens, _ = tokenizers.pad_right(responses, longest[1], 0)
    return packed, packing.of_sequence(tokens, packed)


def _micro_batches(packed: Packed, tokens: Any) -> dict[str, Any]:
    return {"rows": packed.contexts[0], "chunks": packed.chunks, "tokens": tokens, "inside": packed.owner >= 0}


def make_update(
    config: models.ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The jitted `update(state, (packed, tokens)) -> (state, metrics)` on the mean loss per response token.

    It donates the state.
    """

    def update(state, batch):
        packed, tokens = batch
        count = (packed.owner >= 0).sum()

        def loss_fn(params, micro):
            logp, _ = response_logprobs(params, micro, config=config, dtype=dtype, remat=remat)
            loss = -jnp.where(micro["inside"], logp, 0.0).sum() / jnp.maximum(count, 1)
            return loss, {"loss": loss}

        grads, metrics = accumulate(loss_fn, state.params, packed.count, _micro_batches(packed, tokens))
        state, grad_norm = apply_gradients(state, grads, optimizer)
        metrics |= {"grad_norm": grad_norm, "skipped": state.skipped, "tokens": count}
        return state.replace(step=state.step + 1), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def make_losses(config: models.ModelConfig, *, dtype: Any, remat: bool) -> Callable[[Any, Any], jax.Array]:
    """The jitted `loss(params, (packed, tokens)) -> []`: summed negative log-likelihood of the responses, nats."""

    @jax.jit
    def loss(params, batch):
        packed, tokens = batch

        def summed(micro):
            logp, _ = response_logprobs(params, micro, config=config, dtype=dtype, remat=remat)
            return -jnp.where(micro["inside"], logp, 0.0).sum()

        return in_micro_batches(summed, packed.count, _micro_batches(packed, tokens)).sum()

    return loss


def validation_loss(
    loss_of: Callable, params: Any, rows: Sequence[dict], encode: Callable, batch: int, mesh: Mesh
) -> float:
    """Mean loss per response token over `rows`, nats."""
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        encoded = encode(rows[start : start + batch])
        total += float(loss_of(params, put(encoded, mesh)))
        tokens += int((encoded[0].owner >= 0).sum())
    return total / tokens


def put(batch: tuple[Packed, np.ndarray], mesh: Mesh) -> tuple[Packed, jax.Array]:
    packed, _ = batch
    specs = packing.specs(packed)
    return sharding.put(batch, (specs, specs.owner), mesh)
