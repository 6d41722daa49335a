"""The sampler against a sort and a running sum in float64; generation against the uncached forward pass."""

import math
import re
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from sgpo_jax import models, policy, sharding
from sgpo_jax.plan.flops import matmul_flops
from sgpo_jax.plan.phases import Scopes
from sgpo_jax.rollout import LENGTH, STOP, LanguageModel, Prompts, Sampling, generate, sampling, weights
from sgpo_jax.training import packing
from sgpo_jax.training.forward import Forward, MicroBatch, Tokens, response_hidden, response_logprobs

filtered = jax.jit(sampling.filtered, static_argnames=("top_p", "top_k"))
inverse_cdf = jax.jit(sampling.inverse_cdf)
sample = jax.jit(sampling.sample, static_argnums=2)

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))

# ---- filters

ROWS, V = 4, 13


def kept_by_top_p(probs, top_p):
    """Returns the smallest set of most likely tokens that reaches `top_p`, by sorting; ties at the border are kept."""
    order = np.sort(probs)[::-1]
    count = min(np.searchsorted(np.cumsum(order), top_p) + 1, len(probs))
    return probs >= order[count - 1]


SMOOTH = arrays(np.float32, (ROWS, V), elements=st.floats(-12, 12, width=32, allow_subnormal=False))
TIED = arrays(np.float32, (ROWS, V), elements=st.sampled_from([-50.0, -1.0, 0.0, 0.5, 3.0]))


@given(SMOOTH | TIED, st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-6, 1.0]))
def test_top_p_keeps_what_a_sort_keeps(logits, top_p):
    kept = np.asarray(filtered(logits, top_p=top_p, top_k=0))
    for row, actual in zip(logits.astype(np.float64), kept, strict=True):
        unnormalised = np.exp(row - row.max())
        np.testing.assert_allclose(actual[actual > 0], unnormalised[actual > 0], rtol=1e-5)
        probs = unnormalised / unnormalised.sum()
        # Float32 sums may fall on either side of top_p where a running sum meets it.
        least, most = kept_by_top_p(probs, top_p - 1e-6), kept_by_top_p(probs, top_p + 1e-6)
        assert (actual[least] > 0).all(), (row, top_p)
        assert (actual[~most] == 0).all(), (row, top_p)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.9999])
def test_several_halvings_in_a_pass_keep_the_same_tokens(monkeypatch, top_p):
    logits = 4 * jax.random.normal(jax.random.key(0), (32, 3000))
    kept = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(sampling, "platform", lambda platform=platform: platform)
        kept.append(jax.jit(lambda x: sampling.filtered(x, top_p=top_p, top_k=0))(logits))
    np.testing.assert_array_equal(*kept)
    assert 0 < (kept[0] > 0).sum() < logits.size


def test_top_p_of_a_large_vocabulary():
    # Hundreds of tokens lie close to the border here.
    logits = np.random.default_rng(0).normal(size=(ROWS, 3000)).astype(np.float32)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        kept = np.asarray(filtered(logits, top_p=top_p, top_k=0)) > 0
        probs = np.exp(logits.astype(np.float64))
        expected = [kept_by_top_p(row / row.sum(), top_p).sum() for row in probs]
        # Rounding may add or remove one token.
        np.testing.assert_allclose(kept.sum(-1), expected, atol=1)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, [1, 1, 1, 1]),
        (0.35, 0, [1, 0, 0, 0]),
        (0.45, 0, [1, 1, 0, 0]),
        (0.75, 0, [1, 1, 1, 0]),
        (0.95, 0, [1, 1, 1, 1]),
        (1e-9, 0, [1, 0, 0, 0]),
        (float(BELOW_ONE), 0, [1, 1, 1, 1]),
        (1.0, 1, [1, 0, 0, 0]),
        (1.0, 3, [1, 1, 1, 0]),
        (1.0, 4, [1, 1, 1, 1]),
        (1.0, 99, [1, 1, 1, 1]),
        # After top-k the two left have 4/7 and 3/7 of the mass.
        (0.55, 2, [1, 0, 0, 0]),
        (0.6, 2, [1, 1, 0, 0]),
    ],
)
def test_filters_by_hand(top_p, top_k, kept):
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))
    actual = np.asarray(filtered(logits, top_p=top_p, top_k=top_k)) > 0
    np.testing.assert_array_equal(actual, [kept, kept[::-1]])


