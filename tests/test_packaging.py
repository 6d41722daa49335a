"""The ranges of setup.py, at whose ends CI runs tests; the version; the wheel and the archive."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata

import pytest
from helpers.paths import ROOT

import sgpo_jax


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


def test_the_version_is_said_once():
    assert re.search(r"^## (\S+?)(,|$)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == sgpo_jax.__version__
    assert f"\nversion: {sgpo_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "version=VERSION" in (ROOT / "setup.py").read_text()


@pytest.mark.slow
def test_the_wheel_and_the_archive_have_all_that_a_command_needs(tmp_path):
    """Both are built from a clean copy of the tree; the wheel is unpacked and run without the checkout."""
    tree = tmp_path / "tree"
    left_behind = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests")
    shutil.copytree(ROOT, tree, ignore=left_behind)
    built = subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"],
        cwd=tree, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if "No module named 'setuptools'" in built.stderr or "invalid command 'bdist_wheel'" in built.stderr:
        pytest.skip("needs setuptools >= 70.1, which builds the wheel")
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,), (archive,) = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "installed")
    with tarfile.open(archive) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    installed = tmp_path / "installed"
    for name in ("py.typed", "report/templates/report.html", "rewards/worker.py", "commands/train.py"):
        assert (installed / "sgpo_jax" / name).is_file() and f"sgpo_jax/{name}" in inside
    (entries,) = installed.glob("*.dist-info/entry_points.txt")
    assert "sgpo = sgpo_jax.cli:main" in entries.read_text()
    program = "from sgpo_jax.cli import main; import sys; sys.argv = ['sgpo', 'train', '--help']; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert done.returncode == 0 and "--config.rl.delta=1.0" in done.stdout, done.stderr
