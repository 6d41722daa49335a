"""docs/own_data.md, carried out on rows like those of GSM8K with a tiny model: training, questions, export, page."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import xla_flags
from helpers.paths import ROOT

from sgpo_jax.runtime.files import read_jsonl

PAGE = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
TINY = {
    "model.source": "scratch", "model.tokenizer": "words:train.jsonl;test.jsonl", "model.layers": 1,
    "model.hidden": 16, "model.heads": 2, "model.mlp": 16, "model.dtype": "float32", "data.system": "",
    "data.instruction": "", "data.max_prompt_tokens": 64, "sft.max_response_tokens": 32, "sft.steps": 2,
    "sft.batch": 4, "sft.micro_batch": 4, "rl.batch": 4, "rl.micro_batch": 4, "rl.steps": 2, "rl.eval_every": 0,
    "rl.autonomous": 2, "rl.guided": 2, "rl.max_new_tokens": 2, "rl.reward": "my_reward:with_unit", "eval.limit": 3,
    "eval.batch": 4, "eval.max_new_tokens": 4, "data.decontaminate": False,
}  # fmt: skip
PROGRAM = """
import json, shlex, sys
from sgpo_jax.cli import main
for line in json.load(open("commands.json")):
    sys.argv = shlex.split(line)
    main()
"""


def block(marker):
    (code,) = re.findall(rf"^<!-- test: {re.escape(marker)} -->\n```\w+\n(.*?)^```$", PAGE, re.M | re.S)
    return code


def gsm8k(count, start=0):
    return [
        {"question": f"Ann has {i} bags of {i + 1} apples. How many apples?",
         "answer": f"{i} * {i + 1} = {i * (i + 1)}.\n#### {i * (i + 1)}", "unit": "apples",
         "strategy": "Equal groups: multiply."}
        for i in range(start, start + count)
    ]  # fmt: skip


def test_the_config_is_short_and_passes_the_check(tmp_path, monkeypatch):
    from sgpo_jax import config_checks
    from sgpo_jax.cli import COMMANDS, parsing

    code = block("mine.py")
    assert len(code.splitlines()) <= 30
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("")
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    config_checks.check(parsing.load("mine.py"))
    for line in block("commands").splitlines():  # every flag is known
        program, name, *arguments = shlex.split(line)
        if name == "train":
            assert program == "sgpo" and parsing.parse(COMMANDS[name], arguments)[1].workdir == "runs/mine"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which all commands of the page have run, one after the other."""
    place = tmp_path_factory.mktemp("own")
    for name, rows in {"gsm8k_train": gsm8k(40), "gsm8k_test": gsm8k(6, 50)}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("prepare.py", "my_reward.py", "mine.py"):
        (place / name).write_text(block(name))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.quick(1), "COLUMNS": "100",
    }  # fmt: skip
    subprocess.run([sys.executable, "prepare.py"], cwd=place, check=True, timeout=60)
    (place / "other.jsonl").write_text((place / "test.jsonl").read_text())
    rows = (place / "train.jsonl").read_text().splitlines()
    rows[0] = rows[0].replace("\\\\boxed{0}", "0")
    (place / "train.jsonl").write_text("\n".join(rows) + "\n")
    changes = " ".join(f"'--config.{name}={value}'" for name, value in TINY.items())
    commands = block("commands").replace("--config=mine.py", f"--config=mine.py {changes}").splitlines()
    (place / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=place, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place, done.stdout, done.stderr


@pytest.mark.slow
def test_the_page_runs_from_rows_to_an_exported_model(place):
    folder, output, errors = place
    assert "although: solution with a reward below 1" in " ".join(output.split())
    assert re.search(r"RL step 1: cut 100 %: .*rl\.max_new_tokens=2 .*--config\.rl\.max_new_tokens=8", output)
    assert max(map(len, output.splitlines())) <= 200
    run = folder / "runs/mine"
    assert {line["id"] for line in read_jsonl(next((run / "eval/after").glob("test_unguided_*.jsonl")))} == {
        "test/0", "test/1", "test/2"
    }  # fmt: skip
    results = json.loads((run / "evaluate/results.json").read_text())["results"]["unguided"]
    assert set(results) == {"test", "other"} and results["other"]["problems"] == 3
    answers = read_jsonl(folder / "answers.jsonl")
    assert [(line["id"], line["sample"]) for line in answers] == [(f"test/{i}", k) for i in range(6) for k in range(2)]
    assert {"response", "finish", "reward", "outcome", "unit"} <= set(answers[0])
    assert "Page: runs/mine/report.html" in output and (run / "report.html").is_file()
    assert (folder / "my-model/README.md").is_file() and (folder / "my-model/model.safetensors").is_file()
    assert "runs/mine after" in errors
