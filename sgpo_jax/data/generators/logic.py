"""Worked solutions of reasoning-gym's puzzles of logic and of binary strings, with what their strategies say of each.

A guess is right in 1 of 4 puzzles of two islanders, in 1 of 8 of three.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

# Of the islanders. reasoning-gym draws from 51, which say nothing and are half of what a small model has to learn.
NAMES = ("Ann", "Bob", "Cleo")


def _holds(statement: tuple, truthful: Sequence[bool]) -> bool:
    """Whether a statement of reasoning-gym is true where the islanders are as `truthful` says."""
    match statement:
        case ("telling-truth", int(islander)):
            return truthful[islander]
        case ("lying", int(islander)):
            return not truthful[islander]
        case ("not", inner):
            return not _holds(inner, truthful)
        case ("and", *parts):
            return all(_holds(part, truthful) for part in parts)
        case ("or", *parts):
            return any(_holds(part, truthful) for part in parts)
        case ("->", condition, conclusion):
            return not _holds(condition, truthful) or _holds(conclusion, truthful)
        case ("<=>", left, right):
            return _holds(left, truthful) == _holds(right, truthful)
    raise ValueError(f"statement {statement!r}; allowed: and, or, not, -> and <=> of telling-truth and lying")


def _substituted(statement: tuple, truthful: Sequence[bool]) -> str:
    """A statement with "true" or "false" in the place of what it says of single islanders."""

    def inner(part: tuple) -> str:
        text = _substituted(part, truthful)
        return text if " " not in text else f"({text})"

    match statement:
        case ("and" | "or" as word, *parts):
            return f" {word} ".join(map(inner, parts))
        case ("->", condition, conclusion):
            return f"if {inner(condition)} then {inner(conclusion)}"
        case ("<=>", left, right):
            return f"{inner(left)} if and only if {inner(right)}"
        case ("not", ("and" | "or" | "->" | "<=>" | "not", *_) as part):
            return f"not {inner(part)}"
    return "true" if _holds(statement, truthful) else "false"


def _cases(islanders: int) -> Iterator[tuple[bool, ...]]:
    return itertools.product((True, False), repeat=islanders)


def _first(statements: Sequence[tuple]) -> int:
    """The islander whose statement, true if and only if he is truthful, leaves the fewest cases."""
    left = [
        sum(_holds(statement, case) == case[i] for case in _cases(len(statements)))
        for i, statement in enumerate(statements)
    ]
    return left.index(min(left))


def islanders(item: dict) -> tuple[str, str]:
    r"""(problem, answer) of a puzzle about knights and knaves, under whatever names: one word for each islander.

    What everybody says is as reasoning-gym has it, the frame around it shorter. Its answer is a sentence. As words in
    the order of the islanders it is compared as text; without the \text{} a product in another order would pass.
    """
    terms, count = item["metadata"]["knight_knave_terms"], len(item["metadata"]["names"])
    asked = re.sub(r"^A very .*?\. | You meet .*?\.| So who is .*", "", item["question"])
    for name, ours in zip(item["metadata"]["names"], NAMES, strict=False):
        asked = re.sub(rf"\b{name}\b", ours, asked)
    words = re.findall(r" is an? (\w+)", item["answer"])
    asked += f' Say "{terms["knight"]}" or "{terms["knave"]}" for {" and ".join(NAMES[:count])}, in this order.'
    return asked, f"\\text{{{' '.join(words)}}}"


def begin(metadata: dict) -> dict[str, str]:
    """Whom to suppose first, and what: found in the statements, whatever the answer."""
    first = _first(metadata["statements"])
    return {"islander": NAMES[first], "knight": str(metadata["knight_knave_terms"]["a_knight"])}


def knights_knaves(metadata: dict) -> tuple[str, str] | None:
    """Cases, those in which the islander of `begin` is truthful first, until no statement contradicts its speaker."""
    statements, terms = metadata["statements"], metadata["knight_knave_terms"]
    first, steps = _first(statements), []
    order = sorted(range(len(statements)), key=lambda i: i != first)
    for case in sorted(_cases(len(statements)), key=lambda case: not case[first]):
        words = " ".join(terms["knight" if truthful else "knave"] for truthful in case)
        found = []
        for i in order:
            holds = _holds(statements[i], case)
            said, truth = _substituted(statements[i], case), "true" if holds else "false"
            found.append(f"{NAMES[i]} says {said}" + f", {truth}" * (said != truth))
            if holds != case[i]:
                steps.append(f"{words}: {'; '.join(found)}; contradiction.")
                break
        else:
            return f"\\text{{{words}}}", " ".join([*steps, f"{words}: {'; '.join(found)}; consistent."])
    return None


def binary_alternation(metadata: dict) -> tuple[str, str]:
    """Each swap mends two places, so that half the places that differ from the nearest alternating string count."""
    string = metadata["string"]
    counts = {digit: string.count(digit) for digit in "10"}
    steps = [f"{count} of {digit}." for digit, count in counts.items()]
    starts = [digit for digit, count in counts.items() if 2 * count >= len(string)]
    if abs(counts["1"] - counts["0"]) > 1:
        return "-1", f"{' '.join(steps)} {max(counts.values())} - {min(counts.values())} > 1."
    swaps = []
    for start in starts:
        wanted = (start + "10".replace(start, "")) * len(string)
        wrong = sum(a != b for a, b in zip(string, wanted, strict=False))
        swaps.append(wrong // 2)
        steps.append(f"From {start}: {wanted[: len(string)]}, {wrong} wrong, {wrong} / 2 = {wrong // 2}.")
    return str(min(swaps)), " ".join(steps)
