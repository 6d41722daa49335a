"""Benchmark problems that nobody can solve as they are stated: they need a text or a figure that is not there.

`reason` reads the problem's text alone. The rules were made for OlympiadBench, where they flag 16 of 675 problems; in
MATH500 they flag one of 500, in AMC23 and AIME24 none (docs/evaluation.md says how this was checked).
"""

import re

_RULES = [
    # Relay problems: T is the number you will receive, the answer of another problem.
    (re.compile(r"Let\s*\$?\s*T\s*=\s*T\s?N\s?Y\s?W\s?R"), "it needs the answer of a problem that is not there"),
    (re.compile(r"\b(?:previous|preceding) problem\b", re.IGNORECASE), "it needs a problem that is not there"),
    (
        re.compile(r"\b(?:in|of|from|see|using) (?:the )?(?:figure|diagram|picture|graph) (?:below|above|shown|at)\b"),
        "it needs a figure that is not there",
    ),
    (re.compile(r"\bas (?:shown|pictured) in the (?:figure|diagram|picture)"), "it needs a figure that is not there"),
]
_PART = re.compile(r"\b(?:in|of|from|see|using|by) part \(?([a-zA-Z])\)?(?!\w)")
# A figure or table that is in the text.
_DRAWN = re.compile(r"\[asy\]|\\begin\{(?:tabular|array|tikzpicture)|^ *\|", re.MULTILINE)

# What reading them showed, by a piece of their text.
_REVIEWED = {
    # The answer is 0 whatever T is.
    r"2^{\log _{T} 8}-8^{\log _{T} 2}": None,
    # The picture says which regions are meant.
    "The two smaller regions are tangent semicircles, as shown.": "it needs a figure that is not there",
}


def reason(problem: str) -> str | None:
    """Why a problem cannot be solved as stated, or None."""
    for piece, why in _REVIEWED.items():
        if piece in problem:
            return None if why and _DRAWN.search(problem) else why
    for rule, why in _RULES:
        if rule.search(problem) and not ("figure" in why and _DRAWN.search(problem)):
            return why
    for part in _PART.finditer(problem):
        rest = problem[: part.start()] + problem[part.end() :]
        if not re.search(rf"\({part[1]}\)", rest):
            return "it needs a part that is not there"
    return None
