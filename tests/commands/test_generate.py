"""Questions to a model: a response depends on seed, question and sample alone; streaming, JSONL, refusals."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from sgpo_jax import config as configs
from sgpo_jax import sharding
from sgpo_jax.cli import COMMANDS
from sgpo_jax.commands import generate, stream
from sgpo_jax.policy import Run, tokenizer
from sgpo_jax.rollout import Sampling
from sgpo_jax.training import stage

PRICES = [f"Prices at copper market: {i} 8, 4 6, 6 9" for i in range(3)]


def config_of():
    config = configs.base()
    config.model.source, config.model.tokenizer, config.model.dtype = "scratch", "arithmetic", "float32"
    config.model.layers, config.model.hidden, config.model.heads, config.model.mlp = 1, 16, 2, 16
    config.data.instruction = ""
    config.mesh.fsdp, config.mesh.data, config.eval.batch, config.eval.temperature = 2, 4, 8, 1.0
    return config


@pytest.fixture(scope="module")
def ask():
    """Returns `ask(rows, seed, guided, show)` of a model that knows nothing."""
    config = config_of()
    policy, load = stage.load_policy(config)
    mesh = sharding.make_mesh(**config.mesh)
    params = load(jax.random.key(0))

    def answer(rows, seed=0, guided=False, show=False):
        config.seed = seed
        run = Run(config, Path(), policy, mesh)
        return generate.answer(run, params, rows, Sampling(6), 2, guided, show)

    return answer


def test_a_response_depends_on_seed_question_and_sample_alone(ask, capsys):
    rows = [{"id": f"q{i}", "problem": text} for i, text in enumerate(PRICES)]
    lines = ask(rows)
    assert [(line["id"], line["sample"]) for line in lines] == [(f"q{i}", k) for i in range(3) for k in range(2)]
    assert ask(rows[1:2]) == lines[2:4] and ask(rows[::-1])[2:4] == lines[2:4]
    assert len({line["response"] for line in lines}) > 3
    assert [line["response"] for line in ask(rows, seed=1)] != [line["response"] for line in lines]
    assert all(set(line) == {"id", "problem", "sample", "response", "tokens", "finish"} for line in lines)
    assert {line["finish"] for line in lines} <= {"stop", "length"} and max(line["tokens"] for line in lines) <= 6

    capsys.readouterr()
    assert ask(rows, show=True) == lines, "watching changes nothing"
    shown = re.split(r"\n\[question q\d, sample \d of 2\]\n", "\n" + capsys.readouterr().out)[1:]
    assert shown == [f"{line['response']}\n" for line in lines]


def test_a_verdict_where_there_is_an_answer_and_a_strategy_where_it_is_asked_for(ask):
    rows = [{"problem": PRICES[0], "answer": 7, "strategy": "add the prices"}]
    lines = ask(rows)
    assert {line["outcome"] for line in lines} <= {"correct", "wrong", "no_box"} and lines[0]["reward"] in (0.0, 1.0)
    assert [line["response"] for line in ask(rows, guided=True)] != [line["response"] for line in lines]


def test_a_text_grows_by_whole_characters():
    tok = tokenizer.words(["2 + 3 = 5."])
    text = stream.Text(tok)
    ids = tok("2 + 3 = 5.", add_special_tokens=False)["input_ids"]
    assert "".join(text.add(token) for token in ids) == "2 + 3 = 5."

    class Bytes:
        def decode(self, tokens, **_):
            return bytes(tokens).decode(errors="replace")

    text = stream.Text(Bytes())
    assert [text.add(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]


def given(**changes):
    flags = {flag.name: flag.default for flag in COMMANDS["generate"].flags}
    return SimpleNamespace(**flags | {"questions": [], "model": "scratch", "to": "-"} | changes)


def test_the_command_writes_jsonl(monkeypatch, tmp_path, capsys):
    sampled, answer = [], generate.answer
    monkeypatch.setattr(generate, "answer", lambda *args, **more: sampled.append(args[3]) or answer(*args, **more))
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"problem": text, "strategy": "add"}) + "\n" for text in PRICES))
    generate.main(config_of(), given(file=str(questions), guided=True, max_new_tokens=6, seed=3))
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["problem"] for line in lines] == PRICES
    assert all((line["seed"], line["guided"], line["model"]) == (3, True, "scratch") for line in lines)
    assert err.startswith("scratch; 3 questions, temperature 1, seed 3, at most 6 tokens\n")
    # A training run samples for hours and may compile for longer; a question waits for the compiler.
    assert [Sampling.from_config(config_of()[section]).often for section in ("rl", "eval")] == [True, True]
    assert [sampling.often for sampling in sampled] == [False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "a question or --file: give one of them"),
        ({"questions": ["a"], "workdir": "x"}, "--workdir and --model: give one of them"),
        ({"questions": ["a"], "guided": True}, "--guided: shows the strategies of --file"),
        ({"questions": ["a"], "temperature": 0.0, "samples": 2}, "--samples=2: must be 1 with --temperature=0"),
        ({"file": "none.jsonl"}, "--file=none.jsonl: there is no such file"),
        ({"questions": ["a"], "max_new_tokens": 5000}, r"--max_new_tokens=5000: the model has 4096 .* 4\d+$"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        generate.main(config_of(), given(**changes))


@pytest.mark.parametrize("line", ['{"question": "a"}', '{"problem": ""}', '{"problem": 3}'])
def test_a_wrong_question_is_named(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text('{"problem": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: problem is .*; allowed: a text \(the line has"):
        generate.read_questions(path, guided=False)
    with pytest.raises(ValueError, match="line 1: strategy is None"):
        generate.read_questions(path, guided=True)
