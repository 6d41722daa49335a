"""The passes of planned rollouts with drafts, and where problems go on from step to step."""

import jax
import numpy as np
import pytest
from helpers.configs import small_run

from sgpo_jax import policy, sharding
from sgpo_jax.plan import decoding, programs
from sgpo_jax.plan.workload import Assumed
from sgpo_jax.policy import generation
from sgpo_jax.rollout import RUNNING, STOP, Rollout, Sampling
from sgpo_jax.rollout.schedule import Going, Pace, Pool, Stage, schedule
from sgpo_jax.training import carried, rl
from sgpo_jax.training.inputs import Problems

GOES_ON = {"rl.carry_over": 1.0, "rl.carry_most": 1, "rl.draft": 3, "rl.importance": "token"}
GOES_ON |= {"rl.autonomous": 3, "rl.guided": 1}


def test_a_pass_keeps_drafts_up_to_the_first_wrong_one():
    assert decoding.pace(0, 0.5) == Pace(1, 1)
    assert decoding.pace(3, 0.5) == Pace(4, 1 + 0.5 + 0.25 + 0.125)
    assert decoding.pace(3, 1.0) == Pace(4, 4) and decoding.pace(3, 0.0) == Pace(4, 1)


def test_drafts_take_fewer_passes_where_few_slots_are_left():
    """On a CPU a pass has at most 8 tokens: 32 slots draft nothing, the last 2 up to 3 tokens."""
    fields, assumed = small_run(**{"rl.draft": 3, "rl.max_new_tokens": 400}).rl, Assumed(100, 4, acceptance=1.0)
    found = decoding.passes(fields, assumed, 4, 0, 1, 32)
    fields.draft = 0
    plain = decoding.passes(fields, assumed, 4, 0, 1, 32)
    assert [stage.width for stage in found.stages] == [stage.width for stage in plain.stages] == [32, 8, 2]
    assert found.stages[:2] == plain.stages[:2]  # 8 // 8 - 1
    last, alone = found.stages[2], plain.stages[2]
    assert alone.steps > 8 and alone.steps / 4 <= last.steps <= alone.steps / 4 + 2
    times = [1, 1, 4]  # as on TPUs, where each token of a pass reads the cache of its row
    found = found._replace(begun=48.0, stages=[found.stages[0]._replace(refills=3.0), *found.stages[1:]])
    assert dict(decoding.scopes(found, times, [4] * 3, 10).trips)["refill/while/body/while$"] == 16
    reads = [size for _, size in decoding.scopes(found, times, [4] * 3, 10).reads]
    assert reads == [10 * fed * stage.cached for fed, stage in zip(times, found.stages, strict=True)]


def test_steps_that_leave_problems_to_the_next_are_those_of_training():
    """`training.carried` says which problems are in flight, which are due, and which are trained on."""
    fields, assumed, shards, slots = small_run(**GOES_ON).rl, Assumed(6, 4, acceptance=0.5), 2, 7
    beyond, each = carried.extra(fields), fields.autonomous + fields.guided
    found = decoding.passes(fields, assumed, each, beyond, shards, slots)
    lengths = decoding.lengths(fields, assumed, (decoding.STEPS * fields.batch + beyond) * each).reshape(-1, each)
    flight, steps, waited = carried.nothing({"all": each}, fields.max_new_tokens), [], 0
    for position in range(decoding.STEPS):
        flight = carried.spread(carried.begin(flight, position, 1000, fields, 0), shards)
        begun, size = carried.begun(flight, position, fields), (shards, -1)
        age = (position - flight.first).reshape(size)
        going = Going(begun.rollout.lengths.reshape(size), age, begun.due.reshape(size), int(begun.enough))
        of_flight = lengths[flight.numbers].reshape(size)
        one = schedule(of_flight, np.full_like(of_flight, 4), slots, lambda _: decoding.pace(0, 0.5), going)
        now = one.tokens.reshape(-1, each)
        finish = np.where(now == lengths[flight.numbers], STOP, RUNNING)
        tokens = np.zeros((*now.shape, fields.max_new_tokens), np.int32)
        _, flight, _ = carried.end(flight, {"all": Rollout(tokens, tokens, now, finish)}, position, fields.batch)
        steps.append(one)
        waited += int(begun.due.sum())
    steps = steps[decoding.SETTLED :]
    assert waited and len({one.stages[0].steps for one in steps}) > 2, "problems were due, and steps differ"
    (stage,) = found.stages
    (stages,) = zip(*(one.stages for one in steps), strict=True)
    passes = np.mean([one.steps for one in stages])
    cached = np.mean([one.steps * one.cached for one in stages]) / passes
    assert stage == pytest.approx(Stage(slots, np.mean([one.refills for one in stages]), passes, cached))
    assert found.begun == pytest.approx(np.mean([one.begun for one in steps]))
    # A step that waits takes longer.
    assert passes < decoding.passes(fields, assumed, each, 0, shards, slots).stages[0].steps


