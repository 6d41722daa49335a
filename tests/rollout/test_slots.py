"""Continuous batching: the same responses from any number of slots, and few idle slot-steps."""

import math

import jax
import numpy as np
import pytest
from helpers import gpu_kernels

from sgpo_jax import models, policy, sharding
from sgpo_jax.models import layout
from sgpo_jax.policy import generation
from sgpo_jax.rollout import STOP, LanguageModel, Problems, Prompts, Rollout, Sampling, generate, stages
from sgpo_jax.rollout.cache import insert
from sgpo_jax.rollout.schedule import schedule
from sgpo_jax.rollout.stages import narrowed

COUNT, GROUP, NEW, LENGTH, PAD = 24, 2, 24, 7, 63
STOPS = tuple(range(1, 9))  # an eighth of the vocabulary, so that responses end at all lengths


def sample(params, config, prompts, key, ids, *, group=GROUP, shards=1, slots=0):
    model, sampling = LanguageModel(config, STOPS, PAD), Sampling(NEW, slots=slots)
    return generate(params, model, prompts, key, ids, sampling=sampling, group=group, shards=shards)


def prompts(seed=0):
    """Prompts of 1 to 7 tokens, padded on the left."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH + 1, COUNT)
    mask = np.arange(LENGTH) >= LENGTH - lengths[:, None]
    return Prompts(np.where(mask, rng.integers(9, PAD, (COUNT, LENGTH)), PAD).astype(np.int32), mask)


@pytest.fixture(scope="module")
def run(tiny, tiny_params):
    def run(seed=0, expected=None, **changes):
        ids = np.arange(COUNT, dtype=np.uint32) * 7
        known = ids if expected is None else Problems(ids, expected)
        rollout, slot_steps = sample(tiny_params, tiny, prompts(seed), jax.random.key(seed), known, **changes)
        return jax.device_get(rollout), int(slot_steps)

    return run


@pytest.fixture(scope="module")
def at_once(run):
    rollout, slot_steps = run()
    # The tests need responses that end at different times.
    assert rollout.lengths.min() <= 2 and rollout.lengths.max() == NEW and len(set(rollout.lengths.ravel())) > 8
    assert (rollout.finish == STOP).any() and (rollout.finish != STOP).any()
    return rollout, slot_steps


def assert_same(actual, expected):
    for name in ("tokens", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    np.testing.assert_allclose(actual.logp, expected.logp, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 16, 40])
def test_any_number_of_slots_gives_the_same_responses(run, at_once, slots):
    assert_same(run(slots=slots)[0], at_once[0])


def test_prompts_of_one_token(tiny, tiny_params):
    """Nothing is prefilled then, and a refill copies nothing."""
    tokens, ids = np.arange(9, 15, dtype=np.int32)[:, None], np.arange(6, dtype=np.uint32)
    one, longer = (
        [
            jax.device_get(sample(tiny_params, tiny, Prompts(*prompt), jax.random.key(0), ids, slots=slots)[0])
            for slots in (0, 4)
        ]
        for prompt in ((tokens, tokens > 0), (np.pad(tokens, ((0, 0), (2, 0))), np.pad(tokens > 0, ((0, 0), (2, 0)))))
    )
    for rollout in (one[1], *longer):
        assert_same(rollout, one[0])
    assert len(set(one[0].lengths.ravel())) > 3


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_refill_copies_the_prompts_of_the_refilled_slots_and_nothing_else(shards):
    rng, width, batch, length = np.random.default_rng(shards), 5, 4, 6
    shapes = {"slots": (2, 3, shards * width, 9, 8), "prompts": (2, 3, shards * batch, length, 8)}
    caches = {
        name: {field: rng.normal(size=shape).astype(np.float32) for field in ("key", "value")}
        | {"length": rng.integers(1, length, shape[2]).astype(np.int32)}
        for name, shape in shapes.items()
    }
    prompt = rng.integers(0, batch, (shards, width)).astype(np.int32)
    refilled = rng.random((shards, width)) < 0.5
    refilled[0] = [True, False, True, False, False]  # another number than in another shard
    refilled[-1, 1:] = True
    expected = jax.tree.map(np.copy, caches["slots"])
    for shard, slot in np.argwhere(refilled):
        source, target = shard * batch + prompt[shard, slot], shard * width + slot
        for field in ("key", "value"):
            expected[field][:, :, target, :length] = caches["prompts"][field][:, :, source]
        expected["length"][target] = caches["prompts"]["length"][source]
    got = jax.jit(insert)(caches["slots"], caches["prompts"], refilled, prompt)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), expected)


@pytest.mark.parametrize(("slots", "shards"), [(8, 4), (4, 2), (0, 3)])
def test_any_number_of_shards_gives_the_same_responses(run, at_once, slots, shards):
    assert_same(run(slots=slots, shards=shards)[0], at_once[0])


@pytest.mark.parametrize(("slots", "shards"), [(0, 1), (1, 1), (3, 1), (16, 1), (40, 1), (8, 4), (4, 2), (0, 3)])
def test_the_schedule_is_known_from_the_lengths(run, at_once, slots, shards):
    lengths = at_once[0].lengths.reshape(shards, -1)
    stages = schedule(lengths, np.full_like(lengths, LENGTH), slots // shards or lengths.shape[1]).stages
    _, slot_steps = run(**({"slots": slots, "shards": shards} if (slots, shards) != (0, 1) else {}))
    assert sum(stage.width * stage.steps for stage in stages) * shards == slot_steps


def test_the_tokens_in_the_caches_of_the_slots():
    # Prompts of 5 tokens, of which 4 are in the cache before the first step. Slot 0 takes responses of 2 and 3 tokens,
    # slot 1 one of 4; after the 4th step it is idle, and one token is read.
    (stage,) = schedule(np.array([[2, 4, 3]]), np.full((1, 3), 5), 2).stages
    assert (stage.width, stage.refills, stage.steps) == (2, 2, 5)
    first, second = [5, 6, 5, 6, 7], [5, 6, 7, 8, 1]
    assert stage.cached == pytest.approx((sum(first) + sum(second)) / 5)


def test_slots_on_a_mesh_of_eight_devices(at_once, tiny, tiny_params):
    mesh = sharding.make_mesh(2, 2, 2)
    ids = sharding.put_rows(np.arange(COUNT, dtype=np.uint32) * 7, mesh)
    with jax.set_mesh(mesh):
        batch = Prompts(*sharding.put_rows(tuple(prompts()), mesh))
        params = policy.place(tiny_params, mesh)
        rollout, _ = sample(params, tiny, batch, jax.random.key(0), ids, slots=8, shards=4)
    assert_same(Rollout(*jax.device_get(rollout)), at_once[0])


KINDS = (GROUP, 3)  # responses to a prompt of each kind


@pytest.fixture(scope="module")
def sampled_alone(tiny, tiny_params):
    """The responses to two kinds of prompts, sampled separately with different keys and group sizes."""
    ids = np.arange(COUNT, dtype=np.uint32)
    first, second = (
        jax.device_get(sample(tiny_params, tiny, prompts(seed), jax.random.key(seed), ids, group=group)[0])
        for seed, group in enumerate(KINDS)
    )
    assert (first.tokens != second.tokens[:, :GROUP]).any(axis=2).mean() > 0.9
    return first, second


@pytest.mark.parametrize(("slots", "ways"), [(0, (1, 1, 1)), (5, (1, 1, 1)), (8, (2, 2, 2)), (0, (1, 8, 1))])
def test_groups_sampled_at_once_are_those_sampled_alone(sampled_alone, tiny, tiny_params, slots, ways):
    mesh = sharding.make_mesh(*ways, devices=jax.devices()[: math.prod(ways)])
    tokens = [[list(row[real]) for row, real in zip(*prompts(seed), strict=True)] for seed in range(2)]
    tiny_policy = policy.Policy(tiny, None, STOPS, PAD, np.dtype(np.float32), "")
    kinds = [generation.Kind(tokens[seed], jax.random.key(seed), KINDS[seed]) for seed in range(2)]
    with jax.set_mesh(mesh):
        rollouts, slot_steps = generation.respond_in_groups(
            tiny_policy, policy.place(tiny_params, mesh), kinds, mesh, Sampling(NEW, slots=slots), LENGTH
        )  # fmt: skip
    for actual, expected in zip(rollouts, sampled_alone, strict=True):
        assert_same(actual, expected)
    assert slot_steps >= sum(expected.lengths.sum() for expected in sampled_alone)


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "ways"), [(1, (1, 1, 1)), (2, (1, 2, 1))])
def test_the_kernels_of_gpus_give_the_same_responses(monkeypatch, at_once, tiny, tiny_params, shards, ways):
    """Refilled and narrowed, where the cache keeps the rows that the last responses no longer use."""
    gpu_kernels.interpret(monkeypatch)
    monkeypatch.setattr(stages, "LEAST", dict.fromkeys(stages.LEAST, (4, 2)))
    model, ids = LanguageModel(tiny, STOPS, PAD), np.arange(COUNT, dtype=np.uint32) * 7
    mesh = sharding.make_mesh(*ways, devices=jax.devices()[:shards])

    def sampled(params, prompts, key):  # traced anew
        return generate.__wrapped__(
            params, model, prompts, key, ids, sampling=Sampling(NEW, slots=40), group=GROUP, shards=shards
        )

    with jax.set_mesh(mesh):
        batch = Prompts(*sharding.put_rows(tuple(prompts()), mesh))
        rollout, _ = jax.jit(sampled)(policy.place(tiny_params, mesh), batch, jax.random.key(0))
    assert_same(Rollout(*jax.device_get(rollout)), at_once[0])


def test_groups_sampled_at_once_need_fewer_steps(sampled_alone):
    """The other group's responses fill the slots at the end of one group."""

    def steps(lengths, slots):
        stages = schedule(lengths, np.full_like(lengths, LENGTH), slots or lengths.size).stages
        return sum(stage.steps for stage in stages)

    lengths = [expected.lengths for expected in sampled_alone]
    together = np.concatenate(lengths, axis=1).reshape(1, -1)
    for slots in (48, 0):
        assert steps(together, slots) < 0.75 * sum(steps(group.reshape(1, -1), slots) for group in lengths)


