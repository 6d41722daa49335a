"""Tests a plan's arithmetic on numbers known by hand, the search with a fake compiler, and a plan with the real one."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers.configs import small_run
from helpers.paths import ROOT
from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import models, plan, sharding
from sgpo_jax.models import lora, presets
from sgpo_jax.plan import estimate, hardware, programs, roofline, search, tpus, workload
from sgpo_jax.plan.hlo_cost import Collective
from sgpo_jax.plan.phases import Scopes
from sgpo_jax.plan.programs import Program, Setting
from sgpo_jax.plan.roofline import Chip, Reached, Seconds
from sgpo_jax.plan.workload import Assumed
from sgpo_jax.training.batch import pack_batch
from sgpo_jax.training.weighting import Weighting

# ---- shapes

PARAMETERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736,
    "allenai/OLMo-2-1124-7B-Instruct": 7_298_617_344,
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
    "google/gemma-3-270m-it": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 3_880_263_168,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "microsoft/phi-4": 14_659_507_200,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
}


@pytest.mark.parametrize("source", presets.KNOWN)
def test_known_models_have_as_many_parameters_as_published(source):
    params = jax.eval_shape(lambda key: models.init(key, presets.shape(source)), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[source]


def test_the_paper_configs_need_no_network():
    for model in ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"):
        assert programs.load_shape(configs.paper(model, tensor=1)) == presets.shape(model)


# ---- the recipe

ASSUMED = Assumed(response_tokens=4096, prompt_tokens=256)


def test_calls_of_the_papers_recipe():
    # 8500 problems: 2833 for the warm-up, of which 283 are held out, and 2550 make 39 batches of 64; 5667 for RL make
    # 44 of 128. Ten epochs each. The 283 make 5 batches, once an epoch. The sets, before and after RL, in batches of
    # 64: 8 and 11 with 4 samples, 1 and 1 with 32.
    config = configs.paper("Qwen/Qwen2.5-7B-Instruct", tensor=4)
    assert workload.calls(config, ASSUMED) == workload.Calls(390, 50, 440, 0, {4: 38, 32: 4})


def test_calls_of_other_recipes():
    config = configs.paper("Qwen/Qwen2.5-7B-Instruct", tensor=4)
    config.stages = ("sft", "rl")
    config.sft.train = "rows"  # its own 8500 rows: 850 held out, 7650 make 119 batches
    config.sft.validate_every = 200
    config.rl.steps, config.rl.eval_every = 50, 20
    config.eval.sets = ConfigDict({"ours": {"source": "rows", "samples": 2}})
    calls = workload.calls(config, ASSUMED._replace(eval_problems=130))
    # Validated six times (1190 steps by 200) in 14 batches; three evaluations (after 20, 40 and 50) of 3 batches.
    assert calls == workload.Calls(1190, 6 * 14, 50, 0, {2: 9})
    config.rl.guide = "self"  # 8500 problems in batches of 128, the last one filled up
    assert workload.calls(config, ASSUMED._replace(eval_problems=130)) == calls._replace(own_strategies=67)
    config.rl.guided = 0
    assert workload.calls(config, ASSUMED._replace(eval_problems=130)) == calls
    config.rl.update({"guide": "strategy", "guided": 4})
    config.stages = ("rl", "eval")
    config.eval.guided = True
    calls = workload.calls(config, ASSUMED._replace(eval_problems=130))
    assert (calls.sft_steps, calls.sft_validations, calls.evaluations) == (0, 0, {2: (4 + 3) * 3})


@pytest.mark.parametrize("mean", [1, 7, 400, 512, 900, 1000])
def test_assumed_lengths_have_the_assumed_mean(mean):
    lengths = workload.lengths(500, mean, 1024)
    assert lengths.min() >= 1 and lengths.max() <= 1024
    assert lengths.mean() == pytest.approx(mean, rel=0.01)


def test_the_lengths_of_a_run(tmp_path):
    rows = [
        {"step": 1, "response_length": 100.0, "response_length_guided": 40.0, "truncated": 0.25},
        {"step": 2, "response_length": 200.0, "response_length_guided": 60.0, "truncated": 0.75},
    ]
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"rl": {"max_new_tokens": 300, "autonomous": 8, "guided": 4}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    mean, cut = workload.of_run(tmp_path, 300)
    assert (mean, cut) == ((8 * 150 + 4 * 50) / 12, 0.5)
    found = workload.lengths(1000, 170.0, 300, cut)
    assert (found == 300).sum() == 500 and found.mean() == pytest.approx(170, rel=0.01) and found.min() == 1
    config = configs.base()
    config.rl.max_new_tokens = 300
    made = programs.made_up_batch(config, ASSUMED._replace(response_tokens=mean, cut=0.25))
    for group in (made.autonomous, made.guided):
        assert (group.lengths == 300).mean() == 0.25
    assert workload.lengths(4, 10.0, 300, 0.5).tolist().count(300) == 2, "the mean is too low for the share"
    assert workload.lengths(3, 300.0, 300, 1.0).tolist() == [300] * 3
    with pytest.raises(ValueError, match=r"of the run is 300; must be the plan's, 512"):
        workload.of_run(tmp_path, 512)
    (tmp_path / "rl.jsonl").write_text("")
    with pytest.raises(ValueError, match="--lengths=.*: rl.jsonl must be there, and have the steps of RL"):
        workload.of_run(tmp_path, 300)


def test_assumed_lengths_are_exponential():
    lengths = np.sort(workload.lengths(1000, 100.0, 10**6))
    # The median of an exponential distribution is its mean times log 2.
    assert lengths[500] == pytest.approx(100 * math.log(2), rel=0.02)
    assert (workload.lengths(1000, 100.0, 10**6)[:10] != lengths[:10]).any()


# ---- time

CHIP, HALF = Chip(flops=100.0, hbm=10.0, ici=4.0), Reached(flops=0.5, hbm=0.5, ici=0.5)


def test_time_of_a_phase():
    # 200 FLOP at 50 a second; 30 bytes at 5; and twice an all-gather of 16 bytes among 4, of which 12 are sent, at 2.
    moved = [Collective("all-gather", "", 16, 4, 2.0)]
    seconds = roofline.seconds(200.0, 30.0, moved, CHIP, HALF)
    assert seconds == Seconds(4.0, 6.0, 12.0)
    assert (seconds.least, seconds.most) == (12.0, 22.0)


def test_a_small_collective_takes_the_steps_of_its_ring():
    assert roofline.link_seconds(Collective("all-reduce", "", 1, 64, 1.0), CHIPS_FAST, Reached()) == 32e-6


CHIPS_FAST = Chip(flops=1e15, hbm=1e12, ici=1e11)


def result(stage, calls, *phases, fits=True, compiled=True, needed=0, limit=16 * hardware.GIB):
    return {
        "stage": stage, "calls": calls, "tokens": 1000.0, "fits": fits, "compiled": compiled,
        "hbm": {"needed": needed, "limit": limit},
        "phases": {str(i): {"seconds": seconds._asdict()} for i, seconds in enumerate(phases)},
    }  # fmt: skip


def test_hours_of_a_run():
    # A call takes, at least, 4 + 9 seconds, and at most 6 + 10.
    generation, update = Seconds(1.0, 4.0, 1.0), Seconds(9.0, 0.5, 0.5)
    results = {"SFT": result("sft", 900, update), "RL": result("rl", 1800, generation, update)}
    assert estimate.seconds(results["RL"]) == (13.0, 16.0)
    assert estimate.hours(results) == {
        "sft": {"least": 2.25, "most": 2.5},
        "rl": {"least": 6.5, "most": 8.0},
        "all": {"least": 8.75, "most": 10.5},
    }
    # With HBM three times as slow a generation takes 12 to 14 seconds, an update 9 to 11.
    assert estimate.hours(results, 3.0)["rl"] == {"least": 10.5, "most": 12.5}
    results["RL"] |= {"compiled": False}
    assert estimate.hours(results) is None


# ---- advice and search

GIB = hardware.GIB


def program(name, field, value, size, resident=0, arguments=0):
    setting, mesh = Setting(field, value, size), sharding.make_mesh()
    return Program(name, "rl", mesh, lambda: None, Scopes(""), resident, arguments, 1, 1.0, setting)


def test_a_program_has_the_mesh_that_it_runs_on(tiny):
    """Compiled on another one, sums over the axes that split the weights would be over other devices."""
    config, mesh = configs.paper("", tensor=2), sharding.make_mesh(1, 4, 2)
    config.rl.decode_ways = (2,)
    found = {p.name: dict(p.mesh.shape) for p in programs.programs(config, tiny, mesh, Assumed(64.0, 16))}
    assert found["rollout"] == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert found["update"] == found["evaluation, 32 samples"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}


def test_a_cache_in_8_bits_is_planned_with_its_scales(tiny):
    """With heads of 8 a key takes 8 bytes and 4 for its scale, in place of 16. An evaluation has none."""
    config, mesh = small_run(**{"stages": ("rl", "eval"), "rl.importance": "token"}), sharding.make_mesh(1, 4, 2)
    found = {}
    for kind in ("", "int8"):
        config.rl.rollout_cache = kind
        by_name = {p.name: p for p in programs.programs(config, tiny, mesh, Assumed(8.0, 4))}
        found[kind] = [by_name[name] for name in ("rollout", "evaluation, 32 samples")]
    (numbers, exact), (codes, same) = found.values()
    assert codes.setting.bytes / numbers.setting.bytes == pytest.approx(12 / 16, rel=1e-3)  # and the lengths of rows
    (_, read), (_, less) = numbers.scopes.reads[0], codes.scopes.reads[0]
    assert less / read == pytest.approx(12 / 16)
    assert (same.setting, same.scopes.reads) == (exact.setting, exact.scopes.reads)


@pytest.mark.parametrize(
    ("field", "value", "size", "needed", "mesh", "heads", "expected"),
    [
        # Half of 8 GiB of cache is more than the 3 GiB that are too much.
        ("rl.slots", 64, 8, 19, (1, 4, 2), 4, "config.rl.slots=32; config.mesh.tensor=4"),
        # A quarter of it has to do for 5 GiB, and nothing for 9.
        ("rl.slots", 64, 8, 21, (1, 4, 2), 2, "config.rl.slots=16; more chips"),
        ("rl.slots", 64, 8, 25, (1, 4, 2), 4, "config.mesh.tensor=4"),
        (
            "eval.slots",
            8,
            8,
            17,
            (2, 4, 1),
            4,
            "config.mesh.data=1, so that parameters are held once; config.mesh.tensor=2",
        ),
        (
            "rl.micro_batch",
            16,
            10,
            20,
            (1, 4, 2),
            4,
            "config.rl.micro_batch=8; config.optimizer.mu_dtype=bfloat16; config.mesh.tensor=4",
        ),
    ],
)
def test_what_to_change(field, value, size, needed, mesh, heads, expected):
    measured = [
        (program("first", field, value, size * GIB), result("rl", 1, fits=False, needed=needed * GIB)),
        (program("second", field, value, size * GIB), result("rl", 1)),
    ]
    lines = estimate.advice(measured, small_run(), sharding.make_mesh(*mesh), heads)
    assert lines == [f"first needs {needed}.00 of 16.00 GiB; in this order: {expected}"]


def test_layers_are_recomputed_first():
    measured = [(program("update", "rl.micro_batch", 16, 10 * GIB), result("rl", 1, fits=False, needed=20 * GIB))]
    config = small_run(**{"model.remat": "dots", "optimizer.mu_dtype": "bfloat16"})
    (line,) = estimate.advice(measured, config, sharding.make_mesh(1, 8, 1), 2)
    assert line.endswith("in this order: config.model.remat=full; config.rl.micro_batch=8; config.mesh.tensor=2")


def with_eight(monkeypatch):
    """Eight devices of the CPU in the place of a topology."""
    monkeypatch.setattr(hardware, "topology", lambda name: (CHIPS_FAST, jax.devices()))
    monkeypatch.setattr(hardware, "hbm_limit", lambda *_: GIB)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh.data": 3},
            r"mesh\.data=3, mesh\.fsdp=-1, mesh\.context=1, mesh\.tensor=1 needs a multiple or product of 3 devices",
        ),
        ({"rl.micro_batch": 12}, r"config\.rl\.micro_batch=12: must be a multiple of mesh\.data \* mesh\.fsdp = 8"),
        ({"rl.pool_tokens": 9}, r"config\.rl\.pool_tokens=9: must be 0 or at least \d+, for the prompts"),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_is_compiled(monkeypatch, changes, message):
    with_eight(monkeypatch)
    monkeypatch.setattr(estimate, "measure", lambda *_, **__: pytest.fail("compiled"))
    config = small_run(**{"model.source": "HuggingFaceTB/SmolLM2-135M-Instruct"} | changes)
    with pytest.raises(ValueError, match=message):
        plan.make(config, "v5e:2x4", False, Assumed(4, 4), Reached())


def test_a_search_has_no_pool(monkeypatch):
    with_eight(monkeypatch)
    config = small_run(**{"model.source": "HuggingFaceTB/SmolLM2-135M-Instruct", "rl.pool_tokens": 4096})
    with pytest.raises(ValueError, match=r"config\.rl\.pool_tokens=4096: must be 0 with --topology=auto"):
        plan.make(config, "v5e:2x4", True, Assumed(4, 4), Reached())


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(tpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"libtpu, the compiler for TPUs, is not installed: pip install 'sgpo_jax\[tpu"
    ):
        hardware.topology("v5e:2x2")


def test_a_shape_that_libtpu_refuses_is_named(monkeypatch):
    def refuse(**_):
        raise RuntimeError("not divisible")

    monkeypatch.setattr(tpus.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(tpus.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(tpus.os, "environ", {})
    with pytest.raises(ValueError, match=r"--topology=v5e:3x7: libtpu knows no such topology \(not divisible\)"):
        hardware.topology("v5e:3x7")


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (36.50G) exceeds "
         "available HBM (15.75G).", (36.5 * GIB, 15.75 * GIB)),
        ("RESOURCE_EXHAUSTED: ... (512.00M) exceeds available HBM (1.00G).", (GIB / 2, GIB)),
        ("INTERNAL: (36.50G) exceeds available HBM (15.75G).", None),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)  # fmt: skip
def test_sizes_in_the_compilers_message(message, sizes):
    assert tpus.too_large(RuntimeError(message)) == sizes


def made_up(limit, unit_gib, rest_gib):
    """A compiler for which a program needs `unit_gib` for each unit of its setting, and `rest_gib` for the rest."""

    def measure(program, mesh):
        needed = int((program.setting.value * unit_gib[program.setting.field] + rest_gib(program, mesh)) * GIB)
        return result(program.stage, program.calls, fits=needed <= limit, needed=needed)

    return measure


def test_the_search_takes_the_first_that_fits(tiny, capsys):
    def rest_gib(program, mesh):
        return (4 if mesh.shape["tensor"] == 2 else 20) + 9 * (program.name == "evaluation, 4 samples")

    limit = 16 * GIB
    sizes = {"sft.micro_batch": 0.5, "rl.micro_batch": 1.5, "rl.slots": 0.25, "eval.slots": 0.125}
    measure = made_up(limit, sizes, rest_gib)
    config, measured, tried = search.search(small_run(), tiny, jax.devices(), CHIPS_FAST, Assumed(4, 4), limit, measure)
    assert dict(config.mesh) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    # The largest with value * size + 4 <= 16, from what is tried: all of 8; half of 16; half of both groups' 96; and of
    # 256 so few that the evaluation with 32 responses in all, which needs 9 more, fits too.
    assert [config[section][name] for section, name in (field.split(".") for field in search.FIELDS)] == [8, 8, 48, 16]
    assert [program.name for program, _ in measured] == [
        "SFT update", "SFT validation", "update", "rollout", "evaluation, 4 samples", "evaluation, 32 samples",
    ]  # fmt: skip
    outcomes = [(t.mesh["tensor"], t.field, t.value, t.outcome) for t in tried]
    assert outcomes[-10:] == [
        (2, "sft.micro_batch", 8, "fits"),
        (2, "rl.micro_batch", 16, "update needs 28.00 GiB"),
        (2, "rl.micro_batch", 8, "fits"),
        (2, "rl.slots", 96, "rollout needs 28.00 GiB"),
        (2, "rl.slots", 48, "fits"),
        *((2, "eval.slots", slots, "evaluation, 4 samples needs 17.00 GiB") for slots in (256, 128, 64, 32)),
        (2, "eval.slots", 16, "fits"),
    ]
    assert "rl.micro_batch=16: update needs 28.00 GiB" in capsys.readouterr().out
    assert search.flags(config).startswith(
        "--config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.context=1 --config.mesh.tensor=2 --config.sft"
    )


def test_the_search_says_when_nothing_fits(tiny):
    measure = made_up(GIB, dict.fromkeys(search.FIELDS, 1.0), lambda *_: 0)
    config, measured, tried = search.search(small_run(), tiny, jax.devices(), CHIPS_FAST, Assumed(4, 4), GIB, measure)
    assert config is None and not measured
    assert {t.mesh["tensor"] for t in tried} == {1, 2} and all("needs" in t.outcome for t in tried)


def test_the_search_compiles_nothing_that_cannot_fit(tiny):
    def measure(program, mesh):
        raise AssertionError(f"{program.name} was compiled")

    limit = 2**12  # less than the training state
    _, _, tried = search.search(small_run(), tiny, jax.devices(), CHIPS_FAST, Assumed(4, 4), limit, measure)
    assert tried and all("needs more than 0.00 GiB" in t.outcome for t in tried)


@pytest.mark.parametrize("autonomous", [2, 62])
def test_what_moves_least_is_the_first(tiny, autonomous):
    chip, assumed = Chip(flops=1.0, hbm=1e6, ici=1e6), Assumed(1024, 4)
    config = small_run(**{"rl.max_new_tokens": 1024, "rl.autonomous": autonomous, "rl.guided": 2})
    candidates = search.meshes(config, tiny, jax.devices(), chip, assumed)
    # A wider split in decoding serves as well as the tensor axis, which has activations to sum in an update too.
    assert [mesh.shape["tensor"] for _, mesh in candidates] == [1, 2]
    params = jax.eval_shape(lambda key: models.init(key, tiny), jax.random.key(0))
    size, responses = 2 * sum(x.size for x in jax.tree.leaves(params)), 8 * (autonomous + 2)
    # Of 1024 tokens each, in micro-batches of 8 or 4 rows; two layers, four sums in each, twice in a ring.
    summed = 2 * 4 * responses / 4 * 1024 * tiny.hidden_size * 2

    def decoding(tensor, ways):
        """A step: weights, and in two places of two layers a sum over the split and a gather of the rows."""
        row, split = tiny.hidden_size * 2, ways * tensor
        moved = 2 * 2 * responses * tensor / 8 * ways * row * (2 * (split - 1) / split + (ways - 1) / ways)
        return (size / split + moved) / 1e6

    least = 0.0
    for candidate, mesh in candidates:
        tensor, (ways,) = mesh.shape["tensor"], candidate.rl.decode_ways
        steps = {count: decoding(tensor, count) for count in (1, 2, 4, 8)[: 4 if tensor == 1 else 3]}
        assert steps[ways] == min(steps.values()) and candidate.eval.decode_ways == (ways,)
        rest = 3 * responses / (8 / tensor) * size / tensor * (8 / tensor - 1) / (8 / tensor) / 1e6
        rest += size / tensor * (8 / tensor - 1) / (8 / tensor) / 1e6 + summed / 1e6 * (tensor - 1)
        moved = search.moving_seconds(candidate, mesh, tiny, chip, assumed)
        assert moved == pytest.approx(1024 * steps[ways] + rest) and moved > least
        least = moved
        assert search.decode_ways(candidate, mesh, tiny, chip._replace(hbm=1e3)) > 1


def test_updates_are_planned_with_the_runs_chunks(tiny):
    # Of 512 response tokens each of 128 rows has 4; on eight devices 512 are those of one.
    # A quarter of a row is less.
    sizes = {f"{stage}.{name}": 128 for stage in ("sft", "rl") for name in ("batch", "micro_batch")}
    every = programs.programs(small_run(**sizes), tiny, sharding.make_mesh(1, 8, 1), Assumed(4, 4))
    sft_batch, rl_batch = (next(p for p in every if p.name == name).trace.args[1] for name in ("SFT update", "update"))
    assert sft_batch[1].shape == (1, 4, 128, 6)
    assert rl_batch.autonomous_tokens.shape == (8, 4, 128, 6)


def test_a_device_holds_as_much_of_split_rows_as_of_whole_ones(tiny):
    meshes = sharding.make_mesh(1, 4, 2), sharding.make_mesh(1, 2, 2, context=2)
    whole, split = (programs.programs(small_run(), tiny, mesh, Assumed(4, 4)) for mesh in meshes)
    assert [(p.name, p.setting) for p in split] == [(p.name, p.setting) for p in whole]


@pytest.mark.parametrize("guide", ["strategy", "self"])
def test_the_planned_update_has_candidates_and_targets(guide):
    config = small_run()
    config.rl.guide = guide
    batch = programs.made_up_batch(config, Assumed(4, 4))
    packed = pack_batch(
        batch, Weighting.from_config(config.rl), config.rl.distillation, micro_batch=config.rl.micro_batch
    )
    assert packed.targets.count > 0 and packed.candidates.count > 0
    assert (packed.alpha > 0).any()


@pytest.mark.parametrize(("guided", "calls"), [(4, 5), (0, None)])
def test_own_strategies_are_planned(tiny, guided, calls):
    """40 problems in batches of 8: a few responses to each, and one reply."""
    changes = {"rl.guide": "self", "rl.self_tries": 3, "rl.guided": guided, "sft.train": "rows"}
    assumed = Assumed(4, 4, problems=40)
    every = programs.programs(small_run(**changes), tiny, sharding.make_mesh(1, 8, 1), assumed)
    by_name = {program.name: program for program in every}
    responses, strategies = (by_name.get(name) for name in ("own responses", "own strategies"))
    assert [program and program.calls for program in (responses, strategies)] == [calls, calls]
    # Responses to 8 problems: 8 to each, and those with a strategy.
    assert by_name["rollout"].setting.value == 8 * (8 + (guided or 0))
    if guided:
        assert responses.tokens == pytest.approx(3 * strategies.tokens, rel=0.05)


@pytest.mark.parametrize("guide, lengths, kinds", [("sibling", 4 + 3, 2), ("solution", 4, 1)])
def test_own_responses_are_planned_with_the_prompts_of_their_hints(guide, lengths, kinds):
    config = small_run(**{"rl.target": "own", "rl.guide": guide, "rl.guided": 0, "rl.weight": "fixed"})
    batch = programs.made_up_batch(config, Assumed(2.6, 4))
    groups = np.array(batch.guided_prompts.tokens).reshape(config.rl.batch, config.rl.autonomous, lengths)
    assert [len(np.unique(group, axis=0)) for group in groups] == [kinds] * config.rl.batch
    if kinds == 2:
        assert (groups[:, 1:] == groups[:, 1:2]).all(), "all read the same one, but for the one that it is"


def test_shared_prompts_are_planned_with_longer_rows(tiny):
    """Prompts of 8 tokens and responses of 16: a row of 24, or one of 8 + 3 * 16."""
    mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])
    own, shared = (
        {program.name: program for program in programs.programs(small_run(**fields), tiny, mesh, Assumed(4, 4))}
        for fields in ({"rl.micro_batch": 8}, {"rl.micro_batch": 8, "rl.share_prompt": 3})
    )
    assert shared["update"].setting.bytes * 24 == own["update"].setting.bytes * 56 > 0


def test_adapters_are_planned_with_a_frozen_base(tiny):
    """Of `q` alone, with rank 4, on two devices that split the rows of A and W. 2 layers, hidden 16, 4 heads of 8."""
    changes = {"lora.rank": 4, "lora.targets": "q", "lora.base_dtype": "bfloat16", "rl.teacher": "frozen"}
    mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])
    small, whole = (
        {program.name: program for program in programs.programs(small_run(**fields), tiny, mesh, Assumed(4, 4))}
        for fields in (changes, {"rl.teacher": "frozen"})
    )
    weights = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: models.init(jax.random.key(0), tiny))))
    norms = 2 * (2 * 16 + 2 * 8) + 16  # whole on both devices
    parameters = (weights - norms) // 2 + norms
    adapters, kernel = 2 * (8 * 4 + 4 * 32), 2 * 8 * 32
    # Value, two moments and the teacher of an adapter; four counts; and W, under the merged one that is sampled from.
    assert small["rollout"].resident == 16 * adapters + 4 * 4 + 2 * kernel
    assert small["evaluation, 4 samples"].resident == 2 * kernel
    # The update has the base beside the state.
    saved = 16 * parameters - (16 * adapters + 2 * parameters)
    assert whole["update"].arguments - small["update"].arguments == saved


def test_a_base_of_4_bits_is_planned_with_its_scales_and_whole_kernels_for_sampling(tiny):
    """As above, with all kernels of a base of 16 and 32 rows, one tile of a column."""
    pytest.importorskip("qwix", reason="the quantised extra is not installed")
    changes = {"lora.rank": 4, "lora.targets": "q", "lora.base_dtype": "nf4"}
    mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])
    small, whole = (
        {program.name: program for program in programs.programs(small_run(**fields), tiny, mesh, Assumed(4, 4))}
        for fields in (changes, changes | {"lora.base_dtype": "bfloat16"})
    )
    kernels = {name: shape for name, shape in lora.kernels(tiny).items()}
    codes = sum(math.prod(shape) for shape in kernels.values()) // 2
    # Of q, k, v, gate and up the rows are split, which are one tile; of o and down the columns.
    tiles = {name: layers * -(-rows // 64) * columns for name, (layers, rows, columns) in kernels.items()}
    scales = sum(count // 2 if name in ("o", "down") else count for name, count in tiles.items())
    quantised = codes // 2 + 4 * scales
    assert whole["update"].arguments - small["update"].arguments == 2 * codes - quantised
    assert whole["rollout"].arguments == small["rollout"].arguments, "sampled from are numbers of bfloat16"
    assert small["evaluation, 4 samples"].resident == quantised


def test_meshes_divide_heads_and_batches(tiny):
    # Two key and value heads; and a batch of 4, for which 8 ways are too many.
    every = search.meshes(small_run(), tiny, jax.devices(), CHIPS_FAST, Assumed(4, 4))
    assert {mesh.shape["tensor"] for _, mesh in every} == {1, 2}
    fewer = search.meshes(small_run(**{"sft.batch": 4}), tiny, jax.devices(), CHIPS_FAST, Assumed(4, 4))
    assert {mesh.shape["tensor"] for _, mesh in fewer} == {2}


# ---- the compiler for TPUs

P, T, D, F, V, H, N = 64, 192, 128, 256, 502, 2, 128  # prompt, response, hidden, MLP, vocabulary, heads, head size
CONFIG = f"""
from ml_collections import ConfigDict
from sgpo_jax import config as configs

