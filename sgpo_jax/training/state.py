"""The training state: everything that an update changes and a checkpoint holds."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sgpo_jax.training.teacher import LIVE, Teacher, Teaching, begin


class TrainState(struct.PyTreeNode):
    """The arrays that an update changes; a checkpoint holds all of them."""

    step: jax.Array  # [] int32, finished updates; without rollbacks also the data position, and folded into the seed
    params: Any
    opt_state: optax.OptState
    skipped: jax.Array  # [] int32, updates in a row that were skipped because they were not finite
    teacher: Teacher | None = None  # None: the student itself


def init_state(params: Any, optimizer: optax.GradientTransformation, teaching: Teaching = LIVE) -> TrainState:
    """Returns the state before the first step."""
    # Two separate arrays: a donated state must not hold a buffer twice.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    opt_state, teacher = optimizer.init(params), begin(params, teaching)
    return TrainState(step=step, params=params, opt_state=opt_state, skipped=skipped, teacher=teacher)
