"""Rollouts with kernels in 8 bits: their codes and scales, the model that samples, and meshes that do not change it."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.small_models import CONFIGS, random_params

from sgpo_jax import policy, sharding
from sgpo_jax.models import quantised
from sgpo_jax.rollout import LanguageModel, Prompts, Sampling, generate, weights

pytest.importorskip("qwix", reason="the quantised extra is not installed")

PROMPTS = Prompts(np.array([[0, 5, 9, 2], [7, 1, 2, 3]] * 4, np.int32), np.arange(32).reshape(8, 4) > 0)
IDS = np.arange(8, dtype=np.uint32)
SAMPLING = Sampling(6, 0.7, 0.9, weights="int8")


def sampled(params, config, sampling=SAMPLING, dtype=jnp.float32, prompts=PROMPTS, ids=IDS, shards=1):
    model = LanguageModel(config, (), 0, dtype)
    rollout, _ = generate(params, model, prompts, jax.random.key(0), ids, sampling=sampling, group=2, shards=shards)
    return jax.device_get(rollout)


def rounded(params):
    """The parameters with the kernels that codes and scales stand for, in float64 rounded to float32."""
    found, layers = quantised.by_column(params), {}
    for name, leaves in found["layers"].items():
        if "kernel_scale" in leaves:
            values = np.asarray(leaves["kernel"], np.float64) * np.asarray(leaves["kernel_scale"], np.float64)
            leaves = {**params["layers"][name], "kernel": values.astype(np.float32)}
        layers[name] = leaves
    return params | {"layers": layers}


@pytest.mark.parametrize("family", ["qwen2", "qwen3moe"])
def test_codes_are_the_nearest_of_their_column(family):
    params = random_params(CONFIGS[family])
    found = quantised.by_column(params)
    names = {"q", "k", "v", "o"} | ({"gate", "up", "down"} if family == "qwen2" else set())
    for name, leaves in found["layers"].items():
        assert ("kernel_scale" in leaves) == (name in names), "experts keep their type"
        if name not in names:
            assert leaves is params["layers"][name]
            continue
        kernel = np.asarray(params["layers"][name]["kernel"], np.float64)
        scale = np.abs(kernel).max(axis=1, keepdims=True) / 127.5
        np.testing.assert_allclose(leaves["kernel_scale"], scale, rtol=1e-6)
        assert leaves["kernel"].dtype == jnp.int8
        apart = np.abs(np.asarray(leaves["kernel"]) * scale - kernel)
        assert (apart <= 0.50001 * scale).all() and apart.max() > 0.49 * scale.min()
        x = np.random.default_rng(0).normal(size=(5, kernel.shape[1])).astype(np.float32)
        product = quantised.column_product(x, leaves["kernel"][1], leaves["kernel_scale"][1])
        np.testing.assert_allclose(product, x @ (np.asarray(leaves["kernel"][1]) * scale[1]), rtol=1e-5, atol=1e-5)
    assert found["embed"] is params["embed"], "embedding and head keep their type"


def test_a_column_of_many_rows_has_one_scale():
    kernel = np.random.default_rng(0).normal(size=(2, 192, 3)).astype(np.float32)
    found = quantised.by_column({"layers": {"down": {"kernel": kernel}}})["layers"]["down"]
    np.testing.assert_allclose(found["kernel_scale"], np.abs(kernel).max(axis=1, keepdims=True) / 127.5, rtol=1e-6)


def test_the_product_of_bfloat16_has_exact_codes():
    """Row by row the product is 128 times 1 less 127, which a rounding of the codes to 7 bits would change."""
    codes, scale = jnp.array([[-128, 127], [127, -126]], jnp.int8), jnp.array([[1.0, 0.5]])
    product = quantised.column_product(jnp.ones((1, 2), jnp.bfloat16), codes, scale)
    assert product.dtype == jnp.bfloat16 and product.tolist() == [[-1.0, 0.5]]


def test_the_sampler_is_the_model_with_rounded_kernels(tiny, tiny_params):
    """Its log-probabilities are those of the tokens under the kernels that it sampled with, and not the trainer's."""
    found = sampled(tiny_params, tiny)
    expected, exact = (sampled(params, tiny, Sampling(6, 0.7, 0.9)) for params in (rounded(tiny_params), tiny_params))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logp, expected.logp, atol=1e-5)
    assert np.abs(found.logp - exact.logp).max() > 1e-3


