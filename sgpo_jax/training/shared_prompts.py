"""Packing of groups whose responses share a prompt, so that an update computes the prompt once for several of them.

A row has a prompt once, and after it responses to it; other prompts with theirs may follow. Attention sees the
sequences whole, see `models.sequences`.

Axis key: as in `packing`; A rows of attention for each row, U tokens of a row of attention, n responses.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sgpo_jax.models import Sequences
from sgpo_jax.training import packing
from sgpo_jax.training.packing import Packed, Placed, Tokens


class Shared(NamedTuple):
    """A prompt with its responses."""

    prompt: Tokens
    responses: list[Tokens]
    owners: list[int]  # number of each response, at least 0


class Whole(NamedTuple):
    """Places of n sequences in the rows of attention."""

    row: np.ndarray  # [n], of the A rows that their row has
    start: np.ndarray  # [n]


def most_rows(problems: int, responses: int, share: int) -> int:
    """Returns the most rows that groups can need: A of the longest responses fit after their prompt.

    Args:
      problems: groups.
      responses: of a group, at most.
      share: A.
    """
    return problems * -(-responses // share)


def pack_shared(
    groups: Sequence[Shared], *, longest: tuple[int, int], share: int, micro_batch: int, most: int, chunk: int
) -> Packed:
    """Packs groups of responses, each prompt once in a row.

    Args:
      groups: prompts with their responses.
      longest: tokens of the longest prompt and of the longest response of all batches. A row has room for A such
        responses after such a prompt, and U is their sum.
      share: A.
      micro_batch: M, rows of a micro-batch.
      most: upper limit of the number of rows in any batch, see `most_rows`.
      chunk: as in `packing.pack`.

    Returns:
      The packed sequences; the segments are `Sequences`.

    Raises:
      ValueError: a prompt with a response is longer than a row of attention.
    """
    prompt, response = longest
    room, length = prompt + share * response, prompt + response
    placed, whole = fit(groups, room, share, length)
    prompts = [group.prompt for group in groups for _ in group.responses]
    responses = [tokens for group in groups for tokens in group.responses]
    owners = [owner for group in groups for owner in group.owners]
    shape = -(-most // micro_batch), micro_batch
    packed = packing.fill([prompts], responses, owners, placed, lengths=[room], shape=shape, chunk=chunk)

    places, segments = (np.zeros((*shape, share, length), np.int32) for _ in range(2))
    (rows,) = packed.contexts
    outputs = np.zeros(rows.tokens.shape, np.int32)
    for s in np.lexsort((whole.start, whole.row, placed.row)):
        k, m = divmod(int(placed.row[s]), micro_batch)
        parts = (placed.prompt[s, 0], len(prompts[s])), (placed.response[s, 0], len(responses[s]))
        tokens = np.concatenate([first + np.arange(size) for first, size in parts])
        start, end = whole.start[s], whole.start[s] + len(tokens)
        places[k, m, whole.row[s], start:end] = tokens
        segments[k, m, whole.row[s], start:end] = segments[k, m, whole.row[s]].max() + 1
        outputs[k, m, tokens] = whole.row[s] * length + np.arange(start, end)  # of a prompt's copies the last one
    sequences = Sequences((rows.segments > 0).astype(np.int32), places, segments, outputs)
    return packed._replace(contexts=(rows._replace(segments=sequences),))


def fit(groups: Sequence[Shared], room: int, share: int, length: int) -> tuple[Placed, Whole]:
    """Assigns responses to rows: large groups first, and in a group long responses first.

    A group goes to the first of the rows that take most of its responses, and those that are left go on likewise.

    Args:
      groups: as in `pack_shared`.
      room, share, length: tokens of a row; A; U.

    Returns:
      The places of all responses, group by group.

    Raises:
      ValueError: a prompt with a response is longer than U.
    """
    sizes = [np.array([len(response) for response in group.responses], np.int64) for group in groups]
    firsts = np.cumsum([0, *map(len, sizes)])
    total = int(firsts[-1])
    placed = Placed(*(np.zeros(shape, np.int64) for shape in (total, (total, 1), (total, 1))))
    whole = Whole(*(np.zeros(total, np.int64) for _ in range(2)))
    used, attention = np.zeros(total, np.int64), np.zeros((total, share), np.int64)
    for g in sorted(range(len(groups)), key=lambda g: -(len(groups[g].prompt) + sizes[g].sum())):
        prompt, left = len(groups[g].prompt), np.argsort(-sizes[g], kind="stable")
        if prompt + sizes[g].max(initial=0) > length:
            raise ValueError(f"a sequence has {prompt + sizes[g].max()} tokens; allowed: {length}")
        while len(left):
            taken, starts, rows, whole_starts = _try(prompt, sizes[g][left], used, attention, room, length)
            r = int(taken.sum(axis=1).argmax())
            chosen = taken[r]
            s = firsts[g] + left[chosen]
            placed.row[s], placed.prompt[s, 0], placed.response[s, 0] = r, used[r], starts[r, chosen]
            whole.row[s], whole.start[s] = rows[r, chosen], whole_starts[r, chosen]
            used[r] += prompt + sizes[g][left[chosen]].sum()
            np.add.at(attention[r], rows[r, chosen], prompt + sizes[g][left[chosen]])
            left = left[~chosen]
    return placed, whole


def _try(
    prompt: int, sizes: np.ndarray, used: np.ndarray, attention: np.ndarray, room: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Puts responses of these sizes after a prompt into each of N rows, as many as it takes.

    Returns:
      (whether it takes a response, where it begins, row of attention, where the sequence begins there), each `[N,n]`.
    """
    used, attention, each = used + prompt, attention.copy(), np.arange(len(used))
    found = []
    for size in sizes:
        free = attention + prompt + size <= length
        row = free.argmax(axis=1)
        takes = free.any(axis=1) & (used + size <= room)
        found.append((takes, used, row, attention[each, row]))
        used = used + takes * size
        attention[each, row] += takes * (prompt + size)
    taken, starts, rows, whole_starts = (np.stack(x, axis=1) for x in zip(*found, strict=True))
    return taken, starts, rows, whole_starts
