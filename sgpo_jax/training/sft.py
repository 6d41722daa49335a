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

from sgpo_jax import data, logprobs, models, sharding
from sgpo_jax.data import filtering
from sgpo_jax.policy import Policy
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.generation import encode_solution
from sgpo_jax.report import page
from sgpo_jax.runtime import preemption
from sgpo_jax.runtime.metric_writer import Writer
from sgpo_jax.training import packing, stage
from sgpo_jax.training.packing import Packed
from sgpo_jax.training.state import TrainState
from sgpo_jax.training.train_step import (
    Metrics,
    accumulate,
    apply_gradients,
    in_micro_batches,
    response_logprobs,
    response_loss,
)

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
    settings = {"dtype": policy.dtype, "remat": config.model.remat}
    update = make_update(policy.config, tx, shardings=shardings, **settings)
    loss_of = make_losses(policy.config, **settings)
    encode = partial(
        encode_batch, encoded=encoded, batch=config.sft.batch, micro_batch=config.sft.micro_batch,
        chunk=logprobs.default_chunk(mesh),
    )  # fmt: skip

    with stage.checkpoints(config, workdir, "sft") as saved, jax.set_mesh(mesh):
        state = stage.start(saved, initial, policy, tx, mesh)
        first = int(state.step)
        if first >= total:
            return
        show = page.live(workdir, config.report_seconds * (jax.process_index() == 0), "SFT", total)
        with Writer(workdir, total, "sft", resume_step=first, enabled=jax.process_index() == 0) as writer:
            for step in range(first, total):
                started = time.perf_counter()
                batch_rows = batches[step]
                batch = encode(batch_rows)
                state, device_metrics = update(state, put(batch, mesh))
                metrics = {name: float(value) for name, value in device_metrics.items()}
                seconds = time.perf_counter() - started
                stage.watch_skipped(config, workdir, "sft", step + 1, int(metrics["skipped"]), batch_rows, batch)
                metrics |= {"learning_rate": float(rate(step)), "seconds_step": seconds}
                metrics["rows_filled"] = packing.filled(batch[0])
                if step == first:
                    stage.advise_packing(config, "sft", metrics["rows_filled"], mesh)
                metrics["tokens_per_second"] = metrics.pop("tokens") / seconds

                done, score = step + 1, None
                if done % validate_every == 0 or done == total:
                    score = validation_loss(loss_of, state.params, validation, encode, config.sft.batch, mesh)
                    metrics["validation_loss"] = score
                writer.write(done, metrics)
                preempted = preemption.requested()
                if score is not None or done % config.checkpoint.every == 0 or preempted:
                    saved.save(done, state, score)
                if preempted:
                    preemption.check()
                show(done)


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
    long_prompts = filtering.too_long(sieve.rows, prompts, config.data.max_prompt_tokens)
    long_responses = filtering.too_long(sieve.rows, responses, config.sft.max_response_tokens)
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
    return prompt, encode_solution(policy, prompt, row)


def encode_batch(
    rows: Sequence[dict], encoded: dict[str, Encoded], *, batch: int, micro_batch: int, chunk: int | None = None
) -> tuple[Packed, np.ndarray]:
    """At most `batch` responses after their prompts, packed in shapes that are those of the stage; and their tokens.

    `chunk`: response tokens whose logits are held at once, over all devices; None: `logprobs.default_chunk`.
    """
    prompts, responses = zip(*(encoded[row["id"]] for row in rows), strict=True)
    longest = [max(map(len, part)) for part in zip(*encoded.values(), strict=True)]
    packed = packing.pack(
        [prompts], responses, range(len(rows)), lengths=[sum(longest)], micro_batch=min(micro_batch, batch), most=batch,
        chunk=logprobs.default_chunk() if chunk is None else chunk,
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
    remat: str = "none",
    shardings: TrainState | None = None,
    watch: Callable[[Any], None] = lambda gradient: None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The jitted `update(state, (packed, tokens)) -> (state, metrics)` on the mean loss per response token.

    It donates the state. `watch` sees the gradient, also of an update that is skipped.
    """

    def update(state, batch):
        packed, tokens = batch
        count = (packed.owner >= 0).sum()

        def nll(logp, _, micro):
            return -jnp.where(micro["inside"], logp, 0.0)

        def loss_fn(params, micro):
            loss, *_ = response_loss(nll, params, micro, config=config, dtype=dtype, remat=remat)
            loss = loss / jnp.maximum(count, 1)
            return loss, {"loss": loss}

        with jax.named_scope("responses"):
            grads, metrics = accumulate(loss_fn, state.params, packed.count, _micro_batches(packed, tokens))
        watch(grads)
        state, grad_norm = apply_gradients(state, grads, optimizer, metrics["loss"])
        metrics |= {"grad_norm": grad_norm, "skipped": state.skipped, "tokens": count}
        return state.replace(step=state.step + 1), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def make_losses(config: models.ModelConfig, *, dtype: Any, remat: str) -> Callable[[Any, Any], jax.Array]:
    """The jitted `loss(params, (packed, tokens)) -> []`: summed negative log-likelihood of the responses, nats."""

    @jax.jit
    def loss(params, batch):
        packed, tokens = batch

        def summed(micro):
            logp, _ = response_logprobs(params, micro, config=config, dtype=dtype, remat=remat)
            return -jnp.where(micro["inside"], logp, 0.0).sum()

        with jax.named_scope("responses"):
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
