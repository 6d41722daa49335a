"""Kernels in int8 and nf4: what codes and scales are, gradients through them, one layer at a time, places on meshes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import CONFIGS, random_adapters, random_params
from jax.sharding import PartitionSpec as P

from sgpo_jax import models, sharding
from sgpo_jax.models import ModelConfig, lora, quantised
from sgpo_jax.models.lora import Lora

pytest.importorskip("qwix", reason="the quantised extra is not installed")

# The 16 values of QLoRA's appendix E.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
# Kernels of 128 and 192 rows, which are 2 and 3 tiles.
WIDE = ModelConfig(
    architecture="Qwen2ForCausalLM", qkv_bias=True, tie_embeddings=True, vocab_size=152, hidden_size=128, num_layers=12,
    num_heads=4, num_kv_heads=2, head_dim=32, mlp_size=192, rope_theta=1e4, norm_eps=1e-5, max_positions=64,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 151, (2, 9))


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def small_base(config):
    return jax.tree.map(lambda x: jnp.asarray(0.3 * x, jnp.bfloat16), random_params(config))


def hidden_states(params, config, remat="none", tokens=TOKENS):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return models.apply(params, config, jnp.asarray(tokens), positions, jnp.ones(tokens.shape, bool), remat=remat)[0]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codes_are_the_nearest_and_scales_the_largest_of_their_tile(kind):
    base = small_base(WIDE)
    kernel = np.asarray(base["layers"]["down"]["kernel"], np.float64)
    found = quantised.quantise(base, kind, one_device())["layers"]["down"]
    tiles = kernel.reshape(12, 3, 64, 128)
    most = np.abs(tiles).max(axis=2)
    values = np.arange(-128, 128) if kind == "int8" else NF4
    np.testing.assert_allclose(found["kernel_scale"], most / (127.5 if kind == "int8" else 1), rtol=1e-6)
    assert found["kernel"].dtype == {"int8": jnp.int8, "nf4": jnp.uint4}[kind]
    steps = tiles / np.asarray(found["kernel_scale"], np.float64)[:, :, None]
    codes = np.asarray(found["kernel"]).astype(int).reshape(tiles.shape) + (128 if kind == "int8" else 0)
    nearest = np.abs(steps[..., None] - values[None, None, None, None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(steps - values[codes]), nearest, atol=5e-5)  # of float32 numbers up to 127.5
    # A kernel is the number of bfloat16 nearest code times scale.
    whole = np.asarray(jax.vmap(quantised.kernel)(found).astype(jnp.float32)).reshape(tiles.shape)
    exact = (values[codes] * np.asarray(found["kernel_scale"], np.float64)[:, :, None]).astype(np.float32)
    assert np.mean(whole == exact.astype(jnp.bfloat16).astype(np.float32)) > 0.999
    # All else is shared.
    assert "kernel_scale" not in base["layers"]["down"], "what it is given stays as it is"


def test_experts_are_not_quantised():
    layers = lora.base_shapes(CONFIGS["qwen3moe"], "int8")["layers"]
    assert {name for name, leaves in layers.items() if "kernel_scale" in leaves} == {"q", "k", "v", "o"}
    assert layers["experts_up"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("kind", "remat"), [("nf4", "none"), ("int8", "dots")])
def test_gradients_are_those_of_dense_differentiation_and_of_the_adapters_alone(kind, remat):
    config, chosen = CONFIGS["qwen2"], Lora(3, 6.0, "q|o|up|down", False)
    base, adapters = quantised.quantise(small_base(config), kind, one_device()), random_adapters(config, chosen)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(*TOKENS.shape, config.hidden_size)), jnp.float32)
    kernels = {
        name: jax.vmap(quantised.kernel)({leaf: leaves[leaf] for leaf in ("kernel", "kernel_scale")})
        for name, leaves in base["layers"].items() if "kernel" in leaves
    }  # fmt: skip

    def dense(adapters):
        layers = {}
        for name, leaves in base["layers"].items():
            if "kernel" in leaves:
                pair = adapters["layers"].get(name)
                product = chosen.scale * pair["lora_a"] @ pair["lora_b"] if pair else 0.0
                leaves = {"kernel": kernels[name].astype(jnp.float32) + product} | {
                    leaf: value for leaf, value in leaves.items() if leaf == "bias"
                }
            layers[name] = leaves
        return jnp.sum(weight * hidden_states(base | {"layers": layers}, config))

    def ours(adapters):
        return jnp.sum(weight * hidden_states(lora.attach(base, adapters, chosen.scale), config, remat))

    (value, gradient), (expected, wanted) = (jax.jit(jax.value_and_grad(loss))(adapters) for loss in (ours, dense))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for found, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, right, atol=2e-5 * float(jnp.abs(right).max()))
    # Merged, the weights are what the trainer multiplies by: to the bit while the adapters change nothing.
    new = lora.init(jax.random.key(0), config, chosen)
    merged = lora.merge(base, new, chosen.scale)
    assert merged["layers"]["k"]["kernel"].dtype == jnp.bfloat16 and "kernel_scale" not in merged["layers"]["k"]
    np.testing.assert_array_equal(
        hidden_states(lora.attach(base, new, chosen.scale), config), hidden_states(merged, config)
    )


@pytest.mark.parametrize(("kind", "held"), [("int8", 0), ("nf4", 1)])
def test_no_more_than_a_layer_is_in_memory_as_numbers(kind, held):
    """A gradient of one token, without rematerialisation. On a CPU, XLA spreads codes of 4 bits over bytes."""
    chosen = Lora(1, 1.0, "q", False)
    base, adapters = lora.base_shapes(WIDE, kind), lora.shapes(WIDE, chosen)

    def loss(adapters, base):
        return jnp.sum(hidden_states(lora.attach(base, adapters, 1.0), WIDE, "none", TOKENS[:1, :1]))

    memory = jax.jit(jax.grad(loss)).lower(adapters, base).compile().memory_analysis()
    weights = sum(leaf.size for leaf in jax.tree.leaves(lora.base_shapes(WIDE, "bfloat16")["layers"]))
    assert memory.temp_size_in_bytes < (held + 0.5) * weights, "a quarter of all kernels in bfloat16"
    codes = {"int8": 1, "nf4": 0.5}[kind]
    assert memory.argument_size_in_bytes < (codes + 4 / 64 + 0.03) * weights + 2 * 152 * 128, "two codes in a byte"


def test_codes_and_scales_are_the_same_on_every_mesh_and_lie_as_their_kernel_does():
    params, found = small_base(WIDE), {}
    for sizes in ((1, 1, 1), (1, 4, 2)):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        placed = sharding.place(params, sharding.tree_shardings(params, mesh))
        found[sizes] = quantised.quantise(placed, "nf4", mesh)
    whole, split = found.values()
    assert lora.fingerprint(whole) == lora.fingerprint(split)
    assert lora.fingerprint(whole) != lora.fingerprint(quantised.quantise(params, "int8", one_device()))
    gate, down = (split["layers"][name] for name in ("gate", "down"))
    assert gate["kernel"].sharding.spec == P(None, sharding.SHARDS, "tensor")
    # Four ways do not divide the 2 tiles of 128 rows, and two not the 3 of 192.
    assert gate["kernel_scale"].sharding.spec == P(None, None, "tensor")
    assert down["kernel_scale"].sharding.spec == P(None, None, sharding.SHARDS)
    mesh = sharding.make_mesh(1, 2, 4)
    scale = sharding.tree_shardings(split, mesh)["layers"]["gate"]["kernel_scale"]
    assert scale.spec == P(None, sharding.SHARDS, "tensor")


def test_without_the_library_the_field_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"config.lora.base_dtype: must be .* pip install 'sgpo_jax\[quantised\]'"):
        quantised.import_qwix()
    with pytest.raises(ValueError, match=r"config.rl.rollout_weights: must be '' without the extra 'quantised'"):
        quantised.by_column({"layers": {}})
