"""Both training stages account for every row of their data, and resume only with the same rows."""

import json

import pytest

from sgpo_jax import config as configs
from sgpo_jax import data, sharding
from sgpo_jax.policy import Run, generation
from sgpo_jax.runtime.files import jsonl
from sgpo_jax.training import inputs, stage
from sgpo_jax.training.inputs import demonstrations, problems


def write(path, rows):
    path.write_text(jsonl(rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def policy():
    return stage.load_policy(small_config())[0]


def small_config():
    config = configs.base()
    config.model.source, config.model.tokenizer, config.model.dtype = "scratch", "arithmetic", "float32"
    config.data.instruction = ""
    config.sft.batch = config.rl.batch = 2
    config.rl.max_new_tokens = 64
    return config


def run(config, workdir, policy):
    return Run(config, workdir, policy, sharding.make_mesh(**config.mesh))


def test_both_stages_account_for_every_row(tmp_path, policy, capsys):
    training = data.load("arithmetic:train,count=60")
    held_out = data.load("arithmetic:eval,count=3")
    for row in training[:6]:
        del row["strategy"], row["solution"]
    training.append({**training[10], "id": "again", "problem": f" {training[10]['problem']} "})
    training.append({**held_out[1], "id": "leaked"})
    training[20]["problem"] += " 1" * 50
    training[21]["solution"] += " 1" * 50
    config = small_config()
    config.data.train = write(tmp_path / "train.jsonl", training)
    config.data.max_prompt_tokens, config.sft.max_response_tokens = 60, 60
    with config.unlocked():
        config.eval.sets.heldout = {"source": write(tmp_path / "heldout.jsonl", held_out), "samples": 1}
    for share in (0.5, 1.0, 0.0):
        config.data.sft_share = share
        rows = {}
        if share:
            first, second, encoded = demonstrations(run(config, tmp_path / f"{share}", policy))
            rows["sft"] = first + second
            assert {row["id"] for row in rows["sft"]} == set(encoded)
        if share < 1:
            rows["rl"], prompts, _ = problems(run(config, tmp_path / f"{share}", policy))
            ids = {row["id"] for row in rows["rl"]}
            assert {name: set(group) for name, group in prompts.items()} == {"autonomous": ids, "guided": ids}
        counts = json.loads((tmp_path / f"{share}" / "data.json").read_text())
        for name, others in rows.items():
            (count,) = counts[name]["sources"].values()
            assert count["read"] == 62 and count["kept"] == len(others) == 62 - sum(count["left_out"].values())
            assert count["left_out"]["in heldout"] == 1 and count["kept_although"]["duplicate"] == 1
            assert not {"leaked", training[20]["id"]} & {row["id"] for row in others}
    sft_count, rl_count = ({}, {})
    for share, name, count in ((1.0, "sft", sft_count), (0.0, "rl", rl_count)):
        (part,) = json.loads((tmp_path / f"{share}" / "data.json").read_text())[name]["sources"].values()
        count |= part["left_out"]
    assert sft_count == {
        "in heldout": 1, "for RL": 0, "without solution": 6, "prompt too long": 1, "response too long": 1,
    }  # fmt: skip
    assert rl_count == {"in heldout": 1, "for the warm-up": 0, "without strategy": 6, "prompt too long": 1}
    assert "RL: 54 rows of 62" in capsys.readouterr().out
    config.data.remove_duplicates, config.data.decontaminate = True, False
    others, *_ = problems(run(config, tmp_path / "removed", policy))
    assert {"leaked"} == {row["id"] for row in others} & {"leaked", "again"}


def test_the_warm_up_leaves_out_what_the_template_has_opened(tmp_path, policy, monkeypatch):
    """`tokenizer.continuation` has its own test; this one sees that the warm-up asks it, with the row's prompt."""
    asked = {}

    def continuation(tokenizer, prompt, solution):
        asked[solution] = prompt
        return " 7"

    monkeypatch.setattr(inputs.tokenizers, "continuation", continuation)
    config = small_config()
    config.sft.train = "arithmetic:train,count=30"
    training, validation, encoded = demonstrations(run(config, tmp_path, policy))
    for row in training + validation:
        prompt, response = encoded[row["id"]]
        assert asked[row["solution"]] == prompt
        assert response == inputs.tokenizers.encode_response(policy.tokenizer, " 7", policy.stop_ids[0])


def test_what_becomes_of_thoughts_is_counted(tmp_path, policy, monkeypatch, capsys):
    said = iter(["closed", "", "closed", "endless"])
    monkeypatch.setattr(inputs.tokenizers, "thought_change", lambda *_: next(said, ""))
    config = small_config()
    config.sft.train = "arithmetic:train,count=30"
    training, validation, _ = demonstrations(run(config, tmp_path, policy))
    assert len(training + validation) == 30
    (counts,) = json.loads((tmp_path / "data.json").read_text())["sft"]["sources"].values()
    assert counts["kept_although"] == {
        "duplicate": counts["kept_although"]["duplicate"], "closed": 2, "endless": 1,
        "solution without the right boxed answer": 0,
    }  # fmt: skip
    assert "although: closed" in capsys.readouterr().out
    said = iter(["closed"])
    config.data.train, config.rl.guide = config.sft.train, "demonstration"
    found = problems(run(config, tmp_path, policy))
    (counts,) = json.loads((tmp_path / "data.json").read_text())["rl"]["sources"].values()
    assert counts["kept_although"]["closed"] == 1, "expert solutions are responses in RL, too"
    for row in found.rows:
        solution = generation.encode_solution(policy, found.prompts["autonomous"][row["id"]], row)
        assert found.solutions[row["id"]].tolist() == solution


def test_a_stage_with_checkpoints_refuses_other_rows(tmp_path, policy):
    config = small_config()
    config.data.train = "arithmetic:train,count=30"
    problems(run(config, tmp_path, policy))
    config.data.train = "arithmetic:train,count=40"
    problems(run(config, tmp_path, policy))  # nothing was trained yet
    (tmp_path / "rl" / "checkpoints" / "3").mkdir(parents=True)
    problems(run(config, tmp_path, policy))
    config.data.train = "arithmetic:train,count=30"
    with pytest.raises(ValueError, match="the rl stage in .* began with different rows"):
        problems(run(config, tmp_path, policy))
