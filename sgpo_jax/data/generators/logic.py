"""Solves reasoning-gym's puzzles about logic and binary strings, and fills in the strategies for each puzzle.

A guess is right in 1 of 4 puzzles with two islanders, and in 1 of 8 with three.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

# Names of the islanders. reasoning-gym uses 51 names, which would be half of a small model's vocabulary to learn.
NAMES = ("Ann", "Bob", "Cleo")


def _holds(statement: tuple, truthful: Sequence[bool]) -> bool:
    """Returns the truth of a statement from reasoning-gym, given which islanders are truthful."""
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
    """Returns a statement as text, with "true" or "false" in place of its claims about single islanders."""

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
    """Yields every assignment of truthfulness."""
    return itertools.product((True, False), repeat=islanders)


def _first(statements: Sequence[tuple]) -> int:
    """Returns the islander whose statement leaves the fewest cases, as it is true exactly if he is truthful."""
    remaining = [
        sum(_holds(statement, case) == case[i] for case in _cases(len(statements)))
        for i, statement in enumerate(statements)
    ]
    return remaining.index(min(remaining))


def islanders(item: dict) -> tuple[str, str]:
    r"""Returns (problem, answer) of a puzzle about knights and knaves, whatever it calls them.

    The statements are reasoning-gym's; the text around them is shorter. The answer has one word for each islander, in
    order, where reasoning-gym has a sentence. It is compared as text: without \text{} the verifier would take the words
    for a product and accept any order.
    """
    terms, count = item["metadata"]["knight_knave_terms"], len(item["metadata"]["names"])
    problem = re.sub(r"^A very .*?\. | You meet .*?\.| So who is .*", "", item["question"])
    for name, replacement in zip(item["metadata"]["names"], NAMES, strict=False):
        problem = re.sub(rf"\b{name}\b", replacement, problem)
    words = re.findall(r" is an? (\w+)", item["answer"])
    problem += f' Say "{terms["knight"]}" or "{terms["knave"]}" for {" and ".join(NAMES[:count])}, in this order.'
    return problem, f"\\text{{{' '.join(words)}}}"


def begin(metadata: dict) -> dict[str, str]:
    """Returns which islander to suppose truthful first, from the statements alone, and the word for it."""
    first = _first(metadata["statements"])
    return {"islander": NAMES[first], "knight": str(metadata["knight_knave_terms"]["a_knight"])}


def knights_knaves(metadata: dict) -> tuple[str, str] | None:
    """Returns (answer, worked solution) of a puzzle, or None if it has no answer.

    The solution goes through cases until no statement contradicts its speaker. The cases in which the islander of
    `begin` is truthful come first.
    """
    statements, terms = metadata["statements"], metadata["knight_knave_terms"]
    first, steps = _first(statements), []
    order = sorted(range(len(statements)), key=lambda i: i != first)
    for case in sorted(_cases(len(statements)), key=lambda case: not case[first]):
        words = " ".join(terms["knight" if truthful else "knave"] for truthful in case)
        checks = []
        for i in order:
            holds = _holds(statements[i], case)
            said, truth = _substituted(statements[i], case), "true" if holds else "false"
            checks.append(f"{NAMES[i]} says {said}" + f", {truth}" * (said != truth))
            if holds != case[i]:
                steps.append(f"{words}: {'; '.join(checks)}; contradiction.")
                break
        else:
            return f"\\text{{{words}}}", " ".join([*steps, f"{words}: {'; '.join(checks)}; consistent."])
    return None


def binary_alternation(metadata: dict) -> tuple[str, str]:
    """Returns (answer, worked solution): a swap mends two places, so it counts half the places that differ."""
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
