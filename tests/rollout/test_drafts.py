"""Drafts: the same responses in fewer passes, whatever is drafted."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from sgpo_jax import policy, sharding
from sgpo_jax.rollout import STOP, LanguageModel, Problems, Prompts, Sampling, Steps, drafts, generate

NONE, SUFFIX = drafts.NONE, drafts.SUFFIX

# ---- matching

K = 4
propose = jax.jit(drafts.propose, static_argnums=2)
TEXT = arrays(np.int32, st.integers(1, 30), elements=st.integers(-1, 3))
LAST = arrays(np.int32, SUFFIX, elements=st.integers(-1, 3))


def proposed(text, last):
    """What `propose` returns, by looking at every place."""
    text, last = text.tolist(), last.tolist()
    best, found = 0, []
    for place in range(len(text) - 1):
        agree = 0
        while agree < min(SUFFIX, place + 1) and text[place - agree] == last[SUFFIX - 1 - agree] != NONE:
            agree += 1
        follows = text[place + 1 :]
        if agree >= best and follows[0] != NONE:
            best, found = agree, follows[: follows.index(NONE) if NONE in follows else None][:K]
    return found if best else []


@settings(max_examples=60)
@given(TEXT, LAST)
def test_the_longest_match_is_found_and_the_last_one_of_several(text, last):
    padded = np.full(30, NONE, np.int32)
    padded[: len(text)] = text
    tokens, count = propose(padded, last, K)
    assert tokens[:count].tolist() == proposed(text, last)


def test_matches_by_hand():
    text = np.array([[5, 6, 7, 8, NONE, 6, 7, 9, NONE, 1, 6, 7]], np.int32)
    last = np.full((1, SUFFIX), NONE, np.int32)
    last[0, -3:] = 5, 6, 7  # three agree at the beginning; the match at the end is followed by nothing
    assert proposed(text[0], last[0]) == [8]
    tokens, count = propose(text, last, K)
    assert count[0] == 1 and tokens[0, 0] == 8
    last[0, -3:] = 2, 6, 7  # two agree in three places, of which the second is the last one that goes on
    tokens, count = propose(text, last, K)
    assert count[0] == 1 and tokens[0, 0] == 9
    last[0, -2:] = 2, 4  # which is nowhere
    assert propose(text, last, K)[1][0] == 0


def test_the_last_tokens_of_a_response_begin_with_its_prompt():
    before = drafts.before(jnp.array([[NONE, 9, 3, 4]]))
    assert before.tolist() == [[NONE] * (SUFFIX - 2) + [9, 3, 4]]
    texts = jnp.concatenate([before, jnp.array([[10, 11, NONE]])], axis=1)[None]
    for sampled, end in ((0, [9, 3, 4]), (2, [3, 4, 10, 11])):
        last = drafts.last_tokens(texts, jnp.array([[0]]), jnp.array([[sampled]]))
        assert last[0, 0, -len(end) :].tolist() == end


# ---- acceptance

accept = jax.jit(drafts.accept)
TOKENS = arrays(np.int32, K + 1, elements=st.integers(0, 3))


@settings(max_examples=60)
@given(TOKENS, arrays(np.int32, K, elements=st.integers(0, 3)), st.integers(0, K), st.integers(1, K + 2))
def test_the_tokens_of_a_pass_are_those_of_one_by_one(token, drafted, count, left):
    kept = 0
    while True:
        kept += 1
        if token[kept - 1] == 3 or kept == left or kept > count or drafted[kept - 1] != token[kept - 1]:
            break
    got, stopped = accept(token, drafted, count, jnp.array([3, 7]), left)
    assert (got, stopped) == (kept, token[kept - 1] == 3)


# ---- rollouts

COUNT, GROUP, NEW, LENGTH, PAD = 24, 3, 24, 7, 63
STOPS = tuple(range(1, 9))  # responses end at all lengths
IDS = np.arange(COUNT, dtype=np.uint32) * 7


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) >= LENGTH - rng.integers(1, LENGTH + 1, COUNT)[:, None]
    return Prompts(np.where(mask, rng.integers(9, PAD, (COUNT, LENGTH)), PAD).astype(np.int32), mask)


@pytest.fixture(scope="module")
def run(tiny, tiny_params, prompts):
    """Returns `generate` on the tiny model; `hostile` has what is drafted, in place of what is found in texts.

    These are the drafts `[Q,NEW,K]` of each response, after each number of tokens that it has, and how many count.
    """

    @functools.cache
    def compiled(chosen, shape, stops):
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
        shards = sharding.row_ways(mesh)

        def sampled(params, batch, problems, hostile):
            def guess(_, place, most):
                tokens, counts = (x.reshape(shards, -1, *x.shape[1:]) for x in hostile)
                at = jnp.arange(shards)[:, None], place[..., 0], jnp.minimum(place[..., 1], NEW - 1)
                return tokens[at][..., :most], jnp.minimum(counts[at], most)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(drafts, "AT_ONCE_CPU", 64)
                if hostile is not None:
                    patch.setattr(drafts, "last_tokens", lambda _, *place: jnp.stack(place, axis=-1))
                    patch.setattr(drafts, "propose", guess)
                return generate.__wrapped__(
                    params, LanguageModel(tiny, stops, PAD), Prompts(*batch), jax.random.key(0), problems,
                    sampling=chosen, group=GROUP, shards=shards,
                )  # fmt: skip

        return jax.jit(sampled), mesh, policy.place(tiny_params, mesh)

    def run(draft, hostile=None, shape=(1, 1, 1), stops=STOPS, known=None, **changes):
        chosen = dataclasses.replace(Sampling(NEW, 0.5, draft=draft), **changes)
        sample, mesh, params = compiled(chosen, shape, stops)
        with jax.set_mesh(sharding.decoding_mesh(mesh, chosen.decode_ways)):
            batch, problems = sharding.put_rows((tuple(prompts), Problems(IDS, **known or {})), mesh)
            rollout, steps = jax.device_get(sample(params, batch, problems, hostile))
        return rollout, steps

    return run


@pytest.fixture(scope="module")
def one_by_one(run):
    rollout, _ = run(0)
    assert {1, NEW} < set(rollout.lengths.ravel()) and len(set(rollout.lengths.ravel())) > 8
    assert (rollout.finish == STOP).any() and (rollout.finish != STOP).any()
    return rollout


def assert_same(sampled, expected):
    rollout, steps = sampled
    for name in ("tokens", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected, name))
    np.testing.assert_allclose(rollout.logp, expected.logp, atol=1e-5)
    assert isinstance(steps, Steps) and steps.slots >= steps.passes.sum()
    assert (steps.passes >= 1).all() and (steps.passes + steps.drafted >= rollout.lengths).all()


@pytest.mark.parametrize(
    ("draft", "changes"),
    [(3, {"slots": 8}), (5, {"shape": (1, 4, 2), "slots": 8})]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (7, {}), (1, {"slots": 1}), (12, {"slots": 3}), (4, {"shape": (2, 2, 2)}), (4, {"shape": (4, 1, 2)}),
            (4, {"shape": (1, 1, 8), "slots": 4}), (4, {"shape": (2, 1, 4), "slots": 8}),
            (4, {"shape": (1, 4, 2), "decode_ways": (2, 4)}), (4, {"shape": (1, 8, 1), "slots": 16}),
        ]
    ],
)  # fmt: skip
def test_drafts_from_texts_change_no_response(run, one_by_one, draft, changes):
    rollout, steps = run(draft, **changes)
    assert_same((rollout, steps), one_by_one)
    assert steps.drafted.sum() > 0 and steps.passes.sum() < rollout.lengths.sum()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2)])
def test_earlier_texts_of_a_problem_are_drafted_from(run, one_by_one, shape):
    """Here they are its responses, of which the second is the last one in the text of each problem."""
    texts = np.where(np.arange(NEW) < one_by_one.lengths[..., None], one_by_one.tokens, NONE)
    texts = np.pad(texts, ((0, 0), (0, 0), (1, 0)), constant_values=NONE).reshape(COUNT, -1)
    rollout, steps = run(3, shape=shape, slots=8, known={"earlier": texts})
    assert_same((rollout, steps), one_by_one)
    assert 1.5 * steps.passes.sum() < rollout.lengths.sum()


# ---- hostile drafts


@pytest.fixture(scope="module")
def right(run):
    """Right drafts of every place `[Q,NEW,K]`, also past a stop and past the limit."""
    longer, _ = run(0, stops=(), max_new_tokens=NEW + K + 1)
    tokens = longer.tokens.reshape(-1, NEW + K + 1)
    return np.stack([tokens[:, i : i + K] for i in range(NEW)], axis=1)


def always(tokens):
    return tokens, np.full(tokens.shape[:2], K, np.int32)


def test_a_pass_takes_all_of_right_drafts_but_none_past_the_stop_or_the_limit(run, one_by_one, right):
    rollout, steps = run(K, always(right), slots=4)
    assert_same((rollout, steps), one_by_one)
    np.testing.assert_array_equal(steps.passes, -(-rollout.lengths // (K + 1)))
    # A pass at the limit is drafted up to it.
    assert (steps.drafted + steps.passes <= NEW).all()


def test_wrong_drafts_cost_nothing_but_their_passes(run, one_by_one, right):
    rollout, steps = run(K, always((right + 1) % 64), slots=4)
    assert_same((rollout, steps), one_by_one)
    np.testing.assert_array_equal(steps.passes, rollout.lengths)
    assert steps.slots == run(0, slots=4)[1]


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.3, 0.8]), st.sampled_from([(1, 1, 1), (1, 4, 2)]))
def test_any_drafts_give_the_same_responses(run, one_by_one, right, seed, wrong, shape):
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 64, right.shape)
    tokens = np.where(rng.random(right.shape) < wrong, noise, right).astype(np.int32)
    counts = rng.integers(0, K + 1, right.shape[:2]).astype(np.int32)
    _, steps = sampled = run(K, (tokens, counts), shape=shape, slots=4)
    assert_same(sampled, one_by_one)
    for response in range(0, len(tokens), 7):
        expected, length = one_by_one.tokens.reshape(-1, NEW)[response], one_by_one.lengths.ravel()[response]
        at = passes = 0
        while at < length:
            agree = 0
            while agree < counts[response, at] and at + agree < length:
                if tokens[response, at, agree] != expected[at + agree]:
                    break
                agree += 1
            at, passes = at + agree + 1, passes + 1
        assert steps.passes.ravel()[response] == passes


def test_the_watcher_sees_every_token_once(run, one_by_one, right):
    seen = np.zeros((COUNT * GROUP, NEW), int)
    found = np.full((COUNT * GROUP, NEW), PAD)

    def watch(response, sampled, token):
        for index, at, new in zip(response[0], sampled[0], token[0], strict=True):
            if index < len(seen):
                seen[index, at] += 1
                found[index, at] = new

    run(K, always(right), slots=4, watch=watch)
    jax.effects_barrier()
    np.testing.assert_array_equal(found, one_by_one.tokens.reshape(-1, NEW))
    np.testing.assert_array_equal(seen.sum(axis=1), one_by_one.lengths.ravel())
    assert seen.max() == 1


@pytest.mark.parametrize(
    ("draft", "width", "slots", "most", "on_cpu"),
    [(8, 4, 4, 8, 1), (8, 16, 16, 3, 0), (3, 2, 512, 3, 3), (8, 512, 512, 0, 0), (8, 128, 512, 3, 0), (0, 2, 8, 0, 0)],
)
def test_a_pass_has_few_tokens_or_no_more_than_the_first_stage(monkeypatch, draft, width, slots, most, on_cpu):
    assert drafts.most_drafted(draft, width, slots) == on_cpu
    monkeypatch.setattr(drafts, "platform", lambda: "tpu")
    assert drafts.most_drafted(draft, width, slots) == most