def test_ties_at_the_border_are_all_kept():
    logits = jnp.array([[2.0, 1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(filtered(logits, top_p=1.0, top_k=2)[0] > 0, [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(filtered(jnp.zeros((1, 5)), top_p=1e-6, top_k=1)[0] > 0, np.ones(5))


@pytest.mark.parametrize(
    ("edge", "top_p", "top_k"), [(0, 1, 2), (-2.5, 1, 2), (-30, 1, 2), (0, 0.4, 0), (-2.5, 0.84, 0)]
)
def test_the_last_token_that_is_kept_survives_rounding(edge, top_p, top_k):
    """A program may compute its logit again with another rounding; a clearly less likely token is dropped."""
    logits = jnp.array([0, edge, edge - 1e-7 * (1 - edge), edge - 1e-5 * (1 - edge)])
    np.testing.assert_array_equal(filtered(logits[None], top_p=top_p, top_k=top_k)[0] > 0, [1, 1, 1, 0])


# ---- the draw


quantiles = jax.jit(jax.vmap(sampling.inverse_cdf, in_axes=(None, 1), out_axes=1))


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, 5000])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_quantile_is_that_of_a_running_sum(size, scale):
    rng = np.random.default_rng(size)
    probs = rng.dirichlet(np.full(size, 0.3), size=20).astype(np.float32)
    probs[:, rng.random(size) < 0.2] = 0
    probs[:, 0] += 1e-3
    uniform = rng.random((20, 50), np.float32)
    tokens = quantiles(probs * np.float32(scale), uniform)
    total = np.cumsum(probs.astype(np.float64), axis=-1)
    total /= total[:, -1:]
    expected = np.stack([np.searchsorted(row, u, side="right") for row, u in zip(total, uniform, strict=True)])
    # Where the point lies within rounding of a border, both neighbours are right.
    border = np.abs(total[:, :, None] - uniform[:, None, :]).min(axis=1) < 2e-6
    assert border.mean() < 0.05
    np.testing.assert_array_equal(np.where(border, 0, tokens), np.where(border, 0, expected))


def test_a_token_owns_the_half_open_interval_below_its_sum():
    probs = jnp.broadcast_to(jnp.array([0.25, 0.0, 0.25, 0.5]), (6, 4))
    tokens = inverse_cdf(probs, jnp.array([0.0, 0.125, 0.25, 0.375, 0.5, 0.75]))
    np.testing.assert_array_equal(tokens, [0, 0, 2, 2, 3, 3])


@pytest.mark.parametrize("size", [3, 128, 200])
def test_equally_spaced_uniforms_give_every_token_its_share(size):
    count = 20_000
    probs = np.random.default_rng(0).dirichlet(np.ones(size)).astype(np.float32)
    uniform = ((np.arange(count) + 0.5) / count).astype(np.float32)
    tokens = inverse_cdf(jnp.broadcast_to(probs, (count, size)), uniform)
    counts = np.bincount(tokens, minlength=size)
    assert np.abs(counts - count * probs).max() < 1.1


def test_random_uniforms_give_frequencies_that_pass_a_chi_square_test():
    count, size = 20_000, 200
    logits = jnp.asarray(np.random.default_rng(1).normal(size=size), jnp.float32)
    uniform = jax.random.uniform(jax.random.key(2), count)
    tokens, _ = sample(jnp.broadcast_to(logits, (count, size)), uniform, Sampling(1))
    expected = count * np.asarray(jax.nn.softmax(logits))
    chi_square = ((np.bincount(tokens, minlength=size) - expected) ** 2 / expected).sum()
    # Mean size - 1, variance 2 (size - 1): five deviations on each side.
    assert abs(chi_square - (size - 1)) < 5 * math.sqrt(2 * (size - 1))


@pytest.mark.parametrize(
    ("size", "first", "last"), [(1, 0, 0), (5, 1, 3), (128, 0, 127), (130, 3, 128), (300, 140, 299)]
)
def test_the_ends_of_the_unit_interval(size, first, last):
    probs = np.zeros((2, size), np.float32)
    probs[:, [first, last]] = 0.25
    tokens = inverse_cdf(jnp.array(probs), jnp.array([0.0, BELOW_ONE]))
    np.testing.assert_array_equal(tokens, [first, last])


# One row of 300 tokens: zeros, and numbers whose float32 sum rounds.
MASSES = arrays(np.float32, 300, elements=st.sampled_from([0.0, 0.0, 1e-6, 0.1, 0.3, 1.0]))


@given(MASSES, st.sampled_from([0.0, 0.5, float(BELOW_ONE)]) | st.floats(0, float(BELOW_ONE), width=32))
def test_tokens_of_probability_zero_are_never_drawn(probs, uniform):
    probs[170] = max(probs[170], np.float32(1e-6))
    token = int(inverse_cdf(probs[None], np.float32([uniform]))[0])
    assert 0 <= token < 300
    assert probs[token] > 0


def test_a_vocabulary_of_one():
    tokens, logp = sample(jnp.array([[3.0], [-2.0]]), jnp.array([0.0, BELOW_ONE]), Sampling(1, top_p=0.9, top_k=1))
    np.testing.assert_array_equal(tokens, [0, 0])
    np.testing.assert_array_equal(logp, [0.0, 0.0])


def drawable(logits, **filters):
    """Returns the share of each token among the draws of an even grid of uniforms from one row of logits."""
    uniform = jnp.linspace(0, BELOW_ONE, 2001)
    tokens, _ = sample(jnp.broadcast_to(jnp.array(logits), (2001, len(logits))), uniform, Sampling(1, **filters))
    return np.bincount(tokens, minlength=len(logits)) / 2001


def test_temperature_comes_before_the_filters():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # At temperature 0.5 the probabilities are squared: 16, 9, 4 and 1 of 30.
    shares = drawable(logits, temperature=0.5, top_p=1.0, top_k=0)
    np.testing.assert_allclose(shares, np.array([16, 9, 4, 1]) / 30, atol=1e-3)
    # The first two have 25/30 there, but 0.7 at temperature 1.
    shares = drawable(logits, temperature=0.5, top_p=0.8, top_k=0)
    np.testing.assert_allclose(shares, [16 / 25, 9 / 25, 0, 0], atol=1e-3)
    # The first token has 4/7 of the mass that top-k keeps, which reaches 0.55; its 0.4 of the whole would not.
    np.testing.assert_array_equal(drawable(logits, temperature=1.0, top_p=0.55, top_k=2), [1, 0, 0, 0])


@pytest.mark.parametrize("filters", [{"top_p": 1.0, "top_k": 0}, {"top_p": 0.1, "top_k": 5}])
def test_greedy_takes_the_most_likely_token_whatever_the_uniform(filters):
    logits = np.random.default_rng(0).normal(size=(64, 150)).astype(np.float32)
    uniform = np.linspace(0, BELOW_ONE, 64, dtype=np.float32)
    tokens, logp = sample(jnp.array(logits), uniform, Sampling(1, temperature=0, **filters))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logp, logits.max(-1) - np.log(np.exp(logits.astype(np.float64)).sum(-1)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_log_probability_ignores_temperature_and_filters(dtype):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 150)), dtype)
    uniform = jax.random.uniform(jax.random.key(0), 64)
    tokens, logp = sample(logits, uniform, Sampling(1, temperature=0.3, top_p=0.7, top_k=20))
    assert (tokens.dtype, logp.dtype) == (jnp.int32, jnp.float32)
    wide = np.asarray(logits, np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    np.testing.assert_allclose(logp, expected[np.arange(64), tokens], rtol=1e-5)


# ---- generation

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6], [60, 33, 21, 8]]
IDS = [10, 11, 12, 13]
NEW, PAD = 8, 63


