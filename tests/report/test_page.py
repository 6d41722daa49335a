"""The page of a run and of a lab: what it says, that texts stay texts, and that it never stops a run."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from helpers.folders import (
    HOSTILE,
    analysis_line,
    config_of,
    generations,
    make_lab,
    make_run,
    metrics_rows,
    write_jsonl,
)
from helpers.paths import ROOT
from ml_collections import ConfigDict

from sgpo_jax import lab
from sgpo_jax.commands import report as report_command
from sgpo_jax.commands import train
from sgpo_jax.report import examples, figures, page


class Page(HTMLParser):
    """A parsed page: tags with their attributes, and the text between them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", []
        self._within = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " "
        self._within = tag

    def handle_endtag(self, tag):
        self._within = ""
        self.text += " "

    def handle_data(self, data):
        if self._within == "script":
            self.scripts.append(data)
        elif self._within != "style":
            self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("pages") / "my run")


@pytest.fixture(scope="module")
def found(run):
    return Page(page.write_run(run))


def words(found):
    return " ".join(found.text.split())


def test_a_run_has_its_accuracies_with_intervals_and_gain(found):
    text = words(found)
    assert "heldout, unguided 0.0 [0.0, 0.0] → 25.0 [" in text
    assert re.search(r"\+25\.0 points \[\+\d+\.\d, \+\d+\.\d\] over 4 problems", text)
    assert "SFT 1 steps · RL 6 steps · 7 min of training · seed 0" in text
    titles = [attributes["aria-label"] for attributes in found.of("figure")]
    assert titles[:3] == ["SFT loss", "Reward", "Distillation weight α"] and len(found.of("svg")) == len(titles)
    assert "rl.learning_rate 0.0002 1e-06" in text.replace("rl. learning", "rl.learning"), "what the config changes"


def test_texts_of_problems_models_and_configs_stay_text(found):
    assert {tag for tag, _ in found.tags} & {"img", "iframe", "link", "object", "form"} == set()
    assert len(found.scripts) == 1 and "owned" not in found.scripts[0]
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    # In two tables of the config, the environment, an analysis, and four problems with four responses.
    assert found.text.count(HOSTILE) == 2 + 1 + 4 + 4 * (1 + 4)
    end = HOSTILE.rpartition("/")[2]  # of the model's name, in both titles
    assert found.text.count(end) == found.text.count(HOSTILE) + 2


