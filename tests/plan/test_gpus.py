"""Tests plans for GPUs: the names of topologies, the cards, time over NVLink and the network, dollars, and one plan."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
from helpers.paths import ROOT
from jax.sharding import Mesh

from sgpo_jax import sharding
from sgpo_jax.plan import estimate, gpus, hardware, roofline, search, workload
from sgpo_jax.plan.hlo_cost import Collective
from sgpo_jax.plan.roofline import Chip, Reached, Seconds
from sgpo_jax.rollout.schedule import schedule

CHIP = Chip(flops=100.0, hbm=10.0, ici=8.0, network=2.0, start=0.25, hop=0.125, network_hop=0.5, price=3.0)
HALF = Reached(0.5, 0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", ["h300:8", "h100", "h100:", "h100:0", "h100:9", "h100:0x8", "h100:2x2x2", "h100:8x"])
def test_a_topology_that_does_not_exist_is_refused_with_what_is_allowed(name):
    message = rf"--topology={name}: must be v5e, v6e, v5p, .* or h100, h200, b200, a100, .*, rtx4090, .* as in h100:4x8"
    with pytest.raises(ValueError, match=message):
        hardware.topology(name)


def test_the_compiler_is_asked_for(monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"XLA's compiler for GPUs is not installed: pip install 'sgpo_jax\[gpu"):
        hardware.topology("h100:8")


def test_hosts_and_gpus_of_a_topology(monkeypatch):
    asked = []
    monkeypatch.setattr(gpus, "devices", lambda *sizes: asked.append(sizes) or [])
    for name in ("a100-40gb:1", "h100:8", "b200:16x4"):
        assert hardware.topology(name)[0] == gpus.CHIPS[name.partition(":")[0]]
    assert asked == [("a100-40gb", 1, 1), ("h100", 1, 8), ("b200", 16, 4)]


@pytest.mark.parametrize("kind", gpus.CHIPS)
def test_cards_are_described_as_their_peaks_are_stated(kind):
    text = resources.files("sgpo_jax.plan").joinpath("cards", f"{kind}.txtpb").read_text()
    (bandwidth,) = re.findall(r"memory_bandwidth: (\d+)", text)
    assert gpus.CHIPS[kind].hbm == pytest.approx(float(bandwidth), rel=1e-3)
    published = {"h100": 80, "h200": 141, "b200": 180, "a100": 80, "a100-40gb": 40, "rtx4090": 24}[kind]
    assert gpus.memory(kind) == pytest.approx(published * 1e9, rel=0.08)


def test_a_program_may_take_the_share_of_a_card_that_jax_takes():
    assert hardware.hbm_limit("h100:8", None, 0.75) == int(0.75 * 84942979072)
    assert hardware.hbm_limit("a100-40gb:8", None, 0.5) == 42331013120 // 2


def test_what_leaves_a_host_takes_the_network():
    # 16 bytes for eight devices of two hosts: 14 are sent, of which a quarter leave through each device.
    gather = Collective("all-gather", "", 16, 8, 3.0, 2)
    assert gather.sent_to_hosts == 14 * 2 / 8
    moved = roofline.seconds(0.0, 0.0, [gather], CHIP, HALF)
    assert moved == Seconds(0.0, 0.0, 3 * 14 * 6 / 8 / 4, 3 * 14 * 2 / 8 / 1)
    assert (moved.least, moved.most) == (moved.network, moved.ici + moved.network)


def test_a_small_collective_takes_its_start_and_the_steps_of_its_ring():
    small = Collective("all-reduce", "", 0, 8, 1.0, 4)
    assert roofline.link_seconds(small, CHIP, HALF) == 0.25 + 4 * 0.125
    assert roofline.network_seconds(small, CHIP, HALF) == 2 * 0.5
    assert roofline.network_seconds(small._replace(hosts=1), CHIP, HALF) == 0


def test_dollars_of_a_run():
    hours = {"rl": {"least": 1.0, "most": 1.5}, "all": {"least": 2.0, "most": 3.5}}
    assert estimate.dollars(hours, 32, CHIP.price) == {"least": 192.0, "most": 336.0}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh needs to know of a device."""

    id: int
    process_index: int


