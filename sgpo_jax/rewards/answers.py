r"""Grading by text: finds the answer in a response, rewrites it into plain LaTeX, and compares it as text.

Every rule applies to gold answers and predictions alike, unless it says otherwise. Pairs that text cannot decide go to
math-verify (`worker`), in the forms that `readings` returns.
"""

import math
import re
from itertools import product
from typing import Any

from sgpo_jax.rewards.structure import CONNECTIVE, entries, has_ratio, same_ratio, split, with_colons
from sgpo_jax.rewards.symbols import names_to_latex, to_latex
from sgpo_jax.rewards.units import MONTHS, SET, number_alone, says_more, without_units, without_words
from sgpo_jax.rewards.words import NUMBERS

MAX_ANSWER = 1000  # characters; a longer answer is wrong unless it is identical to the gold answer

_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_DECIMAL, _DEGREES, _RADIANS = r"([0-9]+(?:\.[0-9]+)?)", r"\^ ?\{? ?\\circ ?\}?", r"\\\1(\\frac{\2 \\pi}{180})"
_PMATRIX = r"\\begin{pmatrix}\1\\end{pmatrix}"
_OPEN = r"([\[\]]) ?([^\[\],]+),([^\[\],]+)([\[\]])(?= ?(?:$|\\cup))"
_INDEX = r"(?:\{ ?([0-9a-z]{1,3}(?: ?[-+] ?[0-9a-z]{1,3})?) ?\}|([0-9a-z]))"
_SIZES = "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
_FONTS = "bf|it|rm|sf|tt|sc|em|bfseries|itshape|displaystyle|textstyle|scriptstyle|boldmath"

