"""SFT warm-up: the expert's responses, the loss on a held-out part, and the best checkpoint for RL to start from."""

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

from sgpo_jax import data, logprobs, rewards, sharding
from sgpo_jax.data import filtering
from sgpo_jax.policy import Policy, Run, positions
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.generation import encode_solution
from sgpo_jax.runtime import distributed
from sgpo_jax.runtime.profile import phase
from sgpo_jax.training import packing, stage
from sgpo_jax.training.forward import Forward, MicroBatch, Tokens, attached, listed, response_logprobs, response_loss
from sgpo_jax.training.gradients import Metrics, accumulate, apply_gradients, in_micro_batches
from sgpo_jax.training.loop import Clock, Loop
from sgpo_jax.training.packing import Packed
from sgpo_jax.training.state import TrainState

Encoded = tuple[list[int], list[int]]  # prompt and response tokens of a row


def train(run: Run, initial: Callable[[], Any]) -> None:
    """Runs the warm-up, or what is left of it; checkpoints and metrics go to `workdir/sft`.

    Args:
      run: the config, the folder, the model and its mesh.
      initial: returns the parameters to begin with, where there is no checkpoint.
    """
    sft, mesh = run.config.sft, run.mesh
    training, validation, encoded = load_rows(run)
    batches = data.batches(training, sft.batch, run.config.seed)
    epoch = data.steps_per_epoch(training, sft.batch)
    total = sft.steps or sft.epochs * epoch
    chunk = logprobs.default_chunk(mesh)
    encode = partial(encode_batch, encoded=encoded, batch=sft.batch, micro_batch=sft.micro_batch, chunk=chunk)
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


def load_rows(run: Run) -> tuple[list[dict], list[dict], dict[str, Encoded]]:
    """Reads the rows of the warm-up; an account of those left out goes to `workdir`.

    Returns:
      (training rows, validation rows, id -> prompt and response tokens).

    Raises:
      ValueError: there are too few rows, or others than the run began with, or one exceeds the model's positions.
    """
    config, policy = run.config, run.policy
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
    stage.count_thoughts(sieve, policy, {id: prompt for id, (prompt, _) in encoded.items()})
    count_wrong(sieve, config.rl.reward, run.workdir)
    stage.account(sieve, run.workdir, "sft")
    training, validation = data.split_validation(sieve.rows, config.sft.validation_share)
    print(f"SFT: {len(training)} rows for training, {len(validation)} for validation", flush=True)
    if len(training) < config.sft.batch or not validation:
        raise ValueError(
            f"SFT has {len(training)} rows for training and {len(validation)} for validation; "
            f"it needs sft.batch={config.sft.batch} and at least 1"
        )
    encoded = {row["id"]: encoded[row["id"]] for row in sieve.rows}
    limits = f"config.data.max_prompt_tokens={config.data.max_prompt_tokens}"
    limits += f", config.sft.max_response_tokens={config.sft.max_response_tokens}"
    positions.check_rows(policy, encoded, limits)
    return training, validation, encoded


def count_wrong(sieve: filtering.Sieve, reward: str, workdir: Path) -> None:
    """Counts the solutions that the reward of RL would not call correct, before the warm-up's first start; all stay.

    A solution without a box teaches the model to answer without one.

    Args:
      sieve: the rows, which have solutions.
      reward: as in `rewards.judge`.
      workdir: of the run.
    """
    if distributed.first(lambda: stage.has_begun(workdir, "sft")):
        return  # counted when it began

    def judged(rows):
        verdicts = rewards.judge([row["solution"] for row in rows], rows, reward)
        return [[verdict.outcome, verdict.extracted] for verdict in verdicts]

    wrong: dict[str, str] = {}
    for row, (outcome, box) in zip(sieve.rows, distributed.split(judged, sieve.rows), strict=True):
        if outcome != "correct":
            found = f"boxes {box!r:.40}" if box is not None else "no box"
            wrong[row["id"]] = f"{found}, answer {row['answer']!r:.40}"
    reason = "solution with a reward below 1" if reward else "solution without the right boxed answer"
    sieve.leave_out(reason, wrong, keep=True)


def _encode(config: ConfigDict, policy: Policy, row: dict) -> Encoded:
    strategy = row.get("strategy") if config.sft.use_strategy else None
    prompt = tokenizers.encode_prompt(policy.tokenizer, row["problem"], strategy, policy.instruction, policy.system)
    return prompt, encode_solution(policy, prompt, row)


def encode_batch(
    rows: Sequence[dict], encoded: dict[str, Encoded], *, batch: int, micro_batch: int, chunk: int | None = None
) -> tuple[Packed, np.ndarray]:
    """Packs the responses of some rows after their prompts, in shapes that are the same in the whole stage.

    Args:
      rows: at most `batch` rows.
      encoded: id -> prompt and response tokens, of all rows of the stage.
      batch: rows of a full batch.
      micro_batch: M, rows of packed tokens whose activations are held at once.
      chunk: response tokens whose logits are held at once, over all devices; None: `logprobs.default_chunk`.

    Returns:
      (the packed sequences, response tokens `[K,S,M,J]`).
    """
    prompts, responses = zip(*(encoded[row["id"]] for row in rows), strict=True)
    longest = [max(map(len, part)) for part in zip(*encoded.values(), strict=True)]
    packed = packing.pack(
        [prompts], responses, range(len(rows)), lengths=[sum(longest)], micro_batch=min(micro_batch, batch), most=batch,
        chunk=logprobs.default_chunk() if chunk is None else chunk,
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
