r"""Finds the answer in a response: the content of its last box."""

import re

_TOKEN = re.compile(
    r"\\(?:boxed|fbox)\s*\{"
    # A box without braces: \boxed 7, \boxed\frac12, \boxed A$. Before a word, as in "a \boxed as asked", it is no box.
    r"|\\(?:boxed|fbox)(?=[ \t]*(?:[-+−±]?[ ]?(?:\.?[0-9０-９]|\\(?!(?:boxed|fbox|end)\b)[A-Za-z]+|\\\{)"
    r"|[-+−±]?[ ]?[A-Za-z](?![A-Za-z])[ ]?(?:[-=^_+*/]|\$|\\[)\]]|\.?[ \t]*(?:\n|\Z))"
    r"|[(\[][ ]?[-+−]?[ ]?[0-9\\]|[√π∞½]))"
    # An escaped character (\{ opens no group) or a brace. In `\\boxed` the first \ is a slip.
    r"|\\(?:\\(?!boxed|fbox)|[^\\])|[{}]",
    re.DOTALL,
)
_BLANK = re.compile(r"(?:[\s.…_~$]|\\[ ,;:!_]|\\q?quad\b|\\[lcvd]?dots[a-z]?\b|\\(?:text|mbox)\{\s*\})*")
# Where the content of a box without braces ends: with its formula, its sentence or its line.
_END = re.compile(r"\\[)\]]|\\\\?(?:boxed|fbox)\b|\\.|[{}$\n]|[.!?](?=\s|\Z)", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""Returns the content of the last \boxed or \fbox after the last "</think>"; None if there is no answer.

    The box that closes last counts; of nested boxes it is the outermost. A box without braces holds the rest of its
    formula, so that \boxed 7\sqrt2 is not read as 7. A blank box (`\boxed{}`, `\boxed{...}`) counts only if there is no
    other. There is no answer in an unfinished thought, nor if the text ends inside a box that opened after all others.
    The time is linear in the length of the text.
    """
    text = text.rpartition("</think>")[2]
    if text.lstrip().startswith("<think>"):
        return None  # an unfinished thought
    last: slice | None = None
    blank: slice | None = None
    opened: list[re.Match[str]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else token
            if len(start[0]) > 1:  # a box, not a plain group
                if _BLANK.fullmatch(text, start.end(), token.start()):
                    blank = slice(start.end(), token.start())
                else:
                    last = slice(start.end(), token.start())
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token)
        elif len(token[0]) > 2:
            last = slice(token.end(), None)
    for start in opened:
        if len(start[0]) > 1 and start.start() >= (last.start if last else 0):
            if not _BLANK.fullmatch(text, start.end()):
                return None
            break
    if last is None:
        return None if blank is None else text[blank]
    return text[last] if last.stop is not None else _formula(text, last.start)


def _formula(text: str, start: int) -> str | None:
    """Returns the text from `start` to the end of its formula; None if it ends inside a group."""
    depth, end = 0, len(text)
    for token in _END.finditer(text, start):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}" and depth:
            depth -= 1
        elif token[0][0] != "\\" or token[0] in (r"\)", r"\]") or token[0].endswith(("boxed", "fbox")):
            end = token.start()
            break
    return text[start:end].strip() if depth == 0 else None
