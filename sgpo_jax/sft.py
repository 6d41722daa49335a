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

from sgpo_jax import cleaning, data, logprobs, models, sharding, stage
from sgpo_jax import tokenizer as tokenizers
from sgpo_jax.metrics import Writer
from sgpo_jax.policy import Policy
from sgpo_jax.respond import pad_prompts
from sgpo_jax.train_step import Metrics, TrainState, accumulate, apply_gradients, in_micro_batches, response_hidden

Encoded = tuple[list[int], list[int]]  # prompt and response tokens of a row


def train(config: ConfigDict, workdir: Path, policy: Policy, initial: Callable[[], Any], mesh: Mesh) -> None:
    """Runs the warm-up, or what is left of it; checkpoints and metrics go to `workdir/sft`."""
    training, validation, encoded = load_rows(config, workdir, policy)
    batches = data.batches(training, config.sft.batch, config.seed)
    epoch = data.steps_per_epoch(training, config.sft.batch)
    total = config.sft.steps or config.sft.epochs * epoch
    validate_every = config.sft.validate_every or epoch

    tx, rate = stage.optimizer(config, "sft", total)
    _, shardings = stage.state_shardings(policy, tx, mesh)
    settings = {"micro_batch": config.sft.micro_batch, "dtype": policy.dtype, "remat": config.model.remat}
    update = make_update(policy.config, tx, shardings=shardings, **settings)
    losses_of = make_losses(policy.config, **settings)
    encode = partial(encode_batch, policy, encoded=encoded)

    with stage.checkpoints(config, workdir, "sft") as saved, jax.set_mesh(mesh):
        state = stage.start(saved, initial, policy, tx, mesh)
        first = int(state.step)
        if first >= total:
            return
        with Writer(workdir, total, "sft", resume_step=first, enabled=jax.process_index() == 0) as writer:
            for step in range(first, total):
                started = time.perf_counter()
                batch = sharding.put_rows(encode(batches[step]), mesh)
                state, device_metrics = update(state, batch)
                metrics = {name: float(value) for name, value in device_metrics.items()}
                seconds = time.perf_counter() - started
                stage.watch_skipped(workdir / "sft", step + 1, int(metrics["skipped"]), config.max_skipped, batch)
                metrics |= {"learning_rate": float(rate(step)), "seconds_step": seconds}
                metrics["tokens_per_second"] = metrics.pop("tokens") / seconds

                done, score = step + 1, None
                if done % validate_every == 0 or done == total:
                    score = validation_loss(losses_of, state.params, validation, encode, config.sft.batch, mesh)
                    metrics["validation_loss"] = score
                writer.write(done, metrics)
                if score is not None or done % config.checkpoint.every == 0:
                    saved.save(done, state, score)


def load_rows(config: ConfigDict, workdir: Path, policy: Policy) -> tuple[list[dict], list[dict], dict[str, Encoded]]:
    """(training rows, validation rows, id -> prompt and response tokens); an account of the rest goes to `workdir`.

    Raises:
      ValueError: there are too few rows, or others than the run began with.
    """
    sieve = stage.sift(config, config.sft.train or config.data.train)
    if not config.sft.train:
        _, others = data.split_sft(sieve.rows, config.data.sft_share)
        sieve.leave_out("for RL", {row["id"]: "" for row in others})
    sieve.leave_out("without solution", {row["id"]: "" for row in sieve.rows if "solution" not in row})
    encoded = {row["id"]: _encode(config, policy, row) for row in sieve.rows}
    prompts, responses = ([encoded[row["id"]][part] for row in sieve.rows] for part in (0, 1))
    long_prompts = cleaning.too_long(sieve.rows, prompts, config.data.max_prompt_tokens)
    long_responses = cleaning.too_long(sieve.rows, responses, config.sft.max_response_tokens)
    sieve.leave_out("prompt too long", long_prompts)
    sieve.leave_out("response too long", long_responses)
    stage.account(sieve, workdir, "sft")
    training, validation = data.split_validation(sieve.rows, config.sft.validation_share)
    print(f"SFT: {len(training)} rows for training, {len(validation)} for validation", flush=True)
    if len(training) < config.sft.batch or not validation:
        raise ValueError(
            f"SFT has {len(training)} rows for training and {len(validation)} for validation; "
            f"it needs sft.batch={config.sft.batch} and at least 1"
        )
    return training, validation, {row["id"]: encoded[row["id"]] for row in sieve.rows}


