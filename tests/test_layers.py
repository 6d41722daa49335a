"""The house: packages in layers, each importing only from those below; commands imported by nobody."""

import ast
import importlib
from pathlib import Path

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "sgpo_jax"
# From the ground up. A layer imports from the layers before it, a package also from itself.
LAYERS = (
    ("sharding",),
    ("losses", "divergences", "output_head", "logprobs"),
    ("config", "methods", "config_checks"),
    ("runtime",),
    ("cli", "stats", "rewards"),
    ("data", "report"),
    ("models",),
    ("rollout",),
    ("policy",),
    ("evaluation", "strategies"),
    ("training",),
    ("lab", "plan"),
    ("commands",),
    ("main", "evaluate", "export", "generate", "analyze", "replay"),  # doors, which start a command by its name
)
COMMANDS = LAYERS[-1]
# These are each one file, and one purpose in several: within such a layer the order of the names counts.
ORDERED = ("losses", "config")


def level(name: str) -> tuple[int, int]:
    """(layer, place within it) of a package or a module at the top."""
    (found,) = ((i, layer.index(name)) for i, layer in enumerate(LAYERS) if name in layer)
    return found


def room(file: Path) -> str:
    """The name of LAYERS that a file belongs to; `sgpo_jax/__main__.py` is a door."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0].replace("__main__", "main")


def imported(file: Path) -> list[str]:
    """Modules of the package that a file imports, as in "training.rl"."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return [module.removeprefix("sgpo_jax.") for module in modules if module.startswith("sgpo_jax.")]


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent != PACKAGE or file.stem != "__init__"]


def refused(file: Path, module: str) -> str:
    """Why a file may not import a module of the package, or ""."""
    here, there = room(file), module.split(".")[0]
    if there in COMMANDS:
        return f"imports the command {there}"
    if here == there and file.parent != PACKAGE:
        return ""
    (layer, place), (other, before) = level(here), level(there)
    within = layer == other and LAYERS[layer][0] in ORDERED and before < place
    return "" if other < layer or within else f"imports {module} of layer {other}, and is itself in layer {layer}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_from_layers_below(file):
    assert [why for module in imported(file) if (why := refused(file, module))] == []


def test_every_room_has_a_layer_and_every_layer_its_rooms():
    rooms = {room(file) for file in FILES}
    assert sorted(rooms) == sorted(name for layer in LAYERS for name in layer)
    assert len(LAYERS) == 14


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("losses.py", "training.rl"), ("losses.py", "divergences"), ("training/rl.py", "lab"),
        ("training/rl.py", "main"),
        ("runtime/lock.py", "cli"), ("lab/grid.py", "plan.search"), ("evaluation/sets.py", "strategies"),
    ],
)  # fmt: skip
def test_the_search_finds_an_import_that_runs_up(file, module):
    assert refused(PACKAGE / file, module)


def test_the_top_is_small_and_no_module_is_long():
    assert len(list(PACKAGE.glob("*.py"))) <= 16
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


PACKAGES = sorted(file.parent.relative_to(PACKAGE) for file in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_a_package_says_what_it_is_for_and_what_others_may_use(package):
    module = importlib.import_module(f"sgpo_jax.{package}")
    lines = (module.__doc__ or "").strip().splitlines()
    assert len(lines) == 1 and lines[0].endswith(".")
    exported = getattr(module, "__all__", [])
    assert all(hasattr(module, name) for name in exported)
    assert bool(exported) == (str(package) != "commands")  # which `cli` imports by name
