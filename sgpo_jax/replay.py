"""The update on a batch that a run skipped, once more: where the first number appears that is not finite.

    python -m sgpo_jax.replay --config=configs/NAME.py --workdir=DIR --batch=DIR/rl/skipped_batch_STEP.npz [--step=N]

The state is that of the last checkpoint before the batch, or after step N; 0 is the state that the stage began with.
Numbers that are not finite are counted where they are computed, in that order: the state, what the batch says of each
response, the forward pass of each response, the metrics, the gradient, the change of the parameters.

Axis key: B problems, G responses of a group, T response tokens; packed: K micro-batches, S chunks of response tokens,
M rows, J response tokens of a row in a chunk, C = M * J.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import cli, config_checks, logprobs, losses, models, sharding
from sgpo_jax import config as configs
from sgpo_jax.policy import Policy
from sgpo_jax.runtime.tables import table
from sgpo_jax.training import packing, rl, sft, skipped_batch, stage
from sgpo_jax.training.batch import Batch, pack_batch, specs
from sgpo_jax.training.packing import Packed
from sgpo_jax.training.state import TrainState
from sgpo_jax.training.train_step import in_micro_batches, make_update, response_hidden, with_responses

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
    given: dict[str, np.ndarray]  # what the batch says of them, `[B,G,...]`
    packed: Packed  # a response is number b * G + g
    tokens: np.ndarray  # [K,S,M,J]
    advantages: np.ndarray  # [B,G]
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (log-probabilities [N], advantages [N]) -> [N]


def run(config: ConfigDict, workdir: Path, file: Path, step: int | None = None) -> list[Finding]:
    """Prints and returns what is not finite, the first one first.

    Args:
      config, workdir: of the run; nothing in it is changed.
      file: the batch, as the run left it.
      step: after which the state is taken; None is the last one before the batch that has a checkpoint.

    Raises:
      ValueError: there is no such file or step, or the run has another config.
    """
    configs.check_resume(config, workdir / "config.json")
    kept = skipped_batch.read(file)
    steps = [0, *stage.saved_steps(config, workdir, kept.stage)]
    if step is None:
        step = max(saved for saved in steps if saved < kept.step)
    elif step not in steps:
        raise ValueError(f"--step={step}: must be one of {steps}, the steps of stage {kept.stage!r} that can be had")
    print(f"stage {kept.stage}, batch of step {kept.step}, state after step {step}", flush=True)
    if step != kept.step - 1:
        print(
            f"warning: step {kept.step} may have met another state. If the run stopped there, start it again with "
            "--config.checkpoint.every=1: it comes to the same batch, with a checkpoint just before it",
            flush=True,
        )
    mesh = sharding.make_mesh(**config.mesh)
    policy, load = stage.load_policy(config)
    tx, _ = stage.optimizer(config, kept.stage, total_steps=1)  # the learning rate is of no account here
    with jax.set_mesh(mesh):
        state = _state(config, workdir, kept.stage, step, policy, load, tx, mesh)
        found = _in_leaves("parameters", state.params) + _in_leaves("optimizer state", state.opt_state)
        for group in _groups(config, kept):
            found += _in_responses(config, kept.ids, policy, state.params, group, mesh)
        found += _in_update(config, kept, policy, tx, state, mesh)
    if jax.process_index() == 0:
        _show(found)
    return found


def _state(
    config: ConfigDict,
    workdir: Path,
    of_stage: str,
    step: int,
    policy: Policy,
    load: Callable[[jax.Array], Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    if step:
        return stage.state_at(config, workdir, of_stage, step, policy, tx, mesh)

    def initial():
        return load(jax.random.key(config.seed))

    first = initial() if of_stage == "sft" else stage.warmed_up(config, workdir, policy, initial, mesh)
    return stage.first_state(first, policy, tx, mesh)


def _groups(config: ConfigDict, kept: skipped_batch.Skipped) -> list[_Group]:
    if kept.stage == "sft":
        packed, tokens = kept.batch
        return [_Group("", {}, packed, tokens, np.zeros((len(kept.ids), 1), np.float32), lambda logp, _: -logp)]
    batch: Batch = kept.batch
    fields, (of_batch, of_update) = config.rl, rl.method(config.rl)
    packed = pack_batch(batch, micro_batch=fields.micro_batch, **of_batch)

    def given(group, **more):
        inside = np.arange(group.logp.shape[-1]) < group.lengths[..., None]
        return {"reward": group.rewards, "sampler's log-probability": np.where(inside, group.logp, 0.0)} | more

    def surrogate(logp, advantages):
        return losses.clipped_surrogate(logp, logp, advantages, of_update["clip_low"], of_update["clip_high"])

    def likelihood(logp, _):
        return losses.shaped_likelihood(logp, fields.shaping) if fields.distillation == "shaped" else -logp

    ours = packed.autonomous, packed.autonomous_tokens, packed.advantages, surrogate
    groups = [_Group("autonomous", given(batch.autonomous, advantage=packed.advantages), *ours)]
    if batch.guided is not None:
        # As if each guided response were a target, whatever its reward.
        every = pack_batch(
            batch, micro_batch=fields.micro_batch, guide="demonstration", target="mean", weight="fixed",
            distillation=fields.distillation,
        ).targets  # fmt: skip
        assert every is not None  # there are guided responses
        size = batch.guided.rewards.size
        tokens = packing.of_sequence(batch.guided.tokens.reshape(size, -1), every)
        theirs = every, tokens, np.zeros_like(batch.guided.rewards), likelihood
        groups.append(_Group("guided", given(batch.guided), *theirs))
    return groups


def _in_responses(
    config: ConfigDict, ids: list[str], policy: Policy, params: Any, group: _Group, mesh: Mesh
) -> list[Finding]:
    """What is not finite in the batch itself and in the forward pass, by response."""
    name = f" ({group.name})" if group.name else ""
    size = group.advantages.shape[1]

    def finding(what, places):
        """`places`: numbers of problem, response and, if any, token, sorted."""
        b, i, *token = places[0]
        where = [f"problem {ids[b]!r}", f"response {i}", *(f"token {t}" for t in token)]
        problems = tuple(dict.fromkeys(ids[place[0]] for place in places))
        return Finding(what + name, ", ".join(where), len(places), problems)

    found = []
    for what, values in group.given.items():
        if places := np.argwhere(~np.isfinite(values)).tolist():
            found.append(finding(what, places))
    packed = group.packed
    micro = {
        "rows": [*packed.contexts], "tokens": group.tokens, "chunks": packed.chunks, "owner": packed.owner,
        "advantage": group.advantages.reshape(-1)[packed.owner].astype(np.float32),
    }  # fmt: skip
    of_packed = packing.specs(packed)
    listed = of_packed.owner
    placed = sharding.put(
        (packed.count, micro),
        (of_packed.count, {"rows": [*of_packed.contexts], "tokens": listed, "chunks": of_packed.chunks, "owner": listed,
                           "advantage": listed}), mesh,
    )  # fmt: skip
    marks = sharding.fetch(jax.jit(_make_marks(config, policy, group.loss))(params, *placed))
    for q, what in enumerate(QUANTITIES):
        used = (marks[:, q] > 0) & (packed.owner >= 0)
        owners, tokens = packed.owner[used].tolist(), packed.index[used].tolist()
        if owners:
            found.append(finding(what, sorted((*divmod(o, size), t) for o, t in zip(owners, tokens, strict=True))))
    return found


def _make_marks(config: ConfigDict, policy: Policy, loss: Callable) -> Callable[[Any, jax.Array, Any], jax.Array]:
    """`marks(params, count, micro-batches) -> [K,Q,S,M,J]`: 1 where a quantity of a token is not finite."""
    fields = config.rl
    hidden_of = partial(response_hidden, config=policy.config, dtype=policy.dtype, remat=config.model.remat)

    def marks(params, count, micro_batches):
        head = models.head(params, policy.config)
        owner, tokens = micro_batches["owner"], micro_batches["tokens"]
        rows = [with_responses(rows, owner, tokens) for rows in micro_batches["rows"]]

        def of_micro(micro):
            tokens, chunks = micro["tokens"], micro["chunks"]
            hidden, *guided = (hidden_of(params, rows) for rows in micro["rows"])
            logp, entropy = logprobs.chunked_logprobs(hidden, head, tokens.reshape(hidden.shape[:2]), chunks)
            kl = [
                logprobs.chunked_kl(each, hidden, head, chunks, fields.distillation, fields.beta, fields.kl_top_k)
                for each in guided
            ]
            of_loss = loss(logp.reshape(-1), micro["advantage"].reshape(-1))
            none = jnp.zeros_like(logp)  # where only one context is
            values = hidden, *(guided or [none]), logp, entropy, *(kl or [none]), of_loss
            return jnp.stack([
                (~jnp.isfinite(x.reshape(tokens.size, -1)).all(axis=1)).reshape(tokens.shape) for x in values
            ]).astype(jnp.float32)  # fmt: skip

        return in_micro_batches(of_micro, count, micro_batches | {"rows": rows})

    return marks


def _in_update(
    config: ConfigDict,
    kept: skipped_batch.Skipped,
    policy: Policy,
    tx: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
) -> list[Finding]:  # fmt: skip
    """What is not finite in the run's own update: metrics and gradients."""
    seen: list[Any] = []

    def watch(gradient):
        jax.debug.callback(seen.append, _bad(gradient), ordered=False)

    settings = {
        "dtype": policy.dtype, "remat": config.model.remat, "shardings": stage.state_shardings(policy, tx, mesh)[1],
        "watch": watch,
    }  # fmt: skip
    if kept.stage == "sft":
        _, metrics = sft.make_update(policy.config, tx, **settings)(state, sft.put(kept.batch, mesh))
    else:
        of_batch, of_update = rl.method(config.rl)
        packed = pack_batch(kept.batch, micro_batch=config.rl.micro_batch, **of_batch)
        run_update = make_update(policy.config, tx, **of_update, **settings)
        _, metrics = run_update(state, sharding.put(packed, specs(packed), mesh))
    values = {name: float(value) for name, value in metrics.items()}
    jax.effects_barrier()
    found = [Finding("metric", name, 1) for name, value in values.items() if not np.isfinite(value)]
    for number, gradient in enumerate(seen, start=1):
        which = f", optimizer step {number} of {len(seen)}" if len(seen) > 1 else ""
        found += _findings(f"gradient{which}", gradient)
    verdict = "is skipped" if values["skipped"] else "is applied"
    print(f"the update {verdict}; loss {values['loss']:g}, gradient norm {values['grad_norm']:g}", flush=True)
    return found