def _encode(config: ConfigDict, policy: Policy, row: dict) -> Encoded:
    strategy = row.get("strategy") if config.sft.use_strategy else None
    prompt = tokenizers.encode_prompt(policy.tokenizer, row["problem"], strategy, policy.instruction)
    solution = tokenizers.continuation(policy.tokenizer, prompt, row["solution"])
    return prompt, tokenizers.encode_response(policy.tokenizer, solution, policy.stop_ids[0])


def encode_batch(policy: Policy, rows: Sequence[dict], encoded: dict[str, Encoded]) -> dict[str, Any]:
    """Arrays for the update, padded to the longest prompt and response of the stage, so that shapes stay fixed."""
    prompt_length, response_length = (max(map(len, part)) for part in zip(*encoded.values(), strict=True))
    prompts, responses = zip(*(encoded[row["id"]] for row in rows), strict=True)
    tokens, lengths = tokenizers.pad_right(responses, response_length, policy.pad_id)
    return {"prompts": pad_prompts(policy, prompts, prompt_length), "tokens": tokens, "length": lengths}


def _row_losses(params, rows, *, config, dtype, remat):
    """Summed negative log-likelihood `[R]` of each response, nats."""
    hidden, mask = response_hidden(params, rows["prompts"], rows, config=config, dtype=dtype, remat=remat)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), rows["tokens"].reshape(-1)
    logp, _ = logprobs.token_logprobs(flat, models.head(params, config), targets)
    return -jnp.where(mask, logp.reshape(mask.shape), 0.0).sum(axis=-1)


def make_update(
    config: models.ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    micro_batch: int,
    dtype: Any = jnp.float32,
    remat: bool = False,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The jitted `update(state, rows) -> (state, metrics)` on the mean loss per response token; donates the state."""
    row_losses = partial(_row_losses, config=config, dtype=dtype, remat=remat)

    def update(state, rows):
        tokens = rows["length"].sum()
        # `accumulate` averages over rows; this turns it into the average over tokens.
        scale = rows["length"].shape[0] / jnp.maximum(tokens, 1)

        def loss_fn(params, rows):
            losses = row_losses(params, rows) * scale
            return losses, {"loss": losses}

        grads, metrics = accumulate(loss_fn, state.params, rows, micro_batch)
        state, grad_norm = apply_gradients(state, grads, optimizer)
        metrics = {"loss": metrics["loss"].mean(), "grad_norm": grad_norm, "skipped": state.skipped, "tokens": tokens}
        return state.replace(step=state.step + 1), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def make_losses(config: models.ModelConfig, *, micro_batch: int, dtype: Any, remat: bool) -> Callable[[Any, Any], Any]:
    """The jitted `losses(params, rows) -> [R]`: summed negative log-likelihood of each response, nats."""
    row_losses = partial(_row_losses, config=config, dtype=dtype, remat=remat)
    return jax.jit(lambda params, rows: in_micro_batches(partial(row_losses, params), rows, micro_batch))


def validation_loss(
    losses_of: Callable, params: Any, rows: Sequence[dict], encode: Callable, batch: int, mesh: Mesh
) -> float:
    """Mean loss per response token over `rows`, nats."""
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        part = list(rows[start : start + batch])
        encoded = encode(part + part[-1:] * (batch - len(part)))
        summed = sharding.fetch(losses_of(params, sharding.put_rows(encoded, mesh)))
        total += float(np.sum(summed[: len(part)], dtype=np.float64))
        tokens += int(encoded["length"][: len(part)].sum())
    return total / tokens
