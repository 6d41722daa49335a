"""Units and other words after a number that do not change it."""

import re

from sgpo_jax.rewards.words import DOUBT, QUALIFIER

SET = r"\\(?:text|textbf|textrm|textit|textsf|textnormal|mbox|hbox|mathrm|mathbf|mathit|mathsf|operatorname)\s*"
# Units of two or more letters, which cannot be variables. For units of one letter see `without_words`.
_UNIT = (
    r"(?:(?:sq(?:uare|\.)?|cu(?:bic|\.)?) ?)?"
    r"(?:[cmkd]m|[km]g|lbs?|oz|ft|in|mi|yd|mph|kmh|km/h|m/s|k?Hz|hrs?|mins?|secs?|"
    r"(?:inch|foot|feet|yard|mile|(?:centi|milli|kilo|deci)?met(?:er|re)|(?:milli)?lit(?:er|re)|(?:kilo)?gram|pound|"
    r"ounce|hour|minute|second|day|week|month|year|degree|radian|cent|dollar|unit|point)(?:s|es)?|USD)"
)
_POWER = r"(?:\s*\^\s*\{?-?[0-9]\}?)?"
MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_TEXT = re.compile(r"\\(?:text|textbf|textit|mbox|hbox) ?\{(?! ?(?:and|or|to) ?\})[^{}]*[A-Za-z]{2}")
# In \text{} any words except an hour of the day or a month. Other fonts are also used for variables: there only units.
# A digit is allowed only as a power (cm2, m^2): any other says more than the number before it. So do signs. A single
# letter that is no unit may be a variable or a scale (5 \text{k}).
_SET_UNIT = (
    rf"(?:\\(?:text|mbox|hbox|textnormal) ?\{{(?! ?(?i:[ap]\.? ?m\b|(?:{MONTHS})[a-z]*))"
    r"(?! ?(?:[^\W\d_mghslLNJWVACF]|[bmt]n) ?\})(?:[^\W\d_]|[ .,/'()^%\\-]|(?<=[A-Za-z^])[23](?![0-9]))*\}"
    rf"|{SET}\{{ ?(?:[mghsL]|{_UNIT}){_POWER} ?\}})"
)
_SET_UNIT = rf"(?:{_SET_UNIT}|\\[dt]?frac ?\{{ ?{_SET_UNIT} ?\}} ?\{{ ?{_SET_UNIT}{_POWER} ?\}})"
_TRAILING = re.compile(
    rf"(?<=[0-9A-Za-z}})\]!]) ?(?:{_SET_UNIT}{_POWER}|(?<![A-Za-z]){_UNIT}{_POWER}(?![A-Za-z]))"
    rf"(?: ?(?:/|\\cdot|per) ?(?:{_SET_UNIT}|{_UNIT}|[hsm]){_POWER})?$",
)
_WORD = r"(?!(?:and|or)\b)[A-Za-z]"
_WORDS = re.compile(rf"(?<=[0-9}})]) (?:({_WORD}{{3,}})(?: {_WORD}{{2,}})*|[mghsL](?:\^\{{?[23]\}}?|/[hs])?)$")
# Names of variables and functions, which are no units.
_NAMES = (
    "alpha beta gamma delta epsilon zeta theta iota kappa lambda sigma tau upsilon phi chi psi omega rho sqrt sin cos "
    "tan cot sec csc log exp choose dots infinity inf nan"
).split()


def says_more(gold: str, answer: str) -> bool:
    """Returns True if an answer has words that the gold answer lacks and that may change it.

    math-verify would read such a word as a variable, which times zero is nothing.
    """
    return bool(DOUBT.search(answer) and not QUALIFIER.search(gold) or _TEXT.search(answer) and not _TEXT.search(gold))


# What a unit may be called, by its name here.
_CALLED = {
    name: called
    for names in (
        "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre kmh", "m meter metre",
        "in inch inche", "ft foot feet", "yd yard", "mi mile mph", "g gram", "kg kilogram", "mg milligram",
        "lb pound", "oz ounce", "L l liter litre", "mL ml milliliter millilitre", "h hr hour", "min minute",
        "s sec second", "day", "week", "month", "year", "degree", "radian rad", "cent", "dollar USD",
    )
    for called in names.split()[:1]
    for name in names.split()
}  # fmt: skip
_MEASURE = re.compile(
    rf"(?<=[0-9}})\]]) ?(?:{SET}\{{)? ?(?:(?:square|cubic|sq|cu)\b\.? ?)?"
    rf"(?:({'|'.join(sorted((name for name in _CALLED if len(name) > 1), key=len, reverse=True))})s?"
    rf"|(?<=\{{)([mghsLl])|(?<=\{{ )([mghsLl]))(?![A-Za-z])|^[-+]?[0-9.,/]+ ?([mghsLl])$"
)
_DEGREES = re.compile(rf"\^ ?\{{? ?\\circ ?\}}? ?(?:{SET}\{{ ?)?([CF](?![A-Za-z]))?")


def unit(text: str) -> str:
    """Returns the name of the first unit after a number, without its power; "" if there is no well-known one."""
    if degrees := _DEGREES.search(text):
        return f"degree {degrees[1] or ''}".strip()
    if re.search(r"\\\$", text):
        return "dollar"
    measure = _MEASURE.search(text)
    return _CALLED[next(filter(None, measure.groups()))] if measure else ""


def without_units(text: str) -> str:
    """Removes the units after an answer, unless a word changes its meaning."""
    if QUALIFIER.search(text):
        return text
    bare = _TRAILING.sub("", text)
    while bare != text:
        text, bare = bare, _TRAILING.sub("", bare)
    return text


def without_words(answer: str) -> str:
    """Removes words and units of one letter after an answer's number: `12 hours`, `27 m`."""
    match = None if QUALIFIER.search(answer) else _WORDS.search(answer)
    if not match:
        return answer
    word = (match[1] or "").lower()
    if word in _NAMES or len(word) > 2 and list(word) == sorted(set(word)):  # abc, xyz: variables
        return answer
    return answer[: match.start()]


def number_alone(gold: str) -> str:
    """Returns the number of a gold answer such as `72 beads`; any other text stays."""
    bare = without_words(gold)
    return bare if re.fullmatch(r"[-+]?[0-9][0-9.,/]*", bare) and re.search("[A-Za-z]{3}", gold) else gold
