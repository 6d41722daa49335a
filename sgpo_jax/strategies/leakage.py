r"""Checks whether a strategy gives away the answer, or a value that the expert calculated.

Values are compared as numbers: 1/2, \frac12, 0.5, 50 % and "half" are one value, and so are 5 and -5 (a sign is easily
put into words). An answer that is not a plain number is compared by `rewards.score` with every formula of the strategy.
In doubt a strategy is refused: a refusal costs one of several candidates, but a leak teaches the wrong thing.
docs/strategies.md has the reasons for these rules:

  * The answer must not appear anywhere. If it is 0, 1 or 2, or appears in the problem, it only must not be stated as
    the answer.
  * No other number of the expert's solution may appear unless it appears in the problem. Whole numbers up to 12 and
    everyday numbers (60 minutes, 100 %, 360 degrees) only must not be stated as a result, as in "= 4". 0, 1 and 2 are
    always allowed.
  * Exponents, indices, ordinals and numbers that structure the text ("degree 3", "4 cases", "2nd") are not values.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

from sgpo_jax import rewards

RULES_VERSION = "1"  # version of the checks in this module and in `parsing`; an older verdict is made anew
MAX_FORMULAS = 40  # formulas of one strategy that are checked
MAX_TEXT = 100_000  # characters of a problem or solution that are searched for numbers
SMALL = 12  # largest whole number that the expert may have calculated and a strategy may mention
TRIVIAL = (0, 1, 2)
EVERYDAY = (24, 30, 52, 60, 90, 100, 180, 360, 365, 1000, 3600)

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve "
_UNITS += "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS: dict[str, Fraction] = {word: Fraction(i) for i, word in enumerate(_UNITS.split())}
_WORDS |= {word: Fraction(10 * i) for i, word in enumerate(_TENS.split(), start=2)}
_WORDS |= {"half": Fraction(1, 2), "dozen": Fraction(12), "hundred": Fraction(100), "thousand": Fraction(1000)}

_NUMBER = re.compile(
    r"(?<![A-Za-z0-9.])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    rf"|\b(?:(?:{_TENS.replace(' ', '|')})[- ](?:{'|'.join(_UNITS.split()[1:10])})|{'|'.join(_WORDS)})\b",
    re.IGNORECASE,
)
_PERCENT = re.compile(r" ?(?:\\?%|percent\b|per cent\b)")
_ORDINAL = re.compile(r"(?:st|nd|rd|th|d)\b", re.IGNORECASE)
_COUNTED = re.compile(r"[ -](?:steps?|cases?|parts?|equations?|unknowns?|variables?|dimension(?:s|al)|digit)\b", re.I)
_NAMED = re.compile(
    r"\b(?:steps?|cases?|parts?|equations?|degree|order|base|mod(?:ulo)?|stage|method|grade) ?[(#]?$", re.I
)
_STATED = re.compile(
    r"(?:[=≈]|\\approx|\b(?:is|are|be|was|equals?|gives?|giving|gets?|getting|yields?|obtain|obtaining|makes?|becomes?"
    r"|answer|result|total|sum)\b)[ $\\({]*(?:(?:about|exactly|only|to|of|as|is|=|:)[ $\\({]*)?$",
    re.IGNORECASE,
)
_AS_ANSWER = re.compile(r"\b(?:answer|result|solution)s?\b[^.;\n]{0,24}$", re.IGNORECASE)


class Number(NamedTuple):
    """A number in a text."""

    value: Fraction  # its magnitude
    shown: str  # as the text has it
    before: str  # the text before it

    @property
    def stated(self) -> bool:
        """True if the text says that something equals the number."""
        return _STATED.search(self.before) is not None

    @property
    def as_answer(self) -> bool:
        """True if the text calls the number the answer or the result."""
        return _AS_ANSWER.search(self.before) is not None


def numbers(text: str) -> Iterator[Number]:
    """Yields every number of a text, alone and as part of a fraction, power or percentage.

    Exponents, indices, ordinals and numbers that structure the text are left out.
    """
    text = _tidy(text[:MAX_TEXT])
    previous: tuple[Fraction, int, int] | None = None
    for match in _NUMBER.finditer(text):
        start, end = match.span()
        before, after = text[max(0, start - 40) : start], text[end : end + 16]
        value = _value(match[0])
        if value is None:
            continue
        pair = _pair(previous, value, text, start)
        if pair is not None and previous is not None:
            lead = text[max(0, previous[1] - 48) : previous[1]]
            yield Number(pair, text[previous[1] : end], re.sub(r"\\[dt]?frac ?\{?$", "", lead))
        if percent := _PERCENT.match(after):
            yield Number(value / 100, match[0] + percent[0], before)
        previous = value, start, end
        number = Number(value, match[0], before)
        index = before.rstrip(" {").endswith(("^", "_"))
        counted = value <= SMALL and bool(_COUNTED.match(after) or _NAMED.search(before)) and not number.stated
        if not (index or counted or _ORDINAL.match(after)):
            yield number


def _tidy(text: str) -> str:
    """Removes separators of thousands and puts braces around the digits of a fraction."""
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\[,!]|,\\!)(?=[0-9]{3})", "", text)
    return re.sub(r"\\[dt]?frac ?([0-9])([0-9])", r"\\frac{\1}{\2}", text)


def _value(text: str) -> Fraction | None:
    text = text.lower()
    if text[0].isalpha():
        tens, _, unit = text.replace("-", " ").partition(" ")
        return _WORDS[tens] + (_WORDS[unit] if unit else 0)
    text = text.replace(",", "")
    if len(text) > 40:
        return None  # no answer has that many digits
    return Fraction(int(text)) if text.isdigit() else Fraction(text)


def _pair(first: tuple[Fraction, int, int] | None, second: Fraction, text: str, start: int) -> Fraction | None:
    """Returns the value of two neighbouring numbers that form a fraction or a power, or None."""
    if first is None or start - first[2] > 6:
        return None
    value, _, end = first
    between = text[end:start].replace(" ", "")
    fraction = between == "}{" and re.search(r"\\[dt]?frac ?\{ ?$", text[max(0, first[1] - 10) : first[1]])
    if (between in ("/", "÷") or fraction) and second:
        return value / second
    if between in ("^", "^{", "**") and second.denominator == 1 and second <= 64 and value <= 1000:
        return value ** int(second)
    return None


def find(strategy: str, problem: str, answer: str, solution: str) -> tuple[str, str]:
    """Returns what a strategy gives away as (reason, detail), or ("", "").

    The reasons are "leak_answer"; "leak_value" for a value that the expert calculated; and "leak_unchecked" if there
    are too many formulas, or comparing one with the answer takes too long.
    """
    answer = rewards.read_gold(answer)
    if "\\boxed" in strategy or "\\fbox" in strategy:
        return "leak_answer", "a box"
    in_problem = {number.value for number in numbers(problem)}
    final = plain_value(answer)
    by_expert = [*numbers(solution), *numbers(answer)]
    calculated = {number.value for number in by_expert} - in_problem
    everyday = set(EVERYDAY) - {number.value for number in by_expert if number.value in EVERYDAY and number.stated}
    not_whole = sorted(float(value) for value in calculated if value.denominator > 1)
    for number in numbers(strategy):
        value = number.value
        if final is not None and (value == final or (value not in in_problem and _close(value, [float(final)]))):
            told = number.as_answer if value in TRIVIAL else number.stated or number.as_answer
            if told or not (value in TRIVIAL or value in in_problem):
                return "leak_answer", number.shown.replace("}{", "/")
        elif value not in in_problem and value not in TRIVIAL and (value in calculated or _close(value, not_whole)):
            common = value.denominator == 1 and (value <= SMALL or value in everyday)
            if number.stated or not common:
                return "leak_value", number.shown.replace("}{", "/")
    if final is not None and final in TRIVIAL:
        return "", ""
    return _formula_leak(strategy, problem, answer, final)


def _close(value: Fraction, ordered: list[float]) -> bool:
    """Returns whether a value that is not whole is one of `ordered` (ascending) rounded to two or more decimals."""
    if value.denominator == 1:
        return False
    margin = min(0.005, 0.02 * float(value)) * (1 + 1e-9)
    within = bisect_left(ordered, float(value) - margin), bisect_right(ordered, float(value) + margin)
    return any(x != int(x) for x in ordered[slice(*within)])


_DECORATION = re.compile(
    r"\\(?:text|mathrm|mbox|textbf) ?\{[^{}]{0,40}\}|\^? ?\{? ?\\circ ?\}?|\\?[%$]|\\[ ,;!]|[ {}()+.-]"
)


def plain_value(answer: str) -> Fraction | None:
    """Returns the magnitude of an answer that is one number, with or without a unit; None for any other answer."""
    answer = _tidy(answer.strip()[: rewards.MAX_ANSWER])
    longest_first = sorted(numbers(answer), key=lambda number: -len(number.shown))
    if not longest_first:
        return None
    value, shown, _ = longest_first[0]
    rest = answer.replace(",", "").replace(shown.replace(",", ""), "", 1)
    rest = re.sub(r"\\[dt]?frac", "", rest)
    return None if _DECORATION.sub("", rest) else value


_MATH = re.compile(r"\$([^$]{1,200})\$|\\\(([^$]{1,200}?)\\\)|\\\[([^$]{1,200}?)\\\]")
_RELATION = re.compile(r"=|≈|\\approx|<|>|\\l?eq?\b|\\g?eq?\b|≤|≥|≠|\\ne\b")
_LETTERS = re.compile(r"\\(?:text|mathrm|mbox|textbf) ?\{([A-Za-z .'()-]{1,60})\}|\(?([A-Za-z][A-Za-z .'-]{0,60})\)?")


def _formula_leak(strategy: str, problem: str, answer: str, final: Fraction | None) -> tuple[str, str]:
    """Finds the answer in the strategy, in words or as a formula, unless the problem has it too; returns as `find`."""
    if words := _LETTERS.fullmatch(answer.strip()):
        return _word_leak(strategy, problem, (words[1] or words[2]).strip("() "))
    shown, tight = _squeeze(problem), _squeeze(answer)
    if final is None and len(tight) > 2 and tight not in shown and tight in _squeeze(strategy):
        return "leak_answer", answer[:80]
    formulas = [f for f in dict.fromkeys(_formulas(strategy)) if _squeeze(f) not in shown]
    if len(formulas) > MAX_FORMULAS:
        return "leak_unchecked", f"{len(formulas)} formulas"
    verdicts = rewards.score([f"\\boxed{{{formula}}}" for formula in formulas], [answer] * len(formulas))
    for formula, verdict in zip(formulas, verdicts, strict=True):
        if verdict.outcome == "correct":
            return "leak_answer", formula
        if verdict.outcome in ("timeout", "crash"):
            return "leak_unchecked", formula
    return "", ""


def _word_leak(strategy: str, problem: str, word: str) -> tuple[str, str]:
    """Finds an answer in words. If it is one letter or the problem has it too, only stating it as the answer counts."""
    if len(word) < 2 or re.search(rf"\b{re.escape(word)}\b", problem, re.IGNORECASE):
        pattern = rf"\b(?:answer|result|option|choice)\b[^.;\n]{{0,16}}\b{re.escape(word)}\b"
    else:
        pattern = rf"\b{re.escape(word)}\b"
    match = re.search(pattern, strategy, re.IGNORECASE)
    return ("leak_answer", match[0]) if match else ("", "")


def _formulas(strategy: str) -> Iterator[str]:
    """Yields texts that may be formulas: between dollars, the sides of a relation, and words with mathematics."""
    spans = [next(filter(None, match.groups())) for match in _MATH.finditer(strategy)]
    words = [word.strip(".;:!?$") for word in _MATH.sub(" ", strategy).split()]
    runs = [" ".join(run) for mathematical, run in groupby(words, key=_in_formula) if mathematical]
    for text in (*spans, *words, *runs):
        for part in (text, *_RELATION.split(text)):
            part = part.strip(" .,;:")
            if 1 < len(part) <= 200 and _is_formula(part):
                yield part


def _in_formula(word: str) -> bool:
    return len(word) == 1 or _is_formula(word)


def _is_formula(text: str) -> bool:
    """Returns whether a text has a sign of mathematics and is not only a number, an ordinal, "and/or" or "\\sin"."""
    bare = r"[0-9.,%]+|[0-9]+(?:st|nd|rd|th|d)|\(?[a-z]\)|[a-z]+(?:/[a-z]+)+|\\[a-z]+"
    return bool(re.search(r"[\\^/√π+*0-9]", text)) and not re.fullmatch(bare, text, re.IGNORECASE)


def _squeeze(text: str) -> str:
    return re.sub(r"\\left|\\right|\\[ ,;:!dt](?=frac)|\\[ ,;:!]|[\s$]", "", text.replace("\\dfrac", "\\frac"))
