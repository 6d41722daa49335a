"""The tables of docs/results/lab.md and docs/smollm2.md are what the committed rows say."""

import itertools
import json
import runpy
import sys
from itertools import takewhile

import numpy as np
import pytest
from helpers.paths import ROOT

sys.path.append(str(ROOT / "benchmarks/lab"))  # as where the script is run
SCRIPT = runpy.run_path(str(ROOT / "benchmarks/lab/tables.py"))
TABLES = SCRIPT["tables"]()
CURVES = runpy.run_path(str(ROOT / "benchmarks/lab/why.py"))
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


def test_the_curves_of_the_hard_worlds_are_those_of_their_rows():
    rows = {(row["world"], row["method"], row["seed"]): row for row in SCRIPT["read"]("anchored", "parts")}
    curves = [json.loads(line) for line in CURVES["STORED"].read_text().splitlines()]
    assert [(c["world"], c["method"]) for c in curves] == [*itertools.product(CURVES["WORLDS"], CURVES["METHODS"])]
    compared = 0
    for curve in curves:
        assert {len(curve[metric]) for metric in CURVES["METRICS"]} == {120}
        row = rows.get((curve["world"], curve["method"], 1))
        for metric in CURVES["METRICS"] if row else ():
            compared += 1
            assert np.mean(curve[metric]) == pytest.approx(row[f"mean_{metric}"], rel=2e-3, abs=1e-5)
    assert compared == 4 * 3 * 4, "all but those of SGPO, which has other rates there"
