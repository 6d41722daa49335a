"""Plans a run for TPUs or GPUs that can be absent: its memory, work, communication, time and cost.

    sgpo plan --config=configs/qwen7b.py --topology=v5e:16x16 [--json=FILE]
    sgpo plan --config=configs/qwen7b.py:h100x32 --topology=h100:4x8
    sgpo plan --config=configs/qwen7b.py --topology=auto --chips=v5e:16x16

Every jitted program of the run is compiled for these chips, on the CPU of this machine. See docs/plan.md.
"""

import json
from typing import Any

import jax
from ml_collections import ConfigDict

from sgpo_jax import cli, config_checks
from sgpo_jax.plan import gpus
from sgpo_jax.plan.planner import make, without_files
from sgpo_jax.plan.report import show
from sgpo_jax.plan.roofline import Reached
from sgpo_jax.plan.workload import Assumed, of_run
from sgpo_jax.runtime import files


def main(config: ConfigDict, given: Any) -> None:
    """Makes the plan that the flags ask for, writes it where --json says so, and prints it."""
    jax.config.update("jax_platforms", "cpu")  # leaves the devices of this host to a run that uses them
    jax.config.update("jax_enable_compilation_cache", False)  # cannot read programs for absent chips back
    config = without_files(config)
    config_checks.check(config)
    auto = given.topology == "auto"
    if auto != bool(given.chips):
        raise ValueError(f"--chips={given.chips}: must be given with --topology=auto, and only then")
    if given.json:
        to = cli.file("json", given.json)
    mean, cut = given.response_tokens or max(config.rl.max_new_tokens // 4, 1), 0.0
    if given.lengths:
        if given.response_tokens:
            raise ValueError(f"--lengths={given.lengths}: must not be given with --response_tokens")
        mean, cut = of_run(cli.folder("lengths", given.lengths), config.rl.max_new_tokens)
    assumed = Assumed(
        mean, given.prompt_tokens or max(config.data.max_prompt_tokens // 4, 1), given.correct, given.problems,
        given.eval_problems, cut, given.acceptance,
    )  # fmt: skip
    limits = {"response_tokens": config.rl.max_new_tokens, "prompt_tokens": config.data.max_prompt_tokens}
    for name, most in limits.items():
        if not 1 <= getattr(assumed, name) <= most:
            raise ValueError(f"--{name}={getattr(assumed, name)}: must be between 1 and {most}")
    shares = {name: getattr(given, f"{name}_share") for name in ("flops", "hbm", "ici", "network")}
    reached = Reached(**{name: share for name, share in shares.items() if share is not None})
    memory_share = gpus.MEMORY_SHARE if given.memory_share is None else given.memory_share
    plan = make(
        config, given.chips if auto else given.topology, auto, assumed, reached,
        memory_share=memory_share, price=given.price,
    )  # fmt: skip
    if given.json:
        files.write_text(to, json.dumps(plan, indent=1) + "\n")
    show(plan)
