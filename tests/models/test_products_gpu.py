"""The products of decoding on GPUs, interpreted: against numpy, in the decoder, and on meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_jax import models, sharding
from sgpo_jax.models import ModelConfig, attention, attention_gpu, layout, products_gpu

SHAPE = ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=64, hidden_size=64, num_layers=3, num_heads=8, num_kv_heads=4,
    head_dim=16, mlp_size=128, rope_theta=1e6, qkv_bias=True, tie_embeddings=True, norm_eps=1e-6, max_positions=512,
)  # fmt: skip


def arrays(seed, rows, depth, width, layers=3):
    random = np.random.default_rng(seed)
    return (random.normal(size=size).astype(jnp.bfloat16) for size in ((rows, depth), (layers, depth, width)))


@settings(max_examples=8, deadline=None)
@given(
    rows=st.sampled_from([1, 17, 130]), depth=st.sampled_from([16, 96, 1024]), width=st.sampled_from([16, 48, 128]),
    layer=st.integers(0, 2),
)  # fmt: skip
def test_a_product_is_that_of_the_layer(rows, depth, width, layer):
    x, stack = arrays(rows, rows, depth, width)
    out = products_gpu.product(x, stack, jnp.int32(layer), interpret=True)
    exact = x.astype(np.float64) @ stack[layer].astype(np.float64)
    assert out.dtype == jnp.bfloat16  # whose rounding is the only error
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8, atol=1e-4 * depth)


@pytest.mark.parametrize(
    ("blocks", "programs", "parts"), [(140, 24, 10), (24, 32, 6), (24, 280, 1), (1, 1, 1), (7, 1, 1), (97, 1, 1)]
)
def test_long_sums_are_split_where_few_programs_run(blocks, programs, parts):
    assert products_gpu._parts(blocks, programs) == parts


@pytest.fixture
def on_gpus(monkeypatch):
    """Traces the programs of GPUs, with their kernels interpreted; returns the widths of the products of the kernel."""
    multiplied, real = [], products_gpu.product

    def product(x, stack, layer):
        multiplied.append(stack.shape[2])
        return real(x, stack, layer, interpret=True)

    monkeypatch.setattr(products_gpu, "product", product)
    for name in ("attend", "attend_cache"):
        monkeypatch.setattr(attention_gpu, name, partial(getattr(attention_gpu, name), interpret=True))
    for module in (attention, layout):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    return multiplied


def decoded(params, dtype, split=("tensor",), rows=8):
    """Returns the hidden states of three tokens of each row, decoded one after the other."""
    cache = models.init_cache(SHAPE, rows, 64, dtype)
    active, outs = jnp.ones(rows, bool), []
    step = jax.jit(lambda params, *args: models.decode(
        models.for_decoding(params, split), SHAPE, *args, dtype=dtype, split=split
    ))  # fmt: skip
    for tokens in np.random.default_rng(0).integers(0, SHAPE.vocab_size, (3, rows), np.int32):
        hidden, cache = step(params, tokens, active, cache)
        outs.append(np.asarray(hidden, np.float32))
    return np.stack(outs)


@pytest.fixture(scope="module")
def params():
    drawn = models.init(jax.random.key(0), SHAPE)
    drawn["layers"]["q"]["bias"] += 0.5  # they are 0 at first
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn)


def test_decoding_with_joined_kernels_is_decoding(params, on_gpus, monkeypatch):
    got = decoded(params, jnp.bfloat16)
    assert on_gpus[:4] == [128 + 2 * 64, 64, 2 * 128, 64]  # q, k, v; o; gate, up; down
    monkeypatch.undo()
    np.testing.assert_allclose(got, decoded(params, jnp.bfloat16), atol=0.06)


def test_float32_is_multiplied_as_elsewhere(params, on_gpus):
    decoded(jax.tree.map(lambda x: x.astype(jnp.float32), params), jnp.float32)
    assert on_gpus == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "split", "widths"),
    [
        ((1, 2, 2), ("tensor",), [128, 64, 128, 64]),
        # Weights are split 4 times, and rows are gathered.
        ((2, 2, 2), ("tensor", "fsdp"), [64, 64, 64, 64]),
        # Of 8 parts of the keys each is 8 wide, which is too narrow.
        ((1, 2, 4), ("tensor", "fsdp"), [64, 32, 64]),
    ],
)
def test_products_on_a_mesh(params, on_gpus, sizes, split, widths):
    alone = decoded(params, jnp.bfloat16)
    on_gpus.clear()
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P())), params)
        np.testing.assert_allclose(decoded(placed, jnp.bfloat16, split), alone, atol=0.1)
    assert on_gpus[: len(widths)] == widths
