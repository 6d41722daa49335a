r"""Parses strategies and scores from replies, which may be any text, and checks their form.

Pure functions of strings. Every pattern runs in time linear in the text. No reply makes a function raise: the fault of
a reply is returned as a reason. docs/strategies.md has the rules as a table.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_REPLY = 20_000  # characters of a reply without its thought; no strategy or list of scores is longer
MAX_STRATEGY = 2_000  # characters of a strategy
MAX_PART = 1_000  # characters of the problem type, the strategy line, or one step
STEPS = range(2, 13)  # how many steps a strategy may have
FOREIGN = 0.2  # share of letters that are neither Latin nor Greek, above which a text is in another language


class Parsed(NamedTuple):
    """A strategy in its canonical form, or the reason why a reply has none."""

    strategy: str | None
    reason: str  # "" or one of the reasons in docs/strategies.md
    detail: str = ""  # the part of the reply that the reason is about


def visible(text: str) -> str | None:
    """Returns the text after a model's thought, stripped; None if the thought has no end."""
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif text.lstrip().startswith("<think>"):
        return None
    return text.strip()


# Invisible characters, which a strategy never needs: controls, zero-width marks, changes of direction.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffd]"
)
_REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|cannot|can[’']t|won[’']t|unable to|not able to|as an ai|decline)\b", re.IGNORECASE
)
# A label begins a line or follows the end of a sentence, with or without markdown around it.
_LABEL = re.compile(
    r"(?:^[ \t>*#_\-0-9.]{0,12}|(?<=[.;!?] )[*_]{0,3})(problem type|strategy|steps)[ \t*_]{0,6}[:：][ \t*_]{0,6}",
    re.IGNORECASE | re.MULTILINE,
)
_MARKER = re.compile(
    r"[ \t>*_]{0,8}(?:[-•*+]|\(?(?:[0-9]{1,2}|[a-zA-Z])[.):]|step [0-9]{1,2}[.):]?)[*_]{0,3}[ \t]", re.I
)


def parse(reply: str, finish: str = "stop") -> Parsed:
    """Returns the strategy of a reply as three lines: problem type, strategy, steps (a), (b), ...

    Prose before the first part and paragraphs after the last step are left out.

    Args:
      reply: the model's text.
      finish: why the model stopped, as in `replies.Reply`.
    """
    text, wrong = _readable(reply, finish)
    if wrong:
        return wrong
    labels = list(_LABEL.finditer(text))
    names = [label[1].lower() for label in labels]
    if names != ["problem type", "strategy", "steps"]:
        if not labels and _REFUSAL.search(text[:300]):
            return Parsed(None, "refusal", text[:80])
        return Parsed(None, "structure", f"parts found: {', '.join(names[:6]) or 'none'}")
    ends = [labels[1].start(), labels[2].start(), len(text)]
    kind, principle, rest = (text[label.end() : end].strip() for label, end in zip(labels, ends, strict=True))
    steps = _steps(rest)
    if len(steps) not in STEPS:
        return Parsed(None, "structure", f"{len(steps)} steps")
    parts = [_line(part) for part in (kind, principle, *steps)]
    for part in parts:
        if sum(map(str.isalpha, part[:MAX_PART])) < 3:
            return Parsed(None, "structure", f"an empty part: {part[:40]!r}")
        if len(part) > MAX_PART:
            return Parsed(None, "too_long", f"a part of {len(part)} characters")
    listed = " ".join(f"({chr(ord('a') + i)}) {step}" for i, step in enumerate(parts[2:]))
    strategy = f"Problem type: {parts[0]}\nStrategy: {parts[1]}\nSteps: {listed}"
    if len(strategy) > MAX_STRATEGY:
        return Parsed(None, "too_long", f"{len(strategy)} characters")
    if foreign_share(strategy) > FOREIGN:
        return Parsed(None, "language", f"{foreign_share(strategy):.0%} of the letters")
    return Parsed(strategy, "")


