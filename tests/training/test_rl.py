"""The groups of a step: whose prompts, whose noise, and how many."""

import dataclasses

import jax
import numpy as np
import pytest

from sgpo_jax import config as configs
from sgpo_jax import policy, sharding
from sgpo_jax.policy import generation, memory
from sgpo_jax.rollout import Rollout, Sampling, Steps
from sgpo_jax.training import rl
from sgpo_jax.training.inputs import Problems

PROMPTS = {
    "autonomous": {"a": [9, 10, 11], "b": [12], "c": [13, 14], "longest": [20, 21, 22, 23]},
    "guided": {"a": [9, 30, 10, 11], "b": [30, 12], "c": [30, 31, 13, 14], "longest": [30, 31, 32, 20, 21, 22, 23]},
}
ROWS = [{"id": "c"}, {"id": "a"}, {"id": "b"}]


def settings(**changes):
    config = configs.base()
    config.seed = 5
    config.rl.update({"autonomous": 3, "guided": 2, "max_new_tokens": 9, "temperature": 1.0} | changes)
    return config


def step(tiny, tiny_params, config, position=7):
    """(rollouts of a step, slot-steps, a function that samples one group by itself)."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    ours = policy.Policy(tiny, None, tuple(range(1, 9)), 63, np.dtype(np.float32), "")
    with jax.set_mesh(mesh):
        params = policy.place(tiny_params, mesh)
        run = policy.Run(config, None, ours, mesh)
        sampler = rl.Sampler(run, Problems([], PROMPTS, {}), Sampling.from_config(config.rl))
        found, slot_steps = rl.sample_groups(sampler, params, ROWS, position)

    def alone(name, group):
        tokens = PROMPTS[name]
        padded = generation.pad_prompts(ours, [tokens[row["id"]] for row in ROWS], len(tokens["longest"]))
        key = generation.noise_key(config.seed, name, position)
        with jax.set_mesh(mesh):
            sampling = dataclasses.replace(Sampling.from_config(config.rl), slots=0)
            rollout, _ = generation.respond(ours, params, padded, np.arange(len(ROWS)), key, mesh, sampling, group)
        return rollout

    return found, slot_steps, alone


@pytest.mark.parametrize("slots", [0, 2])
def test_each_group_has_its_prompts_and_its_noise(tiny, tiny_params, slots):
    found, slot_steps, alone = step(tiny, tiny_params, settings(slots=slots))
    assert list(found) == ["autonomous", "guided"]
    for name, group in (("autonomous", 3), ("guided", 2)):
        rollout, expected = found[name], alone(name, group)
        assert rollout.tokens.shape == (3, group, 9)
        np.testing.assert_array_equal(rollout.tokens, expected.tokens)
        np.testing.assert_array_equal(rollout.lengths, expected.lengths)
        np.testing.assert_array_equal(rollout.finish, expected.finish)
        np.testing.assert_allclose(rollout.logp, expected.logp, atol=1e-5)
    assert slot_steps >= sum(rollout.lengths.sum() for rollout in found.values())


@pytest.mark.parametrize("field", ["weights", "cache"])
def test_a_step_samples_from_rounded_kernels_or_a_rounded_cache_and_an_evaluation_does_not(tiny, field):
    if field == "weights":
        pytest.importorskip("qwix", reason="the quantised extra is not installed")
    config = settings(importance="token", **{f"rollout_{field}": "int8"})
    ours = policy.Policy(tiny, None, (1,), 63, np.dtype(np.float32), "")
    run = policy.Run(config, None, ours, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    chosen = rl.step_sampling(run)
    assert {name: getattr(chosen, name) for name in ("weights", "cache")} == {"weights": "", "cache": ""} | {
        field: "int8"
    }
    assert memory.sampling(run, "eval", 4, 2) == Sampling.from_config(config.eval)


@pytest.mark.parametrize("changes", [{"guided": 0}, {"guide": "demonstration", "guided": 1}])
def test_what_is_not_sampled_is_not_there(tiny, tiny_params, changes):
    found, _, alone = step(tiny, tiny_params, settings(**changes))
    assert list(found) == ["autonomous"]
    np.testing.assert_array_equal(found["autonomous"].tokens, alone("autonomous", 3).tokens)


def sampled(ids, rewards):
    """A made-up batch; every number of a response is that of its problem and place."""
    rewards = np.array(rewards, np.float32)
    place = np.arange(rewards.size).reshape(rewards.shape) + 100 * ord(ids[0])
    rollout = Rollout(place[..., None], place[..., None] / 2, place, place)
    graded = generation.Graded(rollout, place.astype(str).tolist(), place.tolist(), rewards)
    return rl.Sampled([{"id": name} for name in ids], {"autonomous": graded, "guided": graded}, 5, 7)


def test_problems_without_spread_are_replaced_by_others_with_it():
    batch = sampled("abcd", [[1, 1], [1, 0], [0, 0], [0, 0]])
    other = sampled("wbxy", [[0, 0], [0, 1], [1, 0], [0, 1]])  # b is in the batch, w is of no use
    found = rl.fill(batch, other)
    assert [row["id"] for row in found.problems] == ["x", "b", "y", "d"] and found[2:4] == (10, 14)
    for graded in found.graded.values():
        assert graded.rewards.tolist() == [[1, 0], [1, 0], [0, 1], [0, 0]]
        expected = [[int(x) for x in row] for row in graded.texts]
        assert expected[0] == [100 * ord("w") + 4, 100 * ord("w") + 5] and expected[3] == [9706, 9707]
        for field in (graded.verdicts, graded.rollout.tokens[..., 0], graded.rollout.lengths):
            assert np.asarray(field).tolist() == expected
    assert rl.has_spread(found).tolist() == [True, True, True, False]


def test_a_response_is_shown_another_correct_one(monkeypatch):
    """Problem a has two correct responses, b one and c none; the thought is not shown, nor a response too long."""
    def encode(policy, rows, guided, hint):
        return [[50, *map(int, row[hint].split())] for row in rows]

    monkeypatch.setattr(rl, "encode_prompts", encode)
    run = policy.Run(settings(target="own", guide="sibling", max_new_tokens=2), None, None, None)
    rewards = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]], np.float32)
    texts = [["1", "<think> 9 </think> 2", "3"], ["4", "5", " ".join(["6"] * 60)], ["7", "8", "9"]]
    graded = generation.Graded(None, texts, None, rewards)
    contexts = rl.own_contexts(run, graded, PROMPTS, [{"id": name} for name in "abc"])
    plain = PROMPTS["autonomous"]
    assert contexts.tokens == [[50, 2], [50, 3], [50, 2], *[plain["b"]] * 3, *[plain["c"]] * 3]
    assert contexts.longest == 4 + 2 + 32
    run = policy.Run(settings(target="own", guide="solution"), None, None, None)
    fixed = rl.own_contexts(run, graded, PROMPTS, [{"id": name} for name in "abc"])
    assert fixed.tokens == [PROMPTS["guided"][name] for name in "aaabbbccc"] and fixed.longest == 7


def test_another_step_has_other_noise(tiny, tiny_params):
    first, second = (step(tiny, tiny_params, settings(), position)[0] for position in (7, 8))
    for name in first:
        assert (first[name].tokens != second[name].tokens).any()


def test_the_steps_of_drafts_are_added_for_each_response():
    first, second = (Steps(n, np.full((2, n), n), np.full((2, n), 10 * n)) for n in (3, 4))
    slots, passes, drafted, put_back, pool_used = rl.added(first, second)
    assert slots == 7 and passes.tolist() == [3] * 6 + [4] * 8 and drafted.tolist() == [30] * 6 + [40] * 8
    assert put_back is None and pool_used is None
    shares = (0.75, first), (0.25, second)
    both = [steps._replace(put_back=steps.passes, pool_used=np.float32(share)) for share, steps in shares]
    assert rl.added(*both).put_back.tolist() == passes.tolist()
    assert rl.added(*both).pool_used.tolist() == [0.75, 0.25]
    assert rl.added(3, 4) == 7
