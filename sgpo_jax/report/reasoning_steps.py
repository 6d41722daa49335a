"""A response as the reader sees it: its steps, and how strongly a token's KL is shown. Pure functions.

N tokens of a response, each with the text that it adds.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

# Where a step begins: after a line, after the end of a sentence, before a mark such as "(a)", "(iv)" or "(2)".
_LINE = re.compile(r"\n\s*")
_SENTENCE = re.compile(r"[.!?](?=\s)")
_MARK = re.compile(r"(?:^|(?<=\s))\s*\((?:[a-z]|[ivx]{1,4}|\d{1,2})\)(?=\s)")
_LABEL = re.compile(r"\s*(?:\d{1,3}|[a-zA-Z])[.)]\s*")  # the number of a list's item is no step of its own


class Step(NamedTuple):
    """Tokens `start` to `stop` of a response, their text, and the mean of their KL."""

    start: int
    stop: int
    text: str
    mean_kl: float  # nats


def split(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """(start, stop) of the steps of a response, which together are all of its tokens.

    A step ends with a line, with a sentence (a full stop, question or exclamation mark before white space), and before
    a mark such as "(a)", "(iv)" or "(2)" between white space. The number of a list's item ("1.") belongs to what
    follows it. A token belongs to the step in which its first character that is no white space stands.

    Args:
      pieces: `[N]` text of each token; may be empty.
    """
    text = "".join(pieces)
    ends = {match.end() for match in _LINE.finditer(text)} | {match.end() for match in _SENTENCE.finditer(text)}
    ends |= {match.start() for match in _MARK.finditer(text)}
    kept, begin = [], 0
    for end in sorted(ends | {len(text)}):
        if text[begin:end].strip() and not (_LABEL.fullmatch(text[begin:end]) and end < len(text)):
            kept.append(end)
            begin = end
    starts, place, current = [0], 0, 0
    for i, piece in enumerate(pieces):
        first = place + len(piece) - len(piece.lstrip())
        while current < len(kept) - 1 and piece.strip() and first >= kept[current]:
            current += 1
            if starts[-1] < i:
                starts.append(i)
        place += len(piece)
    return list(zip(starts, [*starts[1:], len(pieces)], strict=True)) if pieces else []


def steps(pieces: Sequence[str], token_kl: Sequence[float]) -> list[Step]:
    """The steps of a response with their mean KL.

    Args:
      pieces: `[N]` text of each token.
      token_kl: `[N]` nats.

    Raises:
      ValueError: there are not as many values as tokens.
    """
    if len(pieces) != len(token_kl):
        raise ValueError(f"token_kl has {len(token_kl)} values; must be one for each of the {len(pieces)} tokens")
    return [
        Step(start, stop, "".join(pieces[start:stop]), math.fsum(token_kl[start:stop]) / (stop - start))
        for start, stop in split(pieces)
    ]


def strength(kl: float, delta: float | None) -> float:
    """How strongly a token is coloured, 0..1: the square root of its share of delta, so that small ones show as well.

    Args:
      kl: of the token, nats.
      delta: the clip of Eq. 5, nats, from which on the colour is full; None is none, and 1 nat is full.
    """
    return min(max(kl, 0.0) / (delta or 1.0), 1.0) ** 0.5
