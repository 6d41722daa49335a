"""Rows whose tokens are split over the context axis: gradients, updates, whole runs and compiled programs."""

import importlib.util
import os
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.batches import assert_trees_close, make_batch, make_params
from helpers.configs import load
from helpers.paths import ROOT
from helpers.runs import TINY, parameters, rows
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sgpo_jax import models, sharding
from sgpo_jax.commands import train
from sgpo_jax.plan import hardware
from sgpo_jax.training import packing
from sgpo_jax.training.batch import pack_batch, specs
from sgpo_jax.training.forward import Forward, MicroBatch, response_logprobs, response_loss
from sgpo_jax.training.forward import Tokens as Listed
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.state import init_state
from sgpo_jax.training.train_step import make_update
from sgpo_jax.training.weighting import Weighting

DENSE = models.ModelConfig(
    architecture="Qwen3ForCausalLM", vocab_size=32, hidden_size=16, num_layers=2, num_heads=8, num_kv_heads=2,
    head_dim=6, mlp_size=16, rope_theta=1e4, norm_eps=1e-6, qk_norm=True, tie_embeddings=False, max_positions=64,
)  # fmt: skip
CONFIGS = {
    "dense": DENSE,
    "sliding": replace(DENSE, architecture="Olmo3ForCausalLM", window=3, sliding=(True, False), sliding_rope_theta=1e3),
    "experts": replace(
        DENSE, architecture="Qwen3MoeForCausalLM", experts=6, experts_per_token=3, normalize_experts=True
    ),
}
ROW = 15  # tokens of a row, which no context axis divides


def mesh_of(fsdp=1, context=1, tensor=1):
    return sharding.make_mesh(1, fsdp, tensor, jax.devices()[: fsdp * context * tensor], context=context)


def micro_batch():
    """Two rows with three sequences each, and the places of the arrays."""
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(0, 31, n) for n in rng.integers(1, 4, 6)] for _ in range(2))
    packed = packing.pack(
        [prompts], responses, range(6), lengths=[ROW], micro_batch=2, most=6, chunk=8, context=4
    )
    listed = packed.owner >= 0
    share = np.where(listed, rng.normal(1, 0.3, listed.shape) / listed.sum(), 0).astype(np.float32)
    ids = np.where(listed, rng.integers(0, 31, listed.shape), 0).astype(np.int32)
    first = jax.tree.map(lambda x: x[0], (packed.contexts[0], ids, share, packed.chunks))
    by_row, by_token = P(sharding.ROWS), P(None, sharding.ROWS, "context")
    return first, (packing.Rows(by_row, by_row, by_row, by_token, by_token), by_token, by_token, P())


@cache
def gradient(name, shape):
    """(loss, gradient) of the weighted log-probabilities of a micro-batch, and these, on a mesh of this shape."""
    forward, mesh = Forward(CONFIGS[name], remat="full"), mesh_of(*shape)

    @jax.jit
    def measure(params, rows, ids, share, chunks):
        flat = (x.reshape(len(x), -1) for x in (ids, share, share))
        micro = MicroBatch(rows, chunks, Listed(*flat))

        def loss(params):
            return response_loss(forward, params, micro, lambda logp, entropy, x: x.weight * (logp + 0.3 * entropy))[0]

        return jax.value_and_grad(loss)(params), response_logprobs(forward, params, micro)

    params = make_params(config=CONFIGS[name])
    with jax.set_mesh(mesh):
        params = sharding.place(params, sharding.tree_shardings(params, mesh))
        return jax.device_get(measure(params, *sharding.put(*micro_batch(), mesh)))


CASES = {  # name -> meshes: fsdp, context, tensor; the first of all is quick
    "dense": [(1, 4, 2), (2, 4, 1)], "sliding": [(2, 2, 1)], "experts": [(1, 2, 2), (2, 4, 1)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=[] if (name, i) == ("dense", 0) else [pytest.mark.slow])
        for name, shapes in CASES.items() for i, shape in enumerate(shapes)
    ],
    ids=str,
)  # fmt: skip
def test_split_rows_have_the_gradient_of_whole_ones(name, shape):
    """In the first case eight devices share eight query heads, so each key head is on four of them."""
    assert_trees_close(gradient(name, shape), gradient(name, (1, 1, 1)), 1e-5)


