"""What the SFT and the RL loop share: policy, optimizer and state of a stage, its checkpoints, and skipped updates."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import data, models, sharding
from sgpo_jax import policy as policies
from sgpo_jax.data import filtering
from sgpo_jax.policy import Policy
from sgpo_jax.policy.prompts import INSTRUCTION
from sgpo_jax.runtime import distributed
from sgpo_jax.training import skipped_batch
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.optimizer import adamw, schedule
from sgpo_jax.training.state import TrainState, init_state

# stage: (metric of its best checkpoint, whether higher is better)
BEST = {"sft": ("validation_loss", False), "rl": ("accuracy", True)}


def load_policy(config: ConfigDict) -> tuple[Policy, Callable[[jax.Array], Any]]:
    """(policy, `initial(key) -> params`) of the model that the config names, on the mesh that it names."""
    model, instruction = config.model, config.data.instruction
    policy, initial = policies.load(
        model.source, model.tokenizer, layers=model.layers, hidden=model.hidden, heads=model.heads, mlp=model.mlp,
        dtype=jnp.dtype(model.dtype), instruction=INSTRUCTION if instruction == "default" else instruction,
    )  # fmt: skip
    return policy, lambda key: initial(key, sharding.make_mesh(**config.mesh))


def sift(config: ConfigDict, source: str) -> filtering.Sieve:
    """`data.sift` against the evaluation sets of the config."""
    sets = {name: chosen.source for name, chosen in config.eval.sets.items()}
    fields = config.data
    return data.sift(source, sets, remove_duplicates=fields.remove_duplicates, decontaminate=fields.decontaminate)


def account(sieve: filtering.Sieve, workdir: Path, stage: str) -> None:
    """Prints what became of the rows of a stage and records it in `workdir`.

    Raises:
      ValueError: the stage has a checkpoint, but began with other rows; or the processes have read different ones.
    """
    rows = f"rows of the {stage} stage"
    distributed.agree({f"the number of {rows}": len(sieve.rows), f"the content of {rows}": sieve.fingerprint()})
    if jax.process_index() == 0:
        sieve.table(f"{stage.upper()}: {len(sieve.rows)} rows of {sum(sieve.read.values())}")
        started = any((workdir / stage / "checkpoints").glob("[0-9]*"))
        filtering.record(sieve, workdir, stage, resuming=started)


def optimizer(config: ConfigDict, stage: str, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(AdamW, its learning rate by optimizer step) of a stage."""
    fields = config[stage]
    rate = schedule(fields.learning_rate, total_steps, warmup_share=fields.warmup_share, decay=fields.decay)
    return adamw(rate, **config.optimizer), rate


def checkpoints(config: ConfigDict, workdir: Path, stage: str, reading: bool = False) -> Checkpoints:
    """The checkpoints of a stage, to go on with it or only to read."""
    fields = config.checkpoint
    folder = workdir / stage / "checkpoints"
    return Checkpoints(folder, fields.keep, *BEST[stage], config.seed, fields.stop_on_error, reading)


