"""Weights on meshes: import, export and checkpoints in one process and in two, bit by bit, and their memory."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import xla_flags
from helpers.paths import ROOT
from helpers.small_models import CONFIGS, assert_same
from helpers.two_processes import config_with, start
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from sgpo_jax import models, sharding
from sgpo_jax.models import huggingface, param_mapping, sharded_io
from sgpo_jax.policy import Policy
from sgpo_jax.training import stage
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.optimizer import adamw, schedule

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 2, 2), (2, 2, 2), (1, 1, 8)]
# Sizes that 8 divides; Qwen2, so that there are biases, and an untied head.
CONFIG = models.ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=72, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_size=40, rope_theta=1e4, norm_eps=1e-6, qkv_bias=True, tie_embeddings=False, max_positions=64,
)  # fmt: skip


def mesh_of(shape):
    return sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])


def any_bits(shape, dtype, rng):
    """Returns random bits, with negative zeros, infinities, subnormal numbers and many kinds of NaN among them."""
    return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]


def make(folder, dtype):
    """Returns tensors of random bits, and writes them with safetensors' own writer as a checkpoint of two files."""
    rng = np.random.default_rng(0)
    tensors = {name: any_bits(slot.shape, dtype, rng) for name, slot in param_mapping.layout(CONFIG).items()}
    folder.mkdir()
    weight_map = {}
    for file, part in (("a.safetensors", [*tensors][:20]), ("b.safetensors", [*tensors][20:])):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize(
    ("shape", "dtype"), [(shape, np.float32) for shape in MESHES] + [((2, 2, 2), ml_dtypes.bfloat16)], ids=str
)
def test_import_to_any_mesh_and_export_from_it_are_bit_exact(tmp_path, monkeypatch, shape, dtype):
    tensors = make(tmp_path / "made", dtype)
    monkeypatch.setattr(sharded_io, "BLOCK", 96)  # blocks of a few rows, the last of which are fewer
    params, _ = huggingface.load(tmp_path / "made", CONFIG, mesh=mesh_of(shape))
    leaves, wanted = flatten_dict(params, sep="/"), sharding.tree_shardings(params, mesh_of(shape))
    for path, sharded in flatten_dict(wanted, sep="/").items():
        assert leaves[path].sharding == sharded
    for name, place in param_mapping.layout(CONFIG).items():
        (slot,) = place.slots
        tensor = np.asarray(leaves[slot.path])[slot.at]
        assert (tensor.T if slot.transposed else tensor).tobytes() == tensors[name].tobytes(), name
    huggingface.save(tmp_path / "out", params, CONFIG)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_leaves_of_two_types_are_written_as_safetensors_writes_them(tmp_path):
    config = CONFIGS["llama"]  # vectors of 12 numbers, matrices of odd sizes
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: any_bits(leaf.shape, np.float32 if leaf.shape[-1] == 12 else ml_dtypes.bfloat16, rng),
        param_mapping.shapes(config),
    )
    huggingface.save(tmp_path / "out", params, config)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert len({tensor.dtype for tensor in tensors.values()}) == 2
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)], ids=str)
def test_devices_read_their_parts_and_copies_of_a_part_are_read_once(shape):
    """No device reads a whole tensor, and devices that hold the same part read it once."""
    read = []

    class Tensor(np.ndarray):
        def __getitem__(self, index):
            part = super().__getitem__(index)
            read.append(part.size)
            return np.asarray(part)

    def find(name):
        shape = param_mapping.layout(CONFIG)[name].shape
        return sharded_io.StoredTensor(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32).view(Tensor))

    params = huggingface.assemble(CONFIG, param_mapping.layout(CONFIG), find, mesh=mesh_of(shape))
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_what_cannot_be_split_is_refused_before_anything_is_read():
    def find(name):
        shape = param_mapping.layout(CONFIG)[name].shape
        return sharded_io.StoredTensor(shape, np.dtype(np.float32), lambda: pytest.fail("too late"))

    with pytest.raises(ValueError, match=r"embedding: dimension 0 of shape \(72, 16\).* by mesh\.tensor = 5"):
        huggingface.assemble(CONFIG, param_mapping.layout(CONFIG), find, mesh=mesh_of((1, 1, 5)))


def test_layers_on_different_devices_are_refused_before_anything_is_written(tmp_path):
    split = NamedSharding(mesh_of((3, 1, 1)), P("data"))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), param_mapping.shapes(CONFIG))
    params["layers"]["k"]["bias"] = jax.device_put(params["layers"]["k"]["bias"], split)
    with pytest.raises(ValueError, match=r"layers/k/bias is placed as .*'data'.*; the first axis"):
        huggingface.save(tmp_path / "out", params, CONFIG)
    assert list(tmp_path.iterdir()) == []


# ---- checkpoints


@pytest.fixture(scope="module")
def trained():
    """(policy, optimizer, a whole state of random numbers in host memory)."""
    tx = adamw(schedule(1e-2, 3), b1=0.9, b2=0.99, eps=1e-4, weight_decay=0.01, clip_norm=1.0)
    policy = Policy(CONFIG, None, (), 0, jnp.float32, "")
    shapes, _ = stage.state_shardings(policy, tx, mesh_of((1, 1, 1)))
    rng = np.random.default_rng(0)
    return policy, tx, jax.tree.map(lambda leaf: rng.normal(0, 99, leaf.shape).astype(leaf.dtype), shapes)


