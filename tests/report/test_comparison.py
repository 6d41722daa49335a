"""Runs compared on one page, the titles of runs, the note on guided accuracy, the rows to keep, and the model card."""

import base64
import json
import re

import pytest
from helpers.folders import config_of, make_run

from sgpo_jax import config as configs
from sgpo_jax import methods
from sgpo_jax.report import comparison, page, titles
from sgpo_jax.report.model_card import model_card


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their method and seed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, method, seed in (("one", "sgpo", 0), ("two", "grpo", 3)):
        make_run(folder / name)
        config = methods.select(config_of("quickstart.py"), method)
        config.seed = seed
        (folder / name / "config.json").write_text(configs.to_json(config))
    start = {"commit": "0123456789abcdef-dirty", "jax": "0.10.2", "command": "sgpo train --config=c.py"}
    (folder / "one/environment.json").write_text(json.dumps([{"commit": "older"}, start]))
    return folder / "one", folder / "two"


def test_a_page_shows_several_runs_and_where_they_differ(runs, tmp_path):
    text = comparison.write(runs, tmp_path / "c.html").read_text()
    for said in ("2 runs compared", "one: SGPO · scratch, 2 layers of 96 · arithmetic:train", "two: GRPO · scratch"):
        assert said in text
    rows = re.findall(r"<tr><td>(.*?)</td><td data-side=\"one\">(.*?)</td><td data-side=\"two\">(.*?)</td></tr>", text)
    fields = {name.replace("<wbr>", ""): values for name, *values in rows}
    assert fields == {"rl.autonomous": ["8", "12"], "rl.guided": ["4", "0"], "seed": ["0", "3"]}
    order = re.findall(r"<tr><td>(one|two)</td><td>heldout</td><td>(\w+)</td><td>(\w+) RL</td>", text)
    assert order[:4] == [("one", "unguided", "before"), ("two", "unguided", "before"),
                         ("one", "unguided", "after"), ("two", "unguided", "after")]  # fmt: skip
    with pytest.raises(ValueError, match="one: is given twice"):
        comparison.write((runs[0], runs[0]), tmp_path / "c.html")


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    assert comparison._names([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]


def test_the_title_has_method_model_data_and_commit(runs):
    text = page.write_run(runs[0]).read_text()
    title = "SGPO · scratch, 2 layers of 96 · arithmetic:train"
    assert f"<title>{title} · commit 0123456789-dirty · one</title>" in text and f"<h1>{title}</h1>" in text
    config = configs.to_dict(config_of("smollm2_135m.py"))
    config["data"]["train"] = "a/one.jsonl?first=3;owner/two;x:y,z=1;more"
    assert titles.title_of(config) == "SGPO · smollm2 · one.jsonl + two + x:y and 1 more"
    config["model"]["source"] = "Qwen/Qwen2.5-7B-Instruct"
    config["rl"] |= {"delta": float("inf")}
    assert titles.title_of(config).startswith("SGPO, no kl clip · Qwen2.5-7B-Instruct · ")
    config["rl"] |= {"target": "mean", "weight": "fixed"}
    assert titles.title_of(config).startswith("a method of its own · ")


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_known_by_its_config(name):
    config = methods.select(config_of("quickstart.py"), name)
    assert methods.named(configs.to_dict(config)) == name
    config.rl.learning_rate, config.rl.autonomous = 0.5, 99
    assert methods.named(configs.to_dict(config)) == name, "these are tuned"


def test_fallen_guided_accuracy_is_noted_and_the_rows_can_be_kept(runs):
    text = page.write_run(runs[0]).read_text()
    assert "Guided accuracy" not in text and "Guided: the data" in text
    links = dict(re.findall(r'<a download="([\w.]+)" href="data:application/octet-stream;base64,(.*?)">', text))
    assert base64.b64decode(links["rl.jsonl"]).decode() == (runs[0] / "rl.jsonl").read_text()
    assert set(json.loads(base64.b64decode(links["evaluation.json"]))) == {"before", "after"}
    assert "download" not in page.write_run(runs[0], running=True).read_text()
    results = {when: {"guided": {"heldout": {"accuracy": a, "per_problem": [a] * 9}}}
               for when, a in (("before", 1.0), ("after", 0.5))}  # fmt: skip
    (note,) = page._fallen(results)
    assert note.startswith("Guided accuracy on heldout has fallen, from 100.0 to 50.0 % (-50.0 points).")


def test_the_card_says_what_the_model_is_and_how_it_was_made(runs):
    run = runs[0]
    config = json.loads((run / "config.json").read_text())
    config["model"]["source"], config["eval"]["limit"] = "Qwen/Qwen2.5-7B-Instruct", 4
    (run / "config.json").write_text(json.dumps(config))
    for when in ("before", "after"):
        path = run / "eval" / f"{when}_unguided.json"
        results = json.loads(path.read_text())
        results["results"] = {"MATH500": results["results"].get("heldout") or results["results"]["MATH500"]}
        path.write_text(json.dumps(results))
    source = {"read": 9, "kept": 7, "left_out": {"without strategy": 2, "prompt too long": 0}, "kept_although": {}}
    (run / "data.json").write_text(json.dumps({"rl": {"sources": {"t.jsonl": source}}}))
    text = model_card(run, page.read_config(run), "rl", 6, "bfloat16")
    head = text.partition("\n---\n")[0].splitlines()
    assert head[:2] == ["---", "library_name: transformers"] and head[-1] == "base_model: Qwen/Qwen2.5-7B-Instruct"
    for said in (
        "# SGPO · Qwen2.5-7B-Instruct · arithmetic:train", "after step 6 of the stage 'rl', in bfloat16",
        "| commit | 0123456789abcdef-dirty |", "sgpo train --config=c.py", "; the first 4 of each set",
        "| set | problems | k | before RL | after RL | the paper's |", "| 82.7 |",
        "| rl | t.jsonl | 9 | 7 | 2 without strategy |", "## Limits",
    ):  # fmt: skip
        assert said in text, said
    assert re.search(r"\| MATH500 \| 4 \| 2 \| 0.0 \[0.0, 0.0\] \| 25.0 \[[\d.]+, [\d.]+\] \| 82.7 \|", text)
    assert "after RL" not in model_card(run, page.read_config(run), "sft", 1, "float32")
