"""Repeats the update on a batch that a run skipped, and finds the first number that is not finite.

    sgpo replay --config=configs/NAME.py --workdir=DIR --batch=DIR/rl/skipped_batch_STEP.npz [--step=N]

The state is that of the last checkpoint before the batch, or after step N; 0 is the state that the stage began with.
Numbers that are not finite are counted where they are computed, in that order: the state, the rewards, advantages and
log-probabilities of each response in the batch, the forward pass of each response, the metrics, the gradient.

Axis key: B problems, G responses of a group, T response tokens; packed: K micro-batches, S chunks of response tokens,
M rows, J response tokens of a row in a chunk, C = M * J.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from sgpo_jax import cli, config_checks, divergences, logprobs, losses, models, sharding
from sgpo_jax import config as configs
from sgpo_jax.policy import Run
from sgpo_jax.runtime import is_first
from sgpo_jax.runtime.tables import table
from sgpo_jax.training import packing, sft, skipped_batch, stage
from sgpo_jax.training.batch import Batch, packer, specs
from sgpo_jax.training.forward import response_hidden, with_responses
from sgpo_jax.training.gradients import in_micro_batches
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.packing import Packed
from sgpo_jax.training.state import TrainState
from sgpo_jax.training.train_step import make_update
from sgpo_jax.training.weighting import Weighting

# What is computed for a response token, in this order.
QUANTITIES = ("hidden state", "guided hidden state", "log-probability", "entropy", "KL", "loss")


class Finding(NamedTuple):
    """Numbers that are not finite."""

    what: str
    first: str  # name of an array, or a response and its token
    numbers: int  # how many
    problems: tuple[str, ...] = ()  # ids of all problems concerned


class _Group(NamedTuple):
    """Responses of one kind."""

    name: str  # "" where there is only one
    values: dict[str, np.ndarray]  # name -> `[B,G,...]` in the batch itself
    packed: Packed  # a response is number b * G + g
    tokens: np.ndarray  # [K,S,M,J]
    advantages: np.ndarray  # [B,G]
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (log-probabilities [N], advantages [N]) -> [N]


def run(config: ConfigDict, workdir: Path, file: Path, step: int | None = None) -> list[Finding]:
    """Finds, prints and returns what is not finite, the first one first.

    Args:
      config, workdir: of the run; nothing in it is changed.
      file: the batch, as the run left it.
      step: of the state; None is the last step before the batch that has a checkpoint.

    Raises:
      ValueError: there is no such file or step, or the run has another config.
    """
    configs.check_resume(config, workdir / "config.json")
    skipped = skipped_batch.read(file)
    steps = [0, *stage.saved_steps(config, workdir, skipped.stage)]
    if step is None:
        step = max(saved for saved in steps if saved < skipped.step)
    elif step not in steps:
        raise ValueError(f"--step={step}: must be one of {steps}, the steps of stage {skipped.stage!r} that are saved")
    print(f"stage {skipped.stage}, batch of step {skipped.step}, state after step {step}", flush=True)
    if step != skipped.step - 1:
        print(
            f"warning: step {skipped.step} may have met another state. If the run stopped there, start it again with "
            "--config.checkpoint.every=1: it comes to the same batch, with a checkpoint just before it",
            flush=True,
        )
    run, initial = stage.open_run(config, workdir, sharding.make_mesh(**config.mesh))
    tx, _ = stage.optimizer(config, skipped.stage, total_steps=1)  # the learning rate does not matter here
    with jax.set_mesh(run.mesh):
        state = _state(run, skipped.stage, step, initial, tx)
        findings = _in_leaves("parameters", state.params) + _in_leaves("optimizer state", state.opt_state)
        for group in _groups(config, skipped, run.mesh):
            findings += _in_responses(run, skipped.ids, stage.weights(run, state.params), group)
        findings += _in_update(run, skipped, tx, state)
    if is_first():
        _show(findings)
    return findings


def _state(
    run: Run, stage_name: str, step: int, initial: Callable[[], Any], tx: optax.GradientTransformation
) -> TrainState:
    if step:
        return stage.state_at(run, stage_name, step, tx)
    params = initial() if stage_name == "sft" else stage.warmed_up(run, initial)
    return stage.first_state(params, run.policy, tx, run.mesh, stage.teaching(run.config, stage_name))


def _groups(config: ConfigDict, skipped: skipped_batch.Skipped, mesh: jax.sharding.Mesh) -> list[_Group]:
    if skipped.stage == "sft":
        packed, tokens = skipped.batch
        return [_Group("", {}, packed, tokens, np.zeros((len(skipped.ids), 1), np.float32), lambda logp, _: -logp)]
    batch: Batch = skipped.batch
    objective, pack = Objective.from_config(config.rl), packer(config.rl, mesh)
    packed = pack(batch)

    def values(group, **more):
        inside = np.arange(group.logp.shape[-1]) < group.lengths[..., None]
        return {"reward": group.rewards, "sampler's log-probability": np.where(inside, group.logp, 0.0)} | more

    def surrogate(logp, advantages):
        return losses.clipped_surrogate(logp, logp, advantages, objective.clip_low, objective.clip_high)

    def likelihood(logp, _):
        return losses.shaped_likelihood(logp, objective.shaping) if objective.distillation == "shaped" else -logp

    autonomous = packed.autonomous, packed.autonomous_tokens, packed.advantages, surrogate
    groups = [_Group("autonomous", values(batch.autonomous, advantage=packed.advantages), *autonomous)]
    if batch.guided is not None:
        # As if each guided response were a target, whatever its reward.
        all_targets = Weighting(guide="demonstration", target="mean", weight="fixed")
        targets = pack(batch, weighting=all_targets).targets
        assert targets is not None  # there are guided responses
        tokens = packing.gather(batch.guided.tokens.reshape(batch.guided.rewards.size, -1), targets)
        guided = targets, tokens, np.zeros_like(batch.guided.rewards), likelihood
        groups.append(_Group("guided", values(batch.guided), *guided))
    return groups


def _in_responses(run: Run, ids: list[str], params: Any, group: _Group) -> list[Finding]:
    """Finds what is not finite in the batch itself and in the forward pass, by response."""
    name = f" ({group.name})" if group.name else ""
    size = group.advantages.shape[1]

    def finding(what, places):
        """`places`: numbers of problem, response and, if any, token, sorted."""
        b, i, *token = places[0]
        where = [f"problem {ids[b]!r}", f"response {i}", *(f"token {t}" for t in token)]
        problems = tuple(dict.fromkeys(ids[place[0]] for place in places))
        return Finding(what + name, ", ".join(where), len(places), problems)

    findings = []
    for what, values in group.values.items():
        if places := np.argwhere(~np.isfinite(values)).tolist():
            findings.append(finding(what, places))
    packed = group.packed
    advantages = group.advantages.reshape(-1)[packed.owner].astype(np.float32)
    placement = packing.specs(packed)
    batch = sharding.put(
        (packed, group.tokens, advantages), (placement, placement.owner, placement.owner), run.mesh
    )
    marks = sharding.fetch(jax.jit(_make_marks(run, group.loss))(params, *batch))
    for q, what in enumerate(QUANTITIES):
        marked = (marks[:, q] > 0) & (packed.owner >= 0)
        owners, tokens = packed.owner[marked].tolist(), packed.index[marked].tolist()
        if owners:
            findings.append(finding(what, sorted((*divmod(o, size), t) for o, t in zip(owners, tokens, strict=True))))
    return findings


def _make_marks(run: Run, loss: Callable) -> Callable[[Any, Packed, jax.Array, jax.Array], jax.Array]:
    """Returns `marks(params, packed, tokens, advantages) -> [K,Q,S,M,J]`, 1 where a quantity is not finite."""
    rl, config, forward = run.config.rl, run.policy.config, stage.forward(run)

    def marks(params, packed, tokens, advantages):
        head = models.head(params, config)
        contexts = [with_responses(rows, packed.owner, tokens) for rows in packed.contexts]

        def of_micro_batch(micro):
            contexts, chunks, tokens, advantages = micro
            hidden, *guided = (response_hidden(forward, params, rows) for rows in contexts)
            logp, entropy = logprobs.chunked_logprobs(hidden, head, tokens.reshape(hidden.shape[:2]), chunks)
            missing = jnp.zeros_like(logp)  # where there is only one context
            kl = missing
            if guided:
                divergence = divergences.select(rl.distillation, rl.beta, rl.kl_top_k)
                kl = logprobs.chunked_kl(guided[0], hidden, head, chunks, divergence)
            token_loss = loss(logp.reshape(-1), advantages.reshape(-1))
            values = hidden, *(guided or [missing]), logp, entropy, kl, token_loss
            return jnp.stack([
                (~jnp.isfinite(x.reshape(tokens.size, -1)).all(axis=1)).reshape(tokens.shape) for x in values
            ]).astype(jnp.float32)  # fmt: skip

        return in_micro_batches(of_micro_batch, packed.count, (contexts, packed.chunks, tokens, advantages))

    return marks


def _in_update(
    run: Run, skipped: skipped_batch.Skipped, tx: optax.GradientTransformation, state: TrainState
) -> list[Finding]:
    """Finds what is not finite in the run's own update: metrics and gradients."""
    counts: list[Any] = []

    def watch(gradient):
        jax.debug.callback(counts.append, _bad(gradient), ordered=False)

    teaching = stage.teaching(run.config, skipped.stage)
    _, shardings = stage.state_shardings(run.policy, tx, run.mesh, teaching)
    if skipped.stage == "sft":
        update = sft.make_update(stage.forward(run), tx, shardings=shardings, watch=watch)
        _, metrics = update(state, sft.put(skipped.batch, run.mesh), stage.base(run))
    else:
        packed = packer(run.config.rl, run.mesh)(skipped.batch)
        objective = Objective.from_config(run.config.rl)
        update = make_update(
            stage.forward(run), tx, objective, teaching=teaching, shardings=shardings, watch=watch
        )
        _, metrics = update(state, sharding.put(packed, specs(packed), run.mesh), stage.base(run))
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    jax.effects_barrier()
    findings = [Finding("metric", name, 1) for name, value in values.items() if not np.isfinite(value)]
    for number, gradient in enumerate(counts, start=1):
        which = f", optimizer step {number} of {len(counts)}" if len(counts) > 1 else ""
        findings += _findings(f"gradient{which}", gradient)
    verdict = "is skipped" if values["skipped"] else "is applied"
    print(f"the update {verdict}; loss {values['loss']:g}, gradient norm {values['grad_norm']:g}", flush=True)
    return findings


def _in_leaves(what: str, tree: Any) -> list[Finding]:
    return _findings(what, jax.jit(_bad)(tree))


def _bad(tree: Any) -> Any:
    """Counts the numbers of each leaf that are not finite; float32, as they may be very many."""
    return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.float32), tree)


def _findings(what: str, counts: Any) -> list[Finding]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(counts)
    return [Finding(what, sharding.path_name(path), int(count)) for path, count in leaves if count]


def _show(findings: list[Finding]) -> None:
    if not findings:
        print("all numbers are finite", flush=True)
        return
    lines = []
    for finding in findings:
        more = f" and {len(finding.problems) - 3} more" if len(finding.problems) > 3 else ""
        lines.append((finding.what, finding.first, finding.numbers, ", ".join(finding.problems[:3]) + more))
    table("Not finite, in the order of computation", ("what", "first", "numbers", "problems"), lines)
    print(f"it begins with: {findings[0].what}, {findings[0].first}", flush=True)


def main(config, given) -> None:
    """Checks the config, and finds what is not finite."""
    config_checks.check(config)
    workdir, batch = cli.existing_folder("workdir", given.workdir), cli.existing_file("batch", given.batch)
    run(config, workdir, batch, given.step)
