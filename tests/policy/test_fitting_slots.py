"""Slots that fit into the memory of described devices; sizes counted by hand."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import policy, sharding
from sgpo_jax.models import presets
from sgpo_jax.models.lora import Lora
from sgpo_jax.policy import memory
from sgpo_jax.rollout import Sampling
from sgpo_jax.rollout.memory import cache_bytes, fitting_slots

SHAPE = presets.shape("Qwen/Qwen2.5-1.5B-Instruct")
GIB = 2**30


def test_bytes_of_a_cache():
    mesh = sharding.make_mesh(1, 4, 2)
    # Keys and values of 28 layers, 2 heads of 128 in 2 bytes, halved by the tensor axis; and a length.
    assert cache_bytes(SHAPE, 8, 1000, jnp.bfloat16, mesh) == 2 * (2 * 28 * 1000 * 128 * 2) + 4
    # Four devices do not divide two heads, so each has both.
    mesh = sharding.make_mesh(1, 2, 4)
    assert cache_bytes(SHAPE, 8, 1000, jnp.bfloat16, mesh) == 4 * (2 * 28 * 1000 * 2 * 128 * 2) + 16
    # In 8 bits a byte for each number and 4 for each token and head.
    assert cache_bytes(SHAPE, 8, 1000, jnp.int8, mesh) == 4 * (2 * 28 * 1000 * 2 * (128 + 4)) + 16


@pytest.mark.parametrize(
    ("responses", "room", "slots"), [(64, 1000, 40), (64, 1099, 40), (16, 10**6, 16), (64, 99, 0), (64, -5, 0)]
)
def test_slots_that_fit(responses, room, slots):
    assert fitting_slots(responses, room, slot=100, shards=4) == slots


@pytest.fixture
def sampling(monkeypatch):
    """(slots, GiB of a device or None, ways, types) -> sampling; 512 responses to 128 prompts, 8 devices."""

    def sampling(slots, gib, ways=(1,), weights="", cache="", pool=0):
        monkeypatch.setattr(memory, "_limit", lambda mesh: gib and int(gib * GIB))
        fields = {"max_new_tokens": 16384, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "slots": slots}
        fields |= {"decode_ways": ways, "draft": 0, "rollout_weights": weights, "rollout_cache": cache}
        fields |= {"pool_tokens": pool, "teacher": "live", "reference_kl": 0.0, "teacher_dtype": "float32"}
        config = ConfigDict(
            {"rl": fields, "data": {"max_prompt_tokens": 1024}, "optimizer": {"mu_dtype": "float32"}, "stages": ("rl",),
             "lora": {"base_dtype": "bfloat16"}}
        )  # fmt: skip
        chosen = policy.Policy(SHAPE, None, (0,), 0, jnp.dtype(jnp.bfloat16), "")
        run = SimpleNamespace(config=config, policy=chosen, mesh=sharding.make_mesh(1, 4, 2))
        return memory.sampling(run, "rl", 512, 128)

    return sampling


# On a device: 1.54e9 parameters / 8 of 12 bytes, and their copy of 2 bytes in halves: 3.6 GiB. The prompts take
# 0.44 GiB, a slot of 17,407 tokens 0.2324 GiB, so that 128 of a shard take 29.75.
@pytest.mark.parametrize(
    ("slots", "gib", "fit"), [(0, None, 0), (0, 60, 0), (256, 60, 256), (0, 20, 4 * 60), (512, 34, 512)]
)
def test_as_many_slots_as_fit(sampling, slots, gib, fit, capsys):
    assert sampling(slots, gib).slots == fit
    assert ("config.rl.slots=0: 240 of 512 responses are decoded at once" in capsys.readouterr().out) == (gib == 20)


def test_weights_that_are_split_further_leave_more_room(sampling):
    # A copy in eighths in place of halves: 1.08 GiB less, which is 4 slots of each of four devices, and 0.15 GiB.
    assert sampling(0, 20, (4,)).slots == 4 * 64
    assert sampling(0, 20, (1, 4)).slots == 4 * 58, "both copies: 0.36 GiB more"


def test_kernels_in_8_bits_leave_more_room(sampling):
    pytest.importorskip("qwix", reason="the quantised extra is not installed")
    # 1.31e9 of the copy's weights in halves take a byte less: 0.61 GiB, which is 2 slots of each device, and 0.15 GiB.
    assert sampling(0, 20, weights="int8").slots == 4 * 62
    # In eighths the copy takes 0.15 GiB less.
    assert [sampling(0, 20.05, (4,), weights).slots for weights in ("", "int8")] == [4 * 64, 4 * 65]


def test_a_cache_in_8_bits_has_more_slots(sampling):
    # A token takes 132 bytes in place of 256: a slot 0.1198 GiB and the prompts 0.227, of 14.4 GiB that are left.
    assert sampling(0, 20, cache="int8").slots == 4 * 118


def test_kernels_in_8_bits_need_the_library(sampling, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    for gib in (20, None):
        with pytest.raises(ValueError, match=r"config.rl.rollout_weights: must be '' without the extra 'quantised'"):
            sampling(0, gib, weights="int8")
    assert sampling(0, None).weights == ""


def test_slots_that_do_not_fit_are_refused(sampling):
    with pytest.raises(ValueError, match=r"config.rl.slots=512: the caches take 29.7 of 16.0 GiB .*; 240 slots fit"):
        sampling(512, 20)
    with pytest.raises(ValueError, match=r"config.rl.slots=0: the cache of one slot takes 0.2 of 0.0 GiB"):
        sampling(0, 4.05)


def test_a_pool_that_does_not_fit_or_is_too_small_is_refused(sampling):
    # Of 16 GiB that are left, a page of 128 tokens takes 14,336 bytes for each.
    with pytest.raises(ValueError, match=r"config.rl.pool_tokens=8000000: takes 26.7 of 16.0 GiB") as refused:
        sampling(0, 20, pool=8_000_000)
    fit = int(str(refused.value).split("; ")[1].split()[0])
    assert fit == pytest.approx(4 * 16.0 * GIB / 14336, rel=0.01) and fit % (4 * 128) == 0
    assert sampling(0, 20, pool=fit).pool == fit
    with pytest.raises(ValueError, match=rf"; {fit} tokens fit"):
        sampling(0, 20, pool=fit + 4 * 128)
    # In each of four parts 32 prompts of 1,023 tokens in 8 pages, and 17,407 tokens in 136.
    least = 4 * (32 * 8 + 136) * 128
    for gib in (20, None):
        with pytest.raises(ValueError, match=rf"config.rl.pool_tokens={least - 1}: must be 0 or at least {least}, for"):
            sampling(0, gib, pool=least - 1)
        assert sampling(64, gib, pool=least).slots == 64


def test_adapters_have_a_base_and_merged_kernels_beside_them():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    every, kernels, adapters = 1_543_714_304, 28 * 1536 * 1536, 28 * 16 * (1536 + 1536)
    adapted = Lora(16, 32.0, "q", False)
    found = memory._resident(SHAPE, jnp.dtype(jnp.bfloat16), 8, Sampling(1), mesh, adapted, "bfloat16")
    assert found == 2 * every + 2 * kernels + 12 * adapters + 2 * every, "base, merged, adapters, for the products"


@pytest.mark.parametrize(("base_dtype", "bits"), [("int8", 8), ("nf4", 4)])
def test_a_quantised_base_has_codes_scales_and_all_its_kernels_merged(base_dtype, bits):
    pytest.importorskip("qwix", reason="the quantised extra is not installed")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    every, adapters = 1_543_714_304, 28 * 16 * (1536 + 1536)
    kernels = 28 * (2 * 1536 * (1536 + 256) + 3 * 1536 * 8960)
    adapted = Lora(16, 32.0, "q", False)
    found = memory._resident(SHAPE, jnp.dtype(jnp.bfloat16), 8, Sampling(1), mesh, adapted, base_dtype)
    base = 2 * (every - kernels) + kernels * bits // 8 + 4 * kernels // 64
    assert found == base + 2 * kernels + 12 * adapters + 2 * every


@pytest.mark.parametrize(
    ("changes", "held"),
    [({}, 8), ({"teacher": "frozen", "teacher_dtype": "bfloat16"}, 10), ({"teacher": "ema"}, 12),
     ({"teacher": "gated", "reference_kl": 0.1}, 16), ({"teacher": "trust_region", "reference_kl": 0.1}, 12)],
)  # fmt: skip
def test_moments_and_teachers_are_counted(changes, held):
    config = configs.base()
    config.rl.update(changes)
    assert memory._held_bytes(config) == held
    config.stages = ("eval",)
    assert memory._held_bytes(config) == 0


def test_devices_of_this_machine_do_not_say_how_much_memory_they_have():
    assert memory._limit(sharding.make_mesh(devices=jax.devices()[:1])) is None
