"""The memory of a rollout on a device: the cache of its slots, and how many slots fit."""

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from sgpo_jax.models import ModelConfig, init_cache
from sgpo_jax.sharding import row_ways

RESERVE = 0.1  # share of a device's memory for logits, one layer's activations and what collectives need


def cache_bytes(config: ModelConfig, rows: int, tokens: int, dtype: Any, mesh: Mesh) -> int:
    """Returns the bytes on a device of the cache of `rows` rows of `tokens` tokens; `rows` is over all devices."""
    with jax.set_mesh(mesh):
        cache = jax.eval_shape(partial(init_cache, config, rows, tokens, dtype))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return whole // (row_ways(mesh) * head_ways(config, mesh))


def head_ways(config: ModelConfig, mesh: Mesh) -> int:
    """Returns the number of parts into which the mesh splits the heads of the cache."""
    tensor = mesh.shape["tensor"]
    return tensor if config.num_kv_heads % tensor == 0 else 1


def fitting_slots(responses: int, room: int, slot: int, shards: int) -> int:
    """Returns the most slots, over all devices, whose caches take at most `room` bytes on a device.

    Args:
      responses: there is no use for more slots; divisible by `shards`.
      room: bytes of a device.
      slot: bytes of one slot's cache on a device.
      shards: number of parts into which the slots are split.
    """
    return min(responses, max(room, 0) // slot * shards)