def mesh_of(hosts, each, tensor):
    devices = [Device(i, i // each) for i in range(hosts * each)]
    return Mesh(np.array(devices, object).reshape(1, -1, 1, tensor), sharding.AXES)


@pytest.mark.parametrize(
    ("tensor", "fsdp_speed", "tensor_speed"),
    [
        # Four hosts of four, whose links send 8 and network cards 2 bytes a second: a group of the fsdp axis has four,
        # two or one device of a host; one of the tensor axis has four of each of two hosts, which are no slower.
        (1, 8.0, 8.0), (2, 4.0, 8.0), (4, 2.0, 8.0), (8, 2.0, 8.0),
    ],
)  # fmt: skip
def test_an_axis_is_as_fast_as_the_network_cards_that_its_groups_have(tensor, fsdp_speed, tensor_speed):
    mesh = mesh_of(4, 4, tensor)
    assert search._speed(mesh, "fsdp", CHIP) == fsdp_speed
    assert search._speed(mesh, "tensor", CHIP) == tensor_speed
    assert search._speed(mesh, "fsdp", CHIP._replace(network=0.0)) == CHIP.ici


def test_a_tensor_axis_that_leaves_a_host_is_remarked_on():
    assert estimate.remarks(mesh_of(2, 4, 4), CHIP) == []
    (line,) = estimate.remarks(mesh_of(2, 4, 8), CHIP)
    assert line.startswith("mesh.tensor=8 reaches over 2 hosts") and line.endswith("within the 4 GPUs of a host")
    assert estimate.remarks(mesh_of(2, 4, 8), CHIP._replace(network=0.0)) == []


# ---- a plan, with the compiler for GPUs

# Prompt, response, hidden, MLP, vocabulary, heads, head size, group.
P, T, D, F, V, H, N, G = 64, 192, 256, 512, 1000, 4, 64, 8
CONFIG = f"""
from sgpo_jax import config as configs

def get_config():
    config = configs.base()
    config.stages = ("rl",)
    config.model.source = "{{model}}"
    config.data.train = "data/train.jsonl"
    config.data.max_prompt_tokens = {P}
    config.rl.batch = config.rl.micro_batch = 4
    config.rl.autonomous, config.rl.guided = {G}, 0
    config.rl.max_new_tokens = {T}
    config.mesh.tensor = 2
    return config
"""
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": D, "intermediate_size": F, "head_dim": N,
    "num_hidden_layers": 2, "num_attention_heads": H, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Plans RL of a small model on two hosts with two H100 each; returns the plan and the printed text."""
    if not any(importlib.util.find_spec(name) for name in gpus.PLUGINS):
        pytest.skip("needs XLA's compiler for GPUs: pip install -e '.[gpu-compiler]'")
    place = tmp_path_factory.mktemp("plan")
    (place / "config.json").write_text(json.dumps(SHAPE))
    (place / "config.py").write_text(CONFIG.format(model=place))
    arguments = [f"--config={place}/config.py", "--topology=h100:2x2", "--memory_share=0.9"]
    done = subprocess.run(
        [sys.executable, "-m", "sgpo_jax.plan", *arguments, f"--json={place}/plan.json", "--response_tokens=96",
         "--prompt_tokens=64"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((place / "plan.json").read_text()), done.stdout


@pytest.mark.slow
def test_memory_and_dollars_of_a_plan_for_gpus(planned):
    run_plan, printed = planned
    assert run_plan["fits"] and set(run_plan["programs"]) == {"rollout", "update"}
    for program in run_plan["programs"].values():
        assert program["hbm"]["limit"] == int(0.9 * gpus.memory("h100")) and program["hbm"]["workspace"] >= 0
    assert run_plan["assumed"]["memory_share"] == 0.9 and set(run_plan["versions"]) > {"jax"}
    assert run_plan["dollars"]["least"] == pytest.approx(run_plan["hours"]["all"]["least"] * 4 * 2.95)
    assert "Dollars are 2.95 for a chip and hour, 4 chips" in printed and printed.endswith("fits\n")


@pytest.mark.slow
def test_decoding_on_gpus_moves_the_weights_and_the_live_cache(planned):
    # Of a device: half of the matrices, in every step; and the cache of half of the rows, one of two key heads.
    decoding = planned[0]["programs"]["rollout"]["phases"]["decode"]
    lengths = workload.lengths(4 * G, 96, T).reshape(2, -1)
    stages = schedule(lengths, np.full_like(lengths, 64), 2 * G).stages
    layer = D * N * (H + 2 * 2) + H * N * D + 3 * D * F
    weights = 2 * (2 * layer + D * V) / 2
    steps, cached = sum(stage.steps for stage in stages), sum(stage.steps * stage.cached for stage in stages)
    least = steps * weights + cached * 2 * 2 * 2 * N
    assert least <= decoding["hbm_bytes"]
    # The sampler halves an interval 16 times, each time with a pass over the logits and, in rows so short, two masks.
    # The weights, copied out of the stack of layers, would add more than `least`.
    logits = 4 * V * 2 * G / 2
    assert decoding["hbm_bytes"] <= 1.8 * least + steps * 16 * 8 * logits


@pytest.mark.slow
def test_gathers_of_weights_leave_the_host(planned):
    # The fsdp axis has one device in each host, so that all that it gathers goes over the network.
    update = planned[0]["programs"]["update"]["phases"]["autonomous"]
    gathered, summed = (update["collectives"][kind] for kind in ("all-gather", "all-reduce"))
    assert 0 < gathered["network"] <= gathered["sent"] and summed["network"] < summed["sent"]
    assert update["seconds"]["network"] >= gathered["network"] / (0.65 * 50e9)
