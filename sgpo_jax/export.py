"""Exports the trained model as a Hugging Face folder, which transformers and vLLM load.

The folder has weights, config, tokenizer and stop ids.

python -m sgpo_jax.export --config=configs/NAME.py --workdir=DIR --to=FOLDER [--stage=sft]
"""

from pathlib import Path

from absl import flags

from sgpo_jax import cli, config_checks, sharding
from sgpo_jax import config as configs
from sgpo_jax.models import huggingface
from sgpo_jax.policy import Run
from sgpo_jax.runtime import is_first
from sgpo_jax.training import stage


def run(config, workdir: Path, from_stage: str, folder: Path, dtype: str) -> None:
    """Writes the best parameters of a stage to a new folder.

    Raises:
      ValueError: the stage has no checkpoint, or the folder is not empty.
    """
    configs.check_resume(config, workdir / "config.json")
    policy, _ = stage.load_policy(config)
    params = stage.best_params(Run(config, workdir, policy, sharding.make_mesh(**config.mesh)), from_stage)
    if params is None:
        raise ValueError(f"workdir={str(workdir)!r}: there is no checkpoint of stage {from_stage!r}")
    huggingface.save(folder, params, policy.config, tokenizer=policy.tokenizer, stop_ids=policy.stop_ids, dtype=dtype)
    if is_first():
        print(f"exported to {folder}", flush=True)


def main(config, given) -> None:
    """Checks the config and the flags, joins the other processes, and exports."""
    config_checks.check(config)
    folder = cli.folder("to", given.to)
    cli.join(config, given)
    run(config, Path(given.workdir).expanduser(), given.stage, folder, given.dtype)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_enum("stage", "rl", ["sft", "rl"], "Whose best checkpoint is exported.")
    flags.DEFINE_string("to", None, "Folder to create.")
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of the exported weights.")
    cli.define_processes()
    cli.start(main, required=["config", "workdir", "to"])