def checkpoints(folder, reading=False):
    return Checkpoints(folder, 1, "score", True, seed=0, reading=reading)


def assert_restored(folder, trained, shape):
    policy, tx, expected = trained
    wanted = stage.placed_shapes(policy, tx, mesh_of(shape))
    with checkpoints(folder, reading=True) as saved:
        states = [saved.restore(1, wanted), expected.replace(params=saved.restore_params(1, wanted))]
    for state in states:
        jax.tree.map(np.testing.assert_array_equal, state, expected)
        for leaf, target in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted.params), strict=True):
            assert leaf.sharding == target.sharding


@pytest.mark.parametrize(("before", "after"), [((1, 1, 1), (2, 2, 2)), ((1, 8, 1), (1, 2, 2)), ((1, 2, 2), (1, 1, 1))])
def test_what_is_saved_on_one_mesh_is_restored_on_another(trained, tmp_path, before, after):
    policy, tx, state = trained
    with checkpoints(tmp_path) as saved:
        saved.save(1, jax.device_put(state, stage.state_shardings(policy, tx, mesh_of(before))[1]))
    assert_restored(tmp_path, trained, after)


def test_parameters_are_restored_without_reading_the_optimizers_state(trained, tmp_path, monkeypatch):
    policy, tx, state = trained
    shapes, shardings = stage.state_shardings(policy, tx, mesh_of((2, 2, 2)))
    asked, read = [], Checkpoints._read

    def listen(saved, step, **items):
        asked.append(items)
        return read(saved, step, **items)

    monkeypatch.setattr(Checkpoints, "_read", listen)
    with checkpoints(tmp_path) as saved:
        saved.save(1, jax.device_put(state, shardings))
        saved.wait()
        saved.restore_params(1, stage.placed_shapes(policy, tx, mesh_of((2, 2, 2))))
    target = asked[-1]["state"].item
    assert all(leaf is ... for leaf in jax.tree.leaves(target["opt_state"]))
    with pytest.raises(ValueError, match="has another model"), checkpoints(tmp_path, reading=True) as saved:
        wrong = {**shapes.params, "head": {"kernel": jnp.zeros((16, 73))}}
        saved.restore_params(1, stage.placed_shapes(policy, tx, mesh_of((2, 2, 2))).replace(params=wrong))


def test_arrays_are_saved_in_pieces_however_few_devices_hold_them(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("sgpo_jax.training.checkpoint._PIECE", 1024)
    policy, tx, state = trained
    with checkpoints(tmp_path) as saved:
        saved.save(1, jax.device_put(state, stage.state_shardings(policy, tx, mesh_of((1, 1, 1)))[1]))
        saved.wait()
        described = jax.tree.leaves(
            saved._manager.item_metadata(1)["state"].tree, is_leaf=lambda leaf: hasattr(leaf, "storage")
        )
    sizes = [4 * np.prod(leaf.storage.chunk_shape) for leaf in described if leaf.shape]
    assert len(sizes) > 30 and max(sizes) <= 1024
    assert_restored(tmp_path, trained, (2, 2, 2))


# ---- two processes


def run(*commands, **environment):
    """Runs commands of this checkout side by side; all must succeed within two minutes."""
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | environment,
        )
        for command in commands
    ]  # fmt: skip
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """One process's checkpoint, restored and exported by two, imported and saved by two, restored by one."""
    state = start(config_with(**{"mesh.fsdp": 1, "mesh.tensor": 1, "mesh.data": 8}), tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ROOT / "tests/helpers/two_processes.py"
    run(*([script, index, port, tmp_path] for index in range(2)), XLA_FLAGS=xla_flags.quick(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "one", "two"], "the failed export is gone"

    params, _ = huggingface.load(tmp_path / "exported")
    assert_same(jax.device_get(params), jax.device_get(state.params))
    config = config_with(**{"mesh.fsdp": 4})
    policy, _ = stage.load_policy(config)
    mesh = sharding.make_mesh(**config.mesh)
    tx, _ = stage.optimizer(config, "sft", 1)
    with stage.checkpoints(config, tmp_path / "two", "sft", reading=True) as saved:
        again = saved.restore(1, stage.placed_shapes(policy, tx, mesh))
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.slow
def test_a_host_holds_its_own_shard_and_little_more(tmp_path):
    """The benchmark on 0.2 GB: each of two processes imports and exports half of 0.4 GB of float32."""
    out = tmp_path / "out.json"
    # The threads that conftest.py asks for would take memory too.
    run([ROOT / "benchmarks/weights.py", "--gigabytes=0.2", f"--folder={tmp_path}", f"--json={out}"], NPROC="2")
    result = json.loads(out.read_text())
    assert result["bit_exact"] and len(result["rows"]) == 4
    whole = 4 * result["parameters"]
    for row in result["rows"]:
        assert 0.5 * whole <= row["shard"] < 0.51 * whole
        # Beside it: for an import a few blocks; for an export they are arrays, whose code is compiled.
        assert row["peak_anonymous"] - row["shard"] < {"import": 2e7, "export": 1.5e8}[row["phase"]], row
    assert list(tmp_path.iterdir()) == [out]