def test_nothing_is_loaded_and_no_other_script_may_run(run, found):
    (policy,) = [a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(found.scripts[0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy
    for _, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "action"):
            target = attributes.get(name, "#")
            kept = "download" in attributes and target.startswith("data:application/octet-stream;base64,")
            assert target.startswith("#") or kept
    source = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\((?!#)", source)


def test_filters_count_all_problems_and_every_shown_one_has_its_tags(found):
    buttons = {a["data-tag"]: a["aria-pressed"] for a in found.of("button")}
    assert buttons == {
        "": "true", "correct": "false", "wrong": "false", "no_box": "false", "cut": "false", "newly correct": "false"
    }  # fmt: skip
    tags = [a["data-tags"] for a in found.of("article") if "data-tags" in a]
    assert tags == ["correct|newly correct", "wrong", "no_box", "cut"]
    assert "all 4 correct 1 newly correct 1 wrong 1 no box 1 cut 1" in words(found)


def test_tokens_have_their_kl_as_colour_step_by_step(found):
    tokens = [a for a in found.of("span") if "title" in a]
    assert [(a["style"], a["title"]) for a in tokens][1::4] == [
        ("--kl: 0.500", "0.2500 nats"), ("--kl: 1.000", "2.0000 nats")
    ]  # fmt: skip
    assert [a.get("class") for a in tokens] == [None] * 5 + ["above"]
    assert "0.062 nats" in found.text and "1.250 nats" in found.text


def test_a_generation_has_the_kl_of_its_tokens_as_colour(tmp_path):
    run = make_run(tmp_path)
    plain = words(Page(page.write_run(run)))
    text = f"response 1 {HOSTILE}"
    line = {"column": "after, guided", "id": "p1", "response": text, "tokens": ["response", " 1 ", HOSTILE]}
    line["token_kl"] = [0.0, 0.25, 2.0]
    other = line | {"id": "p2"}  # of another response than the one that is there
    write_jsonl(run / "analysis_generations.jsonl", [line, other, line | {"column": "after, unguided", "id": "p9"}])
    found = Page(page.write_run(run))
    tokens = [a for a in found.of("span") if "title" in a][6:]
    assert [(a["style"], a.get("class")) for a in tokens] == [
        ("--kl: 0.000", None), ("--kl: 0.500", None), ("--kl: 1.000", "above")
    ]  # fmt: skip
    assert words(found) == plain, "the same texts, coloured"


def test_without_a_clip_no_token_is_above_it(tmp_path):
    run = make_run(tmp_path)
    write_jsonl(run / "analysis.jsonl", [analysis_line(delta=None)])
    found = Page(page.write_run(run))
    assert "above" not in [a.get("class") for a in found.of("span")] and "dashed" not in found.text
    assert "≥ 1.0 nats" in words(found)


def test_before_the_evaluation_the_page_has_what_is_there(tmp_path):
    run = make_run(tmp_path)
    for path in [*(run / "eval").glob("*.json"), *run.glob("eval/*/*.jsonl"), run / "analysis.jsonl"]:
        path.unlink()
    write_jsonl(run / "rl/generations/heldout_unguided_000002.jsonl", generations(("correct",), 2))
    write_jsonl(run / "rl/generations/heldout_unguided_000004.jsonl", generations(("wrong",), 4))
    write_jsonl(run / "rl/generations/heldout_unguided_000006.jsonl", [])  # its turn has not come
    found = Page(page.write_run(run, "RL step 6 of 9", running=True))
    text = words(found)
    assert "running: RL step 6 of 9" in text and "reward, unguided 29.2 → 29.2" in text
    assert "all 1 wrong 1" in text, "the latest evaluation during training"
    assert [a["content"] for a in found.of("meta") if a.get("http-equiv") == "refresh"] == ["30"]
    for name in ("rl.jsonl", "sft.jsonl", "environment.json"):
        (run / name).unlink()
    assert "refresh" not in str(Page(page.write_run(run)).of("meta"))


def test_only_a_few_problems_of_each_verdict_are_shown_and_long_responses_are_cut(tmp_path):
    lines = [line | {"response": "x" * 5000} for line in generations(("wrong",) * 30 + ("correct",) * 2, 0)]
    write_jsonl(tmp_path / "a.jsonl", lines)
    found = examples.side_by_side({"now": tmp_path / "a.jsonl"}, "now")
    assert found.total == 32 and found.counts == {"wrong": 30, "correct": 2}
    assert [p.id for p in found.problems] == [*(f"p{i}" for i in range(12)), "p30", "p31"]
    (answer,) = found.problems[0].answers
    assert (len(answer.text), answer.left_out) == (4000, 1000)


def test_a_problem_that_was_correct_is_found_again(tmp_path):
    write_jsonl(tmp_path / "old.jsonl", generations(("correct", "correct", "wrong"), 0))
    write_jsonl(tmp_path / "new.jsonl", generations(("wrong", "correct"), 1))
    files = {"old": tmp_path / "old.jsonl", "new": tmp_path / "new.jsonl"}
    found = examples.side_by_side(files, "new", before="old")
    assert [p.tags for p in found.problems] == [("wrong", "no longer correct"), ("correct",)]
    assert [[a.verdict for a in p.answers] for p in found.problems] == [["correct", "wrong"], ["correct", "correct"]]


def test_a_figure_for_the_page_has_the_pages_colours_and_ids_of_its_own():
    drawn = [figures.svg(figures.panels(metrics_rows(3))["Reward"], name) for name in ("one", "two")]
    for text in drawn:
        assert text.startswith("<svg viewBox=") and "var(--blue)" in text and "var(--rule)" in text
        assert set(re.findall(r"#[0-9a-f]{6}\b", text)) == set(), "every colour is one of the page's"
        assert "<metadata" not in text and "http" not in text
    ids = [set(re.findall(r' id="([^"]*)"', text)) for text in drawn]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', drawn[0])) <= ids[0]
    assert figures.panels([]) == {}


def test_a_lab_has_tables_claims_worlds_and_samples(tmp_path):
    folder = make_lab(tmp_path / "grid")
    before = (folder / "results.jsonl").read_bytes()
    report_command.write(folder, folder / "out" / "page.html")
    text = words(Page(folder / "out" / "page.html"))
    assert "GRPO vs SGPO" in text and "+25.0 points [+25.0, +25.0], paired over 2 seeds" in text
    assert "22 of 22 training runs" in text and "Where distillation helps" in text
    assert "the paper's claims 2 2 reproduced" in text
    assert "before, unguided" in text and "newly correct 1" in text and "jax 1.2.3" in text
    assert (folder / "results.jsonl").read_bytes() == before and not (folder / "report.html").exists()


@pytest.mark.parametrize("finished", [0.0, 0.1, 0.3, 0.6])
def test_a_lab_that_goes_on_has_a_page_too(tmp_path, finished):
    folder = make_lab(tmp_path, finished)
    results = lab.Results(ConfigDict(page.read_config(folder)), folder / "results.jsonl")
    lab.write_page(results, running=True)
    assert f"running: {round(22 * finished)} of 22 training runs" in words(Page(folder / "report.html"))


def test_a_row_that_a_changed_config_no_longer_means_is_left_out(tmp_path):
    folder = make_lab(tmp_path)
    config = page.read_config(folder)
    config["rl"]["batch"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    report_command.write(folder, folder / "page.html")
    text = words(Page(folder / "page.html"))
    assert "0 of 22 training runs" in text and "GRPO vs SGPO" not in text


def test_how_often_a_page_is_written_leaves_results_what_they_are():
    config = config_of("lab.py")
    before = lab.digest(config)
    config.report_seconds = 5.0
    assert lab.digest(config) == before
    config.seed = 1
    assert lab.digest(config) != before


def test_the_page_is_written_at_most_once_in_so_many_seconds(monkeypatch, run, capsys):
    now, written = [100.0], []
    monkeypatch.setattr(page.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(page, "write_run", lambda *args, **kwargs: written.append((*args, kwargs)))
    show = page.live(run, 10.0, "RL", 9)
    for step, time in enumerate((100.0, 105.0, 110.0, 119.0, 121.0), start=1):
        now[0] = time
        show(step)
    running = {"running": True}
    assert written == [(run, f"RL step {step} of 9", running) for step in (1, 3, 5)]
    written.clear()
    page.live(run, 0.0, "RL", 9)(1)
    assert written == [] and capsys.readouterr().out == ""


def test_a_page_that_fails_stops_nothing(tmp_path, capsys):
    page.live(tmp_path / "not there", 1.0, "RL", 9)(1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("report: not written: ValueError: workdir=") and "which has a config.json" in line


@pytest.mark.slow
def test_a_run_writes_its_page_as_it_goes_and_does_not_depend_on_it(tmp_path, monkeypatch, capsys):
    config = config_of("quickstart.py")
    config.model.update({"hidden": 16, "heads": 2, "mlp": 32, "layers": 1})
    config.data.train, config.sft.train = "arithmetic:train,count=32", "arithmetic:pretraining,count=64"
    config.sft.update({"batch": 8, "micro_batch": 8, "steps": 2, "validation_share": 0.1})
    config.rl.update({"batch": 8, "micro_batch": 8, "steps": 2, "autonomous": 2, "guided": 2, "max_new_tokens": 4})
    config.stages, config.report_seconds = ("sft", "rl"), 1e-9
    written = []

    def fail(workdir, status="", running=False):
        written.append((status, running))
        raise RuntimeError("no page today")

    monkeypatch.setattr(page, "write_run", fail)
    train.run(config, tmp_path)
    assert written == [(f"{stage} step {i} of 2", True) for stage in ("SFT", "RL") for i in (1, 2)] + [("", False)]
    assert capsys.readouterr().out.count("report: not written: RuntimeError: no page today") == 5
    (start,) = json.loads((tmp_path / "environment.json").read_text())
    assert {"started", "python", "jax", "flax", "device", "commit"} <= start.keys()

    written.clear()
    monkeypatch.setattr(train.rl, "train", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run(config, tmp_path)
    assert written == [("", False)], "a run that failed is not said to be running"


@pytest.mark.slow
def test_the_command_needs_no_config_and_refuses_in_one_line(run, tmp_path):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "sgpo_jax.report", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    done = call(f"--workdir={run}", f"--to={tmp_path / 'page.html'}")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "page.html"), done.stderr[-2000:]
    assert Page(tmp_path / "page.html").of("svg")
    refused = call(f"--workdir={tmp_path}")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"sgpo_jax: workdir={str(tmp_path)!r}: must be the folder of a run or a lab" in refused.stderr