def test_one_slot_is_never_idle(run, at_once):
    assert run(slots=1)[1] == at_once[0].lengths.sum()


def test_few_slot_steps_are_idle(run, at_once):
    rollout, slot_steps = run(slots=4)
    assert rollout.lengths.sum() <= slot_steps <= rollout.lengths.sum() + 4 * NEW
    # Decoding all until the longest ends, as a fixed batch does, would idle for half of the time.
    assert rollout.lengths.sum() / slot_steps > 0.85 > 0.6 > rollout.lengths.mean() / NEW


def test_the_last_responses_decode_in_fewer_slots(at_once):
    rollout, slot_steps = at_once
    active = [(rollout.lengths > step).sum() for step in range(NEW + 1)]
    widths = [active[0], active[0] // 4, active[0] // 16]
    ends = [next(step for step in range(NEW) if active[step] <= width) for width in widths[1:]]
    steps = np.diff([0, *ends, rollout.lengths.max()])
    assert all(steps) and slot_steps == np.dot(widths, steps)


@pytest.mark.parametrize(("shards", "ways", "changes"), [
    (1, (1, 1, 1), {"slots": 16}), (8, (2, 2, 2), {"slots": 16, "decode_ways": (1, 2)}),
])  # fmt: skip
def test_layers_with_arrays_of_their_own_give_the_same_responses(
    monkeypatch, at_once, tiny, tiny_params, shards, ways, changes
):
    """As they do in models with large layers, on a CPU."""
    names, decode = set(), models.decode

    def watched(params, *args, **more):
        names.update(params)
        return decode(params, *args, **more)

    monkeypatch.setattr(layout, "LARGE", 0)
    monkeypatch.setattr(models, "decode", watched)
    mesh = sharding.make_mesh(*ways, devices=jax.devices()[:shards])
    sampling, ids = Sampling(NEW, often=True, **changes), np.arange(COUNT, dtype=np.uint32) * 7

    def sampled(params, prompts, key):  # traced anew
        return generate.__wrapped__(
            params, LanguageModel(tiny, STOPS, PAD), prompts, key, ids, sampling=sampling, group=GROUP,
            shards=sharding.row_ways(mesh),
        )  # fmt: skip

    with jax.set_mesh(sharding.decoding_mesh(mesh, sampling.decode_ways)):
        batch = Prompts(*sharding.put_rows(tuple(prompts()), mesh))
        rollout, _ = jax.jit(sampled)(policy.place(tiny_params, mesh), batch, jax.random.key(0))
    assert_same(Rollout(*jax.device_get(rollout)), at_once[0])
    assert {"layer_0", "layer_1"} < names


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("slots", [512, 64, 32, 31, 24, 16, 15, 8, 1])
def test_widths_of_the_stages(monkeypatch, platform, slots):
    """For a few slots accelerators do not copy a cache."""
    expected = {512: [128, 32, 8, 2], 64: [16, 4], 32: [8, 2]}
    if platform == "cpu":
        expected |= {31: [7], 24: [6], 16: [4]}
    monkeypatch.setattr(stages, "platform", lambda: platform)
    widths = [slots]
    while widths[-1]:
        widths.append(narrowed(widths[-1], slots))
    assert widths == [slots, *expected.get(slots, []), 0]


def test_new_prompts_and_noise_compile_nothing(run):
    run(slots=4)
    compiled = generate._cache_size()
    rollouts = [run(seed=seed, slots=4)[0] for seed in (1, 2)]
    assert generate._cache_size() == compiled
    assert (rollouts[0].lengths != rollouts[1].lengths).any()


@pytest.mark.parametrize("shards", [1, 2])
def test_any_order_gives_the_same_responses_and_longest_first_the_fewest_steps(run, at_once, shards):
    lengths = at_once[0].lengths.mean(axis=1).astype(np.float32)  # of each prompt's responses
    orders = {"longest": lengths, "shortest": -lengths, "any": np.random.default_rng(0).random(COUNT, np.float32)}
    steps = {}
    for name, expected in orders.items():
        rollout, steps[name] = run(slots=8, shards=shards, expected=expected)
        assert_same(rollout, at_once[0])
    assert steps["longest"] < min(steps["any"], steps["shortest"])
    # Those that are expected to be as long keep their order.
    assert run(slots=8, shards=shards, expected=lengths * 0)[1] == run(slots=8, shards=shards)[1]


@pytest.mark.parametrize(("slots", "shards"), [(0, 5), (6, 4)])
def test_shards_that_do_not_divide_are_refused(run, slots, shards):
    with pytest.raises(ValueError, match=f"shards={shards}: must divide the 24 prompts and slots={slots}"):
        run(slots=slots, shards=shards)


def test_kinds_that_do_not_divide_are_refused(run):
    with pytest.raises(ValueError, match=r"group=\(2, 1, 1, 1, 1\): must have a length that divides the 12 prompts"):
        run(group=(2, 1, 1, 1, 1), shards=2)