def _in_leaves(what: str, tree: Any) -> list[Finding]:
    return _findings(what, jax.jit(_bad)(tree))


def _bad(tree: Any) -> Any:
    """How many numbers of each leaf are not finite; float32, as they may be very many."""
    return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.float32), tree)


def _findings(what: str, counts: Any) -> list[Finding]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(counts)
    return [Finding(what, sharding.path_name(path), int(count)) for path, count in leaves if count]


def _show(found: list[Finding]) -> None:
    if not found:
        print("all numbers are finite", flush=True)
        return
    lines = []
    for finding in found:
        more = f" and {len(finding.problems) - 3} more" if len(finding.problems) > 3 else ""
        lines.append((finding.what, finding.first, finding.numbers, ", ".join(finding.problems[:3]) + more))
    table("Not finite, in the order of computation", ("what", "first", "numbers", "problems"), lines)
    print(f"it begins with: {found[0].what}, {found[0].first}", flush=True)


def main(config, given) -> None:
    config_checks.check(config)
    run(config, Path(given.workdir).expanduser(), Path(given.batch).expanduser(), given.step)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("batch", None, "A skipped_batch_STEP.npz of the run.")
    flags.DEFINE_integer("step", None, "Take the state after this step; by default the last one before the batch.")
    cli.start(main, required=["config", "workdir", "batch"])