_REWRITES: list[tuple[str, Any]] = [
    # Fonts, sizes and colours.
    (rf"\\(?:{_SIZES}|{_FONTS})(?![A-Za-z])\s*", ""),
    (r"\\(?:text)?color\s*(?:\[[^\]{}]{0,40}\])?\s*\{[^{}]{0,40}\}\s*", ""),
    (r"\\(?:boldsymbol|bm|pmb)\s*(?=\{)", r"\\mathbf"),
    (r"^\s*(\*\*|__)([^*_]+)\1\s*$", r"\2"),
    (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # math delimiters and dollars
    (r"√\s*([0-9]+|[a-z])", r"\\sqrt{\1}"),
    (r"∛\s*([0-9]+|[a-z])", r"\\sqrt[3]{\1}"),
    (r"\b(?:np|numpy|math)\.([a-z]+)", r"\\\1"),
    (r"\*\*", "^"),
    (r"\\(?:mathrm|text)\{([ie])\}", r"\1"),
    (r"(?<=[0-9])i\b", " i"),
    (r"_\{ ?\\(?:max|min) ?\}|^\s*\\approx", ""),
    # Thousands separators: 10,\!080 and 10\,080 and 10{,}080; further below 10 080.
    (r"(?<=[0-9])(?:,?\\!|\\[,;: ]|\{,\}|~)\s*(?=[0-9]{3}(?![0-9]))", ""),
    (r"\\!", ""),
    (r"(?:\\(?:text|mathrm|mathbin|mathrel) ?)?\{ ?: ?\}|\\colon(?![a-z])", ":"),
    (r"\\lg(?![a-z])", r"\\log_{10} "),
    (r"(?<!\\)(?:\\[ ,;:]|~|\\q?quad\b)|\s+", " "),
    (r"(?<=[0-9]) (?=[0-9]{3}(?: [0-9]{3}){0,5}$)", ""),
    # 1e-05, which LaTeX reads as 1*e - 05. In "2e - 3", with spaces, e stays Euler's number.
    (
        r"(?<![\w.}\\])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]\+?(-?)0{0,3}([0-9]{1,6})(?![\w.^{/])",
        r"\1 \\times 10^{\2\3}",
    ),
    (r"(?<=[0-9])\.(?= ?(?:$|[-+*/^,;)\]}]))", ""),  # 1./3
    (r"(?<!\\left)(?<!\\right)(?<!\.)\. *$", ""),  # a full stop
    # The rules above take linear time on any text. Those below see at most MAX_ANSWER characters.
]
_READABLE: list[tuple[str, Any]] = [
    (r"(?:\\(?:left|right) ?)?\\langle", "("),
    (r"(?:\\(?:left|right) ?)?\\rangle", ")"),
    (r"\\\\\[[^\]]{0,9}\]", r"\\\\"),  # the row spacing of a matrix
    (r"(?:\\left ?)?[(\[] ?\\begin\{array\} ?\{[clr| ]*\}(.*)\\end\{array\} ?(?:\\right ?)?[)\]]", _PMATRIX),
    (r"([a-z0-9])!\^", r"(\1!)^"),
    (r"\\sqrt ?(\[[0-9a-z]\])? ?\(([^()]*)\)", r"\\sqrt\1{\2}"),
    (r"^([-+]?[0-9.]+) ?x ?(?=10 ?\^)", r"\1 \\times "),  # 3x10^8
    (r"^([A-Za-z]) ?: ?([a-z]) ?\\mapsto(?![a-z])", r"\1(\2)="),
    (rf"(?:^|(?<=\\cup)|(?<=\\cup )){_OPEN}", lambda match: _brackets(match)),
    (r"\^ ?\{?([0-9]+)\}? ?/ ?_ ?\{?([0-9]+)\}?", r"\\frac{\1}{\2}"),  # ^3/_4
    (rf"^([0-9]+) ?(?:\^ ?)?\{{? ?(?:{SET}\{{ ?)?(?:st|nd|rd|th)\b ?\}}? ?\}}?$", r"\1"),  # 4th
    (rf"(?<![A-Za-z\\])(?:{SET}\{{ ?C ?\}}|C) ?_ ?{_INDEX} ?\^ ?{_INDEX}", lambda match: _combinations(match)),
    (r"^[a-z] ?(\([^()\[\]]*\]|\[[^()\[\]]*\))$", r"\1"),  # t(0,4], a slip for t \in (0,4]
    (r"\\varnothing(?![a-z])", r"\\emptyset "),
    (rf"^(?:{SET}\{{)? ?[Nn]o solutions? ?\}}?$", r"\\emptyset"),
    (r"\\log_\{? ?e ?\}?(?![a-z])", r"\\ln "),
    (r" ?(?:=|\\approx) ?-?[0-9]*\.[0-9]+ ?(?:\\[lc]?dots|\.\.\.)$", ""),  # \frac13 = 0.333...
    (r"^" + SET + r"\{ ?([A-Z](?: ?, ?[A-Z])+) ?\}$", r"\1"),  # \text{A, B}
    (r"^([-+]?[0-9]+) ([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),  # 1 4/5
    # Bases: (52)_8, 52_{\text{base }8}, 52_{\text{eight}} (`_base` replaces the word).
    (r"\(([0-9]+)\)_", r"\1_"),
    (rf"(?<=[0-9]) ?{SET}\{{ ?\(? ?base ([0-9]{{1,2}}) ?\)? ?\}}$", r"_{\1}"),
    (r"_\{? ?" + SET + r"\{ ?(?:base )?([a-z]{2,8}|[0-9]{1,2})? ?\} ?([0-9]{0,2})\}?", lambda match: _base(match)),
    # Prose around an answer.
    (r"^" + SET + r"\{ ?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is)?:? ?\}", ""),
    (r"^" + SET + r"\{ ?([-+]?[0-9][0-9,.]*)( [A-Za-z .]+)\}$", r"\1\\text{\2}"),  # \text{12 ways}
    (r",? ?(?:" + SET + r"\{[ ,]*for (?:all|any|every|each)\b[^{}<>=]*\}|\\forall\b|\bfor all\b)[^0-9<>=]*$", ""),
    (r" ?\(?" + SET + r"\{ ?per ?cent(?:age)? ?\}\)?|(?<=[0-9]) ?per ?cent\b", r"\\%"),
    (
        rf"(?<=[0-9]) ?(?:{SET}\{{ ?({'|'.join(_MAGNITUDES)})\b ?([^{{}}]*)\}}|({'|'.join(_MAGNITUDES)})\b)",
        lambda match: _magnitude(match),
    ),
    # Inside a trigonometric function degrees are converted to radians; elsewhere they are dropped.
    (rf"\\(sin|cos|tan|cot|sec|csc) ?(?:\\left ?)?[({{]? ?{_DECIMAL} ?{_DEGREES}(?: ?(?:\\right ?)?[)}}])?", _RADIANS),
    (rf"{_DEGREES}(?: ?(?:[CF]\b|{SET}\{{ ?[CF] ?\}}))?", ""),
    (r"(-?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?(?:\{ ?([0-9]+) ?\}|([0-9]))", lambda match: _repeating(match)),
]
def _brackets(match: re.Match[str]) -> str:
    """Returns an interval such as ]0,1] with a round bracket at each open end."""
    return f"{'(' if match[1] == ']' else '['}{match[2]},{match[3]}{')' if match[4] == '[' else ']'}"


def _base(match: re.Match[str]) -> str:
    """Returns a number's base as a subscript in digits."""
    name = match[1] or match[2]
    if name in NUMBERS:
        name = str(NUMBERS.index(name))
    return f"_{{{name}}}" if name else ""


def _magnitude(match: re.Match[str]) -> str:
    """Returns a word such as million as a power of ten, with the words after it: `3 \\text{ million people}`."""
    rest = rf"\text{{ {match[2]}}}" if match[2] else ""
    return rf" \times 10^{{{_MAGNITUDES[match[1] or match[3]]}}}{rest}"


def _combinations(match: re.Match[str]) -> str:
    r"""Returns C_{10}^3 as \binom{10}{3}, unless there are none: then C is a variable."""
    above, below = match[1] or match[2], match[3] or match[4]
    if above.isdigit() and below.isdigit() and int(above) < int(below):
        return match[0]
    return rf"\binom{{{above}}}{{{below}}}"


def _repeating(match: re.Match[str]) -> str:
    """Returns a repeating decimal such as 0.1\\overline{6} as a fraction."""
    sign, whole, start, period = match[1], match[2] or "0", match[3], match[4] or match[5]
    below = (10 ** len(period) - 1) * 10 ** len(start)
    above = int(whole + start + period) - int(whole + start)
    return rf"{sign}\frac{{{above}}}{{{below}}}"


def normalize_answer(text: str) -> str:
    """Rewrites an answer, gold or predicted, into LaTeX that math-verify reads as intended.

    Removes dollars, thousands separators, spacing commands, units and a final full stop. Rewrites e-notation, Python's
    notation (`**`, `1./3`, `np.arcsin`), repeating decimals, unions of inequalities and common Unicode symbols.
    """
    text = to_latex(text)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    text = text.strip()
    if len(text) > MAX_ANSWER:
        return text
    text = names_to_latex(_unwrapped(text))
    for pattern, replacement in _READABLE:
        text = re.sub(pattern, replacement, text)
    text = text.strip()
    text = without_units(text)
    if _plain(text).lower() in NUMBERS:
        return str(NUMBERS.index(_plain(text).lower()))
    return (_union(text) or text).strip()


_WRAP = re.compile(
    r"\\(?:underline|uline|emph|texttt|textsf|mathtt|mathsf|colorbox\s*\{[^{}]*\}|fcolorbox\s*\{[^{}]*\}\s*\{[^{}]*\}"
    r"|bbox\s*\[[^\]]*\])\s*(?=\{)|\\(?:boxed|fbox)(?![A-Za-z])\s*"
)


def _unwrapped(text: str) -> str:
    """Removes braces, a box and a line under the whole text: {5} becomes 5."""
    text = _without_braces(text)
    while wrap := _WRAP.match(text):
        inner = text[wrap.end() :].strip()
        if inner.startswith("{") and _without_braces(inner) == inner:
            break  # only a part is wrapped
        text = _without_braces(inner)
    return text


def _without_braces(text: str) -> str:
    """Removes braces around the whole text."""
    if re.search(r"\\(?:choose|over|atop)\b", text):
        return text
    while text.startswith("{") and text.endswith("}") and not text.endswith(r"\}"):
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", text[:-1], re.DOTALL):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                return text  # {a}{b}
        text = text[1:-1].strip()
    return text


_RELATION = re.compile(r"\\(?:leqslant|geqslant|leq?|geq?|lt|gt)(?![a-z])|[<>]=?|=")

def _union(text: str) -> str | None:
    r"""Returns `x<2 \text{ or } x>3` as a union of intervals and "and" as an intersection; None for any other text."""
    pieces = CONNECTIVE.split(text)
    words = {word for i, word in enumerate(pieces) if i % 4 and word}
    sides = [_interval(piece) for piece in pieces[::4]]
    if len(sides) == 1 and sides[0] and len(re.findall(">|\\\\g", text)) == 2:
        return sides[0][1]  # 5 > x > 1; math-verify only reads 1 < x < 5
    if len(sides) < 2 or None in sides or len({side[0] for side in sides if side}) > 1:
        return None
    if all(side[1].startswith(r"\{") for side in sides if side):
        return None  # x=1 or x=2: a list
    if words <= {"or", "lor", "vee"}:
        return r" \cup ".join(side[1] for side in sides if side)
    if not words <= {"and", "land", "wedge"}:
        return None
    intervals = sorted((side[1] for side in sides if side), key=lambda side: side.startswith(r"(-\infty"))
    joined = r" \cap ".join(intervals)
    # x > 2 and x < 5: (2,\infty) \cap (-\infty,5), which math-verify does not simplify
    return re.sub(r"^([(\[].*),\\infty\) \\cap \(-\\infty,(.*[)\]])$", r"\1,\2", joined)


def _interval(piece: str) -> tuple[str, str] | None:
    r"""Returns (variable, interval) of one relation such as `x \le 3`, `2<x<5` or `x=1`; None for any other text."""
    ends = [end.strip() for end in _RELATION.split(piece)]
    signs = [
        sign if sign[0] in "<=>" else ("<" if sign[1] == "l" else ">") + "=" * ("e" in sign)
        for sign in _RELATION.findall(piece)
    ]
    if not all(ends) or not 2 <= len(ends) <= 3:
        return None
    if len(ends) == 3:
        if not re.fullmatch("[A-Za-z]", ends[1]) or signs[0][0] != signs[1][0] or signs[0] == "=":
            return None
        if signs[0][0] == ">":
            ends, signs = ends[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
        low, variable, high = ends
        return variable, f"{'[' if '=' in signs[0] else '('}{low},{high}{']' if '=' in signs[1] else ')'}"
    (left, right), sign = ends, signs[0]
    if not re.fullmatch("[A-Za-z]", left):
        left, right, sign = right, left, sign.translate(str.maketrans("<>", "><"))
    if not re.fullmatch("[A-Za-z]", left):
        return None
    if sign == "=":
        return left, rf"\{{{right}\}}"
    if sign[0] == "<":
        return left, rf"(-\infty,{right}{']' if '=' in sign else ')'}"
    return left, rf"{'[' if '=' in sign else '('}{right},\infty)"


_INTEGER = re.compile(r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+))(?:\.0*)?(?:_\{?[0-9]+\}?)?")
_WRAPPED = re.compile(SET + r"\{([A-Za-z .'()-]*)\}")
_CHOICE = re.compile(rf"{SET}\{{ ?\(?([A-Z])\)? ?\}}|\(([A-Z])\)")
_DENIED = r"\(?[a-z]\)?[.:, ]*(?:(?:is|was|can|looks|seems) ?)?(?:not|isn.?t|wasn.?t|wrong|incorrect|false|excluded)\b"
_CHOSEN = re.compile(
    rf"(?:option|choice|answer)?:? ?(?!.*\b(?:and|or)\b|.*\([a-z]\).*\([a-z]\)|{_DENIED})"
    r"(?:\(([a-z])\).*|([a-z])(?:[).:].*)?)",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"([0-9]{1,2})(?: ?: ?([0-5][0-9]))? *(?:([ap])\.? ?m\.?)?", re.IGNORECASE)
_BASE = re.compile(r"(?<=[0-9])_\{?([0-9]+)\}?")
_PRIME = re.compile(r"(?<=[A-Za-z0-9)}])'+(?![A-Za-z])|\\prime(?![a-z])")
_GAP = re.compile(r"(?<![A-Za-z_^0-9.])(?<![A-Za-z] )[0-9.]+ +[0-9]")
_DOTS = re.compile(r"\\[lc]?dots|\.\.\.")
_MONTH = re.compile(rf"\b({MONTHS})[a-z]*\b\.?", re.IGNORECASE)


def _words(text: str) -> list[str] | None:
    """Returns the sides (one or two, sorted) of an answer in words such as `even` or `MR=MC`; None for others."""
    wrapped = _WRAPPED.fullmatch(text)
    if not wrapped and not (re.fullmatch(r"[A-Za-z =]+", text) and re.search("[A-Za-z]{4}", text)):
        return None
    plain = (wrapped[1] if wrapped else text).lower()
    if re.search(r"\b(?:and|or)\b", plain):
        return None  # a list, for math-verify
    plain = re.sub(r"\b(?:an?|the) |(?<=[a-z]{3})s\b", "", plain.strip())
    return sorted(re.sub("[^a-z=]", "", plain).split("="))


def _plain(text: str) -> str:
    r"""Unwraps \text{...} and similar commands."""
    return re.sub(SET + r"\{([^{}]*)\}", r"\1", text).strip()


def _clock(text: str) -> tuple[int, int, str] | None:
    """Returns (hour, minute, "a", "p" or "") of a time of day with minutes or with am or pm; None for other texts."""
    match = _CLOCK.fullmatch(_plain(text))
    if not match or not (match[2] or match[3]):
        return None
    return int(match[1]), int(match[2] or 0), (match[3] or "").lower()


def _same_time(gold: tuple[int, int, str], answer: tuple[int, int, str]) -> bool:
    """Returns True if an answer is the gold answer's time of day; 15:45 is 3:45 pm."""
    if gold[2] and not answer[2] and answer[0] > 12:
        answer = answer[0] - 12, answer[1], "p"
    return gold[:2] == answer[:2] and gold[2] in ("", answer[2])


def _date(text: str) -> list[str] | None:
    """Returns the sorted parts of a date that names its month; None for other texts."""
    month = _MONTH.search(_plain(text))
    if not month or not re.search("[0-9]", text):
        return None
    rest = re.sub(r"(?<=[0-9])(?:st|nd|rd|th)\b|\bof\b", "", _plain(text).replace(month[0], " ").lower())
    return sorted(re.findall(r"\w+", rest) + [month[1].lower()])


def _choice(gold: str, answer: str) -> bool | None:
    """Returns True if the answer chooses the same letter as the gold answer; None if the gold answer is no choice."""
    letter = _CHOICE.fullmatch(gold)
    if not letter:
        return None
    chosen = _CHOSEN.fullmatch(_plain(answer))
    return chosen is not None and (chosen[1] or chosen[2]).upper() == (letter[1] or letter[2])


# A triangle or a segment of named points. \angle ABC is something else.
_FIGURE = re.compile(r"\\(?:var)?triangle ?[A-Z]{3}|\\overline ?\{ ?[A-Z]{2} ?\}|[A-Z]{2,3}")


def _same_figure(gold: str, answer: str) -> bool:
    r"""Returns True for \triangle ABC and ABC, or \overline{AB} and AB."""
    first, second = _FIGURE.fullmatch(gold), _FIGURE.fullmatch(answer)
    return bool(first and second) and "".join(re.findall("[A-Z]", gold)) == "".join(re.findall("[A-Z]", answer))


def compare_text(gold: str, answer: str) -> bool | None:
    """Returns True if two normalised answers are equal, False if they differ, None if text cannot decide."""
    if gold == answer:
        return bool(gold)
    if not (0 < len(gold) <= MAX_ANSWER and 0 < len(answer) <= MAX_ANSWER):
        return False
    # A base may be left out. math-verify drops bases and primes, and adds numbers with a space in between.
    if not set(_BASE.findall(answer)) <= (set(_BASE.findall(gold)) or {"10"}):
        return False
    left, right = _INTEGER.fullmatch(gold), _INTEGER.fullmatch(answer)
    if left and right:
        return int(left[1].replace(",", "")) == int(right[1].replace(",", ""))
    if any(len(mark.findall(gold)) != len(mark.findall(answer)) for mark in (_PRIME, _GAP)):
        return False
    if bool(_DOTS.search(gold)) != bool(_DOTS.search(answer)):
        return False
    gold, answer = with_colons(gold, answer)
    if has_ratio(gold) or has_ratio(answer):
        return same_ratio(gold, answer)
    if (same := _choice(gold, answer)) is not None:
        return same
    if _same_figure(gold, answer):
        return True
    times = _clock(gold), _clock(answer)
    if times[0] and (times[1] or math.gcd(*times[0][:2]) > 1):  # 3:45 could be a ratio in lower terms
        return times[1] is not None and _same_time(times[0], times[1])
    for form in (_words, _date):
        forms = form(gold), form(answer)
        if None not in forms:
            return forms[0] == forms[1]
    if says_more(gold, answer) or entries(gold) and answer.endswith(r"\}"):
        return False  # math-verify compares sets with tuples
    return None


def readings(gold: str, answer: str) -> list[tuple[str, str]]:
    r"""Returns pairs of texts, each one reading of two normalised answers. The answers match if any pair is equal.

    The first pair is the answers as they are. In further pairs every \pm is written out, and a column vector is a tuple
    if the other answer is a tuple.
    """
    gold, answer = with_colons(number_alone(gold), answer)
    answer = without_words(answer) if not _has_letters(gold) else answer
    golds, answers = [gold, *with_signs(gold)], [answer, *with_signs(answer)]
    if ("matrix" in gold) != ("matrix" in answer):
        golds, answers = ([_vector(text) for text in texts] for texts in (golds, answers))
    return [pair for pair in product(golds, answers) if max(map(len, pair)) <= MAX_ANSWER]


def _has_letters(text: str) -> bool:
    return bool(re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))


def _vector(text: str) -> str:
    """Returns a column vector as a tuple, and any other text unchanged."""
    column = re.fullmatch(r"\\begin\{[pb]?matrix\}([^&]*)\\end\{[pb]?matrix\}", text)
    return "(" + ", ".join(filter(None, map(str.strip, column[1].split(r"\\")))) + ")" if column else text


def with_signs(text: str) -> list[str]:
    r"""Returns a list with every \pm written out: with signs that change together, and with independent signs.

    Where an item has a \mp, its signs always change together.
    """
    count = len(re.findall(r"\\[pm][mp](?![a-z])", text))
    if not 1 <= count <= 4:
        return []
    inner = re.fullmatch(r"(?:\\left ?)?\\\{(.*?)(?:\\right ?)?\\\}", text)
    items = split(inner[1] if inner else text)
    together = [variant for item in items for variant in _vary(item, linked=True)]
    apart = [variant for item in items for variant in _vary(item, linked=r"\mp" in item)]
    return [", ".join(variants) for variants in ([together, apart] if together != apart else [together])]


def _vary(item: str, linked: bool) -> list[str]:
    """Returns the item once for each choice of its signs; `linked` signs change together."""
    parts = re.split(r"(\\pm|\\mp)(?![a-z])", item)
    signs = parts[1::2]
    if not signs:
        return [item]
    choices = [(1,) * len(signs), (-1,) * len(signs)] if linked else product((1, -1), repeat=len(signs))
    variants = []
    for choice in choices:
        written = [sign if i % 2 == 0 else "+" if (sign == r"\pm") == (choice[i // 2] > 0) else "-"
                   for i, sign in enumerate(parts)]  # fmt: skip
        variants.append(re.sub(r"(^|[(\[{,=]) ?\+", r"\1", "".join(written)).strip())
    return variants
