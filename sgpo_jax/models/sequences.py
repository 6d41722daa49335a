"""Attention over sequences that share a prompt.

A row may hold a prompt once, and several responses to it. Everything but attention computes a token from itself alone,
so the prompt is computed once. Attention sees each sequence whole, in rows of its own: keys, values and queries are
copied into them, and outputs are copied back.

Axis key: B rows, T tokens of a row, A rows of attention for each, U tokens of a row of attention, H query heads, K
key/value heads, N head size.
"""

from typing import Any, NamedTuple

import jax

from sgpo_jax.models.windows import attend


class Sequences(NamedTuple):
    """The sequences of each row, as attention sees them. Training has a leading axis for its micro-batches."""

    real: Any  # [B,T] int32, 0 is padding of the row
    places: Any  # [B,A,U] int32, where in the row a token of a sequence is
    segments: Any  # [B,A,U] int32: 1, 2, ... from left to right; 0 is padding
    outputs: Any  # [B,T] int32, where in A * U the output of a token is


def attend_whole(
    query: jax.Array, key: jax.Array, value: jax.Array, sequences: Sequences, window: int | None, sliding: Any
) -> jax.Array:
    """Computes `windows.attend` over whole sequences.

    Args:
      query: `[B,T,H,N]`.
      key, value: `[B,T,K,N]`.
      sequences: of the rows.
      window, sliding: as in `windows.attend`.

    Returns:
      `[B,T,H*N]`; outputs of padding mean nothing.
    """
    batch, rows, length = sequences.places.shape

    def copied(x: jax.Array) -> jax.Array:
        return _take(x, sequences.places.reshape(batch, -1)).reshape(batch * rows, length, *x.shape[2:])

    segments = sequences.segments.reshape(batch * rows, length)
    out = attend(copied(query), copied(key), copied(value), segments, window, sliding)
    return _take(out.reshape(batch, rows * length, -1), sequences.outputs)


def _take(x: jax.Array, places: jax.Array) -> jax.Array:
    """Returns the tokens at `places` `[B,P]` of x `[B,T,...]`: rows stay where they are."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds"))(x, places)
