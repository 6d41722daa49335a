"""Tables on the terminal, and as text for a report."""

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Prints a table and returns the same text, for a report at the end of a run.

    Args:
        title: printed above the table.
        columns: headings; the first column is aligned left, the others right.
        rows: one cell for each column, shown with `str`.

    Raises:
        ValueError: a row's number of cells is not the number of columns.
    """
    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {row!r} has {len(row)} cells for {len(columns)} columns")
        drawn.add_row(*(Text(str(cell)) for cell in row))
    text = io.StringIO()
    Console(file=text, width=200).print(drawn)
    print(text.getvalue(), flush=True)
    return text.getvalue()