def get_config():
    config = configs.base()
    config.model.source = "{{model}}"
    config.data.train = "data/train.jsonl"
    config.data.max_prompt_tokens = {P}
    config.sft.batch = config.sft.micro_batch = config.rl.batch = config.rl.micro_batch = config.eval.batch = 4
    config.rl.autonomous = config.rl.guided = 2
    config.rl.distillation = "nll"
    config.sft.max_response_tokens = config.rl.max_new_tokens = {T}
    config.eval.max_new_tokens = 2**18
    config.mesh.tensor = 2
    config.rl.decode_ways = (2,)
    with config.unlocked():
        config.eval.sets.AIME24 = ConfigDict({{{{"source": "data/aime24.jsonl", "samples": 64}}}})
    return config
"""
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": D, "intermediate_size": F, "head_dim": N,
    "num_hidden_layers": 1, "num_attention_heads": H, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Plans a small model on v5e:2x2 in a separate process; returns the plan as JSON and the printed text."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]'")
    place = tmp_path_factory.mktemp("plan")
    (place / "config.json").write_text(json.dumps(SHAPE))
    (place / "config.py").write_text(CONFIG.format(model=place))
    arguments = [f"--config={place}/config.py", "--topology=v5e:2x2", f"--json={place}/plan.json"]
    done = subprocess.run(
        [sys.executable, "-m", "sgpo_jax.plan", *arguments, "--response_tokens=48", "--prompt_tokens=16"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((place / "plan.json").read_text()), done.stdout


def test_memory_on_a_chip(planned):
    run_plan, printed = planned
    assert set(run_plan["programs"]) == {
        "SFT update", "SFT validation", "rollout", "update", "evaluation, 64 samples",
    }  # fmt: skip
    split = D * (3 * H * N + 2 * F) + H * N * D + F * D + 2 * D * V  # matrices, over all four chips
    parameters = 4 * (split // 4 + 3 * D)
    for name, result in run_plan["programs"].items():
        hbm = result["hbm"]
        assert hbm["limit"] == 15.75 * GIB
        assert hbm["resident"] == pytest.approx(
            2 * parameters if name == "rollout" or "validation" in name else 0, abs=64
        )
        if result["compiled"]:
            # Parameters, and in updates their two moments; the rest are small batches of whole numbers.
            state = parameters * (3 if "update" in name else 1)
            assert state <= hbm["arguments"] <= state + 200_000
            assert hbm["outputs"] <= 200_000  # the state takes the place of the one that was given
            parts = ("arguments", "outputs", "temporaries", "code", "resident")
            assert hbm["needed"] == sum(hbm[part] for part in parts)
    assert "HBM of a chip in GiB, of which a program may take 15.75" in printed


def test_a_program_that_does_not_fit(planned):
    # 2 * 64 responses of a device with a token of 512 bytes, at 262,144 + 64 tokens: 16 GiB, and what is sampled.
    run_plan, printed = planned
    evaluation = run_plan["programs"].pop("evaluation, 64 samples")
    assert not evaluation["fits"] and not evaluation["compiled"]
    assert all(result["fits"] for result in run_plan["programs"].values())
    needed = evaluation["hbm"]["needed"] / GIB
    assert 16 < needed < 40 and not run_plan["fits"] and run_plan["hours"] is None
    (line,) = run_plan["advice"]
    assert line.startswith(f"evaluation, 64 samples needs {needed:.2f} of 15.75 GiB; in this order: config.eval.slots=")
    assert line in printed and printed.endswith("does not fit\n")


def test_work_of_an_update(planned):
    # Four rows of P + T tokens, computed once; every product also in the backward pass, once again for what is computed
    # again there (the last of a layer has no reader), and twice for the gradients.
    phase = planned[0]["programs"]["SFT update"]["phases"]["responses"]
    tokens = 4 * (P + T)
    layer = 4 * (D * (3 * H * N + 2 * F) + H * N * D + F * D) - F * D
    # One block of queries and keys: two products forward, twice, and seven backward; and outputs by their gradients.
    attention = 11 * H * N * (P + T) + H * N
    # All chunks of response tokens in use have 4 products with the head.
    head = phase["flops"] * 4 / (2 * D * V) - tokens * (layer + attention) / (D * V)
    assert head == pytest.approx(4 * round(head / 4)) and 4 * 4 * 48 <= head <= 4 * 4 * (T + 48)


def test_communication_and_time(planned):
    update = planned[0]["programs"]["SFT update"]["phases"]["responses"]
    gathered = update["collectives"]["all-gather"]
    # At least the matrices of the layer, forward and backward, in bfloat16, each from two chips.
    assert gathered["bytes"] >= 2 * 2 * (D * (3 * H * N + 2 * F) + H * N * D + F * D) / 2
    assert gathered["sent"] == gathered["bytes"] / 2 and gathered["count"] >= 14
    assert update["seconds"]["compute"] == pytest.approx(update["flops"] / (0.4 * 197e12))
    assert update["seconds"]["hbm"] == pytest.approx(update["hbm_bytes"] / (0.65 * 819e9))
    decoding = planned[0]["programs"]["rollout"]["phases"]["decode"]
    # Matrices in bfloat16 in each step, and the longest response takes nearly all of them.
    assert decoding["hbm_bytes"] > 0 and decoding["flops"] > 0
    assert planned[0]["assumed"]["response_tokens"] == 48


def test_work_of_decoding(planned):
    # Both problems of a device have two responses of each kind, in eight slots; the longest of all sixteen lengths
    # decides the steps.
    steps = max(workload.lengths(16, 48, T))
    decoding = planned[0]["programs"]["rollout"]["phases"]["decode"]
    products = D * 3 * H * N + H * N * D + 3 * D * F + D * V
    cache = decoding["flops"] * 4 / (2 * steps * 16) - products
    # What is left are the blocks of 256 cached tokens (of 512 at most) that attention reads.
    assert 0 < cache <= 2 * H * N * 512


def test_a_refill_copies_each_prompt_once(planned):
    # Eight responses of a device, of a layer and a head: key and value in bfloat16 of all but the last token, which are
    # written, and read at most twice, where they come from and where they go.
    refill = planned[0]["programs"]["rollout"]["phases"]["refill"]
    copied = 8 * 2 * 2 * (P - 1) * N
    assert copied <= refill["hbm_bytes"] <= 3 * copied and refill["flops"] == 0
