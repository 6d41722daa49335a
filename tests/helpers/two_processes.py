"""What test_weights.py runs in two processes of two CPU devices each: index, port and folder are its arguments."""

import resource
import runpy
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from sgpo_jax import sharding
from sgpo_jax.commands import export
from sgpo_jax.models import huggingface
from sgpo_jax.runtime import is_first
from sgpo_jax.training import gathered, stage

FIELDS = {"model.layers": 2, "model.hidden": 16, "model.heads": 2, "model.mlp": 16, "mesh.fsdp": 2, "mesh.tensor": 2}
# name -> (array, how the mesh splits it)
ARRAYS = {
    "split twice": (np.arange(480, dtype=np.float32).reshape(8, 6, 10) / 7, jax.P(None, "fsdp", "tensor")),
    "split on one axis by two": (np.arange(24, dtype=np.int8).reshape(8, 3) - 9, jax.P(("fsdp", "tensor"))),
    "in all devices": (np.arange(35, dtype=np.uint32).reshape(5, 7) + 2**31, jax.P()),
    "on some devices": (np.array([True, False, False, True]), jax.P("tensor")),
    "bfloat16, with all its bits": (
        np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(-1, 2)[::64], jax.P("fsdp", "tensor")
    ),
    "a number": (np.array(-3, np.int32), jax.P()),
    "nothing": (np.zeros((0, 4), np.float32), jax.P(None, "fsdp")),
}  # fmt: skip


def there_and_back(mesh, array, spec):
    """Checks that an array on the devices of all processes comes to the first one, and from there to all of them."""
    placed = sharding.put(array, spec, mesh)
    whole = gathered.gather(placed)
    assert (whole is not None) == is_first()
    if is_first():
        assert (whole.dtype, whole.shape) == (array.dtype, array.shape) and whole.tobytes() == array.tobytes()
        assert whole.flags.owndata, "the memory of the devices is written to by the next update"
    target = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed.sharding)
    back = gathered.spread({"a": whole, "b": ...} if is_first() else None, {"a": target, "b": ...})
    assert back["b"] is ... and back["a"].sharding == placed.sharding
    for ours, theirs in zip(back["a"].addressable_shards, placed.addressable_shards, strict=True):
        assert np.asarray(ours.data).tobytes() == np.asarray(theirs.data).tobytes()


def config_with(**fields):
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "quickstart.py"))["get_config"]()
    config.update_from_flattened_dict(FIELDS | fields)
    return config


def start(config, workdir):
    """Saves the first state of the warm-up of a run as step 1, and returns it."""
    policy, load = stage.load_policy(config)
    tx, _ = stage.optimizer(config, "sft", 1)
    with stage.checkpoints(config, workdir, "sft") as saved:
        state = stage.start(saved, lambda: load(jax.random.key(0)), policy, tx, sharding.make_mesh(**config.mesh))
        saved.save(1, state, 0.5)
    return state


def main(index: int, port: str, folder: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
    # What one process saved, to a folder; what is in the folder, to a checkpoint.
    export.run(config_with(), folder / "one", "sft", folder / "exported", "float32")
    state = start(config_with(**{"model.source": str(folder / "exported")}), folder / "two")
    kernel = state.params["layers"]["q"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(2, 8, 8), (2, 8, 8)]

    gathered._PIECE = 100
    for array, spec in ARRAYS.values():
        there_and_back(sharding.make_mesh(1, 2, 2), array, spec)

    # A full disk of the first process, who alone writes.
    policy, _ = stage.load_policy(config_with())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if index == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    message = r"model\.safetensors cannot be written: .*File too large" if index == 0 else "first process cannot write"
    with pytest.raises(OSError, match=message):
        huggingface.save(folder / "full", state.params, policy.config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises((ValueError, OSError), match="already exists" if index == 0 else "first process cannot write"):
        huggingface.save(folder / "exported", state.params, policy.config)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
