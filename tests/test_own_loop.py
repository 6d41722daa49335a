"""The losses in a loop of one's own: the example learns, and the notebooks run from top to bottom."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers import xla_flags
from helpers.paths import ROOT
from helpers.runs import TINY

NOTEBOOKS = {
    "own_loop": {"warm_up_steps, steps = 400, 50": "warm_up_steps, steps = 20, 2"},
    "quickstart": {
        'Path("/tmp/quickstart-notebook")': 'Path("run").absolute()',
        "changes = {}": f"changes = {TINY | {'rl.steps': 2, 'sft.steps': 2, 'sft.validate_every': 2}}",
    },
}


def environment():
    return os.environ | {"XLA_FLAGS": xla_flags.quick(1), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--nnx"]], ids=["plain JAX", "Flax NNX"])
def test_sgpo_learns_faster_than_grpo_in_the_example(flags):
    done = subprocess.run(
        [sys.executable, "examples/own_loop.py", *flags], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {line.split()[0]: float(line.split()[3].rstrip(",")) for line in done.stdout.splitlines()}
    assert found["warm-up"] < 0.6 and found["warm-up"] < found["GRPO"] < found["SGPO"]


def test_the_notebooks_have_no_output_and_the_cells_that_the_test_changes():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)
    for name, changes in NOTEBOOKS.items():
        cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]
        assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
        (first,) = ("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
        assert all(old in first for old in changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(tmp_path, name, monkeypatch):
    """With fewer steps than it has: its parameters are changed."""
    for package in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("needs the extra 'docs'")
    import nbclient
    import nbformat

    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("Path.cwd()", f"Path({str(ROOT)!r})")
        for old, new in NOTEBOOKS[name].items():
            cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert outputs[-1].output_type == "stream" and ("image/png" in kinds) == (name == "quickstart")