def padded(prompts, length=6, fill=PAD):
    """Prompts and mask `[B,P]`, padded on the left."""
    tokens = np.full((len(prompts), length), fill, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    mask = np.arange(length) >= length - np.array([[len(prompt)] for prompt in prompts])
    return tokens, mask


@pytest.fixture(scope="module")
def run(tiny, tiny_params):
    """Returns `generate` on the tiny model with default arguments, which a test can change; it gives numpy arrays."""

    def run(prompts=PROMPTS, ids=IDS, *, seed=0, length=6, fill=PAD, params=tiny_params, **changes):
        model = LanguageModel(tiny, changes.pop("stop_ids", ()), PAD, changes.pop("dtype", jnp.float32))
        group, shards = changes.pop("group", 2), changes.pop("shards", 1)
        sampling = Sampling(**{"max_new_tokens": NEW, "temperature": 0.7, "top_p": 0.9, **changes})
        batch, key, problems = Prompts(*padded(prompts, length, fill)), jax.random.key(seed), np.array(ids, np.uint32)
        return jax.device_get(
            generate(params, model, batch, key, problems, sampling=sampling, group=group, shards=shards)[0]
        )

    return run


@pytest.fixture(scope="module")
def plain(run):
    """Responses without stop tokens."""
    return run()


def assert_same(actual, expected, tolerance=1e-5):
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.lengths, expected.lengths)
    np.testing.assert_array_equal(actual.finish, expected.finish)
    np.testing.assert_allclose(actual.logp, expected.logp, atol=tolerance)