# Mesh, slots, and the ways that split the weights in each stage of decoding.
@pytest.mark.parametrize(
    ("shape", "slots", "ways"),
    [((2, 2, 2), 8, (1, 4)), *(pytest.param(*case, marks=pytest.mark.slow) for case in
     (((1, 4, 2), 0, (1,)), ((1, 1, 8), 4, (1,))))],
)
def test_responses_are_the_same_on_every_mesh(tiny, tiny_params, shape, slots, ways):
    """Rows of o and down are split over the tensor axis, and those of the others over fsdp."""
    mesh = sharding.make_mesh(*shape)
    rows = sharding.put_rows(tuple(PROMPTS), mesh)
    with jax.set_mesh(sharding.decoding_mesh(mesh, ways)):
        split = sampled(
            policy.place(tiny_params, mesh), tiny, Sampling(6, 0.7, 0.9, slots=slots, decode_ways=ways, weights="int8"),
            prompts=Prompts(*rows), ids=sharding.put_rows(IDS, mesh), shards=sharding.row_ways(mesh),
        )  # fmt: skip
    whole = sampled(tiny_params, tiny)
    np.testing.assert_array_equal(split.tokens, whole.tokens)
    np.testing.assert_allclose(split.logp, whole.logp, atol=1e-5)


def test_codes_and_scales_do_not_depend_on_the_mesh_and_codes_are_what_moves(tiny, tiny_params):
    mesh = sharding.make_mesh(1, 4, 2)
    whole = jax.jit(quantised.by_column)(tiny_params)

    def ready(params):
        return weights.split(weights.cast(quantised.by_column(params), jnp.bfloat16), ("tensor",))

    with jax.set_mesh(mesh):
        placed = policy.place(tiny_params, mesh)
        split = jax.jit(quantised.by_column)(placed)
        compiled = jax.jit(ready).lower(placed).compile()
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    types = {sharding.path_name(path): leaf.dtype for path, leaf in jax.tree.leaves_with_path(compiled.out_info)}
    assert types["layers/down/kernel"] == jnp.int8 and types["layers/down/kernel_scale"] == jnp.float32
    assert types["embed/embedding"] == types["head/kernel"] == jnp.bfloat16
    moved = set(re.findall(r"= (\w+)\[2,(?!1,)\d+,\d+\]\S* all-(?:gather|to-all)\(", compiled.as_text()))
    assert moved == {"s8"}, "kernels of all layers move as codes"


ON_A_TPU = """
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from sgpo_jax.models import quantised
from sgpo_jax.plan import hardware

place = jax.sharding.SingleDeviceSharding(hardware.topology("v5e:2x2")[1][0])
sizes = {"x": ((8, 1024), jnp.bfloat16), "codes": ((3, 1024, 1024), jnp.int8), "scale": ((3, 1, 1024), jnp.float32)}
arrays = [jax.ShapeDtypeStruct(*size, sharding=place) for size in sizes.values()]
layers = lambda x, *stack: jax.lax.scan(lambda x, layer: (quantised.column_product(x, *layer), None), x, stack)[0]
print(jax.jit(layers).lower(*arrays).compile().as_text())
"""


def test_a_product_on_a_tpu_reads_codes_and_makes_no_other_kernel_of_them():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]'")
    done = subprocess.run(
        [sys.executable, "-c", ON_A_TPU], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = set(re.findall(r"(\w+)\[(?:3,|1,)?1024,1024\]", done.stdout))
    assert kernels == {"s8"} and " convolution(" in done.stdout
