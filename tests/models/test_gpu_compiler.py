"""Attention, decoding and the programs of a run, compiled by XLA for GPUs that are not here; nothing runs."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sgpo_jax import config as configs
from sgpo_jax import sharding
from sgpo_jax.models import ModelConfig, attention, cache_codes, cache_pages, products_gpu
from sgpo_jax.plan import gpus, planner
from sgpo_jax.plan.programs import programs
from sgpo_jax.plan.workload import Assumed
from sgpo_jax.rollout.memory import cache_bytes
from sgpo_jax.sharding import BATCH, constrain

BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.fixture(scope="module")
def mesh():
    """(kind, number of GPUs, tensor) -> their mesh."""
    try:
        gpus.plugin()
    except ValueError as missing:
        pytest.skip(str(missing))
    # The cache of compiled programs does not know these devices.
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield lambda kind, count, tensor: sharding.make_mesh(1, -1, tensor, devices=gpus.devices(kind, 1, count))
    jax.config.update("jax_enable_compilation_cache", enabled)


def shapes(text):
    """The shapes of all arrays in a compiled program, as tuples."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d*\[(\d[\d,]*)\]", text)}


def copies(program, size):
    """The instructions outside fusions that move at least `size` elements elsewhere, by the names of their results."""
    found = re.findall(r"^\s*(?:ROOT )?%?(\S*(?:copy|transpose|slice)\S*) = \S*?\[([\d,]+)\]", program.as_text(), re.M)
    count = {name: math.prod(map(int, dims.split(","))) for name, dims in found}
    return [name for name, elements in count.items() if elements >= size and "update" not in name]


def arguments(mesh, *specs):
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)) for shape, dtype, spec in specs]


def compiled_attention(mesh, batch, length, heads, kv_heads, size, dtype):
    """The gradient of projections, attention and a sum."""

    def loss(x, weights, segments):
        parts = (constrain(x @ weight, BATCH, None, "tensor") for weight in weights)
        query, key, value = (part.reshape(batch, length, -1, size) for part in parts)
        return attention.attend(query, key, value, segments).astype(F32).sum()

    rows, columns = P(BATCH), P("fsdp", "tensor")
    x, segments, *weights = arguments(
        mesh, ((batch, length, 64), dtype, rows), ((batch, length), jnp.int32, rows),
        *(((64, count * size), dtype, columns) for count in (heads, kv_heads, kv_heads)),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, weights, segments).lower().compile()


