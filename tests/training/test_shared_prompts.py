"""Groups whose responses share one copy of their prompt: every token in its place, and the same update."""

import re
from dataclasses import replace
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.batches import CONFIG, G1, G2, B, assert_trees_close, make_batch, make_params
from helpers.configs import load
from helpers.paths import ROOT
from helpers.runs import TINY, parameters, rows
from hypothesis import given

from sgpo_jax import config_checks, sharding
from sgpo_jax.commands import train
from sgpo_jax.training import batch as batches
from sgpo_jax.training import shared_prompts
from sgpo_jax.training.batch import Contexts, pack_batch, specs
from sgpo_jax.training.forward import Forward
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.shared_prompts import fit, pack_shared
from sgpo_jax.training.state import init_state
from sgpo_jax.training.train_step import make_update
from sgpo_jax.training.weighting import Weighting

PROMPTS, RESPONSE = (7, 9), 5  # most tokens of a prompt in each of two contexts, and of a response
MOST_GROUPS, MOST_RESPONSES = 5, 5
GROUPS = st.lists(
    st.tuples(
        st.tuples(*(st.integers(1, prompt) for prompt in PROMPTS)),
        st.lists(st.integers(1, RESPONSE), min_size=1, max_size=MOST_RESPONSES),
    ),
    max_size=MOST_GROUPS,
)
FULL = [(PROMPTS, [RESPONSE] * MOST_RESPONSES)] * MOST_GROUPS
SLIDING = replace(
    CONFIG, architecture="Olmo3ForCausalLM", window=3, sliding=(True, False), sliding_rope_theta=1e3,
    qkv_bias=False, qk_norm=True,
)  # fmt: skip
MESHED = replace(CONFIG, vocab_size=32)  # which every mesh of 8 divides
EXPERTS = replace(
    CONFIG, architecture="Qwen3MoeForCausalLM", experts=6, experts_per_token=3, normalize_experts=True,
    qkv_bias=False, qk_norm=True,
)  # fmt: skip


class Drawn(NamedTuple):
    """Sequences with prompts in two contexts, the groups one after the other, of tokens that are all different."""

    prompts: list[list[np.ndarray]]  # of each context
    responses: list[np.ndarray]


def drawn(sizes):
    numbers = iter(range(1, 10_000))

    def draw(count):
        return np.array([next(numbers) for _ in range(count)], np.int32)

    made = Drawn([[], []], [])
    for prompts, responses in sizes:
        for own, prompt in zip(made.prompts, map(draw, prompts), strict=True):
            own.extend([prompt] * len(responses))
        made.responses.extend(map(draw, responses))
    return made


