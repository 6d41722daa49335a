"""The weights of a rollout: their type, and their layout, which is another than that of training."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sgpo_jax import models
from sgpo_jax.sharding import BATCH, SHARDS, constrain, dividing, path_name, platform, spec_for

# Layouts between that of training and one that splits weights over more than the tensor axis. From each to the next the
# moves are exchanges or gathers over one axis; at once, all devices would hold all.
Layout = dict[Any, tuple[str, ...]]  # axes of a rule -> the axes that split in their place
FROM_TRAINING: tuple[Layout, ...] = (
    {SHARDS: BATCH, "tensor": ("tensor",)}, {SHARDS: ("data",), "tensor": ("tensor", "fsdp")},
)  # fmt: skip


def cast(params: Any, dtype: Any) -> Any:
    """Casts matrices to the dtype of the products; norms and biases keep theirs, and so do codes and scales."""

    def cast_leaf(path, leaf):
        name = path_name(path)
        matrix = name.endswith(("kernel", "embedding")) and leaf.dtype != jnp.int8
        leaf = leaf.astype(dtype) if matrix else leaf
        if platform() != "gpu":
            return leaf
        # Else the partitioner gathers first and casts then, with twice the memory.
        return constrain(leaf, *(BATCH if axes == SHARDS else axes for axes in spec_for(name, leaf.shape)))

    return jax.tree_util.tree_map_with_path(cast_leaf, params)


def split(params: Any, axes: tuple[str, ...], through: Sequence[Layout] = ()) -> Any:
    """Gathers matrices, and splits over these axes what the tensor axis splits in training.

    This happens once, before a stage of decoding: otherwise every token would gather them. Where the matrices are split
    over the first of these axes already, nothing moves. From the layout of training they go `through` others.
    """

    def split_leaf(path, leaf):
        spec = spec_for(path_name(path), leaf.shape)
        for step in [*(through if len(axes) > 1 else ()), {"tensor": axes}]:
            by_dimension = [step.get(some, ()) for some in spec]
            leaf = constrain(leaf, *(dividing(n, some) for n, some in zip(leaf.shape, by_dimension, strict=False)))
        return leaf

    return jax.tree_util.tree_map_with_path(split_leaf, params)


def contiguous_head(params: Any, config: models.ModelConfig) -> jax.Array:
    """Returns the head `[D,V]`; for a tied model a transposed copy, which is faster than a transpose at every token."""
    head = models.head(params, config)
    return jax.lax.optimization_barrier(head) if config.tie_embeddings else head
