"""The two training loops, the jitted update, and the state, checkpoints and run folder they share."""

from sgpo_jax.training.batch import Batch, Contexts, Group, PackedBatch, pack_batch
from sgpo_jax.training.forward import Forward
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.state import TrainState, init_state
from sgpo_jax.training.teacher import Teaching
from sgpo_jax.training.train_step import make_update
from sgpo_jax.training.weighting import Weighting

__all__ = [
    "Batch", "Contexts", "Forward", "Group", "Objective", "PackedBatch", "Teaching", "TrainState", "Weighting",
    "init_state", "make_update", "pack_batch",
]  # fmt: skip