def rows(rollout, index):
    return type(rollout)(*(x[index] for x in rollout))


def test_shapes_and_types(plain):
    assert plain.tokens.shape == plain.logp.shape == (4, 2, NEW)
    assert plain.lengths.shape == plain.finish.shape == (4, 2)
    assert [x.dtype for x in plain] == [np.int32, np.float32, np.int32, np.int32]
    assert ((plain.tokens >= 0) & (plain.tokens < 64)).all()
    np.testing.assert_array_equal(plain.lengths, NEW)
    np.testing.assert_array_equal(plain.finish, LENGTH)


def test_the_key_alone_decides(run, plain):
    again, other = run(), run(seed=1)
    for a, b in zip(again, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (other.tokens != plain.tokens).any(axis=-1).all()


def test_samples_of_a_group_differ(plain):
    assert (plain.tokens[:, 0] != plain.tokens[:, 1]).any(axis=-1).all()


def test_a_response_does_not_depend_on_its_batch(run, plain):
    order = [2, 0]
    alone = run([PROMPTS[i] for i in order], [IDS[i] for i in order])
    assert_same(alone, rows(plain, order))
    order = [3, 1, 0, 2]
    shuffled = run([PROMPTS[i] for i in order], [IDS[i] for i in order])
    assert_same(shuffled, rows(plain, order))


def test_a_response_depends_on_its_problem_id(run):
    same_prompt = run([PROMPTS[0]] * 4, [1, 2, 1, 3])
    np.testing.assert_array_equal(same_prompt.tokens[0], same_prompt.tokens[2])
    assert (same_prompt.tokens[0] != same_prompt.tokens[1]).any()
    assert (same_prompt.tokens[0] != same_prompt.tokens[3]).any()


def test_a_response_does_not_depend_on_the_padding_of_its_prompt(run, plain):
    assert_same(run(length=9), plain)
    assert_same(run(fill=17), plain)


def test_a_larger_group_begins_with_the_smaller_one(run, plain):
    larger = run(group=4)
    assert_same(rows(larger, np.s_[:, :2]), plain)
    assert len({tuple(tokens) for tokens in larger.tokens[0]}) == 4


def test_every_draw_has_its_own_noise(run, tiny_params):
    # Without weights all tokens are equally likely, and a token shows its uniform number.
    flat = jax.tree.map(jnp.zeros_like, tiny_params)
    tokens = np.stack([run(params=flat, seed=seed).tokens for seed in range(40)])
    counts = np.bincount(tokens.ravel(), minlength=64)
    expected = tokens.size / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)
    # Neighbours along every axis (key, problem, sample, token) agree as often as by chance.
    for axis in range(4):
        first, second = np.delete(tokens, -1, axis), np.delete(tokens, 0, axis)
        same, chance = (first == second).sum(), first.size / 64
        assert abs(same - chance) < 5 * math.sqrt(chance), axis


