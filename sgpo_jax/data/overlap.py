"""The text of problems as words and sentences, in any script, for finding what two of them share.

Case, accents, white space, full-width forms and LaTeX layout do not count. In scripts that write no spaces (Chinese,
Japanese, Thai, Lao, Burmese, Khmer) every character is a word of its own, and counts as half of one in a run.
"""

import re
import unicodedata

RUN = 13  # words in a row that make two problems the same if both have them
SHORT = 4  # words, numbers and marks; a shorter problem is not looked for inside a longer text

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# LaTeX that changes only the layout of a text: spaces, delimiters, sizes of fractions and brackets.
_LAYOUT = re.compile(r"\\(?:[,;:! ()\[\]]|(?:quad|qquad|left|right|displaystyle)(?![a-z]))|[$~]")
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_WIDE = re.compile(r"[\u3000\uff01-\uffee]+")
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+|\d+|[^\w\s]|_")
_HALF = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
# Where a sentence ends, or a frame around a problem: a mark before white space, a line, a tag, signs of emphasis.
_END = re.compile(
    r"(?<=[^\W\d_])[!:]+(?=\s|\Z|[^\W\d_]|\*\*)|[.?:;…]+[\"'”’»)]*(?=\s|\Z|\*\*|__|</)"
    r"|[。？！：；؟।「」『』“”«»]+|[\r\n]+[#>\-\s]*|</?[a-z_]{2,}>|\*\*|__|^[#>\s]+"
)


def _plain(text: str) -> str:
    """Removes case, accents, full-width forms and LaTeX layout."""
    if not text.isascii():
        text = unicodedata.normalize("NFD", _WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text))
        text = "".join(character for character in text if unicodedata.category(character)[0] != "M")
    return _LAYOUT.sub(" ", _FRACTION.sub(r"\\frac", text.casefold()))


def key(problem: str) -> str:
    """Returns a problem without case, spaces and LaTeX layout. Two problems with the same key are duplicates."""
    return " ".join(_TOKEN.findall(_plain(problem)))


def words(problem: str) -> list[str]:
    """Returns the words and numbers of a problem, without case, punctuation and LaTeX layout."""
    return _WORD.findall(_plain(problem))


def runs(problem: str) -> list[tuple[str, ...]]:
    """Returns the different runs of 13 words of a problem, or of 26 characters of a script without spaces."""
    sequence = words(problem)
    if not _HALF.search(problem):
        return list(dict.fromkeys(zip(*(sequence[i:] for i in range(RUN)), strict=False)))
    halves = [1 if _HALF.match(word) else 2 for word in sequence]
    found: dict[tuple[str, ...], None] = {}
    end = weight = 0
    for start, half in enumerate(halves):
        while weight < 2 * RUN and end < len(sequence):
            weight += halves[end]
            end += 1
        if weight < 2 * RUN:
            break
        found[tuple(sequence[start:end])] = None
        weight -= half
    return list(found)


def sentences(problem: str) -> tuple[str, ...]:
    """Returns the keys of a problem's sentences. Those of a short problem inside a frame are some of the frame's."""
    # Formulas in dollars lose their signs first: "of $x$." ends a sentence.
    pieces = _END.split(_plain(_WIDE.sub(_keep_marks, problem)))
    return tuple(filter(None, (" ".join(_TOKEN.findall(piece)) for piece in pieces)))


def _keep_marks(match: re.Match[str]) -> str:
    """Puts a space after full-width marks, so that they end a sentence after they have become narrow."""
    return re.sub(r"([！：；？．])", r"\1 ", match[0])