def packed(sequences, share=2, micro_batch=2, contexts=2, kinds=1):
    """The sequences in the first contexts, with owners from 100 on."""
    most = shared_prompts.most_rows(MOST_GROUPS, MOST_RESPONSES, share, kinds)
    return pack_shared(
        sequences.prompts[:contexts], sequences.responses, range(100, 100 + len(sequences.responses)),
        lengths=[prompt + RESPONSE for prompt in PROMPTS[:contexts]], longest=RESPONSE, share=share,
        shape=(-(-most // micro_batch), micro_batch), chunk=6,
    )  # fmt: skip


def fitted(sizes, share, contexts=2):
    """(row, row of attention in the first context) of each sequence of groups of these sizes."""
    groups, first = [], 0
    for _, responses in sizes:
        groups.append(range(first, first + len(responses)))
        first += len(responses)
    prompts = np.array([own[:contexts] for own, each in sizes for _ in each], np.int64).reshape(-1, contexts)
    responses = np.array([size for _, each in sizes for size in each], np.int64)
    length = np.array(PROMPTS[:contexts]) + RESPONSE
    placed, whole = fit(groups, prompts, responses, length + (share - 1) * RESPONSE, length, share)
    return placed.row, whole.row[:, 0]


@given(GROUPS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
def test_every_token_is_in_its_place(sizes, share, micro_batch, contexts):
    sequences = drawn(sizes)
    pack = packed(sequences, share, micro_batch, contexts)
    wholes = [
        {100 + s: np.concatenate(pair) for s, pair in enumerate(zip(own, sequences.responses, strict=True))}
        for own in sequences.prompts
    ]
    for side, whole in zip(pack.contexts, wholes, strict=False):
        real, places, segments, outputs = side.segments
        found = []
        for k, m, a in np.ndindex(places.shape[:3]):
            row, length = side.tokens[k, m], places.shape[3]
            for segment in range(1, segments[k, m, a].max(initial=0) + 1):
                inside = np.flatnonzero(segments[k, m, a] == segment)
                np.testing.assert_array_equal(inside, np.arange(inside[0], inside[-1] + 1), "in one piece")
                tokens = places[k, m, a, inside]
                assert real[k, m, tokens].all()
                np.testing.assert_array_equal(side.positions[k, m, tokens], np.arange(len(tokens)))
                found.append(row[tokens].tolist())
                assert (outputs[k, m, tokens] < share * length).all()
            used = np.flatnonzero(real[k, m])
            at = outputs[k, m, used]
            np.testing.assert_array_equal(places[k, m].reshape(-1)[at], used, "a token's output is that of its copy")
            assert (segments[k, m].reshape(-1)[at] > 0).all()
            assert len(set(row[used].tolist())) == len(used), "a row has every prompt and response once"
        assert sorted(found) == sorted(x.tolist() for x in whole.values())

    listed = np.argwhere(pack.owner >= 0)
    assert len(listed) == sum(sum(each) for _, each in sizes)
    for k, s, m, j in listed:
        owner, t = pack.owner[k, s, m, j], pack.index[k, s, m, j]
        assert k < pack.count and s < pack.chunks[k]
        for side, whole in zip(pack.contexts, wholes, strict=False):
            before = len(whole[owner]) - len(sequences.responses[owner - 100]) + t - 1
            row = side.tokens[k, m]
            assert row[side.slots[k, s, m, j]] == whole[owner][before], "the token before it"
            assert row[side.places[k, s, m, j]] == whole[owner][before + 1], "the token itself"


@given(GROUPS, st.integers(1, 4), st.integers(1, 2))
def test_rows_are_as_many_as_their_limit_at_most(sizes, share, contexts):
    """Even if each response is as long as it can be."""
    longest = [(PROMPTS, [RESPONSE] * len(each)) for _, each in sizes]
    for groups in (sizes, longest):
        rows, _ = fitted(groups, share, contexts)
        assert rows.max(initial=-1) < sum(-(-len(each) // share) for _, each in groups) or not groups


def test_a_group_of_long_responses_is_computed_with_one_prompt_for_each_row():
    rows, attention = fitted([(PROMPTS, [RESPONSE] * 4)] * 3, 2)
    assert rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and attention.tolist() == [0, 1] * 6


def test_shapes_do_not_depend_on_what_is_packed():
    shapes = [jax.tree.map(np.shape, packed(drawn(sizes))) for sizes in ([], [((1, 1), [1])], FULL)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("prompts, found", [((7, 3), "[13, 9]"), ((2, 9), "[8, 15]")])
def test_a_response_that_does_not_fit_after_its_prompt_is_refused(prompts, found):
    with pytest.raises(ValueError, match=re.escape(f"a sequence has {found} tokens; allowed: [12, 14]")):
        packed(drawn([(prompts, [5, 6])]))


def test_prompts_of_more_kinds_than_there_are_rows_for_are_refused():
    sequences = drawn(FULL)
    sequences.prompts[1] = [np.full(PROMPTS[1], s) for s in range(len(sequences.responses))]  # one for each
    with pytest.raises(ValueError, match="the sequences take 25 rows; allowed: 16"):
        packed(sequences, share=2)
    assert packed(sequences, share=2, kinds=MOST_RESPONSES).count == 13


def run(batch, config, share, *, micro_batch=8, mesh=None, params=None, weighting=None, **objective):
    """(gradient, metrics) of one update."""
    params = make_params(config=config) if params is None else params
    weighting = weighting or Weighting(guided_grpo=objective.get("guided_grpo", 0.0))
    packed = pack_batch(batch, weighting, micro_batch=micro_batch, chunk=8, share=share)
    optimizer = optax.sgd(1.0)
    update = make_update(Forward(config), optimizer, Objective(delta=1.7, **objective))
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    if mesh is None:
        after, metrics = update(state, packed)
    else:
        state = jax.device_put(state, sharding.tree_shardings(state, mesh))
        with jax.set_mesh(mesh):
            after, metrics = update(state, sharding.put(packed, specs(packed), mesh))
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, after.params), metrics


@pytest.mark.parametrize(
    "config, updates",
    [
        pytest.param(CONFIG, 1, id="dense"),
        pytest.param(SLIDING, 2, id="sliding", marks=pytest.mark.slow),
        pytest.param(EXPERTS, 2, id="experts", marks=pytest.mark.slow),
    ],
)
def test_the_update_is_that_of_sequences_with_prompts_of_their_own(config, updates):
    batch = make_batch()
    expected, metrics = run(batch, config, 1, guided_grpo=0.5, updates_per_batch=updates)
    actual, shared = run(batch, config, 3, guided_grpo=0.5, updates_per_batch=updates)
    assert_trees_close(actual, expected, 1e-5)
    for name in metrics.keys() - {"expert_load_max", "expert_load_max_guided"}:  # these count a prompt once now
        np.testing.assert_allclose(shared[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


def siblings():
    """Rollouts whose own responses are the targets: the second and the third correct one are each other's hints.

    The first response of all is read without a hint, and is no target.
    """
    batch, tokens = make_batch(), []
    hints = np.random.default_rng(1).integers(0, 31, (B, 2, 9)).astype(np.int32)
    for r in range(B * G1):
        b, i = divmod(r, G1)
        tokens.append(hints[b, 0 if i == 1 else 1, i == 1 :] if r else batch.prompts.tokens[0])
    return batch._replace(guided=None, guided_prompts=Contexts(tokens, 9))


SEVERAL = {
    "mean": (make_batch, Weighting(target="mean")),
    "own": (siblings, Weighting(target="own", guide="sibling")),
}


@pytest.mark.parametrize("target", SEVERAL)
def test_targets_of_one_problem_share_their_prompts(target):
    made, weighting = SEVERAL[target]
    batch = made()
    kl = {"weighting": weighting, "token_rule": "scale"}
    expected, metrics = run(batch, CONFIG, 1, **kl)
    actual, shared = run(batch, CONFIG, 3, **kl)
    assert metrics["loss_kd"] > 1e-3
    assert_trees_close(actual, expected, 1e-5)
    for name in metrics:
        np.testing.assert_allclose(shared[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)

    targets = pack_batch(batch, weighting, micro_batch=8, chunk=8, share=8).targets
    group = batch.autonomous if target == "own" else batch.guided
    chosen, size = np.unique(targets.owner[targets.owner >= 0]), group.lengths.shape[1]
    plain = [batch.prompts.tokens[r // size] for r in chosen]
    hinted = [batch.guided_prompts.tokens[r if target == "own" else r // size] for r in chosen]
    kinds = {(bytes(a), bytes(b)): (len(a), len(b)) for a, b in zip(plain, hinted, strict=True)}
    assert len(kinds) == {"own": 2 * B, "mean": len(set(chosen // size))}[target]
    for context, side in enumerate(targets.contexts):
        prompts = sum(lengths[context] for lengths in kinds.values())
        assert side.segments.real.sum() == prompts + group.lengths.reshape(-1)[chosen].sum(), "each is there once"


def test_each_group_shares_its_prompts():
    batch = make_batch()
    packed = pack_batch(batch, Weighting(guided_grpo=1.0), micro_batch=8, chunk=8, share=8)
    tokens = {
        "autonomous": sum(map(len, batch.prompts.tokens)) + int(batch.autonomous.lengths.sum()),
        "guided": sum(map(len, batch.guided_prompts.tokens)) + int(batch.guided.lengths.sum()),
    }
    for name, pack in (("autonomous", packed.autonomous), ("guided", packed.guided.packed)):
        (rows,) = pack.contexts
        assert rows.segments.real.sum() == tokens[name], "with room for all each prompt is there once"
        count = {"autonomous": G1, "guided": G2}[name]
        assert rows.segments.places.shape[2] == count and rows.tokens.shape[:2] == (1, B), "no more than a group needs"
    (rows,) = packed.candidates.contexts
    assert rows.segments.places.shape[2] == G2


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (4, 1, 1), (1, 2, 4)], ids=str)
def test_the_update_is_the_same_on_a_mesh(sizes):
    data, fsdp, tensor = sizes
    params, batch = make_params(config=MESHED), make_batch()
    mesh = sharding.make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])
    expected, _ = run(batch, MESHED, 2, params=params)
    actual, _ = run(batch, MESHED, 2, params=params, mesh=mesh)
    assert_trees_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_a_run_shares_its_prompts(tmp_path, monkeypatch):
    """And ends as one whose responses have prompts of their own; it resumes with the same number alone."""
    config = load(ROOT / "configs" / "quickstart.py")
    config.update_from_flattened_dict(TINY | {
        "stages": ("sft", "rl"), "sft.steps": 2, "sft.validate_every": 1, "rl.eval_every": 0, "checkpoint.every": 1,
        "rl.reward": "helpers.reward_functions:even", "report_seconds": 0.0,
    })  # fmt: skip
    shares, mesh = [], sharding.make_mesh(1, 2, 1, jax.devices()[:2])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_, **__: mesh)

    def watched(*args, **more):
        shares.append(more["share"])
        return pack_shared(*args, **more)

    monkeypatch.setattr(batches, "pack_shared", watched)
    for name, steps, share in (("own", 2, 1), ("shared", 1, 3), ("shared", 2, 3)):
        config.rl.steps, config.rl.share_prompt = steps, share
        train.run(config, tmp_path / name)
    assert set(shares) == {2, 3}, "as many as a group has, or as there are"
    pairs = [(rows(tmp_path / name, "rl"), parameters(tmp_path / name, "rl", 2)) for name in ("own", "shared")]
    for row in pairs[0][0] + pairs[1][0]:
        del row["rows_filled"]
    assert_trees_close(*pairs, 1e-5)
    config.rl.share_prompt = 2
    with pytest.raises(ValueError, match="config.rl.share_prompt=2: the run in .* has 3"):
        train.run(config, tmp_path / "shared")


def test_a_mesh_that_splits_the_tokens_of_a_row_is_refused():
    with pytest.raises(ValueError, match="share=2: must be 1 with context=4"):
        pack_batch(make_batch(), Weighting(), micro_batch=8, context=4, share=2)
    config = load(ROOT / "configs" / "quickstart.py")
    config.rl.share_prompt = 4
    config_checks.check(config)
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:2], context=2)
    with pytest.raises(ValueError, match=r"config.rl.share_prompt=4: must be 1 with mesh.context = 2"):
        config_checks.check_mesh(config, mesh)
    config.rl.share_prompt = 0
    with pytest.raises(ValueError, match=r"config.rl.share_prompt=0: must be at least 1"):
        config_checks.check(config)
