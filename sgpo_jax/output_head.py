"""The output head over the whole vocabulary or a device's part: logits, their softmax, gradients, sums over devices.

Axis key: S chunks, C token positions of a chunk, D hidden, V vocabulary; inside `jax.shard_map`, V is a device's part
of the vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sgpo_jax.sharding import SHARDS, exact_products, platform

# Vocabulary entries of one matrix product on CPU. One product over the whole vocabulary, inside a loop, needs a second
# copy of the head in memory, and takes 1.5 times as long for 128 positions.
WIDTH = 6144
PARTS = 4  # a chunk's gradient of the head is added in this many parts: as a whole, it is as large as the head


class Head(NamedTuple):
    """The output projection, or a device's part of it.

    A tied weight is transposed where it is used: transposing it before the loop over chunks would copy it.
    """

    weight: jax.Array  # [D,V], or [V,D] when tied
    tied: bool

    @property
    def vocabulary(self) -> int:
        """V, the number of columns."""
        return self.weight.shape[0 if self.tied else 1]

    def columns(self, start: Any = 0, count: int | None = None) -> jax.Array:
        """Returns the columns `[D,count]` from `start`, or all columns `[D,V]` if `count` is None."""
        weight = self.weight
        if count is not None:
            weight = jax.lax.dynamic_slice_in_dim(weight, start, count, axis=0 if self.tied else 1)
        return weight.T if self.tied else weight


def log_softmax(hidden: jax.Array, head: Head, temperature: float = 1.0) -> jax.Array:
    """Computes log-probabilities `[C,V]` float32 of `[C,D]`, normalised over the vocabulary of all devices."""
    scaled = logits(hidden, head) / temperature
    largest = scaled.max(axis=-1, keepdims=True)
    largest = jax.lax.pmax(largest, "tensor") if inside_shard_map() else largest
    shifted = scaled - largest
    return shifted - jnp.log(sum_over_vocabulary(jnp.exp(shifted).sum(axis=-1, keepdims=True)))


def logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Computes logits `[C,V]` float32 of `[C,D]`; on CPU, one part of the vocabulary at a time."""
    size = head.vocabulary
    most = size // WIDTH if platform() == "cpu" else 1
    parts = next((n for n in range(most, 1, -1) if size % n == 0), 1)
    if parts == 1:
        return product(hidden, head.columns())

    def add(i, products):
        columns = head.columns(i * (size // parts), size // parts)
        part = product(hidden, columns)
        return jax.lax.dynamic_update_slice_in_dim(products, part, i * (size // parts), axis=1)

    return jax.lax.fori_loop(0, parts, add, jnp.zeros((len(hidden), size), jnp.float32))


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies matrices; the sums and the result are float32."""
    with exact_products(x.dtype):
        return jnp.dot(x, y, preferred_element_type=jnp.float32)


def local_index(head: Head, targets: jax.Array) -> jax.Array:
    """Returns the columns `[C]` of token ids in this device's part of the vocabulary; outside [0, V) if not in it."""
    return targets - (jax.lax.axis_index("tensor") * head.vocabulary if inside_shard_map() else 0)


def zero_gradients(hidden: jax.Array, head: Head, trained: bool = True) -> tuple[jax.Array, jax.Array | None]:
    """Returns zeros for the gradients of `hidden` `[S,C,D]` and the head `[D,V]`; None for a head that is frozen."""
    return jnp.zeros_like(hidden), jnp.zeros((hidden.shape[-1], head.vocabulary), jnp.float32) if trained else None


def add_gradients(
    d_logits: jax.Array, hidden: jax.Array, head: Head, s: Any, gradients: tuple[jax.Array, jax.Array | None]
) -> tuple[jax.Array, jax.Array | None]:
    """Adds what `d_logits` `[C,V]` of chunk s gives the gradients of `zero_gradients`, and returns them."""
    d_hidden, d_head = gradients
    d_logits = d_logits.astype(hidden.dtype)
    d_chunk = sum_over_vocabulary(product(d_logits, head.columns().T))
    if d_head is None:
        return d_hidden.at[s].set(d_chunk.astype(hidden.dtype)), None
    # An explicit transpose: on CPU it cuts the time of the product by a third, and saves a copy of `d_logits`.
    transposed = jax.lax.optimization_barrier(hidden[s].T)
    parts = PARTS if len(d_head) % PARTS == 0 else 1
    size = len(d_head) // parts

    def add(i, d_head):
        rows = partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        total = rows(d_head) + product(rows(transposed), d_logits)
        return jax.lax.dynamic_update_slice_in_dim(d_head, total, i * size, axis=0)

    return d_hidden.at[s].set(d_chunk.astype(hidden.dtype)), jax.lax.fori_loop(0, parts, add, d_head)


def sum_over_vocabulary(x: jax.Array) -> jax.Array:
    """Sums over the devices that have the same positions and different parts of the vocabulary."""
    return jax.lax.psum(x, "tensor") if inside_shard_map() else x


def sum_over_positions(d_head: jax.Array) -> jax.Array:
    """Sums over the devices that have the same part of the vocabulary; each keeps its own rows of the sum."""
    if not inside_shard_map():
        return d_head
    return jax.lax.psum_scatter(jax.lax.psum(d_head, "data"), SHARDS, scatter_dimension=0, tiled=True)


def inside_shard_map() -> bool:
    """Returns whether the caller is inside `jax.shard_map`, where arrays are a device's parts."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
