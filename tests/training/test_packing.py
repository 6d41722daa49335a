"""Packing: every token in its place, nothing twice, and rows that are full."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from sgpo_jax import losses, models
from sgpo_jax.training import packing
from sgpo_jax.training.forward import Forward, MicroBatch, Tokens, listed, response_hidden, response_logprobs

SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 8)), max_size=12)


def sequences(sizes, seed=0):
    """(unguided prompts, guided prompts, responses) of the given lengths."""
    rng = np.random.default_rng(seed)
    return tuple([rng.integers(1, 60, size[part]).astype(np.int32) for size in sizes] for part in range(3))


def packed(sizes, micro_batch=2, chunk=6, most=14, lengths=(14, 17), seed=0, context=1):
    *prompts, responses = sequences(sizes, seed)
    owners = np.arange(len(sizes))[::-1] + 1
    return packing.pack(
        prompts, responses, owners, lengths=lengths, micro_batch=micro_batch, most=most, chunk=chunk, context=context
    )


@given(SIZES, st.integers(1, 4), st.integers(1, 40), st.integers(1, 3))
def test_every_response_token_is_listed_once_and_found_in_its_context(sizes, micro_batch, chunk, ways):
    pack = packed(sizes, micro_batch, chunk, context=ways)
    assert pack.owner.shape[3] % ways == 0 and micro_batch * pack.owner.shape[3] <= max(chunk, micro_batch * ways)
    *prompts, responses = sequences(sizes)
    owners = np.arange(len(sizes))[::-1] + 1
    listed = np.argwhere(pack.owner >= 0)
    pairs = [(pack.owner[tuple(at)], pack.index[tuple(at)]) for at in listed]
    expected = [(owner, t) for owner, r in zip(owners, responses, strict=True) for t in range(len(r))]
    assert sorted(pairs) == sorted(expected)
    for k, s, m, j in listed:
        assert k < pack.count and s < pack.chunks[k], "what is listed is in use"
        sequence = len(sizes) - pack.owner[k, s, m, j]
        t = pack.index[k, s, m, j]
        for context, prompt in zip(pack.contexts, prompts, strict=True):
            end = context.slots[k, s, m, j] + 1
            whole = np.concatenate([prompt[sequence], responses[sequence]])[: len(prompt[sequence]) + t]
            start = end - len(whole)
            np.testing.assert_array_equal(context.tokens[k, m, start:end], whole)
            np.testing.assert_array_equal(context.positions[k, m, start:end], np.arange(len(whole)))
            assert len(set(context.segments[k, m, start:end])) == 1 and context.segments[k, m, start] > 0
    for context, prompt in zip(pack.contexts, prompts, strict=True):
        tokens = sum(map(len, prompt)) + sum(map(len, responses))
        assert (context.segments > 0).sum() == tokens, "nothing else is in the rows"


def test_how_many_of_the_rows_that_are_computed_hold_something():
    sizes = [(4, 1, 5)] * 5  # 9 of 14 tokens: a row each
    assert packing.filled_share(packed(sizes, micro_batch=2)) == 5 / 6, "three micro-batches of two"
    assert packing.filled_share(packed(sizes, micro_batch=4)) == 5 / 8
    assert packing.filled_share(packed(sizes, micro_batch=14)) == 5 / 14
    assert packing.filled_share(packed([], micro_batch=2)) == 0


@given(SIZES)
def test_rows_are_full(sizes):
    """First fit: no sequence would fit into a row before its own."""
    lengths = np.array([14, 17])
    total = np.array([[p + r, g + r] for p, g, r in sizes]).reshape(-1, 2)
    row, offset = packing.fit(total, lengths)
    used = np.array([total[row == r].sum(axis=0) for r in range(row.max(initial=-1) + 1)]).reshape(-1, 2)
    assert (used <= lengths).all()
    for s, r in enumerate(row):
        assert ((used[:r] + total[s] > lengths).any(axis=1)).all()
        before = [total[o].tolist() for o in range(len(row)) if row[o] == r and (offset[o] < offset[s]).all()]
        np.testing.assert_array_equal(offset[s], np.sum(before, axis=0) if before else [0, 0])


def test_shapes_do_not_depend_on_what_is_packed():
    shapes = [jax.tree.map(np.shape, packed(sizes)) for sizes in ([], [(1, 1, 1)], [(6, 9, 8)] * 12)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert [int(packed(sizes).count) for sizes in ([], [(1, 1, 1)], [(6, 9, 8)] * 12)] == [0, 1, 6]


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"a sequence has \[15, 10\] tokens; allowed: \[14, 17\]"):
        packed([(7, 2, 8)])


@partial(jax.jit, static_argnums=1)
def of_pack(params, config, pack, tokens, weights):
    """Weighted sum of the log-probabilities in every context, from the packed sequences."""

    def total(params):
        sums = []
        for context in pack.contexts:
            ids, weight = listed(tokens), listed(weights)
            micro = MicroBatch(context, pack.chunks, Tokens(ids, weight, weight))
            logp, _ = jax.lax.map(partial(response_logprobs, Forward(config), params), micro)
            sums.append(jnp.sum(logp * weight))
        return sums[0] - 2.0 * sums[1], sums

    return jax.value_and_grad(total, has_aux=True)(params)


@partial(jax.jit, static_argnums=1)
def one_by_one(params, config, contexts, weights):
    """The same from rows `[n,T]` that hold one sequence each, padded on the right."""

    def total(params):
        sums = []
        for tokens, length, picked in contexts:
            mask = jnp.arange(tokens.shape[1]) < length[:, None]
            hidden, _ = models.apply(params, config, tokens, models.positions_of(mask), mask)
            log_probs = jax.nn.log_softmax(hidden[:, :-1] @ models.head(params, config))
            logp = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
            sums.append(jnp.sum(jnp.take_along_axis(logp, picked, axis=1) * weights))
        return sums[0] - 2.0 * sums[1], sums

    return jax.value_and_grad(total, has_aux=True)(params)


@settings(max_examples=15)
@given(SIZES, st.integers(0, 1000))
def test_packed_log_probs_and_their_gradient_are_those_of_each_sequence_alone(tiny, tiny_params, sizes, seed):
    pack = packed(sizes, micro_batch=4, most=12, seed=seed)
    *prompts, responses = sequences(sizes, seed)
    # Twelve rows, some empty, so that every example has the same shapes.
    response, weight = np.zeros((13, 8), np.int32), np.zeros((13, 8), np.float32)
    contexts = [(np.zeros((13, 18), np.int32), np.zeros(13, np.int32), np.zeros((13, 8), np.int32)) for _ in prompts]
    for s, r in enumerate(responses):
        owner = len(sizes) - s
        response[owner, : len(r)] = r
        weight[owner, : len(r)] = np.random.default_rng([seed, s]).normal(size=len(r))
        for (tokens, length, picked), prompt in zip(contexts, prompts, strict=True):
            length[owner] = len(prompt[s]) + len(r)
            tokens[owner, : length[owner]] = np.concatenate([prompt[s], r])
            picked[owner] = len(prompt[s]) - 1 + np.arange(8)

    tokens, weights = packing.gather(response, pack), packing.gather(weight, pack)
    # Rows of size 1: those of 0.02 have gradients up to 500, of which 1e-4 is less than float32 tells apart.
    params = tiny_params | {"embed": {"embedding": 50 * tiny_params["embed"]["embedding"]}}
    (_, actual), gradient = of_pack(params, tiny, pack, tokens, weights)
    (_, expected), dense_gradient = one_by_one(params, tiny, contexts, weight)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, dense_gradient)


def test_guided_and_unguided_rows_are_aligned_by_response_token(tiny, tiny_params):
    """With the same prompt in both contexts the hidden states are the same, token by token."""
    sizes = [(3, 3, 5), (2, 2, 8), (5, 5, 1), (1, 1, 4)]
    prompts, _, responses = sequences(sizes)
    pack = packing.pack([prompts, prompts], responses, range(4), lengths=[14, 17], micro_batch=4, most=4, chunk=8)
    first, second = (
        response_hidden(Forward(tiny), tiny_params, jax.tree.map(lambda x: x[0], rows))
        for rows in pack.contexts
    )
    real = (pack.owner[0] >= 0).reshape(first.shape[:2])
    np.testing.assert_allclose(first[real], second[real], atol=1e-5)
    assert losses.kl_divergence(*(jax.nn.log_softmax(x[real]) for x in (first, second))).max() < 1e-5
