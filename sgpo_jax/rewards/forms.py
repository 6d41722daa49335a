r"""Answers in one form: functions of another variable, vectors in \hat{i} and \hat{j}, and values with names.

Each function takes two normalised answers, the gold answer first, and returns both so that they can be compared.
"""

import re

from sgpo_jax.rewards.structure import CONNECTIVE, entries, split

_DEFINITION = re.compile(r"(?:^|(?<=[,;] )|(?<=[,;]))([A-Za-z]) ?\( ?([a-z]) ?\) ?=")
_HAT = re.compile(
    r"\\(?:hat|widehat|vec|mathbf|overrightarrow) ?(?:\{ ?\\?([ijk])(?:math)? ?\}|\\?([ijk])(?:math)?(?![a-z]))"
)
_TERM = re.compile(r"([-+]?)([^-+]*?)(?:\\cdot|\*)? ?!([ijk])")
_NAMED = re.compile(r"([A-Za-z]) ?= ?([^=<>]+)")


def alike(gold: str, answer: str) -> tuple[str, str]:
    """Returns two normalised answers in one form, as far as they have several."""
    return named_values(*vectors(*functions(gold, answer)))


def functions(gold: str, answer: str) -> tuple[str, str]:
    """Writes functions with the gold answer's variable: f(t)=2t as f(x)=2x. It must be free in the answer."""
    golds, answers = ({match[2] for match in _DEFINITION.finditer(text)} for text in (gold, answer))
    if len(golds) != 1 or len(answers) != 1 or golds == answers:
        return gold, answer
    (old,), (new,) = answers, golds
    letters = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
    if new in letters.findall(answer):
        return gold, answer
    return gold, letters.sub(lambda match: new if match[0] == old else match[0], answer)


def vectors(gold: str, answer: str) -> tuple[str, str]:
    r"""Writes sums of multiples of \hat{i}, \hat{j}, \hat{k} as tuples, with as many entries as the other answer has.

    Beside such a vector, plain letters i, j, k are unit vectors too.
    """
    if not (_HAT.search(gold) or _HAT.search(answer)):
        return gold, answer
    parts = [_components(text) for text in (gold, answer)]
    if parts[0] and parts[1]:
        return _tuple(parts[0]), _tuple(parts[1])
    if parts[0] and (length := _length(answer)) in (2, 3) and parts[0][length:] in ([], ["0"]):
        return _tuple(parts[0][:length]), answer
    if parts[1] and (length := _length(gold)) in (2, 3) and parts[1][length:] in ([], ["0"]):
        return gold, _tuple(parts[1][:length])
    return gold, answer


def _tuple(parts: list[str]) -> str:
    return f"({', '.join(parts)})"


def _components(text: str) -> list[str] | None:
    """Returns the three components of a sum of multiples of unit vectors; None for any other text."""
    marked = _HAT.sub(lambda match: f"!{match[1] or match[2]}", text)
    if "!" not in marked:
        marked = re.sub(r"(?<![\\A-Za-z])([ijk])(?![A-Za-z])", r"!\1", text)
    marked = marked.replace(" ", "")
    terms = list(_TERM.finditer(marked))
    axes = [term[3] for term in terms]
    complete = terms and "".join(term[0] for term in terms) == marked and all(term[1] for term in terms[1:])
    if not complete or len(set(axes)) < len(axes):
        return None
    values = {term[3]: f"{term[1].replace('+', '')}{term[2] or '1'}" for term in terms}
    return [values.get(axis, "0") for axis in "ijk"]


def _length(text: str) -> int:
    """Returns the number of entries of a tuple or of a column; 0 for any other text."""
    if column := re.fullmatch(r"\\begin\{[pb]?matrix\}([^&]*)\\end\{[pb]?matrix\}", text):
        return len([entry for entry in column[1].split(r"\\") if entry.strip()])
    return len(entries(text) or [])


def named_values(gold: str, answer: str) -> tuple[str, str]:
    """Writes the values of x=3,y=4 as the tuple (3, 4), by their names, beside a text without names.

    A list beside such a gold answer is a tuple too.
    """
    if ("=" in gold) == ("=" in answer):
        return gold, answer
    if values := _values(gold):
        return _tuple(values), f"({', '.join(listed)})" if len(listed := _items(answer)) > 1 else answer
    values = _values(answer)
    return gold, _tuple(values) if values and entries(gold) else answer


def _items(text: str) -> list[str]:
    return [item for item in split(CONNECTIVE.sub(",", text), ",;") if item]


def _values(text: str) -> list[str]:
    """Returns the values of several names, ordered by the names; none for any other text."""
    named = [_NAMED.fullmatch(item) for item in _items(text)]
    values = {match[1]: match[2].strip() for match in named if match}
    return [values[name] for name in sorted(values)] if 1 < len(values) == len(named) else []
