"""Exports the trained model as a Hugging Face folder, which transformers and vLLM load, or its adapters for peft.

The folder has weights, config, tokenizer and stop ids. Adapters are merged into their base; with --adapters they are
written alone, as a folder of peft.

sgpo export --workdir=DIR --to=FOLDER [--stage=sft] [--adapters] [--push=OWNER/NAME [--public]]
"""

from pathlib import Path

from sgpo_jax import cli, config_checks, sharding
from sgpo_jax import config as configs
from sgpo_jax.cli.processes import join
from sgpo_jax.commands import push
from sgpo_jax.models import huggingface, peft
from sgpo_jax.report import model_card
from sgpo_jax.runtime import files, is_first, mirror
from sgpo_jax.training import stage


def run(config, workdir: Path, from_stage: str, folder: Path, dtype: str, adapters: bool = False) -> None:
    """Writes the best parameters of a stage, or only its adapters, to a new folder.

    Raises:
      ValueError: the stage has no checkpoint, the run has no adapters, or the folder is not empty.
    """
    configs.check_resume(config, workdir / "config.json")
    run, _ = stage.open_run(config, workdir, sharding.make_mesh(**config.mesh))
    policy, lora = run.policy, run.policy.lora
    if adapters and lora is None:
        raise ValueError(f"--adapters: workdir={str(workdir)!r} has a run without adapters (config.lora.rank=0)")
    if adapters:
        peft.refuse_fused(policy.config)
    step = stage.find_step(config, workdir, from_stage, "best")
    if step is None:
        raise ValueError(f"workdir={str(workdir)!r}: there is no checkpoint of stage {from_stage!r}")
    params = stage.params_at(run, from_stage, step)
    if adapters and lora:
        trained = sharding.fetch(params)
        if is_first():
            peft.save(folder, trained, lora, config.model.source)
    else:
        huggingface.save(
            folder, stage.weights(run, params), policy.config,
            tokenizer=policy.tokenizer, stop_ids=policy.stop_ids, dtype=dtype,
        )  # fmt: skip
    if is_first():
        card = model_card.model_card(workdir, configs.to_dict(config), from_stage, step, dtype)
        files.write_text(folder / "README.md", card)
        mirror.push()
        print(mirror.shown(f"exported to {folder}"), flush=True)


def main(config, given) -> None:
    """Checks the config and the flags, joins the other processes, exports, and pushes if the flags ask for it."""
    config_checks.check(config)
    folder = cli.new_folder("to", given.to)
    if given.push or given.public:
        push.check(given.push)
    join(config, given)
    run(config, cli.existing_folder("workdir", given.workdir), given.stage, folder, given.dtype, given.adapters)
    if given.push and is_first():
        visible = "" if given.public else " --private"
        again = f"The export is whole in {folder}; `hf upload {given.push} {folder} .{visible}` pushes it"
        exported = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        push.push(exported, given.push, "model", given.public, again)
