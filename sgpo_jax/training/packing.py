"""Packing of sequences into rows on the host, so that an update wastes little time on padding.

A sequence is a prompt and its response. A row holds several of them as segments that do not see each other. The
response tokens, the only ones that reach the output head, are listed in chunks. The number of chunks and micro-batches
in use varies from batch to batch, while all shapes stay fixed.

Axis key: K micro-batches, M rows of a micro-batch, L tokens of a row, S chunks, J response tokens of a row in a chunk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from sgpo_jax.sharding import ROWS

Array = Any  # numpy's on the host, where packing happens; JAX's in the update
Tokens = Sequence[int] | np.ndarray
LISTED = P(None, None, ROWS, "context")  # of arrays [K,S,M,J]


class Rows(NamedTuple):
    """The packed sequences with one kind of prompt."""

    tokens: Array  # [K,M,L] int32
    positions: Array  # [K,M,L] int32, position of each token in its sequence
    segments: Any  # [K,M,L] int32: 1, 2, ... from left to right; 0 is padding. Or `models.Sequences`: `shared_prompts`
    slots: Array  # [K,S,M,J] int32, for each response token, the index in the row of the token before it
    places: Array  # [K,S,M,J] int32, the index in the row of the token itself


class Packed(NamedTuple):
    """Packed sequences, with one or more kinds of prompts, and the list of response tokens that all kinds share."""

    contexts: tuple[Rows, ...]
    owner: Array  # [K,S,M,J] int32, sequence that a response token belongs to; -1 if there is no token
    index: Array  # [K,S,M,J] int32, position of the token in its response
    chunks: Array  # [K] int32, chunks in use
    count: Array  # [] int32, micro-batches in use


class Placed(NamedTuple):
    """Places of n sequences in rows."""

    row: np.ndarray  # [n]
    prompt: np.ndarray  # [n,C], where in the row its prompt begins, in C contexts
    response: np.ndarray  # [n,C]


def specs(packed: Packed) -> Packed:
    """Returns PartitionSpecs that split the rows of a micro-batch, and the list of a row's response tokens."""
    contexts = jax.tree.map(lambda _: P(None, ROWS), packed.contexts)
    contexts = tuple(rows._replace(slots=LISTED, places=LISTED) for rows in contexts)
    return Packed(contexts, LISTED, LISTED, P(), P())


