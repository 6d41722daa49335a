"""The evaluation command: what it evaluates, prints, writes and refuses."""

import json
import signal

import pytest

from sgpo_jax import config as configs
from sgpo_jax.commands import evaluate
from sgpo_jax.evaluation import sets
from sgpo_jax.runtime import preemption
from sgpo_jax.runtime.files import read_jsonl


@pytest.fixture
def config():
    config = configs.base()
    config.stages, config.model.source, config.model.tokenizer = ("eval",), "scratch", "arithmetic"
    config.model.layers, config.model.hidden, config.model.heads, config.model.mlp = 1, 16, 2, 16
    config.data.instruction, config.model.dtype = "", "float32"
    config.eval.batch, config.eval.max_new_tokens, config.mesh.fsdp, config.mesh.data = 8, 5, 1, -1
    with config.unlocked():
        for name, samples in {"MATH500": 3, "A_set": 2}.items():
            config.eval.sets[name] = configs.ConfigDict({"source": "arithmetic:eval,count=9", "samples": samples})
    return config


def test_it_prints_and_writes_measured_beside_reported(config, tmp_path, capsys, monkeypatch):
    results = evaluate.run(config, None, str(tmp_path / "out"), "qwen7b:sgpo", limit=6)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert any(line.startswith("SUBSET, the first 6 problems of each set") for line in lines)
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in lines if "│" in line
    }
    assert cells["MATH500"][0] == "6 of 9" and cells["MATH500"][-1] == "82.7"
    assert cells["A_set"][-1] == "" and cells["Average"][-1] == "52.1"
    assert list(cells) == ["MATH500", "A_set", "Average"]
    assert "Qwen2.5-7B-Instruct, SGPO" in printed
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["results"] == json.loads(json.dumps(results)) and written["limit"] == 6
    assert (tmp_path / "out" / "table.txt").read_text() in printed
    lines = read_jsonl(tmp_path / "out" / "A_set_unguided_000000.jsonl")
    assert len(lines) == 12 and {"response", "outcome", "extracted", "reward", "truncated"} <= set(lines[0])

    monkeypatch.setattr(sets, "respond", lambda *args, **kwargs: pytest.fail("all of it is there"))
    assert evaluate.run(config, None, str(tmp_path / "out"), "", limit=6) == results
    assert "paper" not in capsys.readouterr().out
    config.eval.temperature = 0.7
    with pytest.raises(ValueError, match=r"temperature 0.6, now 0.7; continue with the same, or choose another --out"):
        evaluate.run(config, None, str(tmp_path / "out"), "", limit=6)


def test_a_preempted_evaluation_keeps_what_it_has(config, tmp_path, monkeypatch):
    config.eval.batch = 8
    asked = iter([0, signal.SIGTERM])
    monkeypatch.setattr(preemption, "requested", lambda: next(asked))
    with pytest.raises(preemption.Preempted, match="the same command resumes"):
        evaluate.run(config, None, str(tmp_path / "out"), "", limit=0)
    files = sorted((tmp_path / "out").glob("*_unguided_*.jsonl"))
    assert [len({line["id"] for line in read_jsonl(path)}) for path in files] == [8, 0], "the first batch"


def test_wrong_arguments_are_refused_before_any_work(config, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.stage, "load_policy", lambda config: pytest.fail("too late"))
    for arguments, message in [
        ((None, None, "", 0), "--out: must be given with --model"),
        ((None, "out", "qwen7b:ppo", 0), "--paper=qwen7b:ppo: must be one of"),
        ((f"{tmp_path}", None, "", 0), "there is no such checkpoint in"),
        (
            (f"{tmp_path}:last", None, "", 0),
            f"--checkpoint={tmp_path}:last: there is no such checkpoint in {tmp_path}/rl",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate.run(config, *arguments)
