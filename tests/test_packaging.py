"""The ranges of setup.py, at whose ends CI runs tests."""

import ast
import re
from importlib import metadata

import pytest
from helpers.paths import ROOT


def requirements() -> list[str]:
    """RUNTIME of setup.py."""
    (assigned,) = [
        node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RUNTIME"
    ]
    return ast.literal_eval(assigned)


def test_the_oldest_releases_are_the_lower_bounds():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    assert lines[1:] == [re.sub(r">=([\d.]+)(,.*)?$", r"==\1", requirement) for requirement in requirements()]


@pytest.mark.parametrize("requirement", requirements())
def test_what_is_installed_is_in_the_range(requirement):
    name, low, high = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", requirement).groups()
    found = version(metadata.version(name))
    assert version(low) <= found and (high is None or found < version(high))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