def _readable(reply: str, finish: str) -> tuple[str, Parsed | None]:
    """Returns (text to parse, None), or ("", the reason why there is none)."""
    if finish == "refused":
        return "", Parsed(None, "refusal", reply.strip()[:200] or "the server says so")
    if finish not in ("stop", "length"):
        return "", Parsed(None, "unknown_finish", finish)
    text = visible(reply)
    if text is None or finish == "length":
        return "", Parsed(None, "truncated", f"{len(reply)} characters")
    if not text:
        return "", Parsed(None, "empty")
    if len(text) > MAX_REPLY:
        return "", Parsed(None, "too_long", f"{len(text)} characters")
    return _INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n")), None


def _steps(text: str) -> list[str]:
    """Returns the steps of a list, marked by letters in their order or by lines that begin with a number or bullet."""
    paragraphs = re.split(r"\n[ \t]*\n", text)
    listed = [paragraphs[0]]
    for paragraph in paragraphs[1:]:
        if not _MARKER.match(paragraph):
            break  # closing words
        listed.append(paragraph)
    text = "\n".join(listed)
    starts, position = [], 0
    for letter in "abcdefghijklmnopqrstuvwxyz":
        start = text.find(f"({letter})", position)
        if start < 0:
            break
        starts.append(start)
        position = start + 3
    if starts:
        ends = [*starts[1:], len(text)]
        return [text[start + 3 : end] for start, end in zip(starts, ends, strict=True)]
    steps: list[str] = []
    for line in text.split("\n"):
        marker = _MARKER.match(line)
        if marker:
            steps.append(line[marker.end() :])
        elif steps:
            steps[-1] += " " + line
    return steps


def _line(text: str) -> str:
    return " ".join(text.split()).strip(" ;*_")


def foreign_share(text: str) -> float:
    """Returns the share of a text's letters that are neither Latin nor Greek."""
    letters = [ord(c) for c in text if c.isalpha()]
    # Latin, Greek and their extensions, and the letterlike and mathematical symbols, are not foreign.
    foreign = [c for c in letters if not (c < 0x400 or 0x1E00 <= c < 0x2000 or 0x2100 <= c < 0x2200 or c >= 0x1D400)]
    foreign += [c for c in letters if c >= 0x1D800]
    return len(foreign) / len(letters) if letters else 0.0


_LIST = re.compile(r"\[([^\[\]]{0,2000})\]")
_SCORE = re.compile(r"(?:[01](?:\.[0-9]{0,12})?|\.[0-9]{1,12})")


def scores(reply: str, count: int, finish: str = "stop") -> tuple[list[float] | None, str]:
    """Returns (the last list "[s1, ..., sN]" of a reply as numbers, ""), or (None, what is wrong with the reply).

    Args:
      reply: the model's text.
      count: N, required number of scores.
      finish: why the model stopped, as in `parse`.
    """
    text, wrong = _readable(reply, finish)
    if wrong:
        return None, wrong.reason
    lists = _LIST.findall(text)
    if not lists:
        return None, "refusal" if _REFUSAL.search(text[:300]) else "no list of scores"
    items = [item.strip(" \t\n*_`") for item in lists[-1].split(",")]
    if len(items) != count:
        return None, f"{len(items)} scores for {count}"
    for item in items:
        if not _SCORE.fullmatch(item) or float(item) > 1:
            return None, f"score {item[:20]!r} is no number from 0 to 1"
    return [float(item) for item in items], ""


def best(candidate_scores: Sequence[float | None]) -> int | None:
    """Returns the index of the highest score, the first of equals, or None without scores.

    Args:
      candidate_scores: score of each candidate; None for a candidate that was rejected.
    """
    scored = [(score, -i) for i, score in enumerate(candidate_scores) if score is not None]
    return -max(scored)[1] if scored else None


def band(rating: float) -> str:
    """Returns the quality band of a mean rating in [0, 1] (App. H)."""
    rating = round(rating, 9)  # the mean of four 0.8 may be slightly below 0.8
    return "high" if rating >= 0.8 else "medium" if rating >= 0.5 else "low"