def pack(
    prompts: Sequence[Sequence[Tokens]],
    responses: Sequence[Tokens],
    owners: Sequence[int],
    *,
    lengths: Sequence[int],
    micro_batch: int,
    most: int,
    chunk: int,
    context: int = 1,
) -> Packed:
    """Packs sequences into few rows, by first-fit decreasing.

    Args:
      prompts: for each context, the prompt of every sequence.
      responses: the response of every sequence, the same in all contexts.
      owners: the number of every sequence, at least 0.
      lengths: for each context, L; every prompt with its response must fit.
      micro_batch: M, rows of a micro-batch.
      most: upper limit of the number of sequences in any batch; with M it fixes K.
      chunk: upper limit of a micro-batch's response tokens in a chunk, M times J (at least M times `context`).
      context: ways that the mesh splits the tokens of a row; J is a multiple of it.

    Returns:
      The packed sequences.

    Raises:
      ValueError: a sequence is longer than a row.
    """
    sizes = np.array(
        [[len(p) + len(r) for p in contexts] for *contexts, r in zip(*prompts, responses, strict=True)], np.int64
    ).reshape(len(responses), len(prompts))
    row, start = fit(sizes, np.array(lengths))
    placed = Placed(row, start, start + sizes - np.array([len(r) for r in responses], np.int64)[:, None])
    shape = -(-most // micro_batch), micro_batch
    return fill(prompts, responses, owners, placed, lengths=lengths, shape=shape, chunk=chunk, context=context)


def fill(
    prompts: Sequence[Sequence[Tokens]],
    responses: Sequence[Tokens],
    owners: Sequence[int],
    placed: Placed,
    *,
    lengths: Sequence[int],
    shape: tuple[int, int],
    chunk: int,
    context: int = 1,
) -> Packed:
    """Writes sequences to their places in rows, and lists their response tokens.

    Args:
      prompts, responses, owners, lengths, chunk, context: as in `pack`.
      placed: the places of the sequences.
      shape: (K, M).
    """
    micro_batch = shape[1]
    slots = min(lengths)  # upper limit of the response tokens in a row
    # The last chunk in use is rarely full. With four or more chunks, its empty part is small.
    per_row = max(min(chunk // micro_batch, -(-slots // 4)) // context, 1) * context
    contexts = [Rows(*(np.zeros((*shape, length), np.int32) for _ in Rows._fields)) for length in lengths]
    owner, index = np.full((*shape, slots), -1, np.int32), np.zeros((*shape, slots), np.int32)
    listed = np.zeros(shape, np.int32)
    segments = np.zeros(shape, np.int32)
    for s in np.lexsort((placed.response[:, 0], placed.row)):
        k, m = divmod(int(placed.row[s]), micro_batch)
        segments[k, m] += 1
        response = np.asarray(responses[s], np.int32)
        first = listed[k, m]
        listed_slice = slice(first, first + len(response))
        for c, rows in enumerate(contexts):
            prompt = np.asarray(prompts[c][s], np.int32)
            for tokens, start, before in ((prompt, placed.prompt, 0), (response, placed.response, len(prompt))):
                part = slice(start[s, c], start[s, c] + len(tokens))
                rows.tokens[k, m, part] = tokens
                rows.positions[k, m, part] = before + np.arange(len(tokens))
                rows.segments[k, m, part] = segments[k, m]
            end = placed.prompt[s, c] + len(prompt) - 1
            places = placed.response[s, c] + np.arange(len(response))
            rows.slots[k, m, listed_slice] = np.where(np.arange(len(response)) == 0, end, places - 1)
            rows.places[k, m, listed_slice] = places
        owner[k, m, listed_slice], index[k, m, listed_slice] = owners[s], np.arange(len(response))
        listed[k, m] += len(response)

    chunks = -(-listed.max(axis=1) // per_row)
    most_chunks = -(-slots // per_row)

    def chunked(x, empty):
        x = x[..., :slots]
        padding = most_chunks * per_row - slots
        x = np.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=empty)
        return np.ascontiguousarray(x.reshape(*shape, most_chunks, per_row).swapaxes(1, 2))

    count = -(-(int(placed.row.max(initial=-1)) + 1) // micro_batch)
    return Packed(
        tuple(rows._replace(slots=chunked(rows.slots, 0), places=chunked(rows.places, 0)) for rows in contexts),
        chunked(owner, -1), chunked(index, 0), chunks.astype(np.int32), np.int32(count),
    )  # fmt: skip


def fit(sizes: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assigns sequences to rows by first-fit decreasing.

    Args:
      sizes: `[n,C]` tokens of each sequence in C contexts.
      capacity: `[C]` tokens of a row.

    Returns:
      (row `[n]`, start in the row `[n,C]`) of each sequence.

    Raises:
      ValueError: a sequence is longer than a row.
    """
    row, offset = np.zeros(len(sizes), np.int64), np.zeros_like(sizes)
    used = np.zeros((len(sizes), len(capacity)), np.int64)
    for s in np.argsort(-sizes.sum(axis=1), kind="stable"):
        if (sizes[s] > capacity).any():
            raise ValueError(f"a sequence has {sizes[s].tolist()} tokens; allowed: {capacity.tolist()}")
        row[s] = np.argmax((used + sizes[s] <= capacity).all(axis=1))
        offset[s] = used[row[s]]
        used[row[s]] += sizes[s]
    return row, offset


def filled_share(packed: Packed) -> float:
    """Returns the share of the rows of the micro-batches in use that hold a sequence."""
    computed = int(packed.count) * packed.owner.shape[2]
    return float((packed.owner >= 0).any(axis=(1, 3)).sum()) / max(computed, 1)


def gather(values: np.ndarray, packed: Packed) -> np.ndarray:
    """Returns the `values` `[sequences,T]` of the listed response tokens `[K,S,M,J]`; 0 where there is no token."""
    return np.where(packed.owner >= 0, values[packed.owner, packed.index], np.zeros((), values.dtype))
