"""Habits of the source that a machine can see: few arguments, docstrings that open with a verb, things said once."""

import ast
import re

import pytest
from helpers.paths import ROOT

FILES = sorted((ROOT / "sgpo_jax").rglob("*.py"))
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
MOST_ARGUMENTS = 8
OPENINGS = re.compile(r"(What|Whether|Of|Where|How|As|The same)\b")
# text -> the modules that may have it; everybody else calls them
SAID_ONCE = {
    "os.fsync(": {"sgpo_jax/runtime/files.py", "sgpo_jax/runtime/journal.py"},  # the journal appends under its own lock
    "process_index() == 0": {"sgpo_jax/runtime/distributed.py"},
    'shape["data"] * mesh.shape["fsdp"]': {"sgpo_jax/sharding.py"},
    "json.loads(configs.to_json": set(),
    "timedelta(seconds": {"sgpo_jax/runtime/progress.py"},
}


def functions(text):
    """(name, number of arguments without self, first line of the docstring or None) of all public functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            yield node.name, len(names), ast.get_docstring(node)


def undocumented(text):
    """Public functions and classes at the top of a module that have no docstring."""
    kinds = ast.FunctionDef | ast.ClassDef
    nodes = [node for node in ast.parse(text).body if isinstance(node, kinds) and not node.name.startswith("_")]
    return [node.name for node in nodes if not ast.get_docstring(node)]


def badly_opened(text):
    """Docstrings that open with a word that says nothing yet."""
    kinds = ast.FunctionDef | ast.ClassDef | ast.Module
    docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [doc.splitlines()[0] for doc in docs if OPENINGS.match(doc)]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_public_functions_have_few_arguments(file):
    assert [(name, count) for name, count, _ in functions(file.read_text()) if count > MOST_ARGUMENTS] == []


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_public_functions_and_classes_say_what_they_do(file):
    assert undocumented(file.read_text()) == []
    assert badly_opened(file.read_text()) == []


@pytest.mark.parametrize("text", SAID_ONCE)
def test_what_is_said_once_stays_in_its_place(text):
    assert {name for name, file in zip(NAMES, FILES, strict=True) if text in file.read_text()} <= SAID_ONCE[text]


def test_the_loops_fit_on_a_screen():
    for name in ("rl", "sft"):
        tree = ast.parse((ROOT / f"sgpo_jax/training/{name}.py").read_text())
        (train,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
        assert train.end_lineno - train.lineno + 1 <= 50


def test_the_searches_find_what_they_look_for():
    many = ", ".join(f"a{i}" for i in range(9))
    assert [count for _, count, _ in functions(f"def f({many}): pass\nclass C:\n    def g(self, *, b): pass")] == [9, 1]
    assert undocumented("def f(): pass\ndef _g(): pass\nclass C: pass") == ["f", "C"]
    assert badly_opened('def f():\n    """What it is."""\ndef g():\n    """Asks."""') == ["What it is."]