@pytest.fixture(scope="module")
def stopped(run, plain):
    """(stop ids, responses that they end): one ends at its first token, one at its last, others in between."""
    stops = (int(plain.tokens[1, 1, 0]), int(plain.tokens[0, 0, 3]), int(plain.tokens[2, 0, -1]))
    return stops, run(stop_ids=stops)


def test_a_response_ends_with_its_first_stop_token(plain, stopped):
    stops, actual = stopped
    hit = np.isin(plain.tokens, stops)
    lengths = np.where(hit.any(-1), hit.argmax(-1) + 1, NEW)
    assert {1, NEW} < set(lengths.ravel())
    np.testing.assert_array_equal(actual.lengths, lengths)
    np.testing.assert_array_equal(actual.finish, np.where(hit.any(-1), STOP, LENGTH))
    assert {STOP, LENGTH} == set(actual.finish.ravel())
    inside = np.arange(NEW) < lengths[..., None]
    # The stop token itself is part of the response; what follows is padding.
    np.testing.assert_array_equal(actual.tokens, np.where(inside, plain.tokens, PAD))
    np.testing.assert_allclose(actual.logp, np.where(inside, plain.logp, 0.0), atol=1e-6)
    assert (actual.logp[inside] < 0).all()


def test_one_new_token(run, plain):
    stop = int(plain.tokens[1, 1, 0])
    one = run(max_new_tokens=1, stop_ids=(stop,))
    np.testing.assert_array_equal(one.tokens, plain.tokens[..., :1])
    np.testing.assert_allclose(one.logp, plain.logp[..., :1], atol=1e-6)
    np.testing.assert_array_equal(one.lengths, 1)
    np.testing.assert_array_equal(one.finish, np.where(one.tokens[..., 0] == stop, STOP, LENGTH))


# ---- agreement with the uncached forward pass


def test_greedy_follows_the_argmax_of_the_uncached_forward_pass(run, tiny, tiny_params):
    @jax.jit
    def logits_of(tokens, mask):
        hidden, _ = models.apply(tiny_params, tiny, tokens, models.positions_of(mask), mask)
        return hidden @ models.head(tiny_params, tiny)

    tokens, mask = padded(PROMPTS, 6)
    tokens = np.pad(tokens, ((0, 0), (0, NEW)))
    mask = np.pad(mask, ((0, 0), (0, NEW)))
    for step in range(NEW):
        tokens[:, 6 + step] = np.asarray(logits_of(tokens, mask))[:, 5 + step].argmax(-1)
        mask[:, 6 + step] = True
    greedy = run(temperature=0.0)
    for sample_index in range(2):
        np.testing.assert_array_equal(greedy.tokens[:, sample_index], tokens[:, 6:])


def packed_responses(rollout):
    """Packs the responses into the update's only micro-batch: (micro-batch, owner and index of each listed token)."""
    group, lengths = rollout.tokens.shape[1], rollout.lengths.reshape(-1)
    tokens = np.asarray(rollout.tokens).reshape(-1, NEW)
    responses = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    pack = packing.pack(
        [np.repeat(np.array(PROMPTS, object), group)], responses, range(len(responses)), lengths=[6 + NEW],
        micro_batch=len(responses), most=len(responses), chunk=16,
    )  # fmt: skip
    listed = packing.gather(tokens, pack)
    weight = np.ones(listed.shape, np.float32)
    tokens = Tokens(*(x.reshape(*x.shape[:2], -1) for x in (listed, weight, weight)))
    micro = MicroBatch(pack.contexts[0], pack.chunks, tokens)
    owner = np.where(pack.owner >= 0, pack.owner, len(responses))
    return jax.tree.map(lambda x: x[0], micro), owner[0], pack.index[0]


@partial(jax.jit, static_argnames=("config", "dtype"))
def training_hidden(params, config, packed, dtype=jnp.float32):
    """Computes the hidden states `[R,T,D]` that predict the responses, as the update does."""
    micro, owner, index = packed
    hidden = response_hidden(Forward(config, dtype), params, micro.rows)
    hidden = hidden.reshape(*owner.shape, -1)
    return jnp.zeros((len(IDS) * 2, NEW, hidden.shape[-1])).at[owner, index].set(hidden, mode="drop")


