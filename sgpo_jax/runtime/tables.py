"""Tables on the terminal, in its width, and as text for a report."""

import io
import shutil
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 200  # columns of a table in a file, and where there is no terminal
_ASCII = str.maketrans("┏┳┓┡╇┩└┴┘╺╸┃│━─", "+++++++++++||--")  # for an output that has no lines
_NAME = 20  # columns to which the first cell of a line may be broken inside a word


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Prints a table, on a terminal in its width, and returns it in full width, for a report at the end of a run.

    Args:
        title: printed above the table.
        columns: headings; the first column is aligned left, the others right.
        rows: one cell for each column, shown with `str`.

    Raises:
        ValueError: a row's number of cells is not the number of columns.
    """
    lines = [[str(cell) for cell in row] for row in rows]
    for line in lines:
        if len(line) != len(columns):
            raise ValueError(f"row {line!r} has {len(line)} cells for {len(columns)} columns")
    text = _drawn(title, columns, lines, WIDTH)
    width = shutil.get_terminal_size((WIDTH, 50)).columns if sys.stdout.isatty() else WIDTH
    shown = fitting(title, columns, lines, width)
    print(shown if _draws_lines() else shown.translate(_ASCII), flush=True)
    return text


def fitting(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> str:
    """Returns a table in at most so many columns of a terminal.

    Cells are broken between words, the first of a line also inside a word. Where not even that makes them fit side by
    side, every cell gets a line of its own.
    """
    text = _drawn(title, columns, lines, WIDTH)
    if max(map(len, text.splitlines())) <= width:
        return text
    cells = zip(columns, *lines, strict=True)
    words = [max(len(word) for cell in column for word in (*cell.split(), "")) for column in cells]
    out = io.StringIO()
    console = Console(file=out, width=width, force_jupyter=False)
    if min(words[0], _NAME) + sum(words[1:]) + 2 * (len(words) - 1) <= width:
        console.print(_table(title, columns, lines, wrap=True))
    else:
        console.print(Text(title))
        for line in lines:
            console.print()
            for column, cell in zip(columns, line, strict=True):
                console.print(Text(f"{column}: {cell}" if column else cell))
    return out.getvalue()


def _draws_lines() -> bool:
    """Returns whether standard output has characters for lines."""
    try:
        "┏─".encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _drawn(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width, force_jupyter=False).print(_table(title, columns, lines))
    return text.getvalue()


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], wrap: bool = False) -> Table:
    style = {"box": box.SIMPLE_HEAD, "padding": 0, "show_edge": False} if wrap else {}
    drawn = Table(title=title, title_justify="left", **style)  # type: ignore[arg-type]
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=not wrap, overflow="fold")
    for line in lines:
        drawn.add_row(*map(Text, line))
    return drawn
