"""Finds benchmark problems that cannot be solved as stated, because they need a text or figure that is missing.

`reason` reads only the problem's text. The rules were made for OlympiadBench, where they flag 16 of 675 problems. They
flag one of 500 problems in MATH500 and none in AMC23 and AIME24 (docs/evaluation.md says how this was checked).
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
# A figure or table inside the text.
_DRAWN = re.compile(r"\[asy\]|\\begin\{(?:tabular|array|tikzpicture)|^ *\|", re.MULTILINE)

# Verdicts from reading single problems: a piece of the text -> the reason.
_REVIEWED = {
    # The answer is 0 whatever T is.
    r"2^{\log _{T} 8}-8^{\log _{T} 2}": None,
    # The picture says which regions are meant.
    "The two smaller regions are tangent semicircles, as shown.": "it needs a figure that is not there",
}


def reason(problem: str) -> str | None:
    """Returns the reason why a problem cannot be solved as stated, or None."""
    for piece, missing in _REVIEWED.items():
        if piece in problem:
            return None if missing and _DRAWN.search(problem) else missing
    for rule, missing in _RULES:
        if rule.search(problem) and not ("figure" in missing and _DRAWN.search(problem)):
            return missing
    for part in _PART.finditer(problem):
        context = problem[: part.start()] + problem[part.end() :]
        if not re.search(rf"\({part[1]}\)", context):
            return "it needs a part that is not there"
    return None
