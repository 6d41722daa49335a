"""The trained model as a Hugging Face folder, which transformers and vLLM load: weights, config, tokenizer, stop ids.

python -m sgpo_jax.export --config=configs/NAME.py --workdir=DIR --to=FOLDER [--stage=sft]
"""

import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sgpo_jax import checks, sharding, stage
from sgpo_jax import config as configs
from sgpo_jax.models import huggingface

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STAGE = flags.DEFINE_enum("stage", "rl", ["sft", "rl"], "Whose best checkpoint is exported.")
_TO = flags.DEFINE_string("to", None, "Folder to create.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of the exported weights.")
flags.mark_flags_as_required(["config", "workdir", "to"])


def run(config, workdir: Path, from_stage: str, folder: Path, dtype: str) -> None:
    """Writes the best parameters of a stage to a new folder.

    Raises:
      ValueError: the stage has no checkpoint, or the folder is not empty.
    """
    configs.check_resume(config, workdir / "config.json")
    policy, _ = stage.load_policy(config)
    params = stage.best_params(config, workdir, from_stage, policy, sharding.make_mesh(**config.mesh))
    if params is None:
        raise ValueError(f"workdir={str(workdir)!r}: there is no checkpoint of stage {from_stage!r}")
    host = sharding.fetch(params)
    if jax.process_index() == 0:
        huggingface.save(
            folder, host, policy.config, tokenizer=policy.tokenizer, stop_ids=policy.stop_ids, dtype=dtype
        )
        print(f"exported to {folder}", flush=True)


def main(argv) -> None:
    logging.set_verbosity(logging.ERROR)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        checks.check(_CONFIG.value)
        workdir, folder = Path(str(_WORKDIR.value)).expanduser(), Path(str(_TO.value)).expanduser()
        run(_CONFIG.value, workdir, _STAGE.value, folder, _DTYPE.value)
    except (ValueError, ImportError) as error:
        sys.exit(f"sgpo_jax: {error}")


if __name__ == "__main__":
    app.run(main)
