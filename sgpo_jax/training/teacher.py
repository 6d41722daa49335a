"""The teacher: whose parameters the guided side has, and how they follow the student's.

The published teacher is live: it has the student's own parameters, under stop-gradient. The others have parameters in
the training state. The guided pass reads those instead, and nothing else changes.

Axis key: S chunks of response tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

TEACHERS = ("live", "frozen", "ema", "trust_region", "gated")


@dataclass(frozen=True)
class Teaching:
    """The rule of the teacher. Units and sources are in `config.base`; the default is the paper's."""

    # "live": the student. "frozen": the policy that RL began with. "ema": a moving average of the student.
    # "trust_region": its logits lie between those of the first policy and of the student. "gated": frozen, and taken
    # from the student again when the reward has risen.
    teacher: str = "live"
    teacher_rate: float = 0.05  # part of the student in "ema", at each step, and in "trust_region"
    teacher_dtype: str = "float32"  # of its parameters
    teacher_window: int = 10  # steps; of "gated"
    teacher_margin: float = 0.01  # reward by which a window must be better; of "gated"
    reference_kl: float = 0.0  # above 0: the policy that RL began with is kept, whatever the teacher

    @classmethod
    def from_config(cls, rl: ConfigDict) -> "Teaching":
        """Reads the section `rl` of a config."""
        return cls(**{field.name: rl[field.name] for field in fields(cls)})


LIVE = Teaching()


class Teacher(struct.PyTreeNode):
    """The part of the training state that a teacher other than the live one needs, or a reference policy."""

    reference: Any = None  # parameters that RL began with: "frozen", "trust_region", and for a KL to them
    moving: Any = None  # parameters that follow the student: "ema", "gated"
    # Both for "gated": the sum over this window's steps of their mean rewards; and the reward to exceed, which is that
    # of the window of the last refresh, at first that of the first window, and -inf before its end.
    window_reward: Any = None  # [] float32
    best_reward: Any = None  # [] float32


def begin(params: Any, teaching: Teaching) -> Teacher | None:
    """Returns the teacher of a policy that begins RL with `params`; None for the live one without a reference."""

    def copy():  # whatever the type is: a donated state must not hold a buffer twice
        return jax.tree.map(lambda x: jnp.array(x, jnp.dtype(teaching.teacher_dtype), copy=True), params)

    keeps = teaching.teacher in ("frozen", "trust_region") or teaching.reference_kl > 0
    moves = teaching.teacher in ("ema", "gated")
    rewards = (jnp.float32(0.0), jnp.float32(-jnp.inf)) if teaching.teacher == "gated" else ()
    return Teacher(copy() if keeps else None, copy() if moves else None, *rewards) if keeps or moves else None


def follow(teacher: Teacher | None, params: Any, step: jax.Array, reward: Any, teaching: Teaching) -> Teacher | None:
    """Returns the teacher after an update.

    `"ema"`: `moving <- (1 - rate) moving + rate params`, as SDPO (arXiv 2601.20802). `"gated"`: at the end of every
    window, `moving <- params` if its mean reward is above that of the last refresh, or of the first window, by more
    than the margin. As CGTR (arXiv 2606.03532), which refreshes a frozen teacher after the reward has risen.

    Args:
      teacher: before the update.
      params: the student's after it.
      step: `[]` finished updates, this one included.
      reward: `[]` mean reward of the step's autonomous responses; only a gated teacher needs it.
      teaching: the rule.
    """
    if teacher is None or teacher.moving is None:
        return teacher
    if teaching.teacher == "ema":
        rate = teaching.teacher_rate
        return teacher.replace(moving=jax.tree.map(lambda t, s: (1 - rate) * t + rate * s, teacher.moving, params))
    total = teacher.window_reward + reward
    ends = step % teaching.teacher_window == 0
    mean = total / teaching.teacher_window
    first = teacher.best_reward == -jnp.inf
    refreshes = ends & ~first & (mean > teacher.best_reward + teaching.teacher_margin)
    moving = jax.tree.map(lambda t, s: jnp.where(refreshes, s.astype(t.dtype), t), teacher.moving, params)
    best = jnp.where(ends & (first | refreshes), mean, teacher.best_reward)
    return teacher.replace(moving=moving, window_reward=jnp.where(ends, 0.0, total), best_reward=best)


def mixture(teacher: Teacher | None, params: Any, teaching: Teaching) -> Sequence[tuple[float, Any]]:
    """Returns the parts of the teacher's logits: (weight, parameters); none for the live teacher.

    All others have one part of weight 1, except `"trust_region"`: `(1 - rate) z_reference + rate z_student`. Its
    distribution is proportional to `p_reference^(1 - rate) p_student^rate`. As SDPO's trust-region teacher.
    """
    if teacher is None or teaching.teacher == "live":
        return ()
    if teaching.teacher == "trust_region":
        student = jax.lax.stop_gradient(params)
        return (1 - teaching.teacher_rate, teacher.reference), (teaching.teacher_rate, student)
    return ((1.0, teacher.reference if teacher.moving is None else teacher.moving),)
