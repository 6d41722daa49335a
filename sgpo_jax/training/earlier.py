"""Texts and lengths of earlier epochs: how long the responses to a problem were, and what to draft from.

It changes no response, only how long a rollout takes. Every step leaves a file in the run's folder, and a resumed run
reads those of the steps before it alone. So its metrics are the same too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sgpo_jax.rollout import Rollout, drafts
from sgpo_jax.runtime import distributed
from sgpo_jax.runtime.files import replacing

MOST = 2**15  # tokens of the text of a problem


class Known(NamedTuple):
    """Lengths and texts of B problems, as far as they are known."""

    expected: np.ndarray  # [B,C] float32, mean tokens of a response to each kind of prompt; 0 where nothing is known
    texts: np.ndarray | None  # [B,S] int32, responses after the ends of their prompts; None without drafts


class _Step(NamedTuple):
    """The responses of one step."""

    place: dict[str, int]  # problem's id -> its row
    lengths: np.ndarray  # [B,C] float32
    texts: np.ndarray  # [B,S] int32


class Earlier:
    """The last epochs' responses, on disk and in memory.

    Args:
      folder: for a file of each step; those of an earlier run of the same command are read.
      size: S, tokens of the text of a problem; 0 keeps no texts.
      keep: number of steps whose files are kept.
    """

    def __init__(self, folder: Path, size: int, keep: int):
        self._folder, self._size, self._keep = folder, size, keep
        files = sorted(folder.glob("*.npz"))
        # With folders of their own, only the first process may find files. Then no process uses any.
        found = " ".join(f"{file.name}:{file.stat().st_size}" for file in files)
        same = len({*distributed.gather(found)}) == 1
        self._steps = {int(file.stem): _read(file, size) for file in files} if same else {}

    def known(self, position: int, ids: Sequence[str], kinds: int) -> Known:
        """Returns what the steps before a position know about problems; of each, the last one counts."""
        expected = np.zeros((len(ids), kinds), np.float32)
        texts = np.full((len(ids), self._size), drafts.NONE, np.int32)
        before = [self._steps[number] for number in sorted(self._steps, reverse=True) if number < position]
        for row, name in enumerate(ids):
            step = next((step for step in before if name in step.place), None)
            if step is not None:
                expected[row], text = step.lengths[step.place[name]], step.texts[step.place[name]]
                texts[row, : len(text)] = text[: self._size]
        return Known(expected, texts if self._size else None)

    def add(
        self, position: int, ids: Sequence[str], rollouts: Sequence[Rollout], prompts: Sequence[Sequence[list[int]]]
    ) -> None:
        """Keeps the responses of a step, those of the first kind of prompts first, and forgets the oldest step.

        Args:
          position: the step's place among all steps.
          ids: B problems.
          rollouts, prompts: of each kind, for these problems.
        """
        lengths = np.stack([rollout.lengths.mean(axis=1) for rollout in rollouts], axis=1).astype(np.float32)
        texts = np.stack([
            text_of([(kind[row], rollout.tokens[row, k, : rollout.lengths[row, k]])
                     for rollout, kind in zip(rollouts, prompts, strict=True) for k in range(rollout.lengths.shape[1])],
                    self._size)
            for row in range(len(ids))
        ])  # fmt: skip
        self._steps[position] = _Step({name: row for row, name in enumerate(ids)}, lengths, texts)
        if distributed.is_first():
            with replacing(self._folder / f"{position:08d}.npz") as unfinished:
                np.savez_compressed(unfinished, ids=np.array(ids), lengths=lengths, texts=texts)
        for old in [number for number in self._steps if number <= position - self._keep]:
            del self._steps[old]
            if distributed.is_first():
                (self._folder / f"{old:08d}.npz").unlink(missing_ok=True)


def text_of(responses: Sequence[tuple[Sequence[int], Sequence[int]]], size: int) -> np.ndarray:
    """Returns prompts and responses as one text `[size]`: of a prompt only the end; what does not fit is left out."""
    pieces = [[drafts.NONE, *prompt[-drafts.SUFFIX :], *response] for prompt, response in responses]
    text = np.full(size, drafts.NONE, np.int32)
    tokens = [token for piece in pieces for token in piece][:size]
    text[: len(tokens)] = tokens
    return text


def _read(file: Path, size: int) -> _Step:
    try:
        with np.load(file, allow_pickle=False) as stored:
            ids, lengths, texts = (stored[name] for name in ("ids", "lengths", "texts"))
    except Exception as error:  # damaged bytes raise many kinds
        raise ValueError(
            f"{file}: must hold the responses of a step ({error}); without the folder {file.parent} the run goes on, "
            "and its next epoch takes longer"
        ) from error
    return _Step({str(name): row for row, name in enumerate(ids)}, lengths, texts[:, :size])
