"""Problems that a step does not wait for: which are trained on when, what is kept of them, and a run that resumes."""

import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from helpers.configs import load
from helpers.paths import ROOT
from helpers.runs import TINY, parameters, rows
from hypothesis import given, settings

from sgpo_jax import config as configs
from sgpo_jax import policy, sharding
from sgpo_jax.commands import train
from sgpo_jax.policy import generation
from sgpo_jax.rollout import LENGTH, RUNNING, STOP, Rollout, Sampling
from sgpo_jax.training import carried, rl
from sgpo_jax.training.inputs import Problems
from sgpo_jax.training.loop import Clock

SIZES, T, PAD = {"autonomous": 2, "guided": 1}, 4, 63


def fields(batch, extra, most=2, **others):
    config = configs.base()
    config.rl.update({"batch": batch, "carry_over": extra / batch, "carry_most": most, "max_new_tokens": T} | others)
    return config.rl


# ---- bookkeeping


def rollout_of(flight, complete, rng):
    """A rollout that samples at random, and ends the responses of these problems; a token is its place plus 10."""
    rollouts = {}
    for name, known in flight.rollouts.items():
        ends = np.broadcast_to(complete[:, None], known.lengths.shape) & (known.finish == RUNNING)
        grown = rng.integers(np.minimum(known.lengths, T - 1), T + ends)
        lengths = np.where(known.finish == RUNNING, grown, known.lengths)
        lengths = np.where(ends, np.maximum(lengths, 1), lengths).astype(np.int32)
        finish = np.where(ends, np.where(lengths == T, LENGTH, STOP), known.finish).astype(np.int32)
        there = np.arange(T) < lengths[..., None]
        tokens, logp = np.where(there, np.arange(10, 10 + T), PAD), np.where(there, -np.arange(T) / 3, 0)
        rollouts[name] = Rollout(tokens.astype(np.int32), logp.astype(np.float32), lengths, finish)
    return rollouts


@settings(max_examples=40)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.sampled_from([1, 2]))
def test_every_problem_is_trained_on_once_in_time_and_in_order(data, half, most, total, shards):
    batch = 2 * half
    chosen = fields(batch, 2 * data.draw(st.integers(1, half)), most)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    flights, first, log, seen = carried.nothing(SIZES, T), {}, {}, []
    for position in range(total):
        flight = carried.begin(flights, position, total, chosen, PAD)
        count = len(flight.numbers)
        assert count == batch + (position < total - 1) * carried.extra(chosen)
        first |= {n: position for n in flight.numbers.tolist() if n not in first}
        assert [first[n] for n in flight.numbers.tolist()] == flight.first.tolist()
        dealt = carried.spread(flight, shards)
        old = (dealt.first < position).reshape(shards, -1).sum(axis=1)
        assert sorted(dealt.numbers) == flight.numbers.tolist() and old.max() - old.min() <= 1
        told = carried.begun(dealt, position, chosen)
        assert told.enough == batch and (told.due == (position - dealt.first >= most)).all()
        done = (told.rollout.finish != RUNNING).all(axis=1) | told.due
        more = max(batch - done.sum(), 0) + rng.integers(0, 2)
        done[rng.permutation(np.flatnonzero(~done))[:more]] = True
        rollouts = rollout_of(dealt, done, rng)
        for name, sampled in rollouts.items():  # which step sampled what, by problem
            for i, n in enumerate(dealt.numbers.tolist()):
                for place in zip(*np.nonzero(np.arange(T) < sampled.lengths[i][:, None]), strict=True):
                    log.setdefault((name, n, *map(int, place)), position)
        trained, flights, metrics = carried.end(dealt, rollouts, position, batch)
        numbers = dealt.numbers[trained].tolist()
        assert numbers == sorted(dealt.numbers[done].tolist())[:batch] and len(numbers) == batch
        assert sorted(flights.numbers.tolist() + numbers) == flight.numbers.tolist()
        assert flights.numbers.tolist() == sorted(flights.numbers.tolist())
        ages = [position - at for (_, n, *_), at in log.items() if n in numbers]
        assert max(position - first[n] for n in numbers) <= most and max(ages) <= most
        assert metrics["token_age_max"] == max(ages)
        np.testing.assert_allclose(metrics["token_age"], np.mean(ages), rtol=1e-6)
        assert metrics["carried"] == np.mean([first[n] < position for n in numbers])
        seen += numbers
    assert sorted(seen) == [*range(total * batch)] and not len(flights.numbers)


