"""Keys and values of the cache in 8 bits: codes, and a scale for each token and key head.

What is stored is an array, which stands for itself, or `Codes`. Products take the codes, and the scores of keys and the
weights of values are multiplied by the scales, so that no cache of numbers is made of codes.

Axis key: as in `attention`; G query heads of a key head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sgpo_jax.sharding import platform

MOST = 127  # greatest code; the least is its negative


class Codes(NamedTuple):
    """Keys or values that are codes times scale. What moves rows or tokens does the same to both."""

    codes: jax.Array  # [...,S,N] int8
    scale: jax.Array  # [...,S,1] float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        return self.codes.dtype


Stored = jax.Array | Codes


def empty(shape: tuple[int, ...], dtype: Any) -> Stored:
    """Returns keys or values that are zero: `Codes` for int8.

    Raises:
      ValueError: int8 on a TPU, whose kernel of decoding would read scales as wide as a head.
    """
    if jnp.dtype(dtype) != jnp.int8:
        return jnp.zeros(shape, dtype)
    if platform() == "tpu":
        raise ValueError("config.rl.rollout_cache='int8': must be '' on TPUs, whose kernel of decoding takes no codes")
    return Codes(jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], 1), jnp.float32))


def token_bytes(size: int, dtype: Any) -> int:
    """Returns the bytes of a token's key or value of one head of `size`, in a cache of a type."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: empty((size,), dtype))))


def encode(new: jax.Array, like: Stored) -> Stored:
    """Returns `new` `[...,N]` as a cache such as `like` stores it.

    A scale is the largest absolute value over MOST. A code is the nearest one, in float32. What is not finite stays so.
    """
    if not isinstance(like, Codes):
        return new
    exact = new.astype(jnp.float32)
    scale = jnp.abs(exact).max(axis=-1, keepdims=True) / MOST
    scale = jnp.where(scale == 0, 1.0, scale)
    return Codes(jnp.round(exact / scale).astype(jnp.int8), scale)


def operand(stored: Stored, dtype: Any) -> jax.Array:
    """Returns what a product multiplies: the codes, which are exact in bfloat16, or the array as it is."""
    return stored.codes.astype(dtype) if isinstance(stored, Codes) else stored


def scaled(by_token: jax.Array, stored: Stored) -> jax.Array:
    """Multiplies scores or weights `[...,G,S]` by the scales of the tokens, if there are any."""
    return by_token * stored.scale.swapaxes(-1, -2) if isinstance(stored, Codes) else by_token
