"""Packing of groups whose responses share a prompt, so that an update computes the prompt once for several of them.

A row has a prompt once, and after it responses to it; other prompts with theirs may follow. Attention sees the
sequences whole, see `models.sequences`. With several contexts, the responses that share a prompt share it in all.

Axis key: as in `packing`; C contexts, A rows of attention for each row, U tokens of a row of attention, n sequences,
N rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sgpo_jax.models import Sequences
from sgpo_jax.training import packing
from sgpo_jax.training.packing import Packed, Placed, Tokens


class Whole(NamedTuple):
    """Places of n sequences in the rows of attention."""

    row: np.ndarray  # [n,C], of the A rows that their row has
    start: np.ndarray  # [n,C]


def most_rows(problems: int, responses: int, share: int, kinds: int = 1) -> int:
    """Returns the most rows that groups can need: A of the longest responses fit after their prompt.

    Args:
      problems: groups.
      responses: of a group, at most.
      share: A.
      kinds: different prompts of a group, at most.
    """
    return problems * (-(-responses // share) + kinds - 1)


def pack_shared(
    prompts: Sequence[Sequence[Tokens]],
    responses: Sequence[Tokens],
    owners: Sequence[int],
    *,
    lengths: Sequence[int],
    longest: int,
    share: int,
    shape: tuple[int, int],
    chunk: int,
) -> Packed:
    """Packs sequences, those with the same prompts with one copy of them in a row.

    Args:
      prompts, responses, owners, chunk: as in `packing.pack`.
      lengths: for each context, U; every prompt with its response must fit.
      longest: tokens of the longest response of all batches. A row has room for A such responses after one prompt.
      share: A.
      shape: (K, M); K * M is at least `most_rows`.

    Returns:
      The packed sequences; the segments are `Sequences`.

    Raises:
      ValueError: a prompt with a response is longer than a row of attention, or there are more rows than K * M.
    """
    room = [length + (share - 1) * longest for length in lengths]
    sizes = np.array([[len(p) for p in own] for own in zip(*prompts, strict=True)], np.int64).reshape(-1, len(lengths))
    groups: dict[tuple[bytes, ...], list[int]] = {}
    for s, own in enumerate(zip(*prompts, strict=True)):
        groups.setdefault(tuple(np.asarray(p, np.int32).tobytes() for p in own), []).append(s)
    counts = np.array([len(response) for response in responses], np.int64)
    placed, whole = fit(list(groups.values()), sizes, counts, np.array(room), np.array(lengths), share)
    if (rows := placed.row.max(initial=-1) + 1) > shape[0] * shape[1]:
        raise ValueError(f"the sequences take {rows} rows; allowed: {shape[0] * shape[1]}")
    packed = packing.fill(prompts, responses, owners, placed, lengths=room, shape=shape, chunk=chunk)
    contexts = tuple(
        rows._replace(segments=_sequences(rows.segments, placed, whole, sizes[:, c], counts, c, (share, lengths[c])))
        for c, rows in enumerate(packed.contexts)
    )
    return packed._replace(contexts=contexts)


def _sequences(
    segments: np.ndarray,
    placed: Placed,
    whole: Whole,
    prompts: np.ndarray,
    responses: np.ndarray,
    context: int,
    attention: tuple[int, int],
) -> Sequences:
    """Returns the sequences of one context as attention sees them.

    Args:
      segments: `[K,M,L]`, 0 where a row is padding.
      placed, whole: the places of the sequences.
      prompts, responses: `[n]` their tokens.
      context: number of the context.
      attention: (A, U).
    """
    shape, length = (*segments.shape[:2], *attention), attention[1]
    places, numbers = (np.zeros(shape, np.int32) for _ in range(2))
    outputs = np.zeros(segments.shape, np.int32)
    row, start = whole.row[:, context], whole.start[:, context]
    for s in np.lexsort((start, row, placed.row)):
        k, m = divmod(int(placed.row[s]), shape[1])
        parts = (placed.prompt[s, context], prompts[s]), (placed.response[s, context], responses[s])
        tokens = np.concatenate([first + np.arange(size) for first, size in parts])
        end = start[s] + len(tokens)
        places[k, m, row[s], start[s] : end] = tokens
        numbers[k, m, row[s], start[s] : end] = numbers[k, m, row[s]].max() + 1
        outputs[k, m, tokens] = row[s] * length + np.arange(start[s], end)  # of a prompt's copies the last one
    return Sequences((segments > 0).astype(np.int32), places, numbers, outputs)


def fit(
    groups: Sequence[Sequence[int]],
    prompts: np.ndarray,
    responses: np.ndarray,
    room: np.ndarray,
    length: np.ndarray,
    share: int,
) -> tuple[Placed, Whole]:
    """Assigns sequences to rows: large groups first, and in a group long responses first.

    A group goes to the first of the rows that take most of its responses, and those that are left go on likewise.

    Args:
      groups: sequences of each prompt.
      prompts: `[n,C]` tokens of each sequence's prompts.
      responses: `[n]` tokens of each response.
      room, length: `[C]` tokens of a row; U.
      share: A.

    Returns:
      The places of all sequences.

    Raises:
      ValueError: a prompt with a response is longer than U.
    """
    total, contexts = prompts.shape
    placed = Placed(np.zeros(total, np.int64), *(np.zeros(prompts.shape, np.int64) for _ in range(2)))
    whole = Whole(*(np.zeros(prompts.shape, np.int64) for _ in range(2)))
    used, attention = np.zeros((total, contexts), np.int64), np.zeros((total, contexts, share), np.int64)
    members = [np.asarray(group, np.int64) for group in groups]
    for group in sorted(members, key=lambda group: -(prompts[group[0], 0] + responses[group].sum())):
        prompt, left = prompts[group[0]], group[np.argsort(-responses[group], kind="stable")]
        if ((most := prompt + responses[left[0]]) > length).any():
            raise ValueError(f"a sequence has {most.tolist()} tokens; allowed: {length.tolist()}")
        while len(left):
            taken, starts, rows, whole_starts = _try(prompt, responses[left], used, attention, room, length)
            r = int(taken.sum(axis=1).argmax())
            s = left[taken[r]]
            placed.row[s], placed.prompt[s], placed.response[s] = r, used[r], starts[r, taken[r]]
            whole.row[s], whole.start[s] = rows[r, taken[r]], whole_starts[r, taken[r]]
            used[r] += prompt + responses[s].sum()
            np.add.at(attention[r], (np.arange(contexts), whole.row[s]), prompt + responses[s][:, None])
            left = left[~taken[r]]
    return placed, whole


def _try(
    prompt: np.ndarray, sizes: np.ndarray, used: np.ndarray, attention: np.ndarray, room: np.ndarray, length: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Puts responses of these sizes after a prompt into each of N rows, as many as it takes.

    Returns:
      (whether it takes a response `[N,n]`; where it begins, row of attention, where the sequence begins there, each
      `[N,n,C]`).
    """
    used, attention, at = used + prompt, attention.copy(), tuple(np.indices(used.shape))
    found = []
    for size in sizes:
        free = attention + (prompt + size)[:, None] <= length[:, None]
        row = free.argmax(axis=2)
        takes = free.any(axis=2).all(axis=1) & (used + size <= room).all(axis=1)
        found.append((takes, used, row, attention[*at, row]))
        used = used + takes[:, None] * size
        attention[*at, row] += takes[:, None] * (prompt + size)
    taken, starts, rows, whole_starts = (np.stack(x, axis=1) for x in zip(*found, strict=True))
    return taken, starts, rows, whole_starts