def test_the_age_of_tokens_by_hand():
    def rollout(lengths):
        lengths = np.array(lengths)
        return Rollout(np.zeros((*lengths.shape, T)), None, lengths, None)

    rollouts = {"autonomous": rollout([[3, 2], [1, 1]]), "guided": rollout([[1], [4]])}
    positions = {"autonomous": np.array([[[3, 3, 4, 0], [4, 5, 0, 0]], [[5, 0, 0, 0], [5, 0, 0, 0]]]),
                 "guided": np.array([[[3, 0, 0, 0]], [[5, 5, 5, 5]]])}  # fmt: skip
    trained = carried.Flight(np.array([7, 9]), np.array([3, 5]), rollouts, positions)
    found = carried.staleness(trained, 5)
    assert found == {"carried": 0.5, "token_age": pytest.approx(8 / 12), "token_age_max": 2.0}


def test_those_that_go_on_are_taken_first_and_the_oldest_before_the_others():
    flight = carried.begin(carried.nothing(SIZES, T), 5, 9, fields(2, 2), PAD)._replace(first=np.array([5, 3, 4, 5]))
    lengths = np.array([[3, 1], [0, 2], [4, 4], [4, 0]], np.float32)
    expected = carried.in_line(flight, 5, lengths, T)
    assert expected.tolist() == [[3, 1], [6, 6], [5, 5], [4, 0]]
    assert carried.in_line(flight, 5, None, T).tolist() == [[0, 0], [6, 6], [5, 5], [0, 0]]


def test_a_run_with_more_or_fewer_steps_than_before_goes_on():
    chosen = fields(4, 2)

    def numbers(goes_on, position, total):
        before = carried.nothing(SIZES, T)._replace(numbers=np.array(goes_on, int), first=np.array(goes_on, int))
        before = before._replace(
            rollouts={name: Rollout(*(np.zeros((len(goes_on), *x.shape[1:])) for x in old))
                      for name, old in before.rollouts.items()},
            positions={name: np.zeros((len(goes_on), *x.shape[1:])) for name, x in before.positions.items()},
        )  # fmt: skip
        return carried.begin(before, position, total, chosen, PAD).numbers.tolist()

    assert numbers([], 0, 3) == [0, 1, 2, 3, 4, 5] and numbers([1, 4], 1, 3) == [1, 4, 6, 7, 8, 9]
    assert numbers([4, 7], 2, 3) == [4, 7, 10, 11] and numbers([], 3, 5) == [12, 13, 14, 15, 16, 17]
    assert numbers([4, 7], 2, 4) == [4, 7, 10, 11, 12, 13] and numbers([1, 4], 1, 2) == [1, 4, 6, 7]


# ---- files


def stored(folder):
    rng = np.random.default_rng(0)
    store = carried.Carried(folder, fields(2, 2), SIZES, total=5, pad_id=PAD, keep=2)
    for position in range(4):
        flight = store.begin(position, 1)
        done = (flight.rollouts["guided"].finish != RUNNING)[:, 0] | (position - flight.first >= 2)
        done[np.flatnonzero(~done)[: max(2 - done.sum(), 0)]] = True
        store.end(position, flight, rollout_of(flight, done, rng))
    return store