@partial(jax.jit, static_argnames=("config", "dtype", "remat"))
def packed_logp(params, config, packed, dtype=jnp.float32, remat="none"):
    micro, owner, index = packed
    logp, _ = response_logprobs(Forward(config, dtype, remat), params, micro)
    return jnp.zeros((len(IDS) * 2, NEW)).at[owner, index].set(logp.reshape(owner.shape), mode="drop")


def training_logp(params, config, rollout, dtype=jnp.float32, remat="none"):
    """Computes the log-probabilities `[B,G,T]` of the responses as training does; 0 after the end."""
    logp = packed_logp(params, config, packed_responses(rollout), dtype=dtype, remat=remat)
    return logp.reshape(rollout.tokens.shape)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.7, 0.9, 0), (2.0, 1.0, 3), (0.7, 0.3, 0)], ids=["usual", "top-k", "narrow"]
)
def test_only_tokens_that_the_filters_keep_are_sampled(run, tiny, tiny_params, temperature, top_p, top_k):
    rollout = run(temperature=temperature, top_p=top_p, top_k=top_k)
    hidden = training_hidden(tiny_params, tiny, packed_responses(rollout))
    logits = np.asarray(hidden @ models.head(tiny_params, tiny), np.float64).reshape(-1, 64) / temperature
    tokens = rollout.tokens.ravel()
    if top_k:
        limits = np.sort(logits, axis=-1)[:, -top_k]
        logits = np.where(logits >= limits[:, None], logits, -np.inf)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    # The tolerance is for probabilities of float32.
    kept = np.array([kept_by_top_p(row, top_p + 1e-4)[token] for row, token in zip(probs, tokens, strict=True)])
    assert kept.all()
    assert (probs[np.arange(len(tokens)), tokens] > 0).all()
    assert (probs[np.arange(len(tokens)), tokens] < probs.max(-1)).any()


def test_log_probs_agree_with_the_training_path(plain, stopped, tiny, tiny_params):
    for rollout in (plain, stopped[1]):
        np.testing.assert_allclose(rollout.logp, training_logp(tiny_params, tiny, rollout), atol=1e-4)


def test_bfloat16_log_probs_agree_with_bfloat16_training(run, tiny, tiny_params):
    rollout = run(dtype=jnp.bfloat16)
    expected = training_logp(tiny_params, tiny, rollout, jnp.bfloat16)
    # About eight bits; logits are of order 1.
    np.testing.assert_allclose(rollout.logp, expected, atol=0.05)
    assert np.abs(rollout.logp - training_logp(tiny_params, tiny, rollout)).max() > 1e-4


def test_remat_changes_the_memory_and_not_the_gradient(plain, tiny, tiny_params):
    def loss(params, remat):
        return training_logp(params, tiny, plain, remat=remat).sum()

    primitives = {}
    for remat in ("none", "full"):
        jaxpr = jax.make_jaxpr(lambda params, remat=remat: loss(params, remat))(tiny_params)
        primitives[remat] = [eqn.primitive.name for eqn, _ in equations(jaxpr.jaxpr)]
    assert [sum("remat" in name or "checkpoint" in name for name in primitives[r]) for r in ("none", "full")] == [0, 1]
    kept, recomputed = (jax.grad(loss)(tiny_params, remat) for remat in ("none", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), recomputed, kept)


# ---- cost and placement


def equations(jaxpr, within=()):
    """Yields (equation, names of the primitives around it) for every equation of a jaxpr, including nested ones."""
    for equation in jaxpr.eqns:
        yield equation, within
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, (*within, equation.primitive.name))


def test_the_prompt_is_prefilled_once_per_problem(tiny, tiny_params):
    """By cost: prefill does not grow with the group, and a decoded token costs one position of its own response."""
    batch, length = 3, 13

    def flops(group, length):
        prompts = Prompts(jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool))
        sampled = partial(generate, model=LanguageModel(tiny, (1,), 0), sampling=Sampling(4), group=group)
        jaxpr = jax.make_jaxpr(sampled)(
            tiny_params, prompts=prompts, key=jax.random.key(0), problems=jnp.arange(batch)
        )
        one_step = Scopes("prefill", (("decode_", "decode"),), trips=(("while$", 1.0),))
        return matmul_flops(jaxpr, one_step)

    alone, group, longer = flops(1, length), flops(5, length), flops(1, 2 * length - 1)
    assert group["prefill"] == alone["prefill"] and group["decode"] == 5 * alone["decode"]
    assert 2 <= longer["prefill"] / alone["prefill"] < 3, "twice the tokens, and attention over twice as many"
    token = alone["prefill"] / (batch * (length - 1))
    head = 2 * tiny.hidden_size * tiny.vocab_size
    assert head < alone["decode"] / batch < 1.1 * (token + head)


