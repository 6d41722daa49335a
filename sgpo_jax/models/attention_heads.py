"""Layout of the heads of attention where the context axis of the mesh splits the tokens of a row.

An all-to-all gives each device the whole row of some of its heads, and another one takes their outputs back to the
tokens: arXiv 2309.14509.

Axis key: B batch, T tokens, H query heads, K key/value heads, N head size.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sgpo_jax.sharding import HEADS, ROWS, axis_ways, constrain, context_ways


def check_heads(heads: int, mesh: Mesh) -> None:
    """Checks that a mesh whose context axis splits the tokens of rows divides the query heads of a model.

    Raises:
      ValueError: it does not.
    """
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    if context > 1 and heads % (context * tensor):
        raise ValueError(
            f"config.mesh.context={context}: must divide, times mesh.tensor={tensor}, the model's {heads} query heads"
        )


def whole_rows(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
    """Splits heads over the tensor and the context axis instead of tokens over the latter, if there is one.

    Args:
      query: `[B,T,H,N]`.
      key, value: `[B,T,K,N]`. Their heads are repeated where the axes do not divide them.
    """
    if context_ways() == 1:
        return query, key, value
    by_token = (divisible(x, query.shape[2]) for x in (query, key, value))
    # Without the first layout, the partitioner exchanges what it computes them from, in float32.
    by_token = (constrain(x, ROWS, "context", "tensor", None) for x in by_token)
    return tuple(constrain(x, ROWS, None, HEADS, None) for x in by_token)


def divisible(x: jax.Array, heads: int) -> jax.Array:
    """Repeats the key heads of x `[B,T,K,N]` as often as the mesh needs to divide them, if H allows it."""
    ways = axis_ways(jax.sharding.get_abstract_mesh(), HEADS)
    repeats = ways // math.gcd(ways, x.shape[2])
    return jnp.repeat(x, repeats, axis=2) if heads % (x.shape[2] * repeats) == 0 else x