def test_what_goes_on_is_read_again_as_it_was(tmp_path):
    store = stored(tmp_path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["00000002.npz", "00000003.npz"]
    again = carried.Carried(tmp_path, fields(2, 2), SIZES, total=5, pad_id=PAD, keep=2)
    jax.tree.map(np.testing.assert_array_equal, store.begin(4, 1), again.begin(4, 1))
    types = jax.tree.map(lambda x: x.dtype, again.begin(4, 1))
    assert types == jax.tree.map(lambda x: x.dtype, store.begin(4, 1))
    assert any((rollout.lengths > 0).any() for rollout in again.begin(4, 1).rollouts.values())


@pytest.mark.parametrize("how", ["cut", "empty", "another", "text", "missing", "shorter"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, how):
    stored(tmp_path)
    file = tmp_path / "00000003.npz"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-20], "empty": b"", "text": b"no arrays"}.get(how, whole))
    if how == "missing":
        file.unlink()
    if how == "another":
        np.savez(file, numbers=np.array([1]))
    if how == "shorter":
        with np.load(file) as arrays:
            np.savez(file, **{**arrays, "autonomous/tokens": arrays["autonomous/tokens"][:-1]})
    store = carried.Carried(tmp_path, fields(2, 2), SIZES, total=5, pad_id=PAD, keep=2)
    message = r"00000003\.npz: must hold the responses that go on after step 4 .*remove the checkpoint of step 4"
    with pytest.raises(ValueError, match=message):
        store.begin(4, 1)


# ---- steps

PROMPTS = {
    "autonomous": {f"p{i}": [9 + i, 10, 11][: 1 + i % 3] for i in range(8)},
    "guided": {f"p{i}": [30, 9 + i, 31][: 1 + i % 3] for i in range(8)},
}
BATCHES = [[{"id": f"p{i}"} for i in (0, 3, 5, 6)], [{"id": f"p{i}"} for i in (1, 2, 4, 7)]] * 3


@pytest.fixture(scope="module")
def sampler(tiny, tiny_params, tmp_path_factory):
    """(mesh shape, carries, parameters) -> (sampler, parameters on its mesh)."""

    def make(shape=(1, 1, 1), extra=2, **others):
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
        config = configs.base()
        config.rl.update({
            "batch": 4, "carry_over": extra / 4, "draft": 4, "slots": 8, "autonomous": 3, "guided": 2,
            "max_new_tokens": 24, "temperature": 0.5, "top_p": 1.0,
        } | others)  # fmt: skip
        ours = policy.Policy(tiny, None, tuple(range(1, 9)), PAD, np.dtype(np.float32), "")
        run = policy.Run(config, tmp_path_factory.mktemp("run"), ours, mesh)
        chosen = rl.Sampler(run, Problems([], PROMPTS, {}), Sampling.from_config(config.rl))
        chosen = dataclasses.replace(chosen, in_flight=rl.make_carried(run, 6))
        return chosen, policy.place(tiny_params, mesh)

    return make


def graded(policy, rollout, rows, reward):
    return generation.Graded(rollout, [[]] * len(rows), [[]] * len(rows), np.zeros(rollout.lengths.shape))


