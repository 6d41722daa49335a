"""Responses of earlier epochs: found again by problem, from the steps before alone, also after a resume."""

import json

import jax
import numpy as np
import pytest
from helpers.configs import load
from helpers.paths import ROOT
from helpers.runs import TINY, parameters, rows

from sgpo_jax import sharding
from sgpo_jax.commands import train
from sgpo_jax.rollout import Rollout
from sgpo_jax.rollout.drafts import NONE
from sgpo_jax.runtime import distributed
from sgpo_jax.training.earlier import Earlier, text_of


def test_a_text_has_the_ends_of_prompts_and_whole_responses_until_it_is_full():
    long = list(range(20, 40))
    text = text_of([(long, [1, 2]), ([7], [3, 4, 5])], 15)
    assert text.tolist() == [NONE, *long[-8:], 1, 2, NONE, 7, 3, 4]
    assert text_of([([7], [3])], 5).tolist() == [NONE, 7, 3, NONE, NONE]


def rollout(*responses):
    """Responses `[B][G]` of at most 3 tokens."""
    lengths = np.array([[len(tokens) for tokens in group] for group in responses])
    tokens = np.array([[[*tokens, 0, 0, 0][:3] for tokens in group] for group in responses])
    return Rollout(tokens, np.zeros(tokens.shape), lengths, lengths * 0)


def test_the_last_step_before_a_position_counts(tmp_path):
    store = Earlier(tmp_path, size=6, keep=3)
    prompts = [[[50], [51]], [[60], [61]]]
    store.add(0, ["a", "b"], [rollout([[1], [2, 2]], [[3], [3]]), rollout([[4]], [[5, 5, 5]])], prompts)
    store.add(2, ["b", "c"], [rollout([[6], [6]], [[7, 7], [7]]), rollout([[8]], [[9]])], prompts)
    for again in (store, Earlier(tmp_path, size=6, keep=3)):
        first, later = (again.known(position, ["b", "a", "new"], 2) for position in (2, 3))
        np.testing.assert_array_equal(first.expected, [[1, 3], [1.5, 1], [0, 0]])
        np.testing.assert_array_equal(later.expected, [[1, 1], [1.5, 1], [0, 0]])
        assert first.texts[0].tolist() == [NONE, 51, 3, NONE, 51, 3]
        assert later.texts[0].tolist() == [NONE, 50, 6, NONE, 50, 6]
        assert (later.texts[2] == NONE).all()
    assert Earlier(tmp_path, size=0, keep=3).known(3, ["a"], 2).texts is None
    store.add(3, ["d"], [rollout([[1]]), rollout([[1]])], [[[1]], [[1]]])
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["00000002.npz", "00000003.npz"]
    assert store.known(4, ["a"], 2).expected.tolist() == [[0, 0]]


def test_processes_that_do_not_see_the_same_files_use_none(tmp_path, monkeypatch):
    Earlier(tmp_path, size=6, keep=3).add(0, ["a"], [rollout([[1], [2]])], [[[50]]])
    for others, expected in ((lambda mine: [mine, mine], 1.0), (lambda mine: [mine, ""], 0.0)):
        # What comes from the other processes has been JSON.
        monkeypatch.setattr(distributed, "gather", lambda mine, of=others: json.loads(json.dumps(of(mine))))
        assert Earlier(tmp_path, size=6, keep=3).known(1, ["a"], 1).expected.tolist() == [[expected]]


@pytest.mark.parametrize("how", ["cut", "empty", "another", "text"])
def test_a_damaged_step_is_named_with_what_to_do(tmp_path, how):
    Earlier(tmp_path, size=6, keep=3).add(0, ["a"], [rollout([[1]])], [[[50]]])
    file = tmp_path / "00000000.npz"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-20], "empty": b"", "another": b"", "text": b"no arrays"}[how])
    if how == "another":
        np.savez(file, ids=np.array(["a"]))
    with pytest.raises(ValueError, match=r"00000000\.npz: must hold .*without the folder .* the run goes on"):
        Earlier(tmp_path, size=6, keep=3)


@pytest.mark.slow
def test_a_run_with_drafts_and_few_slots_learns_the_same_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)

    def run(folder, steps, **fields):
        config = load(ROOT / "configs" / "quickstart.py")
        config.update_from_flattened_dict(TINY | {
            "stages": ("rl",), "data.train": "arithmetic:train,count=8", "rl.reward": "helpers.reward_functions:even",
            "rl.steps": steps, "rl.eval_every": 0, "checkpoint.every": 1, "rl.learning_rate": 1e-2,
            "report_seconds": 0.0, **fields,
        })  # fmt: skip
        train.run(config, tmp_path / folder)
        return rows(tmp_path / folder, "rl"), parameters(tmp_path / folder, "rl", steps)

    drafting = {"rl.draft": 4, "rl.slots": 4}
    whole, state = run("whole", 4, **drafting)
    run("parts", 3, **drafting)
    parts, resumed = run("parts", 4, **drafting)
    assert whole == parts
    jax.tree.map(np.testing.assert_array_equal, state, resumed)
    plain, expected = run("plain", 4)
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, atol=1e-6), state, expected)
    for drafted, row in zip(whole, plain, strict=True):
        assert "passes" not in row and drafted["passes"] + drafted["accepted"] == pytest.approx(
            (4 * row["response_length"] + 2 * row["response_length_guided"]) / 6
        )
        assert drafted["reward_auto"] == row["reward_auto"] and drafted["drafted"] >= drafted["accepted"] >= 0
    assert sum(row["accepted"] for row in whole) > 0
    # 8 prompts of a page each, and ten pages for responses, of which each needs one.
    shared, state = run("pool", 4, **{"rl.pool_tokens": 18 * 128})
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, atol=1e-6), state, expected)
    for pooled, row in zip(shared, plain, strict=True):
        assert pooled["reward_auto"] == row["reward_auto"] and pooled["put_back"] >= 0 and pooled["slots_used"] < 0.2
        assert 8 / 18 < pooled["pool_used"] <= 1 and "pool_used" not in row
