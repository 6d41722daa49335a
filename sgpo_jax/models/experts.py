"""A mixture of experts: each token goes through the few experts that a router chooses, and none is dropped.

Tokens are sorted by expert into blocks of one expert each, and a block is one product with the expert's matrix. On a
mesh the experts are split over the tensor axis. Each device computes its own experts for the tokens that it has, and
the sum over the axis joins them.

Axis key: B batch, T tokens, N = B * T, K experts of a token, M = N * K, D hidden, F mlp, E experts of a device, C
blocks, R rows of a block.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sgpo_jax.sharding import per_device, platform

LEAST, MOST = 8, 128  # rows of a block


class Kernels(NamedTuple):
    """The matrices of all experts of a layer."""

    gate: jax.Array  # [E,D,F]
    up: jax.Array  # [E,D,F]
    down: jax.Array  # [E,F,D]


def route(x: jax.Array, router: jax.Array, per_token: int, normalized: bool) -> tuple[jax.Array, jax.Array]:
    """Chooses the experts of each token, in float32: those with the largest probabilities of a softmax over all.

    Args:
      x: `[B,T,D]`.
      router: `[E,D]`.
      per_token: K.
      normalized: divides the K probabilities by their sum.

    Returns:
      (experts `[B,T,K]` int32, weights `[B,T,K]` float32).
    """
    logits = jnp.einsum("btd,ed->bte", x.astype(jnp.float32), router.astype(jnp.float32))
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), per_token)
    return chosen, weights / weights.sum(axis=-1, keepdims=True) if normalized else weights


def mix(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, kernels: Kernels, places: tuple[Any, Any],
    axes: tuple[str, ...],
) -> jax.Array:  # fmt: skip
    """Computes the weighted sum of the chosen experts' outputs, `[B,T,D]`.

    Args:
      x: `[B,T,D]`.
      chosen, weights: of `route`.
      kernels: of all experts.
      places: axes of the mesh that split B, and those that split T.
      axes: axes of the mesh that split the experts.
    """

    split = bool(axes) and not jax.sharding.get_abstract_mesh().empty

    def local(x, chosen, weights, kernels):
        count = len(kernels.gate)
        own = chosen - (jax.lax.axis_index(axes) * count if split else 0)
        out = _mix_own(x, jnp.where((own >= 0) & (own < count), own, count), weights, kernels)
        return jax.lax.psum(out, axes) if split else out

    by_token, by_expert = P(*places, None), P(axes or None, None, None)
    run = per_device(local, (by_token, by_token, by_token, by_expert), by_token)
    return run(x, chosen, weights.astype(x.dtype), kernels)


def _mix_own(x: jax.Array, chosen: jax.Array, weights: jax.Array, kernels: Kernels) -> jax.Array:
    """Computes `mix` over the experts 0 to E - 1; the expert E is on another device and adds nothing."""
    per_token, count = chosen.shape[-1], len(kernels.gate)
    flat, experts = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
    blocks = _blocks(experts, count)
    token = blocks.source // per_token
    taken = jnp.take(flat, token, axis=0, mode="fill", fill_value=0).reshape(*blocks.shape, -1)  # [C,R,D]
    product = partial(_product, expert=blocks.expert, sizes=blocks.sizes)
    gated = jax.nn.silu(product(taken, kernels.gate)) * product(taken, kernels.up)
    out = product(gated, kernels.down).reshape(-1, x.shape[-1])
    each = jnp.take(out, blocks.place, axis=0, mode="fill", fill_value=0).reshape(*chosen.shape, -1)
    return jnp.einsum("btkd,btk->btd", each, weights)


class _Blocks(NamedTuple):
    shape: tuple[int, int]  # (C, R)
    expert: jax.Array  # [C] int32, of each block
    sizes: jax.Array  # [E] int32, places of each expert, a multiple of R
    source: jax.Array  # [C * R] int32, which of the M choices is in a place; M where there is none
    place: jax.Array  # [M] int32, where a choice is; C * R for an expert of another device


def _blocks(experts: jax.Array, count: int) -> _Blocks:
    """Sorts M choices of experts into blocks; there are enough of them for any choices."""
    choices = len(experts)
    rows = min(max(1 << (choices // count).bit_length(), LEAST), MOST)
    total = choices // rows + min(count, choices)
    sizes = jnp.zeros(count + 1, jnp.int32).at[experts].add(1)
    used = -(-sizes[:count] // rows)
    order = jnp.argsort(experts, stable=True)
    ordered = experts[order]
    rank = jnp.arange(choices) - (jnp.cumsum(sizes) - sizes)[ordered]
    first = jnp.append((jnp.cumsum(used) - used) * rows, total * rows)
    places = jnp.where(ordered < count, first[ordered] + rank, total * rows)
    return _Blocks(
        (total, rows),
        jnp.minimum(jnp.searchsorted(jnp.cumsum(used), jnp.arange(total), side="right"), count - 1),
        used * rows,
        jnp.full(total * rows, choices).at[places].set(order, mode="drop"),
        jnp.zeros(choices, places.dtype).at[order].set(places, unique_indices=True),
    )


def _product(x: jax.Array, kernels: jax.Array, expert: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies blocks `[C,R,D]` by the matrices `[E,D,F]` of their experts."""
    if platform() == "tpu":  # its compiler has a grouped product; others would make one dense product for each expert
        flat = jax.lax.ragged_dot(x.reshape(-1, x.shape[-1]), kernels, sizes)
        return flat.reshape(*x.shape[:2], -1)
    return _in_blocks(x, kernels, expert)


@jax.custom_vjp
def _in_blocks(x, kernels, expert):
    return jax.lax.map(lambda block: block[0] @ kernels[block[1]], (x, expert))


def _in_blocks_backward(saved, gradient):
    # Differentiated automatically, every block would add an array of zeros as large as all kernels.
    x, kernels, expert = saved

    def add(total, block):
        x, gradient, expert = block
        return total.at[expert].add(x.T @ gradient), gradient @ kernels[expert].T

    d_kernels, d_x = jax.lax.scan(add, jnp.zeros_like(kernels), (x, gradient, expert))
    return d_x, d_kernels, None


def _in_blocks_forward(x, kernels, expert):
    return _in_blocks(x, kernels, expert), (x, kernels, expert)


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)
