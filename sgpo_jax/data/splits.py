"""Splits rows by a hash of their ids, and puts them into batches with random access."""

import hashlib
from collections.abc import Sequence

import grain


def _share_of(row: dict, salt: str) -> float:
    """Returns a number in [0, 1) that depends only on the row's id and the salt."""
    digest = hashlib.sha256(f"{salt}/{row['id']}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _split(rows: Sequence[dict], share: float, salt: str) -> tuple[list[dict], list[dict]]:
    """Returns (about `share` of the rows, the others), chosen by id and salt."""
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share!r}; allowed: a number from 0 to 1")
    first = [row for row in rows if _share_of(row, salt) < share]
    second = [row for row in rows if _share_of(row, salt) >= share]
    return first, second


def split_sft(rows: Sequence[dict], share: float = 1 / 3) -> tuple[list[dict], list[dict]]:
    """Returns (rows for the SFT warm-up, rows for RL), with about `share` of the rows in the warm-up.

    A row's part depends only on its id, so it stays the same when other rows are added or removed.

    Raises:
      ValueError: the share is not from 0 to 1.
    """
    return _split(rows, share, "sft")


def split_validation(rows: Sequence[dict], share: float = 0.1) -> tuple[list[dict], list[dict]]:
    """Returns (rows for training, rows for validation), with about `share` of the rows held out, by id.

    Raises:
      ValueError: the share is not from 0 to 1.
    """
    held_out, training = _split(rows, share, "validation")
    return training, held_out


def steps_per_epoch(rows: Sequence[dict], batch_size: int) -> int:
    """Returns the number of full batches in one pass over the rows. A pass leaves out an incomplete last batch.

    Raises:
      ValueError: there are fewer rows than one batch needs.
    """
    if not 1 <= batch_size <= len(rows):
        raise ValueError(f"batch_size is {batch_size!r}; allowed: from 1 to the number of rows, {len(rows)}")
    return len(rows) // batch_size


def batches(rows: Sequence[dict], batch_size: int, seed: int) -> grain.MapDataset:
    """Returns an endless sequence of batches with random access: `batches(...)[step]` is a list of rows.

    A batch depends only on (rows, batch_size, seed, step), so a checkpoint needs to store only the step. Every
    `steps_per_epoch` steps the rows are shuffled again.

    Raises:
      ValueError: there are fewer rows than one batch needs, or the seed is negative.
    """
    steps_per_epoch(rows, batch_size)
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: 0 or more")
    epoch = grain.MapDataset.source(rows).seed(seed).shuffle()
    return epoch.batch(batch_size, drop_remainder=True, batch_fn=list).repeat()
