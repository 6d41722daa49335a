"""The output head over a part of the vocabulary, or all of it: logits, their softmax, sums over devices that share it.

Axis key: C token positions, D hidden, V vocabulary, or a device's part of it inside `jax.shard_map`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sgpo_jax.sharding import platform

# Tokens of the vocabulary in a product on CPU. All at once, in a loop, take as much memory again as the head, and for
# 128 positions half as much time again.
WIDTH = 6144


class Head(NamedTuple):
    """The output projection, or a device's part of it.

    What is transposed before the loop over chunks would be copied, so that is left to each use.
    """

    weight: jax.Array  # [D,V], or [V,D] when tied
    tied: bool

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0 if self.tied else 1]

    def columns(self, start: Any = 0, count: int | None = None) -> jax.Array:
        """`[D,count]` of a part of the vocabulary, or of all."""
        weight = self.weight
        if count is not None:
            weight = jax.lax.dynamic_slice_in_dim(weight, start, count, axis=0 if self.tied else 1)
        return weight.T if self.tied else weight


def log_softmax(hidden: jax.Array, head: Head, temperature: float = 1.0) -> jax.Array:
    """`[C,D]` -> `[C,V]` float32, normalised over the vocabulary of all devices."""
    scaled = logits(hidden, head) / temperature
    largest = scaled.max(axis=-1, keepdims=True)
    largest = jax.lax.pmax(largest, "tensor") if on_a_device() else largest
    shifted = scaled - largest
    return shifted - jnp.log(over_vocabulary(jnp.exp(shifted).sum(axis=-1, keepdims=True)))


def logits(hidden: jax.Array, head: Head) -> jax.Array:
    """`[C,D]` -> `[C,V]` float32, on CPU in parts of the vocabulary."""
    size = head.vocabulary
    most = size // WIDTH if platform() == "cpu" else 1
    parts = next((n for n in range(most, 1, -1) if size % n == 0), 1)
    if parts == 1:
        return jnp.dot(hidden, head.columns(), preferred_element_type=jnp.float32)

    def add(i, found):
        columns = head.columns(i * (size // parts), size // parts)
        product = jnp.dot(hidden, columns, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(found, product, i * (size // parts), axis=1)

    return jax.lax.fori_loop(0, parts, add, jnp.zeros((len(hidden), size), jnp.float32))


def place_in(head: Head, targets: jax.Array) -> jax.Array:
    """`[C]` token ids -> where they stand in this device's part of the vocabulary; others lie outside of [0, V)."""
    return targets - (jax.lax.axis_index("tensor") * head.vocabulary if on_a_device() else 0)


def over_vocabulary(x: jax.Array) -> jax.Array:
    """Sum over the devices that share positions."""
    return jax.lax.psum(x, "tensor") if on_a_device() else x


def over_positions(of_head: jax.Array) -> jax.Array:
    """Sum over the devices that share a part of the vocabulary, of which each keeps the rows that are its own."""
    if not on_a_device():
        return of_head
    return jax.lax.psum_scatter(jax.lax.psum(of_head, "data"), "fsdp", scatter_dimension=0, tiled=True)


def on_a_device() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