def updated(mesh):
    """(parameters after a step of gradient descent, metrics)"""
    optimizer, context = optax.sgd(1.0), mesh.shape["context"]
    packed = pack_batch(make_batch(), Weighting(), micro_batch=2, chunk=8, context=context)
    state = init_state(make_params(config=DENSE), optimizer)
    with jax.set_mesh(mesh):
        shardings = sharding.tree_shardings(state, mesh)
        state, batch = sharding.place(state, shardings), sharding.put(packed, specs(packed), mesh)
        update = make_update(Forward(DENSE, remat="full"), optimizer, Objective(), shardings=shardings)
        state, metrics = update(state, batch)
    return jax.device_get((state.params, metrics))


@pytest.mark.slow
def test_an_update_on_split_rows():
    assert_trees_close(updated(mesh_of(2, 2, 2)), updated(mesh_of()), 1e-5)


def compiled_gradient(config, length, chips):
    """The compiled gradient of a row on a mesh of four devices, with two ways of the context and the tensor axis."""
    mesh = sharding.make_mesh(1, 1, 2, chips, context=2)
    params = jax.eval_shape(lambda: models.init(jax.random.key(0), config))

    def loss(params, rows):
        hidden, _ = models.apply(params, config, rows, rows, rows, dtype=jnp.bfloat16, remat="full")
        return (hidden.astype(jnp.float32) ** 2).sum()

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    rows = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=NamedSharding(mesh, P(sharding.ROWS)))
    with jax.set_mesh(mesh):
        shardings = sharding.tree_shardings(params, mesh)
        gradient = jax.jit(jax.grad(loss), out_shardings=shardings)
        return gradient.lower(jax.tree.map(place, params, shardings), rows).compile().as_text()


@pytest.fixture
def chips(request, monkeypatch):
    """Four devices of a kind, for which programs can be compiled."""
    if request.param == "cpu":
        yield jax.devices()[:4]
        return
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]'")
    monkeypatch.setattr(os, "environ", {**os.environ})
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield hardware.topology(request.param)[1]
    jax.config.update("jax_enable_compilation_cache", enabled)


@pytest.mark.parametrize(
    ("name", "chips"),
    [("dense", "cpu"), ("experts", "cpu"), pytest.param("dense", "v5e:2x2", marks=pytest.mark.slow)],
    indirect=["chips"],
)
def test_no_device_holds_all_tokens_of_a_row_but_for_its_heads(name, chips):
    """Of four heads each of four devices has one."""
    length, size = 1280, 128
    config = replace(
        CONFIGS[name], vocab_size=896, hidden_size=384, num_heads=4, head_dim=size, mlp_size=704, max_positions=2048
    )
    text = compiled_gradient(config, length, chips)
    lines = [line for line in text.splitlines() if "/layers/" in line]
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\b\w+\[([\d,]+)\]", "\n".join(lines))}
    assert "all-to-all" in text and {(1, length // 2, 384), (1, length // 4, 384)} <= shapes
    if chips[0].platform == "cpu":  # scores of all tokens with all, and what masks them
        shapes = {shape for shape in shapes if shape.count(length) == 1 and length // 2 not in shape}
    assert max(np.prod(shape) for shape in shapes if length in shape) == length * size


@pytest.mark.slow
def test_a_run_on_split_rows_is_that_on_whole_ones(tmp_path, monkeypatch):
    """Both stages and evaluations; it resumes on a mesh of another shape."""
    config = load(ROOT / "configs" / "quickstart.py")
    config.update_from_flattened_dict(TINY | {
        "sft.steps": 2, "sft.validate_every": 1, "rl.eval_every": 1, "eval.guided": False, "checkpoint.every": 1,
        "rl.reward": "helpers.reward_functions:even", "report_seconds": 0.0,
    })  # fmt: skip
    for name, steps, shape in (("whole", 2, (1, 1, 1)), ("split", 1, (1, 2, 1)), ("split", 2, (2, 2, 1))):
        config.rl.steps, mesh = steps, mesh_of(*shape)
        monkeypatch.setattr(sharding, "make_mesh", lambda *_, mesh=mesh, **__: mesh)
        train.run(config, tmp_path / name)
    for stage in ("sft", "rl"):
        pairs = [(rows(tmp_path / name, stage), parameters(tmp_path / name, stage, 2)) for name in ("whole", "split")]
        assert_trees_close(*pairs, 1e-5)
