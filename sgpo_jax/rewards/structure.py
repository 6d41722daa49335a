r"""Answers that consist of parts: ratios, whose parts are compared up to a common factor, and lists with repeats."""

import re
from typing import NamedTuple

CONNECTIVE = re.compile(
    r",? ?(?:\\text ?\{ ?(or|and) ?\}|(?<![A-Za-z\\])(or|and)(?![A-Za-z])|\\(lor|vee|land|wedge)(?![a-z]))"
)
# The word "to" between the parts of a ratio: 2 to 3. Between "from" and the end of a range it is not alone.
_TO = re.compile(
    r"(?<=[0-9a-z}) ]) ?(?:\\(?:text|mbox|mathrm) ?\{ ?to ?\}|(?<=[0-9}) ])to(?= ?[-0-9\\({])) ?(?=[-0-9a-z\\({])"
)
_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt|ne|neq|leqslant|geqslant|in|mid|to|cup|cap)(?![a-z])")
_ZERO = re.compile(r"[-+]?0+(?:\.0*)?")


def split(text: str, marks: str = ",") -> list[str]:
    """Splits a text at the marks outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character in marks and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def with_colons(gold: str, answer: str) -> tuple[str, str]:
    r"""Writes `2 \text{ to } 3` as 2:3 if the other text has a colon; alone it may be a range."""
    if (":" in gold) == (":" in answer):
        return gold, answer
    texts = [gold, answer]
    for i, text in enumerate(texts):
        pieces = [piece.strip() for piece in _TO.split(text)]
        if len(pieces) > 1 and all(piece and not re.search("[,=<>]|[A-Za-z]{4}", piece) for piece in pieces):
            texts[i] = ":".join(pieces)
    return texts[0], texts[1]


def has_ratio(text: str) -> bool:
    """Returns True if there may be a ratio of three or more parts in a text: two colons with no comma in between."""
    return bool(re.search(r":[^,;:]*:", text))


def ratio(text: str) -> list[str] | None:
    r"""Returns the three or more parts of a ratio such as `2:3:4` or `a:b:c=2:3:4`; None for any other text."""
    named, equals, values = text.partition("=")
    if equals:
        names = split(named, ":")
        text = values if all(re.fullmatch(r"\\?[A-Za-z]\w*", name) for name in names) else text
    parts = split(text.removeprefix(r"\left").strip(), ":")
    if equals and len(parts) != named.count(":") + 1:
        return None
    if len(parts) == 1 and re.fullmatch(r"\(.*\)", text.strip()):
        parts = split(text.strip()[1:-1], ":")
    if len(parts) < 3 or not all(parts) or re.search(r"[=<>,;%]|\\[lc]?dots|\\pm|\\mp|\.\.\.|\\text", "".join(parts)):
        return None
    return None if all(map(_ZERO.fullmatch, parts)) else parts


def same_ratio(gold: str, answer: str) -> bool | None:
    """Compares two texts of which at least one may be a ratio of three or more parts.

    Returns:
      False if they cannot be the same ratio, True if they are the same time with seconds, None if the parts decide.
    """
    named = [re.fullmatch(r"([A-Za-z: ]+:[A-Za-z: ]+)=.*", text) for text in (gold, answer)]
    if named[0] and named[1] and named[0][1].replace(" ", "") != named[1][1].replace(" ", ""):
        return False
    golds, answers = ratio(gold), ratio(answer)
    if not (golds and answers) or len(golds) != len(answers):
        return False
    if any(re.fullmatch("0[0-9]", part) for part in golds + answers):  # 10:05:30, a time
        digits = re.compile("[0-9]{1,9}")
        return all(
            digits.fullmatch(x) and digits.fullmatch(y) and int(x) == int(y)
            for x, y in zip(golds, answers, strict=True)
        )
    return None


class Items(NamedTuple):
    """The items of two lists."""

    golds: list[str]
    answers: list[str]
    decide: bool  # True if the gold list repeats an item; otherwise the lists must be equal as sets too


def items(gold: str, answer: str) -> Items | None:
    """Returns the items of two lists, in which repeated items count; None if neither can have repeated ones.

    Two sets in braces have no repeats. A list in words or braces is compared with the other as it is written. If the
    other is a tuple, its entries are the items.
    """
    if _RELATION.search(gold) or _RELATION.search(answer):
        return None
    sides = _items(gold), _items(answer)
    if all(braces for _, braces, _ in sides):
        return None
    (golds, _, _), (answers, _, only_or) = sides
    if len(golds) == 1 and only_or:
        return None  # 1/2 or 0.5: one number, written twice
    decide = len({re.sub(r"^[A-Za-z](?:_\w)? ?= ?", "", item) for item in golds}) < len(golds)
    if len(golds) == 1 < len(answers):
        golds = entries(gold) or golds
    elif len(answers) == 1 < len(golds):
        answers = entries(answer) or answers
    return Items(golds, answers, decide) if max(len(golds), len(answers)) > 1 else None


def _items(text: str) -> tuple[list[str], bool, bool]:
    """Returns (items of a list, whether it stands in braces, whether all that joins them is the word "or")."""
    text = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda match: match[0].replace(",", ""), text)
    braces = re.fullmatch(r"(?:[A-Za-z] ?(?:=|\\in) ?)?(?:\\left ?)?\\\{(.*?)(?:\\right ?)?\\\}", text)
    inner = braces[1] if braces and r"\{" not in braces[1] else text
    words = {word for match in CONNECTIVE.finditer(inner) for word in match.groups() if word}
    parts = [part for part in split(CONNECTIVE.sub(",", inner), ",;") if part]
    only_or = bool(words) and words <= {"or", "lor", "vee"} and len(split(inner, ",;")) == 1
    return parts or [text], inner is not text, only_or


def entries(text: str) -> list[str] | None:
    """Returns the entries of a tuple, also after names as in (x,y)=(1,2); None for any other text."""
    tuple_ = re.fullmatch(r"(?:\([A-Za-z_0-9, ]+\) ?= ?)?(?:\\left ?)?\((.*?)(?:\\right ?)?\)", text)
    if not tuple_ or re.search(r"^[^(]*\)", tuple_[1]):  # (1,2),(3,4)
        return None
    return split(tuple_[1])
