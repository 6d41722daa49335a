"""What a run says of its data and its first step, with the field to change."""

import json

import pytest

from sgpo_jax import config as configs
from sgpo_jax.commands import train
from sgpo_jax.data import Sieve
from sgpo_jax.policy import Policy, with_system
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.training import inputs, loop, stage


@pytest.mark.parametrize(
    ("truncated", "no_box", "reward", "said"),
    [
        (1.0, 0.0, "", "RL step 1: cut 100 %: all responses reached rl.max_new_tokens=28 and got reward 0; raise it, "
                       "as in --config.rl.max_new_tokens=112"),
        (0.99, 0.9, "", ""),
        (0.5, 1.0, "", "RL step 1: no response has a \\boxed{} answer"),
        (0.5, 1.0, "mine:f", ""),
    ],
)  # fmt: skip
def test_the_first_step_names_the_field_that_keeps_all_rewards_at_0(truncated, no_box, reward, said, capsys):
    rl = configs.base().rl
    rl.max_new_tokens, rl.reward = 28, reward
    loop.advise_responses(rl, 1, {"truncated": truncated, "no_box": no_box})
    printed = capsys.readouterr().out
    assert said in printed and bool(said) == bool(printed)


def test_solutions_that_the_reward_calls_wrong_are_counted_and_named(tmp_path):
    solutions = {"right": r"so $\boxed{12}$", "wrong": r"so $\boxed{13}$", "none": "so 12"}
    rows = [{"id": name, "problem": "q", "answer": "12", "solution": text} for name, text in solutions.items()]
    sieve = Sieve({"s": rows})
    inputs.count_wrong(sieve, "", tmp_path)
    (counts,) = sieve.counts().values()
    assert counts["kept_although"] == {"solution without the right boxed answer": 2} and counts["kept"] == 3
    assert [(f.id, f.detail) for f in sieve.findings] == [
        ("wrong", "boxes '13', answer '12'"), ("none", "no box, answer '12'")
    ]  # fmt: skip
    (tmp_path / "sft/checkpoints/4").mkdir(parents=True)
    begun = Sieve({"s": rows})
    inputs.count_wrong(begun, "", tmp_path)
    assert begun.findings == [], "it was said when the run began"


def test_a_system_turn_stands_before_the_prompt_or_is_refused():
    tok = tokenizers.words(["problem", "Problem:\nadd 2 and 3.", "you are a tutor."])
    policy = Policy(None, tok, (0,), 0, None, "")
    assert with_system(policy, "") is policy
    tok.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    prompt = tokenizers.encode_prompt(tok, "add 2 and 3.", None, "", with_system(policy, "you are a tutor.").system)
    text = tok.decode(prompt)
    assert text.startswith("<|system|>you are a tutor.<|user|>") and text.endswith("<|assistant|>")
    tok.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"config\.data\.system='you are': the model's chat template leaves it out"):
        with_system(policy, "you are")
    tok.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"config\.data\.system='x': the model's chat template refuses it"):
        with_system(policy, "x")


@pytest.mark.parametrize(
    ("steps", "total", "evaluated", "lines"),
    [
        ({}, 0, False, []),
        ({"sft": 160}, 320, False, ["SFT resumes at step 160 of 320"]),
        ({"sft": 160}, 0, False, ["SFT resumes at step 160"]),
        ({"sft": 320, "rl": 17}, 50, False, ["SFT finished at step 320", "RL resumes at step 17 of 50"]),
        ({"sft": 320, "rl": 50}, 50, False, ["SFT finished at step 320", "RL finished at step 50"]),
        ({"sft": 320, "rl": 50}, 0, True, ["SFT finished at step 320", "RL finished at step 50"]),
    ],
)
def test_a_resumed_run_says_what_it_finds(tmp_path, monkeypatch, steps, total, evaluated, lines):
    config = configs.base()
    config.sft.steps = config.rl.steps = total
    monkeypatch.setattr(stage, "find_step", lambda config, workdir, name, which: steps.get(name))
    if evaluated:
        (tmp_path / "eval").mkdir()
        (tmp_path / "eval/before_unguided.json").write_text(json.dumps({}))
    assert train.found(config, tmp_path) == lines
