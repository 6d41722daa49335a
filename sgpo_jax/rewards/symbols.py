"""Unicode and plain text as LaTeX: tables for symbols and names, compatibility forms (NFKC) for the rest."""

import re
import unicodedata

_TABLE = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "‒": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∙": r"\cdot ", "÷": r"\div ", "∕": "/", "⁄": "/", "∶": ":", "∗": "*", "∣": "|", "π": r"\pi ", "°": r"^\circ ",
    "º": r"^\circ ", "˚": r"^\circ ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
    "⌉": r"\rceil ", "△": r"\triangle ", "∠": r"\angle ", "¬": r"\lnot ", "…": r"\ldots ", "、": ",",
    "¢": r"\text{ cents}", "€": "", "£": "", "¥": "",
    "\u00ad": "", "\u200b": "", "\u2060": "", "\ufeff": "", "\u2062": r"\cdot ", "\u2063": ",",
}  # fmt: skip
# Names that stand as plain text: pi/3, exp(2), log_2(3). A function is one only before its argument.
_CONSTANT = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(?:cbrt|(sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|exp|log|ln))(?= ?[(_^{0-9])"
)
_RAISED = re.compile(r"([⁺⁻]?[⁰¹²³⁴-⁹ⁿⁱ]+)|([₊₋]?[₀-₉]+)|([^\x00-\x7f])")


def to_latex(text: str) -> str:
    """Writes Unicode symbols in LaTeX: ≤, ½, x², 10⁻³, x₁, full-width and mathematical letters and digits.

    Characters that have no plain form stay, as do circled digits. The time is linear.
    """
    return text if text.isascii() else _RAISED.sub(_plain, unicodedata.normalize("NFC", text))


def names_to_latex(text: str) -> str:
    """Writes the names of functions and of pi, where they stand as plain text, in LaTeX."""
    text = _CONSTANT.sub(r"\\pi ", text)
    return _FUNCTION.sub(lambda match: rf"\{match[1]}" if match[1] else r"\sqrt[3]", text)


def _plain(match: re.Match[str]) -> str:
    for mark, group in (("^", match[1]), ("_", match[2])):
        if group:
            return f"{mark}{{{_compatible(group)}}}" if len(group) > 1 else mark + _compatible(group)
    character = match[0]
    if character in _TABLE:
        return _TABLE[character]
    kind, *parts = unicodedata.decomposition(character).split() or [""]
    if kind in ("<circle>", "<square>"):
        return character
    if kind == "<fraction>" and len(fraction := _compatible(character).split("/")) == 2 and all(fraction):
        return rf"\frac{{{fraction[0]}}}{{{fraction[1]}}}"
    return _compatible(character)


def _compatible(text: str) -> str:
    """Returns NFKC of a text, with the table applied to what it brings (a minus sign, a degree sign)."""
    return "".join(_TABLE.get(character, character) for character in unicodedata.normalize("NFKC", text))
