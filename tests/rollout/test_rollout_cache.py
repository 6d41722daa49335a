"""Rollouts with a cache in 8 bits: what is rounded, and slots, drafts, meshes and earlier steps that change nothing."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gpu_kernels

from sgpo_jax import models, policy, sharding
from sgpo_jax.models import cache_codes
from sgpo_jax.rollout import (
    RUNNING,
    Begun,
    LanguageModel,
    Problems,
    Prompts,
    Rollout,
    Sampling,
    generate,
    stages,
)

COUNT, GROUP, NEW, PROMPT, PAD = 8, 3, 24, 7, 63
STOPS = tuple(range(1, 9))  # responses end at all lengths
IDS = np.arange(COUNT, dtype=np.uint32) * 7
SAMPLING = Sampling(NEW, 0.7, 0.95, cache="int8")
MASK = np.arange(PROMPT) >= PROMPT - np.array([1, 7, 3, 4, 2, 6, 5, 7])[:, None]
PROMPTS = Prompts(np.where(MASK, np.random.default_rng(0).integers(9, PAD, MASK.shape), PAD).astype(np.int32), MASK)


@pytest.fixture(scope="module")
def run(tiny, tiny_params):
    def run(shape=(1, 1, 1), begun=None, **changes):
        chosen = dataclasses.replace(SAMPLING, **changes)
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
        with jax.set_mesh(sharding.decoding_mesh(mesh, chosen.decode_ways)):
            batch, problems = sharding.put_rows((tuple(PROMPTS), Problems(IDS, begun=begun)), mesh)
            sampled = partial(generate.__wrapped__, model=LanguageModel(tiny, STOPS, PAD), sampling=chosen, group=GROUP)
            sampled = jax.jit(partial(sampled, shards=sharding.row_ways(mesh)))  # anew, for a platform that is made up
            found, _ = sampled(
                policy.place(tiny_params, mesh), prompts=Prompts(*batch), key=jax.random.key(0), problems=problems
            )
            return jax.device_get(found)

    return run


@pytest.fixture(scope="module")
def whole(run):
    rollout = run()
    assert {1, NEW} < set(rollout.lengths.ravel()), "the tests need responses that end at different times"
    return rollout


def assert_same(actual, expected):
    """Sums of another order differ in the last bit, which moves a number at the border of two codes to the other."""
    for name in ("tokens", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    apart = np.abs(actual.logp - expected.logp)
    assert (apart > 1e-5).mean() < 0.1 and apart.max() < 0.003


def test_the_sampler_differs_a_little_from_the_model(run, whole):
    exact = run(cache="")
    same = np.cumprod(whole.tokens == exact.tokens, axis=-1) * (np.arange(NEW) < whole.lengths[..., None])
    apart = np.abs(whole.logp - exact.logp)[same > 0]
    assert same.mean() > 0.3 and 1e-4 < apart.mean() < 0.01 and apart.max() < 0.1


@pytest.mark.parametrize(
    ("shape", "changes"),
    [((1, 1, 1), {"slots": 9, "draft": 3}), ((2, 2, 2), {"slots": 8, "decode_ways": (1, 4)}),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in
       (((1, 1, 1), {"slots": 5}), ((1, 1, 8), {"draft": 3}), ((1, 4, 2), {"slots": 12})))],
)  # fmt: skip
def test_responses_do_not_depend_on_slots_drafts_and_meshes(monkeypatch, run, whole, shape, changes):
    monkeypatch.setattr(stages, "LEAST", dict.fromkeys(stages.LEAST, (2, 2)))  # the last responses go on in fewer slots
    assert_same(run(shape, **changes), whole)


def test_responses_go_on_as_if_nothing_had_happened(run, whole):
    lengths = np.minimum(whole.lengths, np.random.default_rng(1).integers(0, NEW, whole.lengths.shape))
    known = np.arange(NEW) < lengths[..., None]
    so_far = Rollout(
        np.where(known, whole.tokens, PAD), np.where(known, whole.logp, 0).astype(np.float32),
        lengths.astype(np.int32), np.where(lengths == whole.lengths, whole.finish, RUNNING).astype(np.int32),
    )  # fmt: skip
    assert_same(run(begun=Begun(so_far, np.zeros(COUNT, bool), np.int32(COUNT)), draft=3), whole)


def test_a_prompt_attends_to_exact_keys_and_values_and_leaves_codes(tiny, tiny_params):
    tokens = np.arange(9, 19, dtype=np.int32).reshape(2, 5)
    arguments = tiny_params, tiny, tokens, np.arange(5)[None].repeat(2, axis=0), tokens > 0
    (exact, numbers), (hidden, codes) = (
        models.apply(*arguments, models.init_cache(tiny, 2, 8, dtype)) for dtype in (jnp.float32, jnp.int8)
    )
    np.testing.assert_array_equal(hidden, exact)
    for name in ("key", "value"):
        expected = cache_codes.encode(numbers[name][:, :, :, :5], codes[name])
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:, :, :, :5], y), codes[name], expected)


@pytest.mark.slow
def test_both_kernels_and_cache_in_8_bits(run):
    pytest.importorskip("qwix", reason="the quantised extra is not installed")
    assert_same(run(slots=5, weights="int8"), run(weights="int8"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1)])
def test_the_kernels_of_gpus_give_the_same_responses(monkeypatch, run, whole, shape):
    """Refilled and narrowed, where the cache keeps the rows that the last responses no longer use."""
    gpu_kernels.interpret(monkeypatch)
    monkeypatch.setattr(stages, "LEAST", dict.fromkeys(stages.LEAST, (3, 2)))
    assert_same(run(shape), whole)
