"""The parameters that a command takes from a run: which checkpoint, of which stage."""

from pathlib import Path

from ml_collections import ConfigDict

from sgpo_jax import cli
from sgpo_jax import config as configs
from sgpo_jax.training import stage


def find(config: ConfigDict, flag: str, value: str) -> tuple[Path, str, int]:
    """Returns (folder of the run, stage, step) of a checkpoint: of RL if the run has one, else of SFT.

    Args:
      config: must agree with the run's on the model and the prompts.
      flag: name of the flag, for messages.
      value: "WORKDIR", "WORKDIR:best", "WORKDIR:last" or "WORKDIR:STEP".

    Raises:
      ValueError: there is no such checkpoint, or the config does not agree.
    """
    name, colon, which = value.rpartition(":")
    if not colon or not (which in ("best", "last") or which.isdigit()):
        name, which = value, "best"
    workdir = cli.existing_folder(flag, name)
    configs.check_resume(config, workdir / "config.json", only=("model.", "lora.", "data.instruction", "data.system"))
    for part in ("rl", "sft"):
        step = stage.find_step(config, workdir, part, which)
        if step is not None:
            return workdir, part, step
    raise ValueError(f"--{flag}={value}: there is no such checkpoint in {workdir}/rl or {workdir}/sft")
