"""A stage of a run and its folder: policy, optimizer, state and checkpoints, as the config and the disk have them."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import models, sharding
from sgpo_jax import policy as policies
from sgpo_jax.evaluation import check_sets
from sgpo_jax.models import lora, peft, quantised
from sgpo_jax.policy import Policy, Run, positions
from sgpo_jax.policy.prompts import INSTRUCTION
from sgpo_jax.runtime import distributed, mirror
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.forward import Forward
from sgpo_jax.training.optimizer import adamw, schedule
from sgpo_jax.training.state import TrainState, init_state
from sgpo_jax.training.teacher import LIVE, Teaching

# stage: (metric of its best checkpoint, whether higher is better)
BEST = {"sft": ("validation_loss", False), "rl": ("accuracy", True)}


def load_policy(config: ConfigDict) -> tuple[Policy, Callable[[jax.Array], Any]]:
    """Loads the model that the config names.

    Returns:
      (policy, `initial(key) -> params`), which reads or draws the parameters onto the mesh that the config names.
    """
    model, instruction = config.model, config.data.instruction
    policy, initial = policies.load(
        model.source, model.tokenizer, layers=model.layers, hidden=model.hidden, heads=model.heads, mlp=model.mlp,
        dtype=jnp.dtype(model.dtype), instruction=INSTRUCTION if instruction == "default" else instruction,
    )  # fmt: skip
    policy = policies.with_system(policy, config.data.system)
    policy = policy._replace(lora=lora.Lora.from_config(config.lora))
    if policy.lora:
        lora.kernels(policy.config, policy.lora.targets)  # refuses a rule that names none
        if config.lora.start:
            peft.check(config.lora.start, policy.config, policy.lora)
    base_dtype = config.lora.base_dtype if policy.lora else "float32"
    if base_dtype in quantised.CODES:
        quantised.import_qwix()  # refuses where it is not installed

    def load(key):
        mesh = sharding.make_mesh(**config.mesh)
        params = initial(key, mesh, quantised.dtype_of(base_dtype))
        return quantised.quantise(params, base_dtype, mesh) if base_dtype in quantised.CODES else params

    return policy, load


def open_run(
    config: ConfigDict, workdir: Path, mesh: Mesh, seed: int | None = None
) -> tuple[Run, Callable[[], Any]]:
    """Opens a run, without reading weights.

    Args:
      config, workdir, mesh: of the run.
      seed: of parameters that are drawn; None takes the config's.

    Returns:
      (run, `initial() -> params`, which reads or draws what training begins with: the model's parameters or adapters).

    Raises:
      ValueError: the mesh splits the tokens of rows, and does not divide the model's query heads.
    """
    policy, load = load_policy(config)
    models.check_heads(policy.config.num_heads, mesh)
    run, key = Run(config, workdir, policy, mesh), jax.random.key(config.seed if seed is None else seed)
    if policy.lora is None:
        return run, partial(load, key)
    return replace(run, base=cache(partial(load, key))), partial(_first_adapters, run, key)


def _first_adapters(run: Run, key: jax.Array) -> Any:
    shape, chosen = run.policy.config, run.policy.lora
    assert chosen is not None
    if run.config.lora.start:
        return policies.place(peft.load(run.config.lora.start, shape, chosen), run.mesh)
    return policies.place(lora.init(jax.random.fold_in(key, zlib.crc32(b"adapters")), shape, chosen), run.mesh)


def base(run: Run) -> Any | None:
    """Returns the frozen parameters under the adapters, read once; None where training changes all parameters."""
    return None if run.base is None else run.base()


def weights(run: Run, params: Any) -> Any:
    """Returns the whole model's parameters: `params`, or where these are adapters, their base with them merged in."""
    if run.base is None or run.policy.lora is None:
        return params
    return lora.merge(run.base(), params, run.policy.lora.scale)


def forward(run: Run) -> Forward:
    """Returns how the run's training applies its model."""
    return make_forward(run.policy, run.config.model.remat)


def make_forward(policy: Policy, remat: str) -> Forward:
    """Returns how training applies a policy, with adapters if it has them."""
    return Forward(policy.config, policy.dtype, remat, scale=policy.lora.scale if policy.lora else 1.0)


def check_positions(run: Run) -> None:
    """Checks before the first stage what the later ones would refuse: responses longer than the model's positions.

    Prompts are checked when their rows are read, which takes a while.

    Raises:
      ValueError: a limit of the config does not fit into them.
    """
    config = run.config
    if "rl" in config.stages:
        positions.check_limit(run.policy, [[0]], "rl.max_new_tokens", config.rl.max_new_tokens, "RL")
    if "eval" in config.stages or ("rl" in config.stages and config.rl.eval_every):
        check_sets(run)


def optimizer(config: ConfigDict, stage: str, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns (AdamW, its learning rate by optimizer step) of a stage."""
    fields = config[stage]
    rate = schedule(fields.learning_rate, total_steps, warmup_share=fields.warmup_share, decay=fields.decay)
    return adamw(rate, **config.optimizer), rate


def teaching(config: ConfigDict, stage: str) -> Teaching:
    """Returns the rule of the teacher in a stage: that of the config in RL; the warm-up has none."""
    return Teaching.from_config(config.rl) if stage == "rl" else LIVE


def state_shardings(
    policy: Policy, tx: optax.GradientTransformation, mesh: Mesh, rule: Teaching = LIVE
) -> tuple[TrainState, TrainState]:
    """Returns (shapes, shardings) of the state of a stage, whose teacher has this rule."""
    if policy.lora:
        params = lora.shapes(policy.config, policy.lora)
    else:
        params = jax.eval_shape(partial(models.init, config=policy.config), jax.random.key(0))
    shapes = jax.eval_shape(partial(init_state, optimizer=tx, teaching=rule), params)
    return shapes, sharding.tree_shardings(shapes, mesh)


def placed_shapes(
    policy: Policy, tx: optax.GradientTransformation, mesh: Mesh, rule: Teaching = LIVE
) -> TrainState:
    """Returns the state of a stage as shapes with their shardings."""
    shapes, shardings = state_shardings(policy, tx, mesh, rule)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def folder_of(workdir: Path, stage: str) -> Path:
    """Returns the folder of a stage's checkpoints, which may be in a bucket."""
    return mirror.arrays(workdir / stage / "checkpoints")


def has_begun(workdir: Path, stage: str) -> bool:
    """Returns whether a stage has a checkpoint."""
    folder = folder_of(workdir, stage)
    return folder.is_dir() and any(path.name[0].isdigit() for path in folder.iterdir())


def checkpoints(
    config: ConfigDict, workdir: Path, stage: str, reading: bool = False, base: str = ""
) -> Checkpoints:
    """Opens the checkpoints of a stage, to continue it or only to read; `base` is needed to restore adapters."""
    fields = config.checkpoint
    folder = folder_of(workdir, stage)
    return Checkpoints(folder, fields.keep, *BEST[stage], config.seed, fields.stop_on_error, base, reading)


def checkpoints_of(run: Run, stage: str, reading: bool = False) -> Checkpoints:
    """Opens the checkpoints of a stage of a run; adapters are restored only if the run has the base they belong to."""
    fingerprint = "" if run.base is None else lora.fingerprint(run.base())
    return checkpoints(run.config, run.workdir, stage, reading, fingerprint)


def start(
    saved: Checkpoints,
    initial: Callable[[], Any],
    policy: Policy,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rule: Teaching = LIVE,
) -> TrainState:
    """Returns the state of the latest checkpoint, or the first state, with the parameters of `initial()`."""
    if (state := saved.restore_latest(placed_shapes(policy, tx, mesh, rule))) is not None:
        return state
    return first_state(initial(), policy, tx, mesh, rule)


def first_state(
    params: Any, policy: Policy, tx: optax.GradientTransformation, mesh: Mesh, rule: Teaching = LIVE
) -> TrainState:
    """Returns the state before the first step of a stage that begins with `params`."""
    _, shardings = state_shardings(policy, tx, mesh, rule)
    params = sharding.place(params, shardings.params)
    return jax.jit(partial(init_state, optimizer=tx, teaching=rule), out_shardings=shardings)(params)


def warmed_up(run: Run, initial: Callable[[], Any]) -> Any:
    """Returns the parameters or adapters that RL begins with: the best of the warm-up; without one, `initial()`."""
    params = best_params(run, "sft")
    return initial() if params is None else params


def best_params(run: Run, stage: str) -> Any | None:
    """Reads what is trained of the best checkpoint of a stage; None where the stage has none."""
    step = find_step(run.config, run.workdir, stage, "best")
    return None if step is None else params_at(run, stage, step)


def find_step(config: ConfigDict, workdir: Path, stage: str, which: str) -> int | None:
    """Finds a checkpoint of a stage.

    Args:
      config, workdir: of the run.
      stage: "sft" or "rl".
      which: "best", "last", or a step.

    Returns:
      Its step; None where there is no such checkpoint.
    """
    if not distributed.first(folder_of(workdir, stage).is_dir):
        return None
    with checkpoints(config, workdir, stage, reading=True) as saved:
        if which in ("best", "last"):
            return saved.best_step() if which == "best" else saved.latest_step()
        return int(which) if which.isdigit() and int(which) in saved.all_steps() else None


def saved_steps(config: ConfigDict, workdir: Path, stage: str) -> list[int]:
    """Returns the steps of a stage that have a checkpoint."""
    if not folder_of(workdir, stage).is_dir():
        return []
    with checkpoints(config, workdir, stage, reading=True) as saved:
        return saved.all_steps()


def weights_at(run: Run, stage: str, step: int) -> Any:
    """Reads the whole model's parameters of the checkpoint after `step` of a stage."""
    return weights(run, params_at(run, stage, step))


def params_at(run: Run, stage: str, step: int) -> Any:
    """Reads what is trained, the model's parameters or adapters, of the checkpoint after `step` of a stage."""
    tx, _ = optimizer(run.config, stage, total_steps=1)  # only the shape of its state matters here
    with checkpoints_of(run, stage, reading=True) as saved:
        shapes = placed_shapes(run.policy, tx, run.mesh, teaching(run.config, stage))
        return saved.restore_params(step, shapes)


def state_at(run: Run, stage: str, step: int, tx: optax.GradientTransformation) -> TrainState:
    """Reads the checkpoint after `step` of a stage."""
    with checkpoints_of(run, stage, reading=True) as saved:
        return saved.restore(step, placed_shapes(run.policy, tx, run.mesh, teaching(run.config, stage)))