CASES = [
    # kind, GPUs, tensor, length, H, K, N, type
    ("h100", 8, 4, 1023, 12, 2, 128, BF16),  # tensor does not divide the key heads, an odd length
    ("a100", 8, 2, 1152, 9, 3, 64, BF16),  # nor any multiple of them: SmolLM2-135M
    ("a100", 1, 1, 513, 2, 1, 256, F32),
]
MORE = [
    ("h100", 8, 8, 1025, 32, 8, 128, BF16), ("h100", 1, 1, 640, 2, 2, 96, F32), ("a100", 1, 1, 640, 4, 2, 256, BF16),
    ("b200", 8, 1, 1152, 4, 2, 128, BF16),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "count", "tensor", "length", "heads", "kv_heads", "size", "dtype"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_attention_and_its_gradient_hold_nothing_of_length_squared(
    mesh, kind, count, tensor, length, heads, kv_heads, size, dtype
):
    batch = max(count // tensor, 2)
    program = compiled_attention(mesh(kind, count, tensor), batch, length, heads, kv_heads, size, dtype)
    padded = -(-length // 128) * 128
    square = [shape for shape in shapes(program.as_text()) if sum(n in (length, padded) for n in shape) > 1]
    assert square == []
    assert "cudnn" not in program.as_text()  # which would ask for a workspace on the card


@pytest.mark.parametrize(
    ("kind", "count", "tensor", "heads", "kv_heads", "size", "stored", "page", "each"),
    [("h100", 8, 4, 12, 2, 128, BF16, 0, 1), ("h100", 8, 2, 12, 2, 128, BF16, 128, 1),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in
       (("a100", 1, 1, 9, 3, 64, BF16, 0, 1), ("h100", 8, 2, 12, 2, 128, jnp.int8, 0, 4),
        ("a100", 1, 1, 9, 3, 64, jnp.int8, 0, 1), ("a100", 1, 1, 9, 3, 64, BF16, 64, 9),
        ("a100", 1, 1, 12, 2, 128, jnp.int8, 128, 2)))],
)  # fmt: skip
def test_decoding_steps_copy_no_layer_of_the_cache(
    mesh, kind, count, tensor, heads, kv_heads, size, stored, page, each
):
    """Steps of several layers in a loop, as the engine's, of `each` tokens of a row; with a pool or without."""
    mesh, batch, layers, slots = mesh(kind, count, tensor), 16, 4, 2048

    def step(query, new, keys, values, lengths):
        def layer(carry, number):
            query, keys, values = carry
            keys, values = (attention.append(cache, new, number, lengths, each) for cache in (keys, values))
            attended = attention.attend_cache(query, keys, values, number, lengths + 1, each).reshape(query.shape)
            return (query + attended, keys, values), None

        def body(carry):
            carry, _ = jax.lax.scan(layer, carry[1:], jnp.arange(layers))
            return 1, *carry

        return jax.lax.while_loop(lambda carry: carry[0] < 1, body, (0, query, keys, values))[2:]

    heads_of = "tensor" if kv_heads % tensor == 0 else None
    tokens = batch * each
    query, new, lengths = arguments(
        mesh, ((tokens, heads, size), BF16, P(BATCH)), ((tokens, kv_heads, size), BF16, P(BATCH)),
        ((tokens,), jnp.int32, P(BATCH)),
    )  # fmt: skip
    empty = jax.eval_shape(lambda: cache_codes.empty((kv_heads, layers, batch, slots, size), stored))
    place = P(heads_of, None, BATCH)
    cache = jax.tree.map(lambda x: arguments(mesh, (x.shape, x.dtype, place))[0], empty)
    if page:
        cache = jax.tree.map(lambda x: x.update(shape=(*x.shape[:2], batch * slots // page, page, x.shape[4])), cache)
        shape = count // tensor, batch * tensor // count, slots // page
        cache = cache_pages.Paged(cache, *arguments(mesh, (shape, jnp.int32, P(BATCH))))
    with jax.set_mesh(mesh):
        program = jax.jit(step, donate_argnums=(2, 3)).trace(query, new, cache, cache, lengths).lower().compile()
    rows = batch * tensor // count
    one_layer = kv_heads // (tensor if heads_of else 1) * rows * slots * size
    assert "decode_attention" in program.as_text()
    assert copies(program, one_layer) == []
    assert program.memory_analysis().temp_size_in_bytes < one_layer


TINY = ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=512, hidden_size=256, num_layers=3, num_heads=12, num_kv_heads=2,
    head_dim=128, mlp_size=512, rope_theta=1e6, qkv_bias=True, tie_embeddings=True, norm_eps=1e-6, max_positions=32768,
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled(mesh):
    """(number of GPUs, tensor, name, pool) -> a program of the paper's recipe for TINY on H100, and its mesh."""

    def compiled(count, tensor, name, pool=0):
        config = planner.without_files(configs.paper("Qwen/Qwen2.5-1.5B-Instruct", tensor=tensor))
        config.rl.update({"batch": 16, "micro_batch": 8, "slots": 64, "pool_tokens": pool})
        on = mesh("h100", count, tensor)
        (program,) = (p for p in programs(config, TINY, on, Assumed(4096.0, 256)) if p.name == name)
        with jax.set_mesh(on):
            return program.trace().lower().compile(), on

    return compiled


@pytest.mark.parametrize("kind", ["a100", "h100"])
@pytest.mark.parametrize("rows", [128, 6])
def test_a_product_of_a_layer_fits_into_shared_memory_and_copies_no_layer(mesh, kind, rows):
    """With all rows of a block in use, which takes the most of it."""
    layers, depth, width = 4, 1536, 2048
    x, stack, layer = arguments(
        mesh(kind, 1, 1), ((rows, depth), BF16, P()), ((layers, depth, width), BF16, P()), ((), jnp.int32, P())
    )
    with jax.set_mesh(x.sharding.mesh):
        program = jax.jit(products_gpu.product).trace(x, stack, layer).lower().compile()
    assert "layer_product" in program.as_text() and copies(program, depth * width) == []


def decoding_copies(program, size):
    """The instructions of decoding steps that slice at least `size` elements out of an array."""
    lines = [line for line in program.as_text().splitlines() if "/decode_" in line and "dynamic_slice" in line]
    found = [re.search(r"= \(?.*?\[([\d,]+)\]", line) for line in lines if "update" not in line]
    return [m[0] for m in found if m and math.prod(map(int, m[1].split(","))) >= size]


@pytest.mark.parametrize(("count", "tensor"), [(8, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_a_rollout_takes_little_more_than_its_cache(compiled, count, tensor):
    program, on = compiled(count, tensor, "rollout")
    cache = cache_bytes(TINY, 64, 1024 - 1 + 16384, BF16, on)
    assert cache < program.memory_analysis().temp_size_in_bytes < 1.1 * cache
    assert copies(program, cache // 4 // TINY.num_layers) == []  # half of a layer's keys
    # Nor is a layer's smallest kernel, that of keys or values, copied at every token.
    assert "layer_product" in program.as_text()
    assert decoding_copies(program, TINY.hidden_size * TINY.num_kv_heads * TINY.head_dim // tensor) == []


@pytest.mark.slow
def test_a_rollout_with_a_pool_takes_little_more_than_the_pool(compiled):
    program, on = compiled(4, 1, "rollout", 2**21)
    pool = cache_bytes(TINY, 2**21 // 128, 128, BF16, on)
    assert pool < program.memory_analysis().temp_size_in_bytes < 1.05 * pool
    assert copies(program, pool // 4 // TINY.num_layers) == []
    # Cards agree on what all decide, and on nothing else: each has its own pages and its own queue.
    exchanged = re.findall(r" = (\S+) (?:all-|collective-|reduce-scatter)\S*\(", program.as_text())
    assert {shape.split("[")[0] for shape in exchanged} == {"s32", "pred"} and len(exchanged) < 10


@pytest.mark.parametrize("name", ["SFT update", pytest.param("update", marks=pytest.mark.slow)])
def test_an_update_keeps_layer_inputs_once_and_nothing_of_length_squared(compiled, name):
    text = compiled(8, 2, name)[0].as_text()
    kept = set(re.findall(rf"bf16\[({TINY.num_layers},\d+,{17408 // 2},{TINY.hidden_size})\]{{([\d,]+)", text))
    assert len(kept) == 1, kept  # a second layout is a second copy
    assert [shape for shape in shapes(text) if shape.count(17408) > 1] == []
