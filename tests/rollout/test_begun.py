"""Responses that go on: the rollout ends before them, and a later one takes them up where they are."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from sgpo_jax import models, policy, sharding
from sgpo_jax.rollout import (
    LENGTH,
    RUNNING,
    STOP,
    Begun,
    LanguageModel,
    Problems,
    Prompts,
    Rollout,
    Sampling,
    generate,
)
from sgpo_jax.rollout.schedule import Going, Pace, schedule

COUNT, GROUP, NEW, PROMPT, PAD = 24, 3, 24, 7, 63
STOPS = tuple(range(1, 9))  # responses end at all lengths
IDS = np.arange(COUNT, dtype=np.uint32) * 7
KEY = jax.random.key(0)
FRESH = Rollout(
    np.full((COUNT, GROUP, NEW), PAD, np.int32), np.zeros((COUNT, GROUP, NEW), np.float32),
    np.zeros((COUNT, GROUP), np.int32), np.full((COUNT, GROUP), RUNNING, np.int32),
)  # fmt: skip
NONE_DUE = np.zeros(COUNT, bool)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    mask = np.arange(PROMPT) >= PROMPT - rng.integers(1, PROMPT + 1, COUNT)[:, None]
    return Prompts(np.where(mask, rng.integers(9, PAD, (COUNT, PROMPT)), PAD).astype(np.int32), mask)


@pytest.fixture(scope="module")
def run(tiny, tiny_params, prompts):
    @functools.cache
    def on(shape):
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
        return mesh, policy.place(tiny_params, mesh)

    def run(begun=None, draft=4, shape=(1, 1, 1), params=None, key=KEY, expected=None, **changes):
        chosen = dataclasses.replace(Sampling(NEW, 0.5, draft=draft), **changes)
        mesh, placed = on(shape)
        placed = placed if params is None else policy.place(params, mesh)
        with jax.set_mesh(sharding.decoding_mesh(mesh, chosen.decode_ways)):
            batch, problems = sharding.put_rows((tuple(prompts), Problems(IDS, expected, begun=begun)), mesh)
            found = generate(
                placed, LanguageModel(tiny, STOPS, PAD), Prompts(*batch), key, problems, sampling=chosen, group=GROUP,
                shards=sharding.row_ways(mesh),
            )  # fmt: skip
            return jax.device_get(found)

    return run


@pytest.fixture(scope="module")
def whole(run):
    rollout, _ = run(draft=0)
    assert {1, NEW} < set(rollout.lengths.ravel()) and (rollout.finish != STOP).any()
    return rollout


def until(rollout, enough, due=NONE_DUE):
    return Begun(rollout, due, np.int32(enough))


def cut(rollout, lengths):
    """The rollout as it was when its responses had at most these lengths `[B,G]`."""
    lengths = np.minimum(rollout.lengths, lengths).astype(np.int32)
    known = np.arange(NEW) < lengths[..., None]
    finish = np.where(lengths == rollout.lengths, rollout.finish, RUNNING).astype(np.int32)
    return Rollout(np.where(known, rollout.tokens, PAD), np.where(known, rollout.logp, 0), lengths, finish)


def complete(rollout):
    return (rollout.finish != RUNNING).all(axis=1)


def assert_same(rollout, expected):
    for name in ("tokens", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected, name))
    np.testing.assert_allclose(rollout.logp, expected.logp, atol=1e-5)


NOTHING_DRAFTED = [((1, 1, 1), 8), ((1, 8, 1), 0)]  # because a stage has at least 8 slots of a shard


def assert_scheduled(rollout, steps, before, whole, enough, shards, slots):
    """The host knows the passes and what is left from the lengths."""

    def by_shard(values):
        return values.reshape(shards, -1)

    lengths, age = by_shard(whole.lengths), np.zeros((shards, COUNT // shards))
    going = Going(by_shard(before.lengths), age, age > 0, enough)
    found = schedule(lengths, np.full_like(lengths, PROMPT), slots // shards or lengths.shape[1], going=going)
    assert sum(stage.width * stage.steps for stage in found.stages) * shards == steps.slots
    np.testing.assert_array_equal(found.tokens, by_shard(rollout.lengths))


@pytest.mark.parametrize(
    ("shape", "slots", "ways"),
    [((1, 1, 1), 0, (1,)), ((1, 1, 1), 8, (1,)), ((2, 2, 2), 8, (1,)), ((1, 8, 1), 0, (1,)), ((1, 4, 2), 0, (1, 4))],
)
def test_a_stopped_rollout_goes_on_as_if_it_had_not_stopped(run, whole, shape, slots, ways):
    rollout = FRESH
    for enough in (6, 15, COUNT):
        before = rollout
        rollout, steps = run(until(before, enough), shape=shape, slots=slots, decode_ways=ways)
        assert complete(rollout).sum() >= enough
        if (shape, slots) in NOTHING_DRAFTED:
            assert_scheduled(rollout, steps, before, whole, enough, shards=shape[1], slots=slots)
        assert_same(rollout, cut(whole, rollout.lengths))
        known = np.arange(NEW) < before.lengths[..., None]
        np.testing.assert_array_equal(rollout.logp[known], before.logp[known])
        if enough < COUNT:
            assert (rollout.finish == RUNNING).any() and (rollout.lengths >= before.lengths).all()
            assert (rollout.tokens[np.arange(NEW) >= rollout.lengths[..., None]] == PAD).all()
    assert_same(rollout, whole)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 8, 24]), st.sampled_from([((1, 1, 1), 4), ((1, 4, 2), 8)]))
def test_responses_go_on_from_any_token(run, whole, seed, most, where):
    """Also from none, from the one before the last, and from those that have ended; the order changes nothing."""
    shape, slots = where
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random((COUNT, GROUP)) < 0.2, whole.lengths - 1, rng.integers(0, most + 1, (COUNT, GROUP)))
    begun = cut(whole, np.where(rng.random((COUNT, GROUP)) < 0.2, NEW, lengths))
    expected = rng.random(COUNT).astype(np.float32)
    rollout, steps = run(until(begun, COUNT), shape=shape, slots=slots, expected=expected)
    assert_same(rollout, whole)
    new = rollout.lengths - begun.lengths
    assert (steps.passes[new == 0] == 0).all()
    assert (steps.passes[new > 0] > 0).all()
    assert (steps.passes <= new).all()
    assert (steps.passes + steps.drafted >= new).all()


def test_a_rollout_ends_at_the_pass_that_completes_enough_problems(run, whole):
    """With all responses at once nothing is drafted here, so that after a pass each has a token more."""
    done = np.sort(whole.lengths.max(axis=1))
    for enough in (1, 5, 9):
        rollout, steps = run(until(FRESH, enough))
        assert_same(rollout, cut(whole, done[enough - 1]))
        assert complete(rollout).sum() >= enough and steps.slots <= done[enough - 1] * COUNT * GROUP
        np.testing.assert_array_equal(steps.passes, rollout.lengths)
    known = cut(whole, whole.lengths - 1)  # most are not fed to their ends before the first problem is complete
    rollout, _ = run(until(known, 1))
    assert_same(rollout, cut(whole, np.where(whole.lengths <= done[0], NEW, known.lengths)))
    rollout, steps = run(until(FRESH, 0))
    assert (rollout.lengths == 0).all() and steps.slots == 0
    rollout, steps = run(until(whole, COUNT))
    assert steps.slots == 0
    assert_same(rollout, whole)


def test_known_tokens_are_fed_several_at_a_time(run, whole):
    """Two slots draft three tokens each: a response without its last token takes a pass for four of its tokens."""
    _, steps = run(until(cut(whole, whole.lengths - 1), COUNT), slots=2)
    least = -(-whole.lengths // 4)
    assert least.sum() <= steps.slots <= least.sum() + 2 * least.max()
    assert (steps.passes == 1).all() and (steps.drafted == 0)[whole.lengths % 4 != 1].all()
    ended = np.arange(COUNT)[:, None] % 2 == 0  # takes no slot
    _, steps = run(until(cut(whole, whole.lengths - ~ended), COUNT), slots=2)
    assert steps.slots <= least[1::2].sum() + 2 * least.max()
    # Also where the texts would draft fewer: here the last match is before the last token.
    lengths = np.full((COUNT, GROUP), 20, np.int32)
    known = np.where(np.arange(NEW) < 20, np.int32(9), PAD)[None, None].repeat(COUNT, 0).repeat(GROUP, 1)
    _, steps = run(until(FRESH._replace(tokens=known, lengths=lengths), COUNT), slots=2)
    again = steps.slots - steps.passes.sum()
    assert 5 * COUNT * GROUP <= again <= 5 * COUNT * GROUP + NEW


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2)])
def test_problems_that_are_due_are_complete_whatever_is_enough(run, whole, shape):
    longest = whole.lengths.max(axis=1)
    due = np.isin(np.arange(COUNT), [int(longest.argmin()), int(longest.argmax())])
    rollout, _ = run(until(FRESH, 1, due), shape=shape, slots=8)
    assert complete(rollout)[due].all() and not complete(rollout).all()
    assert_same(rollout, cut(whole, rollout.lengths))


def test_another_policy_goes_on_and_leaves_what_is_known(run, whole, tiny, prompts):
    begun = cut(whole, np.random.default_rng(0).integers(0, 12, (COUNT, GROUP)))
    other = models.init(jax.random.key(1), tiny)
    rollout, _ = run(until(begun, COUNT), params=other, slots=8)
    known = np.arange(NEW) < begun.lengths[..., None]
    new = ~known & (np.arange(NEW) < rollout.lengths[..., None])
    for name in ("tokens", "logp"):
        np.testing.assert_array_equal(getattr(rollout, name)[known], getattr(begun, name)[known])
    goes_on = new.any(axis=2)
    assert (rollout.tokens != whole.tokens)[goes_on].any(axis=1).mean() > 0.9
    ended = begun.finish != RUNNING
    assert ended.any() and (rollout.finish[ended] == begun.finish[ended]).all() and not (new[ended]).any()
    # The new tokens have the probabilities of the other policy after the known ones.
    logp = np.zeros_like(rollout.logp)
    for b in range(COUNT):
        prompt = prompts.tokens[b][prompts.mask[b]]
        text = np.concatenate([np.tile(prompt, (GROUP, 1)), rollout.tokens[b]], axis=1)
        places = np.broadcast_to(np.arange(text.shape[1]), text.shape)
        hidden, _ = models.apply(other, tiny, text, places, np.ones_like(text, bool))
        logits = hidden[:, len(prompt) - 1 : -1] @ models.head_weight(other, tiny)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        logp[b] = jnp.take_along_axis(log_probs, rollout.tokens[b][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(rollout.logp[new], logp[new], atol=1e-4)


def test_each_prompt_can_have_a_key_of_its_own(run, whole):
    """The noise is that of the key and the id, wherever the prompt is."""
    keys = jax.random.split(jax.random.key(3), 2)
    alone = [run(draft=0, key=key)[0] for key in keys]
    of = np.arange(COUNT) % 2
    expected = Rollout(*(np.where(of.reshape(-1, *[1] * (x.ndim - 1)), y, x) for x, y in zip(*alone, strict=True)))
    for shape in ((1, 1, 1), (1, 4, 2)):
        assert_same(run(draft=0, key=keys[of], shape=shape, slots=8)[0], expected)
        assert_same(run(until(FRESH, COUNT), key=keys[of], shape=shape, slots=8)[0], expected)


def test_responses_cannot_go_on_without_drafts(run):
    with pytest.raises(ValueError, match=r"draft=0: must be above 0 for responses that are begun"):
        run(until(FRESH, 1), draft=0)


def test_the_finish_reasons_differ():
    assert len({STOP, LENGTH, RUNNING}) == 3


def test_the_oldest_come_first_and_those_due_are_waited_for():
    """Two slots; known tokens are fed three in a pass, and two are sampled in one."""
    lengths, known = np.array([[9, 4, 1, 8]]), np.array([[0, 4, 0, 6]])

    def planned(due, enough):
        going = Going(known, np.array([[0, 1, 0, 2]]), np.array([due]), enough)
        return schedule(lengths, np.full_like(lengths, 5), 2, lambda width: Pace(3, 2), going)

    # The second has ended. The slots take the last one, which has two known passes and one more, and the first, which
    # has five; then the third, which has one.
    found = planned([False] * 4, 2)
    (stage,) = found.stages
    assert (stage.refills, stage.steps, found.begun) == (1, 3, 2) and found.tokens.tolist() == [[6, 4, 0, 8]]
    first, last = 4 + 7 / 2, 4 + (8 + 1) / 2
    assert stage.cached == pytest.approx(first + last)
    (stage,) = planned([False] * 4, 3).stages
    assert (stage.refills, stage.steps) == (2, 4)
    found = planned([True, False, False, False], 2)
    assert [stage.steps for stage in found.stages] == [5] and found.tokens.tolist() == lengths.tolist()


def test_the_cache_of_a_response_that_goes_on():
    """Prompts of 5 tokens. Of 9 tokens 6 are known; after a pass the other response, of one token, has ended."""
    going = Going(np.array([[6, 0]]), np.array([[1, 0]]), np.array([[False, False]]), 2)
    (stage,) = schedule(np.array([[9, 1]]), np.full((1, 2), 5), 2, lambda width: Pace(3, 2), going).stages
    first = 4 + (3 + 1) / 2 + 3 * (4 + 3 + (3 + 3 + 1) / 2)
    assert stage.steps == 4 and stage.cached == pytest.approx((first + 4 + 1 + 3) / 4)
