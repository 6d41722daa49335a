"""The tables of docs/results/lab.md and docs/smollm2.md are what the committed rows say."""

import runpy
from itertools import takewhile

import pytest
from helpers.paths import ROOT

SCRIPT = runpy.run_path(str(ROOT / "benchmarks/lab/tables.py"))
TABLES = SCRIPT["tables"]()
PAGES = ("docs/results/lab.md", "docs/smollm2.md")


@pytest.mark.parametrize("title", TABLES)
def test_a_printed_table_follows_from_the_rows(title):
    """Compared as a whole, so that no line of another table stands in for a missing one, and none is left over."""
    lines = SCRIPT["markdown"](TABLES[title])
    printed = [(ROOT / name).read_text(encoding="utf-8").splitlines() for name in PAGES]
    expected = [lines[0], "|---" * len(TABLES[title][0]) + "|", *lines[1:]]
    starts = [text[at:] for text in printed for at, line in enumerate(text) if line == expected[0]]
    candidates = [list(takewhile(lambda line: line.startswith("|"), rest)) for rest in starts]
    assert expected in candidates, candidates or f"no table begins with {expected[0]!r}"
