"""The promises of SECURITY.md about the source; those about behaviour are tested in the other modules."""

import ast

import numpy as np
import pytest
from helpers.paths import ROOT

FILES = sorted([*ROOT.glob("sgpo_jax/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("benchmarks/*.py")])
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "tarfile", "zipfile"}
NAMES = {"eval", "exec", "compile", "__import__"}  # the builtins; a method of these names is another thing
METHODS = {"system", "popen", "unpack_archive", "load_module", "read_pickle", "sympify", "parse_expr"}
SHELLS = {"run", "Popen", "call", "check_call", "check_output"}
# Code by name or path: of the user's own reward function and config, never of a model, a row or a reply; and modules
# of this package that its own tables name.
IMPORTS = {
    ("sgpo_jax/rewards/worker.py", "import_module"), ("sgpo_jax/cli/parsing.py", "run_path"),
    ("sgpo_jax/cli/entry.py", "import_module"), ("sgpo_jax/cli/lazy.py", "import_module"),
}  # fmt: skip


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(text: str, name: str = "module.py") -> list[str]:
    """Returns everything forbidden in a source file, as "line: name"."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{node.lineno}: import {m}" for m in modules if m.split(".")[0] in MODULES]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            found.append(f"{node.lineno}: {dotted(node)}")
        if not isinstance(node, ast.Call):
            continue
        function, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        last = function.rpartition(".")[2] or (node.func.attr if isinstance(node.func, ast.Attribute) else "")
        if function in NAMES or (last in METHODS and "." in function):
            found.append(f"{node.lineno}: {function}")
        if last in ("import_module", "run_path", "run_module") and (name, last) not in IMPORTS:
            found.append(f"{node.lineno}: {function}")
        if last in ("load", "loadtxt", "genfromtxt") and function.split(".")[0] in ("np", "numpy", "jnp"):
            if not is_constant(keywords.get("allow_pickle"), False):
                found.append(f"{node.lineno}: {function} without allow_pickle=False")
        if function.split(".")[0] == "torch" and last == "load":
            found.append(f"{node.lineno}: {function}")
        if last in SHELLS and "shell" in keywords and not is_constant(keywords["shell"], False):
            found.append(f"{node.lineno}: {function} with a shell")
        if "trust_remote_code" in keywords and not is_constant(keywords["trust_remote_code"], False):
            found.append(f"{node.lineno}: {function} with trust_remote_code")
        if last == "from_pretrained" and not is_constant(keywords.get("trust_remote_code"), False):
            found.append(f"{node.lineno}: {function} without trust_remote_code=False")
        if "allow_pickle" in keywords and not is_constant(keywords["allow_pickle"], False):
            found.append(f"{node.lineno}: {function} with allow_pickle")
    return found


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_source_has_no_pickle_no_eval_and_no_code_of_others(file):
    assert findings(file.read_text(), str(file.relative_to(ROOT))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import yaml", "yaml.load(x)", "from tarfile import open as o",
        "eval(x)", "exec(x)", "__import__(x)", "os.system(x)", "sympy.sympify(x)", "shutil.unpack_archive(x)",
        "np.load(x)", "np.load(x, allow_pickle=True)", "numpy.load(x, allow_pickle=flag)", "torch.load(x)",
        "subprocess.run(x, shell=True)", "importlib.import_module(x)", "runpy.run_path(x)",
        "AutoTokenizer.from_pretrained(x)", "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        "load_dataset(x, trust_remote_code=flag)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(text):
    assert len(findings(text)) >= 1


def test_the_search_leaves_alone_what_is_fine():
    fine = "np.load(x, allow_pickle=False)\nmodel.eval()\njit(f).lower(x).compile()\nsubprocess.run(x)\njson.load(x)\n"
    assert findings(fine) == []


def test_a_saved_batch_opens_without_pickle(tmp_path):
    """Skipped batches are the only files of a run that numpy could pickle."""
    from sgpo_jax.training import skipped_batch

    skipped_batch.write(tmp_path / "batch.npz", skipped_batch.Skipped("rl", 1, ["a"], {"tokens": np.arange(3)}))
    with np.load(tmp_path / "batch.npz", allow_pickle=False) as kept:
        assert kept["batch/tokens"].tolist() == [0, 1, 2] and kept["ids"].tolist() == ["a"]


def test_model_folders_come_from_the_hub_without_code_or_pickles():
    from sgpo_jax.policy.policy import _WANTED

    assert not [pattern for pattern in _WANTED if pattern.endswith((".py", ".bin", ".pt", ".pth", ".pkl", "*"))]
