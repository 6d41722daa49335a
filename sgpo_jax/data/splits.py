"""Splits that depend on a row's id alone, and batches with random access."""

import hashlib
from collections.abc import Sequence

import grain


def _share_of(row: dict, salt: str) -> float:
    """A number in [0, 1) that depends on the row's id and the salt alone."""
    digest = hashlib.sha256(f"{salt}/{row['id']}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _split(rows: Sequence[dict], share: float, salt: str) -> tuple[list[dict], list[dict]]:
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share!r}; allowed: a number from 0 to 1")
    first = [row for row in rows if _share_of(row, salt) < share]
    second = [row for row in rows if _share_of(row, salt) >= share]
    return first, second


def split_sft(rows: Sequence[dict], share: float = 1 / 3) -> tuple[list[dict], list[dict]]:
    """(rows for the SFT warm-up, rows for RL): about `share` of them go to the warm-up.

    A row's side depends on its id alone, so it stays the same when other rows come or go.
    """
    return _split(rows, share, "sft")


def split_validation(rows: Sequence[dict], share: float = 0.1) -> tuple[list[dict], list[dict]]:
    """(rows for training, rows for validation): about `share` of them are held out, by id."""
    held_out, training = _split(rows, share, "validation")
    return training, held_out


def steps_per_epoch(rows: Sequence[dict], batch_size: int) -> int:
    """Full batches in one pass over the rows; the rest of a pass, under one batch, is left out.

    Raises:
        ValueError: there are fewer rows than one batch needs.
    """
    if not 1 <= batch_size <= len(rows):
        raise ValueError(f"batch_size is {batch_size!r}; allowed: from 1 to the number of rows, {len(rows)}")
    return len(rows) // batch_size


def batches(rows: Sequence[dict], batch_size: int, seed: int) -> grain.MapDataset:
    """An endless sequence of batches with random access: `batches(...)[step]` is a list of rows.

    The batch of a step is a function of (rows, batch_size, seed, step) alone, so the step is all
    that a checkpoint has to remember. Every `steps_per_epoch` steps the rows are shuffled anew.

    Raises:
        ValueError: there are fewer rows than one batch needs, or the seed is negative.
    """
    steps_per_epoch(rows, batch_size)
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: 0 or more")
    epoch = grain.MapDataset.source(rows).seed(seed).shuffle()
    return epoch.batch(batch_size, drop_remainder=True, batch_fn=list).repeat()
