"""The front of the commands: help and typos without JAX, the config of a run, added sets, Ctrl-C, tables that fit."""

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from sgpo_jax import cli
from sgpo_jax import config as configs
from sgpo_jax.cli import COMMANDS, fields, help, parsing
from sgpo_jax.cli import entry as starting
from sgpo_jax.runtime import tables

QUICKSTART = "--config=configs/quickstart.py"
# The modules that cost the seconds before the first line.
HEAVY = ("jax", "numpy", "transformers", "matplotlib", "orbax", "flax")
PROGRAM = f"""
import sys
from sgpo_jax.cli import main
sys.argv = ["sgpo", *sys.argv[1:]]
try:
    main()
finally:
    loaded = [name for name in {HEAVY} if name in sys.modules]
    print("LOADED", loaded, file=sys.stderr)
"""
LIGHT = {
    "overview": (["--help"], 0, "sgpo COMMAND"),
    "version": (["--version"], 0, "sgpo_jax "),
    "a command's help": (["train", "--help"], 0, "--config.rl.autonomous=8"),
    "a config's help": (["lab", "--help", "--config=configs/lab.py"], 0, "--config.lab.methods=('sft', 'grpo',"),
    "a package's help": (["plan", "--help"], 0, "--topology=TEXT"),
    "wrong command": (["trian"], 1, "trian: is not a command (did you mean train?)"),
    "wrong flag": (["train", QUICKSTART, "--workdri=x"], 1, "Did you mean: workdir"),
    "wrong field": (["train", QUICKSTART, "--workdir=x", "--config.rl.bach=3"], 1, "did you mean batch?"),
    "wrong method": (["train", "--config=configs/quickstart.py:gpro", "--workdir=x"], 1, "must be one of sgpo"),
    "no workdir": (["train", QUICKSTART], 1, "--workdir: must be given"),
    "no config": (["train", "--workdir=x"], 1, "--config: must be given"),
    "no run": (["export", "--workdir=nowhere", "--to=x"], 1, "--workdir=nowhere: there is no config.json"),
}


@pytest.fixture(scope="module")
def answers():
    """Returns {name: (exit code, stdout, stderr)} of commands that are all answered without JAX."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "90"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {
        name: subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, env=environment, **pipes)
        for name, (arguments, _, _) in LIGHT.items()
    }
    return {name: (*process.communicate(timeout=120), process.returncode) for name, process in running.items()}


@pytest.mark.parametrize("name", LIGHT)
def test_help_and_typos_are_answered_before_anything_heavy_is_imported(answers, name):
    output, errors, code = answers[name]
    _, wanted, text = LIGHT[name]
    assert code == wanted and text in output + errors and "Traceback" not in errors, errors
    assert "LOADED []" in errors
    assert max(map(len, output.splitlines()), default=0) <= 90


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["train", "--version"]])
def test_an_output_that_nobody_reads_ends_it_without_a_word(arguments, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr("sys.argv", ["sgpo", *arguments])
    with open(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        cli.main()
        with pytest.raises(BrokenPipeError), starting.readable():
            raise BrokenPipeError("of a server")


def test_every_field_has_a_comment_and_is_shown():
    config = configs.base()
    names = configs.flat(config.to_dict())
    assert [name for name in names if not fields.comments().get(name)] == []
    text = help.help_text("train", COMMANDS["train"], config)
    assert [name for name in names if f"--config.{name}=" not in text] == []
    assert fields.comments()["rl.delta"] == "nats; tokens with a larger KL are masked; Eq. 5"
    assert fields.comments()["extract.judge.price_in"] == "per million prompt tokens"
    assert fields.comments()["rl.guide"].endswith("another correct response to the problem.")


@pytest.mark.parametrize("file", ["quickstart.py", "lab.py"])
def test_the_config_of_a_run_is_read_back(tmp_path, file):
    config = parsing.load(str(ROOT / "configs" / file))
    text = configs.to_json(config)
    (tmp_path / "config.json").write_text(text)
    again = configs.from_json(tmp_path / "config.json")
    assert configs.to_json(again) == text and again.stages == ("sft", "rl", "eval")
    older = json.loads(text)
    del older["eval"]["limit"], older["data"]["system"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert configs.from_json(tmp_path / "config.json") == again
    configs.check_resume(again, tmp_path / "config.json")
    older["rl"]["bacth"] = 1
    (tmp_path / "config.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"config\.rl\.bacth: is not a field \(did you mean batch\?\)"):
        configs.from_json(tmp_path / "config.json")


def test_a_run_a_model_and_new_sets_need_no_config_file(tmp_path):
    (tmp_path / "config.json").write_text(configs.to_json(parsing.load(str(ROOT / "configs/quickstart.py"))))
    new = ["--config.eval.sets.more.source=more.jsonl", "--config.eval.sets.more.samples=3", "--config.eval.batch=8"]
    config, given = parsing.parse(COMMANDS["evaluate"], [f"--checkpoint={tmp_path}:last", *new])
    assert config.model.tokenizer == "arithmetic" and config.eval.batch == 8 and given.limit == 0
    assert config.eval.sets.more.to_dict() == {"source": "more.jsonl", "samples": 3} and len(config.eval.sets) == 2
    config, _ = parsing.parse(COMMANDS["evaluate"], ["--model=m", "--out=o", new[0]])
    assert config.eval.sets.to_dict() == {"more": {"source": "more.jsonl", "samples": 1}}
    config, given = parsing.parse(COMMANDS["generate"], ["--model=m", "What is 3 + 4?", "--seed=2"])
    assert given.questions == ["What is 3 + 4?"] and given.seed == 2 and given.temperature is None
    with pytest.raises(ValueError, match="config.eval.sets.more has no field 'sampels' .did you mean samples"):
        parsing.parse(COMMANDS["evaluate"], ["--model=m", new[0], "--config.eval.sets.more.sampels=1"])


def test_ctrl_c_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(starting, "_run", interrupted)
    with pytest.raises(SystemExit) as exit:
        cli.start("report", COMMANDS["report"], [])
    assert exit.value.code == 130 and capsys.readouterr().err == "\nsgpo_jax: stopped by Ctrl-C\n"


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_table_fits_the_terminal_and_loses_nothing(width):
    columns = ["set", "prompt", "avg@k before", "gain", "tokens"]
    lines = [["heldout (k=4)", "unguided", "0.264 [0.245, 0.282]", "+0.700 [+0.678, +0.721]", "25.0 -> 25.0"],
             ["a-name-that-is-long-and-has-no-spaces", "guided", "0.999", "-0.422", "25.0"]]  # fmt: skip
    text = tables.fitting("A title", columns, lines, width)
    assert max(map(len, text.splitlines())) <= width
    letters = "".join(text.split())
    assert "…" not in text and all(word in letters for line in lines for cell in line[1:] for word in cell.split())


def test_libtpu_is_left_out_where_there_is_no_tpu(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(starting.util, "find_spec", lambda name: object())
    monkeypatch.setattr(starting.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(starting, "_may_have_tpus", lambda: True)
    starting._leave_out_libtpu()
    assert "JAX_PLATFORMS" not in os.environ
    monkeypatch.setattr(starting, "_may_have_tpus", lambda: False)
    starting._leave_out_libtpu()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    starting._leave_out_libtpu()
    assert os.environ["JAX_PLATFORMS"] == "tpu"