def test_a_pool_is_planned_with_its_pages(tiny):
    """Four devices split the rows, each with 8 pages of 128 tokens, of which 4 have prompts."""
    config, mesh, assumed = small_run(**{"rl.slots": 16}), sharding.make_mesh(1, 4, 2), Assumed(8, 4)
    each = config.rl.autonomous + config.rl.guided
    found, whole = {}, decoding.passes(config.rl, assumed, each, 0, 4, 4)
    for tokens in (4096, 0):
        config.rl.pool_tokens = tokens
        found[tokens], *_ = (p for p in programs.programs(config, tiny, mesh, assumed) if p.name == programs.ROLLOUT)
    pooled, slots = found[4096].setting, found[0].setting
    assert (pooled.field, pooled.value) == ("rl.pool_tokens", 4096)
    tokens_of_slots = 4 * (config.data.max_prompt_tokens - 1 + config.rl.max_new_tokens)  # of a device
    assert pooled.bytes / slots.bytes == pytest.approx(8 * 128 / tokens_of_slots, rel=0.01)  # and the lengths of rows
    # Two pages for each slot stay free, so two responses decode at once.
    work = decoding.passes(config.rl, assumed, each, 0, 4, 4, Pool(128, 4))
    assert work.stages[0].steps > 1.5 * whole.stages[0].steps
    (loop, steps) = next(pair for pair in found[4096].scopes.trips if pair[0].startswith("decode_4/while"))
    assert steps == work.stages[0].steps / work.stages[0].refills and loop
    # A later stage has no loop over refills of its own name.
    later = work._replace(stages=[Stage(4, 10.0, 50, 9.0), Stage(1, 2.0, 30, 4.0)])
    trips = dict(decoding.scopes(later, [1, 1], [128, 128], 4).trips)
    assert (trips["refill/while$"], trips["decode_4/while$"], trips["decode_1/while$"]) == (10, 5, 3)


@pytest.mark.parametrize("changes", [{}, {"rl.slots": 8}, {"rl.draft": 3}, GOES_ON, {"rl.pool_tokens": 4096}])
def test_a_rollout_is_planned_with_the_arguments_of_the_run(tiny, tmp_path, monkeypatch, changes):
    config, mesh = small_run(**changes), sharding.make_mesh(1, 4, 2)
    every = programs.programs(config, tiny, mesh, Assumed(4, 4))
    (planned,) = (program.trace for program in every if program.name == programs.ROLLOUT)

    class Called(Exception):
        pass

    def generate(*arguments, **more):
        raise Called(arguments, more)

    monkeypatch.setattr(generation, "generate", generate)
    ours = policy.Policy(tiny, None, (0,), 0, np.dtype(config.model.dtype), "")
    run, rows = policy.Run(config, tmp_path, ours, mesh), [{"id": str(i)} for i in range(8)]
    prompts = {name: dict.fromkeys([*map(str, range(8)), "longest"], [9] * 8) for name in ("autonomous", "guided")}
    sampling = Sampling.from_config(config.rl)
    sampler = rl.Sampler(
        run, Problems(rows, prompts, {}), sampling, rl.make_earlier(run, rows, sampling), rl.make_carried(run, 100)
    )
    flight = sampler.in_flight and sampler.in_flight.begin(0, sharding.row_ways(mesh))
    if flight:
        rows = carried.rows_of(flight, [rows, rows], config.rl.batch)
    with pytest.raises(Called) as called:
        rl.sample_groups(sampler, planned.args[0], rows, 0, flight=flight)
    arguments, more = called.value.args
    assert more == planned.keywords and arguments[1] == planned.args[1]
    for ours, theirs in zip(jax.tree.leaves(planned.args[2:]), jax.tree.leaves(arguments[2:]), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim) or ours.dtype == arguments[3].dtype
    assert jax.tree.structure(planned.args[2:]) == jax.tree.structure(arguments[2:])