@pytest.mark.parametrize(
    ("shape", "pool"), [((1, 1, 1), 0), pytest.param((1, 2, 4), 2 * (6 + 2) * 128, marks=pytest.mark.slow)]
)
def test_with_the_same_policy_all_responses_are_those_of_steps_that_wait(sampler, monkeypatch, shape, pool):
    """Also from a pool with a page for each of the 6 prompts of a device, and two for responses."""
    monkeypatch.setattr(rl, "grade", graded)
    waits, params = sampler()
    with jax.set_mesh(waits.run.mesh):
        expected = [rl.sample_groups(waits, params, BATCHES[i], i)[0] for i in range(6)]
    goes_on, params = sampler(shape, pool_tokens=pool)
    seen, stale, tokens, total = [], [], 0, 0
    for position in range(6):
        with jax.set_mesh(goes_on.run.mesh):
            flight = carried.begin(goes_on.in_flight._last[1], position, 6, goes_on.run.config.rl, PAD)
            found = rl.sample_and_grade(goes_on, params, [BATCHES, None], position, Clock())
        after = goes_on.in_flight._last[1]
        numbers = [n for n in flight.numbers.tolist() if n not in after.numbers.tolist()]
        seen += numbers
        assert [row["id"] for row in found.problems] == [BATCHES[n // 4][n % 4]["id"] for n in numbers]
        for place, n in enumerate(numbers):
            for name, group in found.graded.items():
                wanted = expected[n // 4][name]
                for field in ("tokens", "lengths", "finish"):
                    actual = getattr(group.rollout, field)[place]
                    np.testing.assert_array_equal(actual, getattr(wanted, field)[n % 4])
                np.testing.assert_allclose(group.rollout.logp[place], wanted.logp[n % 4], atol=1e-5)
        tokens, total = tokens + found.tokens, total + sum(g.rollout.lengths.sum() for g in found.graded.values())
        stale.append(found.staleness["token_age_max"])
    assert sorted(seen) == [*range(24)] and tokens == total and max(stale) >= 1


def test_problems_go_on_only_where_it_is_asked_for_and_slots_are_for_all_of_them(sampler, monkeypatch):
    monkeypatch.setattr(rl.memory, "sampling", lambda run, section, responses, prompts: (responses, prompts))
    for extra, expected in ((0, (20, 8)), (2, (30, 12))):
        chosen, _ = sampler(extra=extra)
        assert (chosen.in_flight is not None) == (extra > 0) and carried.extra(chosen.run.config.rl) == extra
        assert rl.step_sampling(chosen.run) == expected


# ---- runs


@pytest.fixture
def run(tmp_path, monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)

    def run(folder, steps=6, **changes):
        config = load(ROOT / "configs" / "quickstart.py")
        config.update_from_flattened_dict(TINY | {
            "stages": ("rl",), "data.train": "arithmetic:train,count=16", "rl.reward": "helpers.reward_functions:even",
            "rl.steps": steps, "rl.eval_every": 0, "checkpoint.every": 2, "rl.learning_rate": 1e-2,
            "report_seconds": 0.0, "rl.draft": 4, "rl.slots": 4, "rl.carry_over": 0.5, "rl.importance": "token",
            **changes,
        })  # fmt: skip
        train.run(config, tmp_path / folder)
        return rows(tmp_path / folder, "rl"), parameters(tmp_path / folder, "rl", steps)

    return run


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_run_that_is_killed_within_a_step_resumes_bit_for_bit(run, tmp_path, monkeypatch):
    whole, state = run("whole")
    assert max(row["token_age_max"] for row in whole) >= 1 and whole[0]["carried"] == whole[0]["token_age"] == 0
    assert all(0 <= row["token_age"] <= row["token_age_max"] <= 2 for row in whole)
    assert any(row["carried"] > 0 for row in whole) and max(row["logp_mismatch"] for row in whole[1:]) > 1e-4

    grade, calls = rl.grade, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 7:  # two groups of each step: in the fourth, whose responses are sampled
            raise Killed
        return grade(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rl, "grade", killed)
        with pytest.raises(Killed):
            run("parts")
    folder = tmp_path / "parts/rl"
    assert (folder / "carried/00000003.npz").is_file() and not (folder / "checkpoints/4").exists()
    parts, resumed = run("parts")
    assert parts == whole
    jax.tree.map(np.testing.assert_array_equal, state, resumed)


def test_a_run_whose_file_is_gone_is_refused(run, tmp_path):
    run("short", steps=2)
    (tmp_path / "short/rl/carried/00000001.npz").unlink()
    with pytest.raises(ValueError, match=r"carried/00000001\.npz: must hold .*no such file.*checkpoint of step 2"):
        run("short", steps=4)
