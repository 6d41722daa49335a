"""Slots that share the pages of a pool: who has which page, and the same responses as without a pool, bit for bit."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gpu_kernels
from hypothesis import example, given, settings

from sgpo_jax import policy, sharding
from sgpo_jax.models import attention, attention_gpu, cache_pages
from sgpo_jax.models.attention_plain import attend_cache_plain
from sgpo_jax.rollout import (
    RUNNING,
    STOP,
    Begun,
    LanguageModel,
    Problems,
    Prompts,
    Rollout,
    Sampling,
    Steps,
    drafts,
    generate,
    pages,
    paging,
    records,
    stages,
)
from sgpo_jax.rollout.schedule import Going, Pool, schedule
from sgpo_jax.rollout.stages import Slots

# ---- who has which page, with a queue that is played through without a model

W, R, B, Q = 2, 4, 3, 9
LIMIT, LONGEST, PAGE = 12, 9, 4  # tokens of a response, of a prompt, and of a page
PLAYED = Sampling(LIMIT, pool=W * 4 * 24, page=PAGE)
SIZE = pages.Sizes(PAGE, 2, 5, 24)


def mark(response, place):
    """What the fake cache has in place of the keys of a token of a response."""
    return 100 * (1 + response) + place


@pytest.fixture(scope="module", autouse=True)
def many_drafts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "AT_ONCE_CPU", 64)
        yield


@functools.cache
def played(draft):
    """(refill, a pass) of `paging.make`; in a pass each slot writes the marks of its next `count` tokens.

    The first one also returns whether a refill is due again, the second one what the pass wrote and read.
    """

    def refill(starts, state):
        refilling, _ = paging.make(dataclasses.replace(PLAYED, draft=draft), SIZE, starts, R)
        state = refilling.refill(state)
        return state, refilling.due(state)

    def step(starts, lengths, state, count):
        waiting, slots, out, steps = paging.make(dataclasses.replace(PLAYED, draft=draft), SIZE, starts, R)[1](state)
        active, cached = slots.response < Q, slots.cache["length"].reshape(W, R)
        left = jnp.take_along_axis(lengths, jnp.minimum(slots.response, Q - 1), axis=1) - slots.sampled
        count, keys = jnp.where(active, jnp.minimum(count, left), 0), slots.cache["key"]
        for i in range(1 + draft):
            new = mark(slots.response, slots.sampled + i).reshape(-1, 1, 1).astype(jnp.float32)
            at = jnp.where(i < count, cached + i, 1000).reshape(-1)
            keys = attention.append(cache_pages.Paged(keys, slots.pages.table), new, 0, at).pool
        cache = slots.cache | {"key": keys, "length": (cached + count).reshape(-1)}
        slots = slots._replace(cache=cache, sampled=slots.sampled + count)
        read = cache_pages.of_layer(cache_pages.Paged(keys, slots.pages.table), 0).reshape(W, R, -1)
        after = slots._replace(response=jnp.where(active & (count == left), Q, slots.response))
        return (waiting, after, out, steps), slots, read

    return jax.jit(refill), jax.jit(step)


def check_pages(own, total, of_prompts):
    """No page is owned twice, free ones and owned ones are all that are not the prompts'."""
    for w in range(W):
        owned = [page for r in range(R) for page in own.table[w, r, own.shared[w, r] : own.taken[w, r]]]
        found = [*owned, *own.free[w, : own.left[w]]]
        assert len(set(found)) == len(found) == total[w] and not of_prompts[w] & set(found)
        assert (own.table[w][np.arange(SIZE.most) >= own.taken[w][:, None]] == SIZE.total).all()


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 3, 11]), st.sampled_from([SIZE.most, SIZE.most + 2, 24]))
def test_pages_have_one_owner_and_every_response_ends(seed, draft, room):
    rng = np.random.default_rng(seed)
    refill, step = played(draft)
    cached = rng.integers(0, LONGEST, (W, B)).astype(np.int32)
    prompt = np.broadcast_to(np.arange(Q) // 3, (W, Q)).astype(np.int32)
    order = np.argsort(rng.random((W, Q)), axis=1).astype(np.int32)
    starts = paging.Starts(prompt, np.take_along_axis(cached, prompt, 1), prompt, order)
    lengths = rng.choice([1, 3, 5, LIMIT], (W, Q)).astype(np.int32)
    # Marks of prompts are below 0.
    rows = np.zeros((1, 1, W * B, SIZE.longest * PAGE, 1), np.float32)
    for w, b in np.ndindex(W, B):
        rows[0, 0, w * B + b, : cached[w, b], 0] = -10 * b - 1 - np.arange(cached[w, b])
    cache, own = paging.pooled({"key": rows, "value": rows, "length": cached.reshape(-1)}, SIZE, W, R)
    own = own._replace(left=jnp.minimum(own.left, room), least=jnp.minimum(own.left, room))
    least = np.asarray(own.left)
    total, ended = np.asarray(own.left), np.zeros((W, Q), int)
    of_prompts = [{b * SIZE.longest + i for b in range(B) for i in range(-(-cached[w, b] // PAGE))} for w in range(W)]
    idle, counts = np.full((W, R), Q, np.int32), np.zeros((W, Q), np.int32)
    slots = Slots(idle, idle * 0, idle * 0, cache, own)
    state = np.ones((W, Q), bool), slots, None, Steps(np.int32(0), counts, counts, counts)
    for _ in range(2 * Q * LIMIT):
        for again in range(2 * Q):
            before = state[3].put_back
            state, due = refill(starts, state)
            assert not again or (state[3].put_back == before).all(), "what has just begun is put back"
            now = jax.device_get(state[1])
            least = np.minimum(least, now.pages.left)
            check_pages(now.pages, total, of_prompts)
            for w in range(W):  # the oldest goes on, and one does in any case
                active = slots.response[w] < Q
                oldest = np.argmax(np.where(active, slots.sampled[w], -1))
                assert not active.any() or now.response[w, oldest] == slots.response[w, oldest]
                assert (now.response[w] < Q).any() or not state[0][w].any()
            slots = now
            if not due:
                break
        else:
            pytest.fail("a refill comes again and again")
        state, now, read = jax.device_get(step(starts, lengths, state, rng.integers(1, 2 + draft, (W, R))))
        slots, least = state[1], np.minimum(least, now.pages.left)
        check_pages(now.pages, total, of_prompts)
        for w, r in zip(*np.nonzero(now.response < Q), strict=True):
            response, b = now.response[w, r], prompt[w, now.response[w, r]]
            expected = [*(-10 * b - 1 - np.arange(cached[w, b])), *mark(response, np.arange(now.sampled[w, r]))]
            np.testing.assert_array_equal(read[w, r, : len(expected)], expected)
            ended[w, response] += slots.response[w, r] == Q
        if not state[0].any() and (slots.response == Q).all():
            break
    assert (ended == 1).all()
    np.testing.assert_array_equal(slots.pages.least, least)


def test_the_oldest_go_on_and_no_more_begin_than_have_room():
    own = pages.Pages(None, np.zeros((1, 4), int), np.array([[2, 1, 3, 1]]), None, np.array([1]), None)
    needed, age, active = np.ones((1, 4), int), np.array([[7, 2, 9, 2]]), np.ones((1, 4), bool)
    # With the second, which is older than the fourth, three would take one each: one is free, and the fourth gives one.
    assert pages.going_on(own, needed, age, active).tolist() == [[True, False, True, False]]
    assert pages.going_on(own._replace(left=np.array([2])), needed, age, active).tolist() == [[True, True, True, False]]
    assert pages.going_on(own._replace(left=np.array([4])), needed, age, active).all()
    active[0, 2] = False
    # Slots without a response give nothing here, since `release` has given already.
    assert pages.going_on(own, needed * active, age, active).tolist() == [[True, True, False, False]]
    # 3 pages of the ended response are free too. Of 13, three slots take 3 and two new ones 2, so that 8 are left: two
    # for each of the four others.
    for left, begin in ((10, 2), (9, 1), (7, 1), (6, 0)):
        free = own._replace(left=np.array([left]))
        assert pages.room(free, needed * active, active, 1).tolist() == [begin]
    # Where nothing goes on, one begins in any case.
    nothing = own._replace(taken=np.zeros((1, 4), int))
    assert pages.room(nothing, needed * 0, active & False, 1).tolist() == [1]


def test_slots_that_go_leave_their_pages():
    table = np.array([[[0, 4, 9], [0, 5, 9], [9, 9, 9], [1, 6, 7]]], np.int32)
    shared, taken, free = np.array([[1, 1, 0, 1]]), np.array([[2, 2, 0, 3]]), np.arange(9)[None, ::-1]
    own = pages.Pages(table, shared, taken, free, np.array([1]), np.array([1]))
    cache = {"key": np.zeros((1, 1, 9, 4, 1)), "value": np.zeros((1, 1, 9, 4, 1)), "length": np.array([5, 6, 0, 7])}
    response = np.array([[Q, 3, Q, Q]])
    slots = stages._active_first(Slots(response, response * 0, response, cache, own), Q, 2)
    assert slots.response.tolist() == [[3, Q]] and slots.cache["length"].tolist() == [6, 5]
    assert slots.pages.table.tolist() == [[[0, 5, 9], [9, 9, 9]]] and slots.pages.taken.tolist() == [[2, 0]]
    assert slots.pages.left.tolist() == [4] and {*slots.pages.free[0, :4].tolist()} == {8, 4, 6, 7}
    assert slots.cache["key"] is cache["key"], "the pool stays where it is"


# ---- rollouts

COUNT, GROUP, NEW, PROMPT, PAD = 24, 2, 24, 9, 63
STOPS = tuple(range(1, 9))  # responses end at all lengths
IDS = np.arange(COUNT, dtype=np.uint32) * 7
LENGTHS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 5, 1] * 2)  # of prompts; all but the last token are cached
MASK = np.arange(PROMPT) >= PROMPT - LENGTHS[:, None]
PROMPTS = Prompts(np.where(MASK, np.random.default_rng(0).integers(9, PAD, MASK.shape), PAD).astype(np.int32), MASK)


@pytest.fixture(scope="module")
def run(tiny, tiny_params):
    """Returns `generate` on the tiny model; all but `room` pages of a shard that are no prompt's are missing."""

    @functools.cache
    def compiled(chosen, shape, group, least):
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
        start = pages.start

        def sampled(params, batch, problems, room):
            def fewer(*arguments):
                own = start(*arguments)
                return own._replace(left=jnp.minimum(own.left, room))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pages, "start", fewer)
                patch.setattr(stages, "LEAST", dict.fromkeys(stages.LEAST, least))
                # Sums over parts of a cache depend on the longest row.
                patch.setattr(attention, "attend_cache_partial", attend_cache_plain)
                return generate.__wrapped__(
                    params, LanguageModel(tiny, STOPS, PAD), Prompts(*batch), jax.random.key(0), problems,
                    sampling=chosen, group=group, shards=sharding.row_ways(mesh),
                )  # fmt: skip

        return jax.jit(sampled), mesh, policy.place(tiny_params, mesh)

    def run(room=10_000, shape=(1, 1, 1), group=GROUP, known=None, least=(8, 2), **changes):
        chosen = dataclasses.replace(Sampling(NEW, 0.7, 0.95), **changes)
        sample, mesh, params = compiled(chosen, shape, group, least)
        with jax.set_mesh(sharding.decoding_mesh(mesh, chosen.decode_ways)):
            batch, problems = sharding.put_rows((tuple(PROMPTS), Problems(IDS, **known or {})), mesh)
            return jax.device_get(sample(params, batch, problems, np.int32(room)))

    return run


def assert_same(actual, expected, tolerance=0.0):
    for name in ("tokens", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), name)
    np.testing.assert_allclose(actual.logp, expected.logp, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def without(run):
    rollout, _ = run(slots=8)
    assert {1, NEW} < set(rollout.lengths.ravel()) and (rollout.finish != STOP).any()
    return rollout


def assert_scheduled(rollout, steps, room, page=4, shards=1, slots=8, least=(8, 2)):
    """The host knows the passes, and how often responses are put back, from the lengths."""
    lengths = rollout.lengths.reshape(shards, -1)
    prompts = np.repeat(LENGTHS, rollout.lengths.shape[1]).reshape(lengths.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "LEAST", dict.fromkeys(stages.LEAST, least))
        found = schedule(lengths, prompts, slots // shards or lengths.size, pool=Pool(page, room))
    assert sum(stage.width * stage.steps for stage in found.stages) * shards == steps.slots
    assert found.begun * shards - lengths.size == steps.put_back.sum()


@settings(max_examples=8)
@given(st.integers(8, 40))
@example(8)
@example(11)
def test_responses_do_not_depend_on_the_pool(run, without, room):
    """Of as many slots bit for bit, whatever is put back; 8 pages are those of the longest response with its prompt."""
    rollout, steps = run(room, slots=8, pool=1024, page=4)
    assert_same(rollout, without)
    assert_scheduled(rollout, steps, room)
    assert (steps.passes == rollout.lengths).all() and not steps.drafted.any()
    assert room > 11 or steps.put_back.sum() > 0


def test_the_youngest_are_put_back_where_pages_are_few(run):
    """With 8 pages about two of the slots have a response, and slots that wait count as passes."""
    few, many = (run(room, slots=8, pool=1024, page=4)[1] for room in (8, 100))
    assert few.put_back.sum() > 0 == many.put_back.sum() and few.slots > 1.5 * many.slots
    # Of 256 pages all but 8 or 100 are missing. The longest response takes 6 beside the full ones of its prompt.
    assert few.pool_used > 1 - (8 - 6 + 1) / 256 > 1 - 100 / 256 < many.pool_used < 1 - (100 - 48) / 256


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("shape", "room", "changes"),
    [
        ((2, 2, 2), 10, {"page": 4}),
        slow((1, 8, 1), 9, {"page": 4, "slots": 24}),
        slow((8, 1, 1), 100, {"page": 2}),
        slow((1, 1, 8), 12, {"page": 4, "draft": 3}),
        slow((1, 4, 2), 5, {"page": 8, "decode_ways": (1, 4), "slots": 16}),
        slow((1, 1, 1), 36, {"page": 1}),
        slow((1, 1, 1), 2, {"page": 32}),
        slow((1, 1, 1), 16, {"page": 3, "slots": 0}),
        slow((1, 1, 1), 40, {"page": 3, "draft": 5, "slots": 24}),
    ],
)
def test_on_every_mesh_and_with_pages_of_every_size(run, without, shape, room, changes):
    """The last responses go on in fewer slots, which also put responses back and take them again."""
    rollout, steps = run(room, shape, least=(2, 2), **{"slots": 8, "pool": 2048, **changes})
    assert_same(rollout, without, 1e-5)
    assert (steps.put_back.sum() > 0) == (room < 100 and changes["page"] < 32)
    if "draft" not in changes:
        shards, slots = math.prod(shape[:2]), changes.get("slots", 8)
        assert_scheduled(rollout, steps, room, changes["page"], shards, slots, least=(2, 2))


def test_the_last_responses_are_put_back_and_begin_again_in_fewer_slots(run, without):
    """The queue is empty when the slots become fewer, and those that have ended still have pages."""
    for room in (8, 9, 11, 14):
        rollout, steps = run(room, least=(4, 2), slots=16, pool=1024, page=4)
        assert_same(rollout, without, 1e-5)
        assert steps.put_back.sum() > 0
        assert_scheduled(rollout, steps, room, slots=16, least=(4, 2))


def cut(rollout, lengths):
    """The rollout as it was when its responses had at most these lengths `[B,G]`."""
    lengths = np.minimum(rollout.lengths, lengths).astype(np.int32)
    inside = np.arange(NEW) < lengths[..., None]
    finish = np.where(lengths == rollout.lengths, rollout.finish, RUNNING).astype(np.int32)
    return Rollout(np.where(inside, rollout.tokens, PAD), np.where(inside, rollout.logp, 0), lengths, finish)


def test_drafts_and_responses_that_go_on(run, without):
    """In any order; and a rollout that ends early has what its responses had, also of those that are put back."""
    chosen = {"slots": 8, "draft": 3, "pool": 1024, "page": 2}
    expected = np.random.default_rng(0).random(COUNT, np.float32)
    lengths, due = np.random.default_rng(0).integers(0, NEW, (COUNT, GROUP)), np.zeros(COUNT, bool)
    begun = cut(without, lengths)
    rollout, steps = run(20, known={"expected": expected, "begun": Begun(begun, due, np.int32(COUNT))}, **chosen)
    assert_same(rollout, without, 1e-5)
    assert steps.put_back.sum() > 0 and (steps.passes[begun.finish != RUNNING] == 0).all()
    assert (steps.passes <= rollout.lengths - begun.lengths).all()
    # What has ended is not begun again, although it stands first.
    almost = Begun(cut(without, np.where(without.lengths == 1, 0, NEW)), due, np.int32(COUNT))
    assert 1 < (without.lengths == 1).sum() <= 8
    assert run(20, known={"expected": expected, "begun": almost}, **chosen)[1].slots == 8
    part, _ = run(20, known={"expected": expected, "begun": Begun(begun, due, np.int32(15))}, **chosen)
    assert 15 <= (part.finish != RUNNING).all(axis=1).sum() < COUNT
    inside = np.arange(NEW) < part.lengths[..., None]
    assert (part.lengths >= begun.lengths).all() and (part.lengths <= without.lengths).all()
    np.testing.assert_array_equal(part.tokens, np.where(inside, without.tokens, PAD))


@pytest.mark.parametrize("enough", [12, COUNT])
def test_the_host_knows_a_rollout_that_goes_on_from_a_pool(monkeypatch, run, without, enough):
    """Slots that draft nothing feed known tokens one by one. What is put back last keeps the tokens that it had."""
    monkeypatch.setattr(drafts, "AT_ONCE_CPU", 8)
    lengths = np.random.default_rng(1).integers(0, NEW, without.lengths.shape)
    begun, none = cut(without, lengths), np.zeros(COUNT, bool)
    rollout, steps = run(9, slots=8, draft=1, pool=1024, page=4, known={"begun": Begun(begun, none, np.int32(enough))})
    prompts = np.repeat(LENGTHS, GROUP)[None]
    going = Going(begun.lengths.reshape(1, -1), none[None] * 0, none[None], enough)
    found = schedule(without.lengths.reshape(1, -1), prompts, 8, going=going, pool=Pool(4, 9))
    assert sum(stage.width * stage.steps for stage in found.stages) == steps.slots and steps.put_back.sum() > 0
    np.testing.assert_array_equal(found.tokens, rollout.lengths.reshape(1, -1))


@pytest.mark.slow
def test_kinds_and_a_cache_in_8_bits(run):
    chosen = {"slots": 8, "group": (2, 3), "cache": "int8"}
    without, _ = run(**chosen)
    rollout, steps = run(9, pool=1024, page=4, **chosen)
    assert_same(rollout, without)
    assert steps.put_back.sum() > 0


def test_what_stood_after_an_earlier_end_is_cut():
    tokens = np.arange(1, 9, dtype=np.int32).reshape(1, 2, 4)
    out = records.cut(Rollout(tokens, -tokens.astype(np.float32), np.array([[0, 3]]), np.array([[0, 0]])), PAD)
    assert out.tokens.tolist() == [[[PAD] * 4, [5, 6, 7, PAD]]] and out.logp.tolist() == [[[0] * 4, [-5, -6, -7, 0]]]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1)])
def test_the_kernels_of_gpus_give_the_same_responses(monkeypatch, run, without, shape):
    """With pages of 16 tokens, which the kernel then reads at once."""
    gpu_kernels.interpret(monkeypatch)
    monkeypatch.setattr(attention_gpu, "PAGE", 16)
    rollout, _ = run(5, shape, least=(2, 3), slots=16, pool=2048, page=16, draft=2)
    assert_same(rollout, without, 1e-5)


def test_a_pool_that_is_too_small_is_refused(run):
    with pytest.raises(ValueError, match="pool=200: must be at least 256,"):
        run(shape=(2, 1, 1), pool=200, page=8)


def test_pages_that_the_kernel_of_a_platform_does_not_take_are_refused(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    assert paging.sizes(Sampling(100, pool=1000, page=64), 1, 8, 1, 128).total == 15
    with pytest.raises(ValueError, match=r"page=96: must be a multiple of 64"):
        paging.sizes(Sampling(100, pool=1000, page=96), 1, 8, 1, 128)
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    with pytest.raises(ValueError, match=r"page=64: must be a multiple of 128"):
        paging.sizes(Sampling(100, pool=1000, page=64), 1, 8, 1, 128)
