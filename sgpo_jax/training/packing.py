"""Sequences packed into rows, so that an update spends nothing on padding. Runs on the host.

A sequence is a prompt and its response. Several stand one after another in a row, as segments that do not see each
other. Their response tokens, the only ones that reach the output head, are listed in chunks; how many chunks and
micro-batches are in use varies from batch to batch while all shapes stay fixed.

Axis key: K micro-batches, M rows of a micro-batch, L tokens of a row, S chunks, J response tokens of a row in a chunk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import PartitionSpec as P

from sgpo_jax.sharding import BATCH

Array = Any  # numpy's on the host, where packing happens; JAX's in the update
Tokens = Sequence[int] | np.ndarray


class Rows(NamedTuple):
    """The packed sequences with one kind of prompt."""

    tokens: Array  # [K,M,L] int32
    positions: Array  # [K,M,L] int32, place of each token in its sequence
    segments: Array  # [K,M,L] int32: 1, 2, ... from left to right; 0 is padding
    slots: Array  # [K,S,M,J] int32, where in its row the token before each response token stands


class Packed(NamedTuple):
    """Packed sequences, maybe with several kinds of prompts, and their response tokens in the order they share."""

    contexts: tuple[Rows, ...]
    owner: Array  # [K,S,M,J] int32, sequence that a response token belongs to; -1 where there is none
    index: Array  # [K,S,M,J] int32, place of the token in its response
    chunks: Array  # [K] int32, chunks in use
    count: Array  # [] int32, micro-batches in use


def specs(packed: Packed) -> Packed:
    """PartitionSpecs: the rows of a micro-batch are split over devices, and every device knows the rest."""
    rows, listed = P(None, BATCH), P(None, None, BATCH)
    return Packed((Rows(rows, rows, rows, listed),) * len(packed.contexts), listed, listed, P(), P())


def pack(
    prompts: Sequence[Sequence[Tokens]],
    responses: Sequence[Tokens],
    owners: Sequence[int],
    *,
    lengths: Sequence[int],
    micro_batch: int,
    most: int,
    chunk: int,
) -> Packed:
    """Packs sequences into as few rows as first-fit decreasing finds.

    Args:
      prompts: for each context, the prompt of every sequence.
      responses: the response of every sequence, the same in all contexts.
      owners: number of every sequence, at least 0.
      lengths: for each context, L; every prompt with its response fits.
      micro_batch: M.
      most: the largest number of sequences there can ever be; with M it fixes K.
      chunk: the most response tokens of a micro-batch in a chunk, M times J (or M, where that is more).

    Raises:
      ValueError: a sequence is longer than a row.
    """
    sizes = np.array(
        [[len(p) + len(r) for p in each] for *each, r in zip(*prompts, responses, strict=True)], np.int64
    ).reshape(len(responses), len(prompts))
    row, offset = fit(sizes, np.array(lengths))
    rows_in_use = int(row.max(initial=-1)) + 1

    micro_batches = -(-most // micro_batch)
    slots = min(lengths)  # more response tokens than that no row can have
    # The last chunk in use is rarely full: in four or more, little of what is visited is empty.
    per_row = max(min(chunk // micro_batch, -(-slots // 4)), 1)
    shape = micro_batches, micro_batch
    contexts = [Rows(*(np.zeros((*shape, length), np.int32) for _ in Rows._fields)) for length in lengths]
    owner, index = np.full((*shape, slots), -1, np.int32), np.zeros((*shape, slots), np.int32)
    listed = np.zeros(shape, np.int32)
    segments = np.zeros(shape, np.int32)
    for s in np.lexsort((offset[:, 0], row)):
        k, m = divmod(int(row[s]), micro_batch)
        segments[k, m] += 1
        response = np.asarray(responses[s], np.int32)
        first = listed[k, m]
        here = slice(first, first + len(response))
        for c, rows in enumerate(contexts):
            prompt, start = np.asarray(prompts[c][s], np.int32), offset[s, c]
            place = slice(start, start + sizes[s, c])
            rows.tokens[k, m, place] = np.concatenate([prompt, response])
            rows.positions[k, m, place] = np.arange(sizes[s, c])
            rows.segments[k, m, place] = segments[k, m]
            rows.slots[k, m, here] = start + len(prompt) - 1 + np.arange(len(response))
        owner[k, m, here], index[k, m, here] = owners[s], np.arange(len(response))
        listed[k, m] += len(response)

    chunks = -(-listed.max(axis=1) // per_row)
    most_chunks = -(-slots // per_row)

    def chunked(x, fill):
        x = x[..., :slots]
        room = most_chunks * per_row - slots
        x = np.pad(x, ((0, 0), (0, 0), (0, room)), constant_values=fill)
        return np.ascontiguousarray(x.reshape(*shape, most_chunks, per_row).swapaxes(1, 2))

    return Packed(
        tuple(rows._replace(slots=chunked(rows.slots, 0)) for rows in contexts),
        chunked(owner, -1), chunked(index, 0), chunks.astype(np.int32), np.int32(-(-rows_in_use // micro_batch)),
    )  # fmt: skip


def fit(sizes: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First-fit decreasing: sizes `[n,C]` and the most a row holds `[C]` -> (row `[n]`, where each begins `[n,C]`)."""
    row, offset = np.zeros(len(sizes), np.int64), np.zeros_like(sizes)
    used = np.zeros((len(sizes), len(capacity)), np.int64)
    for s in np.argsort(-sizes.sum(axis=1), kind="stable"):
        if (sizes[s] > capacity).any():
            raise ValueError(f"a sequence has {sizes[s].tolist()} tokens; allowed: {capacity.tolist()}")
        row[s] = np.argmax((used + sizes[s] <= capacity).all(axis=1))
        offset[s] = used[row[s]]
        used[row[s]] += sizes[s]
    return row, offset


def filled(packed: Packed) -> float:
    """Share of the rows that hold a sequence among those that are computed, which the micro-batches in use have."""
    computed = int(packed.count) * packed.owner.shape[2]
    return float((packed.contexts[0].segments > 0).any(axis=-1).sum()) / max(computed, 1)


def of_sequence(values: np.ndarray, packed: Packed) -> np.ndarray:
    """What `values` `[sequences,T]` has for each listed response token: `[K,S,M,J]`, 0 where there is none."""
    return np.where(packed.owner >= 0, values[packed.owner, packed.index], np.zeros((), values.dtype))