def state_shardings(policy: Policy, tx: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the state of a stage."""
    params = jax.eval_shape(partial(models.init, config=policy.config), jax.random.key(0))
    shapes = jax.eval_shape(partial(init_state, optimizer=tx), params)
    return shapes, sharding.tree_shardings(shapes, mesh)


def _placed(shapes: TrainState, shardings: TrainState) -> TrainState:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def start(
    saved: Checkpoints, initial: Callable[[], Any], policy: Policy, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state of the latest checkpoint, or the one before the first step, with the parameters of `initial()`."""
    if (state := saved.restore_latest(_placed(*state_shardings(policy, tx, mesh)))) is not None:
        return state
    return first_state(initial(), policy, tx, mesh)


def first_state(params: Any, policy: Policy, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step of a stage that begins with `params`."""
    _, shardings = state_shardings(policy, tx, mesh)
    params = sharding.place(params, shardings.params)
    return jax.jit(partial(init_state, optimizer=tx), out_shardings=shardings)(params)


def warmed_up(config: ConfigDict, workdir: Path, policy: Policy, initial: Callable[[], Any], mesh: Mesh) -> Any:
    """The parameters that RL begins with: the best of the warm-up, or, where there is none, `initial()`."""
    params = best_params(config, workdir, "sft", policy, mesh)
    return initial() if params is None else params


def best_params(config: ConfigDict, workdir: Path, stage: str, policy: Policy, mesh: Mesh) -> Any | None:
    """Parameters of the best checkpoint of a stage, or None when the stage has none."""
    step = find_step(config, workdir, stage, "best")
    return None if step is None else params_at(config, workdir, stage, step, policy, mesh)


def find_step(config: ConfigDict, workdir: Path, stage: str, which: str) -> int | None:
    """Step of the "best" or "last" checkpoint of a stage, or `which` itself; None when there is no such checkpoint."""
    if not distributed.first((workdir / stage / "checkpoints").is_dir):
        return None
    with checkpoints(config, workdir, stage, reading=True) as saved:
        if which in ("best", "last"):
            return saved.best_step() if which == "best" else saved.latest_step()
        return int(which) if which.isdigit() and int(which) in saved.all_steps() else None


def saved_steps(config: ConfigDict, workdir: Path, stage: str) -> list[int]:
    """Steps of a stage that have a checkpoint."""
    if not (workdir / stage / "checkpoints").is_dir():
        return []
    with checkpoints(config, workdir, stage, reading=True) as saved:
        return saved.all_steps()


def params_at(config: ConfigDict, workdir: Path, stage: str, step: int, policy: Policy, mesh: Mesh) -> Any:
    """Parameters of the checkpoint after `step` of a stage."""
    tx, _ = optimizer(config, stage, total_steps=1)  # only its state's shape matters here
    with checkpoints(config, workdir, stage, reading=True) as saved:
        return saved.restore_params(step, _placed(*state_shardings(policy, tx, mesh)))


def state_at(
    config: ConfigDict,
    workdir: Path,
    stage: str,
    step: int,
    policy: Policy,
    tx: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The checkpoint after `step` of a stage."""
    with checkpoints(config, workdir, stage, reading=True) as saved:
        return saved.restore(step, _placed(*state_shardings(policy, tx, mesh)))


def advise_packing(config: ConfigDict, stage: str, filled: float, mesh: Mesh) -> None:
    """Says how to compute less when many rows of an update are empty."""
    rows = config[stage].micro_batch
    if filled < 0.75 and rows > sharding.row_ways(mesh):
        print(
            f"{stage}.micro_batch={rows}: {filled:.0%} of the rows that an update computes hold responses; "
            "a smaller one leaves fewer empty",
            flush=True,
        )


def watch_skipped(
    config: ConfigDict, workdir: Path, stage: str, step: int, in_a_row: int, rows: Sequence[dict], batch: Any
) -> None:
    """Keeps what a skipped update read, in host memory; stops the run when `config.max_skipped` in a row were skipped.

    Raises:
      FloatingPointError: at the limit; the message names the saved batch.
    """
    if not in_a_row:
        return
    path = workdir / stage / f"skipped_batch_{step:06d}.npz"
    if jax.process_index() == 0:
        skipped_batch.write(path, skipped_batch.Skipped(stage, step, [row["id"] for row in rows], batch))
    if in_a_row >= config.max_skipped:
        raise FloatingPointError(
            f"step {step}: {in_a_row} updates in a row were not finite (max_skipped={config.max_skipped}); parameters "
            f"are those before them. Where it begins: python -m sgpo_jax.replay --config=... --workdir={workdir} "
            f"--batch={path}"
        )
    print(f"warning: step {step}: the update was not finite and is skipped; what it read is in {path}", flush=True)
