"""FLOPs of traced programs whose number is known by hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.gpu import attention as gpu_attention
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec as P

from sgpo_jax import sharding
from sgpo_jax.models import attention_gpu, products_gpu
from sgpo_jax.plan.flops import matmul_flops
from sgpo_jax.plan.phases import Scopes

M, K, N = 3, 5, 7
NOTHING = Scopes("all")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def flops(fn, *args, scopes=NOTHING):
    return matmul_flops(jax.jit(fn).trace(*args).jaxpr, scopes)


def test_a_product():
    assert flops(jnp.dot, shape(M, K), shape(K, N)) == {"all": 2 * M * K * N}


def test_a_batched_product_over_two_axes():
    def product(x, y):
        return jnp.einsum("bmij,bijn->bmn", x, y)

    assert flops(product, shape(4, M, K, 2), shape(4, K, 2, N)) == {"all": 2 * 4 * M * K * 2 * N}


def test_a_scan_of_products():
    def chain(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert flops(chain, shape(M, K), shape(11, K, K)) == {"all": 11 * 2 * M * K * K}


def nested(x, w, count):
    with jax.named_scope("outer"):

        def outer(_, x):
            x = x @ w
            with jax.named_scope("inner"):
                x = jax.lax.fori_loop(0, count, lambda _, x: jax.lax.fori_loop(0, 6, lambda _, x: x @ w, x), x)
            return x

        return jax.lax.fori_loop(0, count, outer, x)


def test_loops_in_loops_with_stated_trips():
    scopes = Scopes("rest", (("inner", "inner"), ("outer", "outer")), (("inner/while$", 4.0), ("outer/while$", 10.0)))
    one = 2 * M * K * K
    assert flops(nested, shape(M, K), shape(K, K), shape(dtype=jnp.int32), scopes=scopes) == {
        "outer": 10 * one, "inner": 10 * 4 * 6 * one,
    }  # fmt: skip


def test_a_loop_of_which_nothing_is_known_is_refused():
    scopes = Scopes("rest", trips=(("outer/while$", 10.0),))
    with pytest.raises(ValueError, match="loop outer/while/body/inner/while: neither the program nor Scopes.trips"):
        flops(nested, shape(M, K), shape(K, K), shape(dtype=jnp.int32), scopes=scopes)


@pytest.mark.parametrize(("remat", "products"), [(False, 3), (True, 4)])
def test_a_gradient_computes_what_was_not_kept_again(remat, products):
    # Forward, and one product for each of the two gradients; the layer's output once more where it was not kept.
    def layer(x, w):
        return jnp.tanh(x @ w)

    def loss(x, w):
        return (jax.checkpoint(layer) if remat else layer)(x, w).sum()

    assert flops(jax.grad(loss, argnums=(0, 1)), shape(M, K), shape(K, N)) == {"all": products * 2 * M * K * N}


def test_phases_are_found_through_the_transformations_of_a_gradient():
    def loss(x, w):
        with jax.named_scope("first"):
            x = jnp.sin(x @ w)
        return (x @ w).sum()

    counts = flops(jax.grad(loss, argnums=1), shape(M, K), shape(K, K), scopes=Scopes("rest", (("first", "first"),)))
    # Each has its product and the gradient of w; the second also the gradient of what the first gave.
    assert counts == {"first": 2 * 2 * M * K * K, "rest": 3 * 2 * M * K * K}


def test_of_two_branches_the_one_with_more_work():
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    assert flops(either, shape(M, K), shape(K, K)) == {"all": 2 * 2 * M * K * K}


def test_a_shard_counts_for_every_device():
    mesh = sharding.make_mesh(2, 2, 2)
    product = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P(("data", "fsdp")), P(None, "tensor")),
                            out_specs=P(("data", "fsdp"), "tensor"))  # fmt: skip
    assert flops(product, shape(8, K), shape(K, 4)) == {"all": 2 * 8 * K * 4}


def test_branches_count_by_their_shares_or_else_the_most_expensive():
    def choose(flag, x):
        with jax.named_scope("choice"):
            return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    one = 2 * K**3
    arguments = shape(dtype=jnp.bool), shape(K, K)
    assert flops(choose, *arguments) == {"all": 2 * one}
    scopes = Scopes("all", branches=(("choice", (0.75, 0.25)),))  # the second branch is that of True
    assert flops(choose, *arguments, scopes=scopes) == {"all": 0.75 * one + 0.25 * 2 * one}


@pytest.mark.parametrize("argument", [0, 1])
def test_a_grouped_product_and_its_gradients_cost_as_much_as_one_of_all_rows(argument):
    grouped = shape(16, K), shape(3, K, 4), shape(3, dtype=jnp.int32)
    one = 2 * 16 * K * 4
    assert flops(jax.lax.ragged_dot, *grouped) == {"all": one}
    gradient = jax.grad(lambda *args: jnp.sin(jax.lax.ragged_dot(*args)).sum(), argnums=argument)
    assert flops(gradient, *grouped) == {"all": 2 * one}


HEADS, TOKENS, SIZE, BLOCK = 2, 512, 128, 128
CAUSAL = (1 + 2 + 3 + 4) / 16  # of the blocks of 128 queries by 128 keys


@pytest.mark.parametrize(("gradient", "products"), [(False, 2), (True, 2 + 4 + 3)])
@pytest.mark.parametrize(("window", "share"), [(None, CAUSAL), (BLOCK + 1, (1 + 2 + 2 + 2) / 16)])
def test_splash_attention_computes_the_blocks_below_the_diagonal(window, share, gradient, products):
    # Forward: scores and values. Backward: scores and gradients of values, keys and weights; then of queries, for which
    # scores and weights' gradients are computed once more.
    mask: Any = splash_attention_mask.CausalMask((TOKENS, TOKENS))
    if window:
        mask = splash_attention_mask.LocalMask((TOKENS, TOKENS), (window - 1, 0), 0)
    mask = splash_attention_mask.MultiHeadMask([mask] * HEADS)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
             "block_q_dq", "block_kv_dq")  # fmt: skip
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, BLOCK))
    kernel = splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def total(query, key, value):
        return kernel(query, key, value).sum()

    fn = jax.grad(total, argnums=(0, 1, 2)) if gradient else total
    count = flops(fn, *[shape(HEADS, TOKENS, SIZE)] * 3)["all"]
    between = 2 * HEADS * TOKENS * SIZE * gradient  # of outputs and their gradients, outside of the kernels
    assert count == products * 2 * HEADS * TOKENS * TOKENS * SIZE * share + between


def test_paged_attention_computes_the_blocks_in_use():
    rows, kv_heads, group, pages, blocks = 4, 2, 3, 8, 2.5
    pool = shape(kv_heads, rows * pages, 128, SIZE)
    kernel = partial(paged_attention, pages_per_compute_block=4)
    counts = flops(
        kernel, shape(rows, kv_heads * group, SIZE), pool, pool, shape(rows, dtype=jnp.int32),
        shape(rows, pages, dtype=jnp.int32), scopes=Scopes("all", trips=(("paged_attention", blocks),)),
    )  # fmt: skip
    assert counts == {"all": 2 * 2 * rows * kv_heads * group * (blocks * 4 * 128) * SIZE}


def causal(block):
    """Share of TOKENS x TOKENS up to the diagonal, in blocks whose longer side is `block`."""
    return (TOKENS + block) / 2 / TOKENS


@pytest.mark.parametrize("gradient", [False, True])
def test_flash_attention_computes_the_blocks_up_to_the_diagonal(gradient):
    # Forward: scores and values. Backward: four products for the gradients of keys and values, three for those of
    # queries. The group of three query heads that share a key head is mapped over, as the model does it.
    batch, group = 2, 3
    sizes = gpu_attention.BlockSizes(128, 32, block_q_dkv=64, block_kv_dkv=32, block_q_dq=32, block_kv_dq=64)

    def total(query, key, value, segments):
        flash = partial(gpu_attention.mha, segment_ids=segments, causal=True, block_sizes=sizes)
        return jax.vmap(flash, in_axes=(3, None, None), out_axes=3)(query, key, value).sum()

    fn = jax.grad(total, argnums=(0, 1, 2)) if gradient else total
    query, key = shape(batch, TOKENS, HEADS, group, SIZE), shape(batch, TOKENS, HEADS, SIZE)
    count = flops(fn, query, key, key, shape(batch, TOKENS, dtype=jnp.int32))["all"]
    one = 2 * batch * HEADS * group * TOKENS * TOKENS * SIZE
    assert count == one * (2 * causal(128) + gradient * (4 + 3) * causal(64))


def test_decoding_on_gpus_computes_the_pages_in_use():
    # Rows of 16 query heads, of which the three of a group are a part; 2.5 pages in each of two parts.
    rows, kv_heads, group, page, slots = 4, 2, 3, attention_gpu.PAGE, 512
    cache = shape(kv_heads, 5, rows, slots, SIZE)
    counts = flops(
        attention_gpu.attend_cache, shape(rows, kv_heads * group, SIZE), cache, cache, shape(dtype=jnp.int32),
        shape(rows, dtype=jnp.int32), scopes=Scopes("all", trips=(("while", 2.5),)),
    )  # fmt: skip
    assert attention_gpu.tokens_at_once(rows, kv_heads, slots) == 2 * page
    assert counts == {"all": 2 * 2 * rows * kv_heads * 16 * (2 * 2.5 * page) * SIZE}


def test_a_product_of_a_layer_on_gpus_computes_blocks_of_whole_rows():
    rows, block, depth, width = 5, 16, 1024, 192
    x, stack = (jax.ShapeDtypeStruct(sizes, jnp.bfloat16) for sizes in ((rows, depth), (3, depth, width)))
    assert flops(products_gpu.product, x, stack, shape(dtype=jnp.int32)) == {"all": 2 * block * depth * width}
