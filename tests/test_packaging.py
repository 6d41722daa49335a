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


def test_a_module_imports_only_from_levels_below_its_own():
    """The levels are those of CONTRIBUTING.md, which has every module."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    levels = {name: int(level) for level, names in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", names)}
    package = ROOT / "sgpo_jax"
    for file in package.rglob("*.py"):
        name = file.stem if file.parent == package else file.parent.name
        imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        for node in imports if file.stem != "__init__" else []:
            top, *below = str(node.module).split(".")
            used = below[:1] or [alias.name for alias in node.names] if top == package.name else []
            assert all(levels[other] < levels[name] for other in used if other != name), (file, used)
