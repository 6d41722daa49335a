"""A cache in pages: attention and what is written are those of the same cache without pages."""

import contextlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import ROOT
from jax.experimental.pallas import tpu as pltpu

from sgpo_jax import sharding
from sgpo_jax.models import attention, attention_gpu, windows
from sgpo_jax.models.attention_plain import attend_cache_plain
from sgpo_jax.models.cache_codes import empty, encode
from sgpo_jax.models.cache_pages import Paged

SHARDS, ROWS, LAYERS, KV_HEADS = 2, 3, 2, 2


def in_pages(cache, rng, page, spare=2):
    """A cache `[K,L,B,S,N]` whose pages are anywhere in their shard's part of a pool that has more of them."""
    most = cache.shape[3] // page
    total = ROWS * most + spare
    table = np.stack([rng.permutation(total)[: ROWS * most].reshape(ROWS, most) for _ in range(SHARDS)])

    def scatter(rows):
        pool = rng.normal(size=(*rows.shape[:2], SHARDS, total, page, rows.shape[4])).astype(rows.dtype)
        for w, r, c in np.ndindex(table.shape):
            pool[:, :, w, table[w, r, c]] = rows[:, :, w * ROWS + r, c * page : (c + 1) * page]
        return pool.reshape(*rows.shape[:2], -1, page, rows.shape[4])

    return Paged(jax.tree.map(scatter, jax.device_get(cache)), table.astype(np.int32))


def out_of_pages(paged):
    """The cache without pages."""

    def gather(pool):
        parts = pool.reshape(*pool.shape[:2], SHARDS, -1, *pool.shape[3:])
        rows = [parts[:, :, w, paged.table[w, r]] for w in range(SHARDS) for r in range(ROWS)]
        return np.stack(rows, axis=2).reshape(*pool.shape[:2], SHARDS * ROWS, -1, pool.shape[4])

    return jax.tree.map(gather, jax.device_get(paged.pool))


