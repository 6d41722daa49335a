"""Rules, meshes, and the promise that every mesh of 8 devices trains like one device."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.batches import make_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sgpo_jax import config as configs
from sgpo_jax import models, sharding
from sgpo_jax.training.batch import Batch, Contexts, Group, pack_batch, specs
from sgpo_jax.training.forward import Forward
from sgpo_jax.training.objective import Objective
from sgpo_jax.training.optimizer import adamw, schedule
from sgpo_jax.training.state import init_state
from sgpo_jax.training.teacher import Teaching
from sgpo_jax.training.train_step import make_update
from sgpo_jax.training.weighting import Weighting

# Dimensions that 8 divides, so that every mesh applies; 2 key/value heads, so that tensor=4 and 8 split a head.
CONFIG = models.ModelConfig(
    architecture="Qwen3ForCausalLM", vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_size=48, rope_theta=1e4, norm_eps=1e-6, qk_norm=True, tie_embeddings=False, max_positions=64,
)  # fmt: skip
MESHES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]


def make_batch(seed):
    rng = np.random.default_rng(seed)
    problems, length = 8, 6

    def prompts(width):
        lengths = width - rng.integers(0, width - 1, problems)
        tokens = rng.integers(0, 40, (problems, width), dtype=np.int32)
        return Contexts([row[-length:] for row, length in zip(tokens, lengths, strict=True)], width)

    def group(size):
        return Group(
            rng.integers(0, 40, (problems, size, length), dtype=np.int32),
            rng.integers(1, length + 1, (problems, size), dtype=np.int32),
            rng.normal(-3, 1, (problems, size, length)).astype(np.float32),
            rng.integers(0, 2, (problems, size)).astype(np.float32),
        )

    return Batch(prompts(4), prompts(7), group(4), group(2))


# A teacher of two parts, a reference, and everything else that reads the state or another pass.
TEACHER = {
    "teacher": "trust_region", "teacher_rate": 0.3, "token_rule": "scale", "delta_quantile": 0.5, "guided_grpo": 0.5,
    "reference_kl": 0.1, "reference_kl_kind": "full", "reference_kl_on": "all", "importance": "sequence",
}  # fmt: skip


def train(mesh, **changes):
    """(losses, parameters on the host) of three updates."""
    config = configs.base()
    config.rl.update(changes)
    teaching, weighting = Teaching.from_config(config.rl), Weighting.from_config(config.rl)
    rate = schedule(1e-2, 3)
    tx = adamw(rate, b1=0.9, b2=0.99, eps=1e-4, weight_decay=0.01, clip_norm=1.0)
    params = models.init(jax.random.key(0), CONFIG)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    state = init_state(params, tx, teaching)
    losses = []
    with jax.set_mesh(mesh):
        shardings = sharding.tree_shardings(state, mesh)
        state = jax.device_put(state, shardings)
        objective = Objective.from_config(config.rl)
        update = make_update(Forward(CONFIG), tx, objective, teaching=teaching, shardings=shardings)
        for step in range(3):
            packed = pack_batch(make_batch(step), weighting, micro_batch=8, chunk=16)
            state, metrics = update(state, sharding.put(packed, specs(packed), mesh))
            losses.append(float(metrics["loss"]))
        leaf = state.params["layers"]["gate"]["kernel"]
        assert leaf.sharding.is_equivalent_to(shardings.params["layers"]["gate"]["kernel"], leaf.ndim)
        if state.teacher is not None:
            held = state.teacher.reference["layers"]["gate"]["kernel"]
            assert held.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), "as the student's"
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def single_device():
    return train(sharding.make_mesh(devices=jax.devices()[:1]))


QUICK = [(2, 2, 2)]  # in the default run; the others are slow


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in MESHES], ids=str
)
def test_every_mesh_trains_like_one_device(shape, single_device):
    losses, params = train(sharding.make_mesh(*shape, devices=jax.devices()[:8]))
    np.testing.assert_allclose(losses, single_device[0], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, single_device[1])


@pytest.mark.slow
def test_a_teacher_trains_alike_on_meshes():
    expected, state = train(sharding.make_mesh(devices=jax.devices()[:1]), **TEACHER)
    for shape in ((1, 8, 1), (2, 2, 2)):
        losses, params = train(sharding.make_mesh(*shape, devices=jax.devices()[:8]), **TEACHER)
        np.testing.assert_allclose(losses, expected, atol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, state)


def test_parameters_are_really_split():
    mesh = sharding.make_mesh(1, 4, 2, devices=jax.devices()[:8])
    params = models.init(jax.random.key(0), CONFIG)
    placed = jax.device_put(params, sharding.tree_shardings(params, mesh))
    kernel = placed["layers"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32 // 4, 32 // 2)
    assert placed["embed"]["embedding"].addressable_shards[0].data.shape == (40 // 2, 32 // 4)


def test_every_parameter_of_every_family_has_a_rule():
    params = jax.eval_shape(lambda: make_params())  # Qwen2: biases and an untied head
    qwen3 = jax.eval_shape(lambda: models.init(jax.random.key(0), CONFIG))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for tree in (params, qwen3):
        sharding.tree_shardings(tree, mesh)


def test_unmatched_parameter_is_an_error_that_names_it():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="router/kernel"):
        sharding.tree_shardings({"router": {"kernel": jnp.zeros((4, 4))}}, mesh)


def test_indivisible_parameter_is_an_error_that_names_it():
    mesh = sharding.make_mesh(1, 8, 1, devices=jax.devices()[:8])
    with pytest.raises(ValueError, match=r"head/kernel: dimension 0 of shape \(12, 40\).*fsdp \* mesh.context = 8"):
        sharding.tree_shardings({"head": {"kernel": jnp.zeros((12, 40))}}, mesh)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, -1, 1, 1), (1, 8, 1, 1)), ((2, -1, 1, 2), (2, 2, 1, 2)), ((-1, 2, 2, 1), (2, 2, 2, 1)),
        ((1, 2, -1, 2), (1, 2, 2, 2)), ((2, 2, 1, 2), (2, 2, 1, 2)),
    ],
)
def test_mesh_shape_fills_in_what_remains(sizes, expected):
    assert sharding.mesh_shape(sizes, 8) == expected


@pytest.mark.parametrize(
    "sizes", [(3, -1, 1, 1), (2, 2, 1, 1), (-1, -1, 1, 1), (0, 8, 1, 1), (16, 1, 1, 1), (1, -1, 3, 1), (1, -1, 0, 1)]
)
def test_impossible_mesh_is_refused(sizes):
    with pytest.raises(ValueError, match=f"mesh.data={sizes[0]}, mesh.fsdp={sizes[1]}, mesh.context={sizes[2]}"):
        sharding.mesh_shape(sizes, 8)


@pytest.mark.parametrize(
    ("shape", "context", "ways"),
    [
        ((1, 8, 1), 1, (2,)), ((2, 2, 2), 1, (2, 4)), ((4, 1, 2), 1, (1, 2, 4)), ((1, 4, 2), 1, (1,)),
        ((1, 2, 2), 2, (2, 4)), ((2, 1, 2), 2, (1,)), ((1, 2, 1), 4, (4, 8)),
    ],
)  # fmt: skip
def test_a_wider_split_of_weights_moves_none(shape, context, ways):
    mesh = sharding.make_mesh(*shape, context=context)
    decoding = sharding.decoding_mesh(mesh, ways)
    assert (decoding.devices.ravel() == mesh.devices.ravel()).all() and decoding.shape["context"] == 1
    with jax.set_mesh(decoding):
        specs = [P(sharding.weight_axes(count)) for count in (1, *ways)]
    held = [NamedSharding(decoding, spec).devices_indices_map((64,)) for spec in specs]
    for device in mesh.devices.ravel():
        parts = [set(range(64)[indices[device][0]]) for indices in held]
        assert [len(part) for part in parts] == [64 // (shape[2] * count) for count in (1, *ways)]
        assert all(wider <= narrower for narrower, wider in zip(parts, parts[1:], strict=False))
    kept = [sharding.BATCH] + [sharding.SHARDS] * all(count in (1, sharding.row_ways(mesh)) for count in ways)
    for axes in kept:
        held = [NamedSharding(m, P(axes)).devices_indices_map((64,)) for m in (mesh, decoding)]
        assert held[0] == held[1]


def test_as_many_axes_as_divide():
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        axes = sharding.weight_axes(4)
        assert axes == ("tensor", "fsdp", "data")
        assert [len(sharding.dividing(size, axes)) for size in (8, 4, 12, 6, 5)] == [3, 2, 2, 1, 0]
    assert sharding.dividing(5, axes) == axes and sharding.weight_axes(4) == ("tensor",), "without a mesh"


def test_constrain_leaves_indivisible_dimensions_whole():
    mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: sharding.constrain(x, sharding.BATCH, "tensor"))(jnp.zeros((6, 4)))
    assert x.sharding.spec in (P(None, "tensor"),)
    assert sharding.constrain(jnp.zeros((6, 4)), sharding.BATCH).shape == (6, 4), "no mesh, no constraint"
