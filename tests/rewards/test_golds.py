"""Gold answers as data sets have them: read, or counted and said before a run."""

import json
import warnings

import pytest
from helpers.paths import SHARED

from sgpo_jax import data, rewards
from sgpo_jax.rewards import read_gold, score, survey

READ = [
    ("Rosa has 31 + 41 = <<31+41=72>>72 beads.\n#### 72", "72"),
    ("#### 72", "72"),
    ("31 + 41 = 72 #### 72", "72"),
    ("#### 1,234", "1,234"),
    ("#### The answer is 72.", "72"),
    (r"\boxed{72}", "72"),
    (r"31 + 41 is $\boxed{\frac12}$.", r"\frac12"),
    (r"$\boxed 7$", "7"),
    (r"\boxed{7} and again \boxed{7}", "7"),
    ("The answer is 72.", "72"),
    ("the answer is: 72", "72"),
    ("So, the final answer is $x=7$.", "$x=7$"),
    ("**Answer:** 72", "72"),
    ("Answer: 72", "72"),
    ("Final Answer: 72", "72"),
    ("Reasoning.\nAnswer: 1, 2", "1, 2"),
    ("<answer>72</answer>", "72"),
    ("<think>31 + 41</think> <answer> 72 </answer>", "72"),
    (r"<answer>\boxed{72}</answer>", "72"),
    ('["72"]', "72"),
    ('["$72$"]', "$72$"),
    ('"72"', "72"),
]
KEPT = [
    "72", "$72$", "72.", r"\[72\]", "x = 72", r"\text{72}", "72 beads", "[1,2]", "[1, 2)", "(1,2)", "2:3:4", "-2,-2",
    r"\text{the answer}", "no answer", "a < b", "5'", r'\text{"}', "[72]", "",
]  # fmt: skip
UNCLEAR = [
    "72 ####",
    "####",
    "The answer is",
    "#### 72\nor more",
    "The answer is 72. It was easy",
    '["72", "73"]',
    r"\boxed{3} or \boxed{4}",
    r"\boxed{",
    "<answer>1</answer> <answer>2</answer>",
    "<answer></answer>",
]


@pytest.mark.parametrize(("gold", "answer"), READ)
def test_a_gold_in_a_longer_text_is_read(gold, answer):
    assert read_gold(gold) == answer
    box = answer.strip("$").removeprefix("x=")
    assert score([rf"So \boxed{{{box}}}."], [gold])[0].outcome == "correct"
    assert score([r"So \boxed{71}."], [gold])[0].outcome == "wrong"


@pytest.mark.parametrize("gold", KEPT + UNCLEAR)
def test_other_golds_stay_as_they_are(gold):
    assert read_gold(gold) == gold
    assert survey([gold])[:2] == (0, int(gold in UNCLEAR))


@pytest.mark.parametrize("name", ["math500", "amc23", "aime24", "olympiadbench"])
def test_the_golds_of_the_benchmarks_stay_as_they_are(name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    golds = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert [gold for gold in golds if read_gold(gold) != gold] == []
    assert survey(golds)[:2] == (0, 0)


def test_what_is_read_and_what_is_unclear_is_counted_when_the_rows_are_loaded(tmp_path):
    file = tmp_path / "rows.jsonl"
    golds = ["7", "#### 8", "1 + 8 = 9\n#### 9", '["1", "2"]']
    lines = (json.dumps({"id": str(i), "problem": "?", "answer": gold}) for i, gold in enumerate(golds))
    file.write_text("\n".join(lines))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = data.load(str(file))
    assert [row["answer"] for row in rows] == golds, "a reward function of the user's sees them as they are"
    read, unclear = (str(warning.message) for warning in caught)
    assert "2 of 4 gold answers" in read and "'#### 8' as '8'" in read
    assert "1 of 4 gold answers" in unclear and """'["1", "2"]'""" in unclear


def test_plain_golds_are_loaded_in_silence(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"id": "1", "problem": "?", "answer": "72"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rewards.read_gold(data.load(str(file))[0]["answer"]) == "72"