# Mesh, and the ways that split the weights in each stage of decoding.
MESHES = [((2, 2, 2), (1,)), ((1, 4, 2), (2, 4))] + [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [
        ((1, 4, 2), (1,)), ((4, 1, 2), (1,)), ((1, 1, 8), (1,)), ((2, 1, 4), (1,)),
        ((2, 2, 2), (4,)), ((4, 1, 2), (2,)), ((1, 4, 2), (1, 4)),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("shape", "decode_ways"), MESHES)
def test_a_mesh_of_eight_devices_samples_the_same_tokens(shape, decode_ways, stopped, tiny, tiny_params):
    stops, expected = stopped
    mesh = sharding.make_mesh(*shape)
    placed = policy.place(tiny_params, mesh)
    assert len(placed["layers"]["q"]["kernel"].sharding.device_set) == 8
    tokens, mask = sharding.put_rows(padded(PROMPTS), mesh)
    with jax.set_mesh(sharding.decoding_mesh(mesh, decode_ways)):
        actual, _ = generate(
            placed, LanguageModel(tiny, stops, PAD), Prompts(tokens, mask), jax.random.key(0),
            sharding.put_rows(np.array(IDS, np.uint32), mesh),
            sampling=Sampling(NEW, 0.7, 0.9, decode_ways=decode_ways), group=2,
        )  # fmt: skip
    assert_same(jax.device_get(actual), expected)


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_a_step_of_decoding_multiplies_with_a_part_of_the_weights(ways, tiny, tiny_params):
    """Of 32 columns of a gate, two devices of the tensor axis, times `ways`, have a part each; rows go to the parts."""
    mesh, count = sharding.make_mesh(1, 4, 2), 8
    placed = policy.place(tiny_params, mesh)
    prompts = Prompts(*sharding.put_rows((np.ones((count, 3), np.int32), np.ones((count, 3), bool)), mesh))
    ids = sharding.put_rows(np.arange(count, dtype=np.uint32), mesh)
    with jax.set_mesh(sharding.decoding_mesh(mesh, (ways,))):
        text = generate.lower(
            placed, LanguageModel(tiny, (1,), 0), prompts, jax.random.key(0), ids,
            sampling=Sampling(4, decode_ways=(ways,)), group=1, shards=4,
        ).compile().as_text()  # fmt: skip
    found = re.findall(r"= f32\[([\d,]+)\][^=]* dot\(.*decode_\d+/.*layers/gate/dot_general", text)
    assert found and {tuple(map(int, sizes.split(","))) for sizes in found} == {(2 * ways, 32 // (2 * ways))}


def test_a_later_stage_takes_its_part_of_the_weights_without_moving_any(tiny, tiny_params):
    placed = policy.place(tiny_params, mesh := sharding.make_mesh(1, 4, 2))

    def moves(params, *arguments):
        text = jax.jit(lambda x: weights.split(x, *arguments)).lower(params).compile().as_text()
        return set(re.findall(r"(all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(", text))

    with jax.set_mesh(sharding.decoding_mesh(mesh, (1, 2, 4))):
        narrow = jax.jit(lambda x: weights.split(x, ("tensor",)))(placed)
        for ways in (2, 4):
            assert moves(narrow, sharding.weight_axes(ways)) == set()
        assert moves(placed, sharding.weight_axes(2), weights.FROM_TRAINING) == {"all-gather", "all-to-all"}


def test_nan_never_leaves_the_vocabulary():
    token, _ = sampling.sample(
        jnp.full((3, 130), jnp.nan), jnp.array([0.0, 0.5, 0.99]), Sampling(1, top_p=0.9)
    )
    assert jnp.all((token >= 0) & (token < 130))
