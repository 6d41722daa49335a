"""The pages: the README's blocks run as they stand, links lead somewhere, and no line is too long to read."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

from sgpo_jax.cli import COMMANDS

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIDTH = 100


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines outside of code blocks, fenced or indented."""
    lines, inside = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            lines.append((number, line))
    assert not inside, f"{name(page)}: a code block has no end"
    return lines


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    titles = [line.lstrip("# ") for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    """Targets of links and images; a link's text may be broken over lines."""
    text = "\n".join(line for _, line in prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def broken(page: Path, link: str) -> str:
    """Why a relative link leads nowhere, or ""."""
    target, _, anchor = link.partition("#")
    path = (page.parent / target).resolve() if target else page
    if not path.exists():
        return f"{link}: there is no such file"
    if anchor and path.suffix == ".md" and anchor not in anchors(path):
        return f"{link}: there is no such heading"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    relative = [link for link in links(page) if not link.startswith(("http://", "https://", "mailto:"))]
    assert [why for link in relative if (why := broken(page, link))] == []


def test_the_search_for_broken_links_finds_them():
    assert links(README)
    assert broken(README, "docs/nothing.md") and broken(README, "docs/faults.md#nothing")
    assert broken(README, "docs/faults.md#limits") == ""


# `x.py`, also with a folder before it: a file of the package, of the repository, or of the user's own.
MENTION = re.compile(r"`((?:[\w.]+/)*[\w.]+\.(?:py|sh|txt|toml|cff))`")
# Files that a page tells the reader to write, and a name that several packages have.
OWN = {"example.py", "my_rewards.py", "__main__.py"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_source_files_that_are_named_exist(page):
    places = (ROOT, ROOT / "sgpo_jax", page.parent)
    named = {mention for _, line in prose(page) for mention in MENTION.findall(line)} - OWN
    missing = [mention for mention in named if not any((place / mention).is_file() for place in places)]
    missing = [mention for mention in missing if "/" in mention or not list((ROOT / "launch").glob(mention))]
    assert missing == []


def test_the_readme_fits_into_the_first_minute():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_short(page):
    """Tables, code, and lines that hold one link or nothing that could be broken are free."""
    long = [(number, line) for number, line in prose(page) if len(line) > WIDTH]
    free = ("|", "    ", "![")
    assert [number for number, line in long if not line.startswith(free) and len(line.split()) > 1] == []


def block(marker: str) -> str:
    """The fenced block after an HTML comment of the README."""
    pattern = rf"^<!-- {re.escape(marker)} -->\n```\w+\n(.*?)^```$"
    (code,) = re.findall(pattern, README.read_text(encoding="utf-8"), re.M | re.S)
    return code


def test_the_losses_can_be_reused_as_the_readme_says():
    """The block defines all that it uses, and prints the numbers in the comment beside its print."""
    code = block("test: losses")
    assert "clipped_surrogate" in code and "distillation_loss" in code
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    printed = re.findall(r"\d+\.\d{3}", result.stdout)
    promised = re.findall(r"\d+\.\d{3}", code[code.rindex("  #") :])
    assert len(printed) == 2 and printed == promised


def test_the_readme_has_the_blocks_that_ci_runs():
    assert "pip install -e ." in block("ci: quickstart") and "pytest" in block("ci: test")


def test_the_readme_shows_every_command_and_package():
    text = README.read_text(encoding="utf-8")
    package = ROOT / "sgpo_jax"
    doors = [path for path in package.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    doors += package.glob("*/__main__.py")
    start = re.compile(r'start\("(\w+)", cli\.COMMANDS\["\1"\]\)')
    opened = [start.findall(path.read_text()) for path in doors if path != package / "__main__.py"]
    assert sorted(opened) == [[name] for name in sorted(COMMANDS)]
    assert [name for name in COMMANDS if f"\n| `{name} --" not in text] == []
    packages = [path.parent.name for path in package.glob("*/__init__.py")]
    assert [package for package in packages if not re.search(rf"(^|; ){package}/ +\w", text, re.M)] == []


def test_the_layers_are_those_that_are_tested():
    """CONTRIBUTING.md shows the list LAYERS of test_layers.py, with a line for each layer."""
    module = ast.parse((ROOT / "tests/test_layers.py").read_text(encoding="utf-8"))
    (layers,) = [
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    ]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", text, re.M))
    assert list(rows) == [str(number) for number in range(1, len(layers) + 1)]
    shown = [set(re.findall(r"`(\w+)`", row)) for row in rows.values()]
    assert [set(names) - named for names, named in zip(layers, shown, strict=True)] == [set()] * len(layers)
