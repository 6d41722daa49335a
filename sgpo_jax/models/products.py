"""Matrix products that are written for XLA's CPU compiler: one for its sums, one for the copies that it would make."""

import jax
import jax.numpy as jnp
import numpy as np

from sgpo_jax.sharding import platform

BLOCK = 128  # terms of a float32 product that a CPU sums in one chain


def dot_in_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies `[...,D]` by `[D,F]`; on CPU, a long float32 sum is split into blocks of about BLOCK terms.

    XLA's CPU product adds up all of D in one chain, whose rounding error is twice that of torch. Where residuals reach
    25,000, as in SmolLM2, the logits show it. Other types round the result so coarsely that the order does not matter.
    """
    if x.dtype != jnp.float32 or x.shape[-1] <= 4 * BLOCK or platform() != "cpu":
        return x @ kernel
    return _in_blocks(x, kernel)


@jax.custom_vjp
def _in_blocks(x, kernel):
    edges = np.linspace(0, x.shape[-1], -(-x.shape[-1] // BLOCK) + 1).astype(int)[1:-1].tolist()
    sums = [a @ b for a, b in zip(jnp.split(x, edges, axis=-1), jnp.split(kernel, edges), strict=True)]
    while len(sums) > 1:
        sums = [sums[i] if i + 1 == len(sums) else sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
    return sums[0]


def _in_blocks_backward(saved, gradient):
    # Automatic differentiation would make a product of every block, and none would have a shorter sum than these two.
    x, kernel = saved
    d_kernel = x.reshape(-1, x.shape[-1]).T @ gradient.reshape(-1, gradient.shape[-1])
    return gradient @ kernel.T, d_kernel


_in_blocks.defvjp(lambda x, kernel: (_in_blocks(x, kernel), (x, kernel)), _in_blocks_backward)


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies `[...,D]` by `a` `[D,r]` and then by `b` `[r,F]`."""
    return x @ a @ b


def _low_rank_forward(x, a, b):
    inner = x @ a
    return inner @ b, (x, a, b, inner)


def _low_rank_backward(saved, gradient):
    # The narrow factor stands first. Automatic differentiation puts the wide gradient there, and XLA's CPU compiler
    # then makes a transposed copy of it, which takes longer than all products of the layer.
    x, a, b, inner = saved
    outer = tuple(range(x.ndim - 1))
    d_inner = gradient @ b.T
    d_b = jnp.tensordot(inner, gradient, axes=(outer, outer))
    d_a = jnp.tensordot(d_inner, x, axes=(outer, outer)).T
    return d_inner @ a.T, d_a, d_b


low_rank.defvjp(_low_rank_forward, _low_rank_backward)