def caches(rng, slots, size, dtype):
    shape = KV_HEADS, LAYERS, SHARDS * ROWS, slots, size
    return [jax.device_get(encode(rng.normal(size=shape).astype(np.float32), empty((1,), dtype))) for _ in range(2)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_of_pages_is_that_of_rows(dtype, each, window):
    rng = np.random.default_rng(each)
    query = rng.normal(size=(SHARDS * ROWS * each, 4, 8)).astype(np.float32)
    attend = jax.jit(partial(windows.attend_cache, window=window, sliding=True, each=each))
    # With 12 slots a CPU reads the cache up to an edge in a page.
    for slots, tolerance in ((16, 0.0), (12, 1e-6)):
        keys, values = caches(rng, slots, 8, dtype)
        paged = [in_pages(x, np.random.default_rng(0), 4) for x in (keys, values)]
        for longest in (5, 8, slots - 2):
            lengths = np.linspace(1, longest, SHARDS * ROWS).astype(int)[:, None] + np.arange(each)
            lengths = lengths.reshape(-1).astype(np.int32)
            expected = attend(query, keys, values, 1, lengths)
            np.testing.assert_allclose(attend(query, *paged, 1, lengths), expected, rtol=0, atol=tolerance)
    if dtype == jnp.float32:
        with jax.set_mesh(sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])):
            np.testing.assert_allclose(attend(query, *paged, 1, lengths), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "each", "page", "shape"),
    [("gpu", jnp.float32, 1, 64, (1, 2, 2)), ("gpu", jnp.int8, 3, 128, (1, 1, 1)),
     ("tpu", jnp.float32, 1, 128, (1, 1, 1)),
     pytest.param("tpu", jnp.float32, 3, 256, (1, 2, 2), marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_kernels_read_the_pages_of_their_rows(monkeypatch, platform, dtype, each, page, shape):
    rng = np.random.default_rng(page)
    size, slots = (128, 768) if platform == "tpu" else (16, 512)
    keys, values = caches(rng, slots, size, dtype)
    query = rng.normal(size=(SHARDS * ROWS * each, 4, size)).astype(np.float32)
    lengths = (np.array([1, 64, 66, 130, 300, 509])[:, None] + np.arange(each)).reshape(-1).astype(np.int32)
    by_token = jax.tree.map(lambda x: np.repeat(x, each, axis=2), (keys, values))
    expected = attend_cache_plain(query, *by_token, 1, lengths)
    paged = [in_pages(x, np.random.default_rng(1), page) for x in (keys, values)]
    # What a row has not reached has no page, and what no row has would spread.
    reached = -(-lengths.reshape(SHARDS, ROWS, each).max(axis=2) // page)
    total = paged[0].pool.shape[2] // SHARDS
    table = np.where(np.arange(slots // page) < reached[..., None], paged[0].table, total).astype(np.int32)
    monkeypatch.setattr(attention, "platform", lambda: platform)
    monkeypatch.setattr(attention_gpu, "attend_cache", partial(attention_gpu.attend_cache, interpret=True))
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    with pltpu.force_tpu_interpret_mode() if platform == "tpu" else contextlib.nullcontext(), jax.set_mesh(mesh):
        attend = jax.jit(lambda *stored: attention.attend_cache(query, *stored, 1, lengths, each))
        got = attend(*(x._replace(table=table) for x in paged))
    np.testing.assert_allclose(got, expected, atol=0.02 if platform == "tpu" else 2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("each", [1, 3])
def test_tokens_are_written_to_the_pages_of_their_rows_alone(dtype, each):
    rng = np.random.default_rng(0)
    cache = caches(rng, 16, 16, dtype)[0]  # wider than a head, as a kernel may need
    new = rng.normal(size=(SHARDS * ROWS * each, KV_HEADS, 8)).astype(np.float32)
    slots = (np.array([0, 3, 7, 8, 11, 14])[:, None] + np.arange(each)).reshape(-1).astype(np.int32)
    expected = attention.append(cache, new, 1, slots, each)
    paged = in_pages(cache, rng, 4)
    got = jax.jit(partial(attention.append, each=each))(paged, new, 1, slots)
    jax.tree.map(np.testing.assert_array_equal, out_of_pages(got), jax.device_get(expected))
    # A row without a page writes nothing, nor does any to a page that no row has.
    total = paged.pool.shape[2] // SHARDS
    nowhere = paged._replace(table=np.full_like(paged.table, total))
    got = attention.append(nowhere, new, 1, slots, each)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got.pool), paged.pool)


STEPS_ON_A_TPU = """
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from sgpo_jax import sharding
from sgpo_jax.models import attention
from sgpo_jax.models.cache_pages import Paged
from sgpo_jax.plan import hardware
from sgpo_jax.sharding import BATCH

mesh = sharding.make_mesh(1, 2, 2, devices=hardware.topology("v5e:2x2")[1])
put = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
cache = Paged(put((2, 4, 512, 128, 128), jnp.bfloat16, "tensor", None, BATCH), put((2, 8, 16), jnp.int32, BATCH))
query, new = put((16, 12, 128), jnp.bfloat16, BATCH), put((16, 2, 128), jnp.bfloat16, BATCH)

def step(query, new, keys, values, lengths):
    def layer(carry, number):
        query, keys, values = carry
        keys, values = (attention.append(cache, new, number, lengths) for cache in (keys, values))
        attended = attention.attend_cache(query, keys, values, number, lengths + 1).reshape(query.shape)
        return (query + attended, keys, values), None
    body = lambda carry: (1, *jax.lax.scan(layer, carry[1:], jnp.arange(4))[0])
    return jax.lax.while_loop(lambda carry: carry[0] < 1, body, (0, query, keys, values))[1:]

with jax.set_mesh(mesh):
    done = jax.jit(step, donate_argnums=(2, 3)).lower(query, new, cache, cache, put((16,), jnp.int32, BATCH)).compile()
print("temp", done.memory_analysis().temp_size_in_bytes)
print(done.as_text())
"""


@pytest.mark.slow
def test_decoding_steps_on_a_tpu_copy_no_layer_of_a_pool():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]'")
    done = subprocess.run(
        [sys.executable, "-c", STEPS_ON_A_TPU], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    layer = 256 * 128 * 128  # of one of two heads, of half of the pages
    assert "tpu_custom_call" in done.stdout and int(done.stdout.split()[1]) < 2 * layer
    moved = re.findall(r"^\s*(?:ROOT )?%?(\S*(?:copy|transpose)\S*) = \S*?\[([\d,]+)\]", done.stdout, re.M)
    assert [name for name, dims in moved if math.prod(map(int, dims.split(","))) >= layer] == []
