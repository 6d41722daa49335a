r"""Reads gold answers as data sets have them: "... #### 72", \boxed{72}, "The answer is 72.", <answer>72</answer>."""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from sgpo_jax.rewards.boxes import extract_boxed

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_ANSWER = re.compile(
    r"(?:^|(?<=[\s*_#.]))(?:(?:the|my|our|its?) +)?(?:(?:final|correct|right) +)?answer[*_]{0,3}"
    r"(?: +is\b(?: *:)?| *[:=])[*_]{0,3}",
    re.IGNORECASE,
)


class Survey(NamedTuple):
    """Counts of gold answers that are read out of a longer text, and of unclear ones, with the first of each."""

    read: int
    unclear: int
    example: str  # "" without any
    unclear_example: str


def read_gold(text: str) -> str:
    r"""Returns the answer that a gold text holds; a text without one of the known marks is the answer itself.

    The marks are `####`, one `<answer>...</answer>`, \boxed, "the answer is", "Answer:", quotes around the whole text,
    and a JSON list of one text. Where they name no single answer, the text stays as it is.
    """
    answer = _read(text)
    return text if answer is None else answer


def survey(golds: Iterable[str]) -> Survey:
    """Counts the gold answers that `read_gold` reads out of a longer text, and those whose marks name no answer."""
    read, unclear = [], []
    for gold in golds:
        answer = _read(gold)
        if answer is None:
            unclear.append(gold)
        elif answer != gold:
            read.append(f"{_short(gold)} as {answer!r}")
    return Survey(len(read), len(unclear), *(next(iter(few), "") for few in (read, map(_short, unclear))))


@lru_cache(maxsize=65536)
def _read(text: str) -> str | None:
    """Returns `read_gold`, or None where the marks name no single answer."""
    stripped = text.strip()
    if "####" in stripped:
        last = re.split(r"(?<!#)####(?!#)", stripped)[-1].strip()
        return _inner(last) if last != stripped else None
    if tagged := {match.strip() for match in _TAGS.findall(stripped)}:
        return _inner(tagged.pop()) if len(tagged) == 1 else None
    if boxes := list(_BOX.finditer(stripped)):
        answers = {extract_boxed(stripped[: box.start()]) for box in boxes[1:]} - {None}
        answers.add(extract_boxed(stripped))
        return _inner(answers.pop() or "") if len(answers) == 1 else None
    if said := list(_ANSWER.finditer(stripped)):
        return _inner(stripped[said[-1].end() :])
    if (listed := _listed(stripped)) is not None:
        return _inner(listed[0]) if len(listed) == 1 else None
    if quoted := re.fullmatch(r"""(["'])([^"']+)\1""", stripped):
        return quoted[2]
    return text


def _inner(text: str) -> str | None:
    """Returns the answer after a mark; None if it is empty or goes over several lines or sentences."""
    text = text.strip().strip("*").strip()
    text = text.removesuffix(".") if not text.endswith("..") else text
    if not text or "\n" in text or re.search(r"[.!?;]\s+[A-Z]", text):
        return None
    return _read(text)


def _listed(text: str) -> list[str] | None:
    """Returns the items of a JSON list of texts; None for any other text, such as the interval [1,2]."""
    if not text.startswith("["):
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return items if items and all(isinstance(item, str) for item in items) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"...{text[-77:]}")
