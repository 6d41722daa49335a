"""Splits a response into reasoning steps, and tells how strongly a token's KL is coloured. Pure functions.

Axis key: N tokens of a response, each with the text that it adds.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

# Where a step begins: after a line, after the end of a sentence, before a mark such as "(a)", "(iv)" or "(2)".
_LINE = re.compile(r"\n\s*")
_SENTENCE = re.compile(r"[.!?](?=\s)")
_MARK = re.compile(r"(?:^|(?<=\s))\s*\((?:[a-z]|[ivx]{1,4}|\d{1,2})\)(?=\s)")
_LABEL = re.compile(r"\s*(?:\d{1,3}|[a-zA-Z])[.)]\s*")  # the number of a list item, which is not a step itself


class Step(NamedTuple):
    """A step: tokens `start` to `stop` of a response, their text, and their mean KL."""

    start: int
    stop: int
    text: str
    mean_kl: float  # nats


def split(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Returns (start, stop) of each step of a response; the steps together have all of its tokens.

    A step ends with a line, with a sentence (a full stop, question or exclamation mark before white space), and before
    a mark such as "(a)", "(iv)" or "(2)" between white space. The number of a list item ("1.") belongs to the text
    after it. A token belongs to the step that has its first character that is not white space.

    Args:
      pieces: `[N]` text of each token; may be empty.
    """
    text = "".join(pieces)
    ends = {match.end() for match in _LINE.finditer(text)} | {match.end() for match in _SENTENCE.finditer(text)}
    ends |= {match.start() for match in _MARK.finditer(text)}
    step_ends, begin = [], 0
    for end in sorted(ends | {len(text)}):
        if text[begin:end].strip() and not (_LABEL.fullmatch(text[begin:end]) and end < len(text)):
            step_ends.append(end)
            begin = end
    starts, place, current = [0], 0, 0
    for i, piece in enumerate(pieces):
        first = place + len(piece) - len(piece.lstrip())
        while current < len(step_ends) - 1 and piece.strip() and first >= step_ends[current]:
            current += 1
            if starts[-1] < i:
                starts.append(i)
        place += len(piece)
    return list(zip(starts, [*starts[1:], len(pieces)], strict=True)) if pieces else []


def steps(pieces: Sequence[str], token_kl: Sequence[float]) -> list[Step]:
    """Returns the steps of a response with their mean KL.

    Args:
      pieces: `[N]` text of each token.
      token_kl: `[N]` nats.

    Raises:
      ValueError: the number of values is not the number of tokens.
    """
    if len(pieces) != len(token_kl):
        raise ValueError(f"token_kl has {len(token_kl)} values; must be one for each of the {len(pieces)} tokens")
    return [
        Step(start, stop, "".join(pieces[start:stop]), math.fsum(token_kl[start:stop]) / (stop - start))
        for start, stop in split(pieces)
    ]


def strength(kl: float, delta: float | None) -> float:
    """Returns how strongly a token is coloured, 0..1: the square root of KL / delta, so that a small KL shows too.

    Args:
      kl: the token's KL, nats.
      delta: the clip of Eq. 5, nats, at which the colour is full; None (no clip) gives full colour at 1 nat.
    """
    return min(max(kl, 0.0) / (delta or 1.0), 1.0) ** 0.5
