"""What test_weights.py runs in two processes of two CPU devices each: index, port and folder are its arguments."""

import resource
import runpy
import sys
from pathlib import Path

import jax
import pytest

from sgpo_jax import sharding
from sgpo_jax.commands import export
from sgpo_jax.models import huggingface
from sgpo_jax.training import stage

FIELDS = {"model.layers": 2, "model.hidden": 16, "model.heads": 2, "model.mlp": 16, "mesh.fsdp": 2, "mesh.tensor": 2}


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
