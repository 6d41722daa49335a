"""Plans a run for TPUs or GPUs that can be absent: its memory, work, communication, time and cost.

    python -m sgpo_jax.plan --config=configs/qwen7b.py --topology=v5e:16x16 [--json=FILE]
    python -m sgpo_jax.plan --config=configs/qwen7b.py:h100x32 --topology=h100:4x8
    python -m sgpo_jax.plan --config=configs/qwen7b.py --topology=auto --chips=v5e:16x16

Every jitted program of the run is compiled for these chips, on the CPU of this machine. See docs/plan.md.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from sgpo_jax import cli, config_checks
from sgpo_jax.plan import gpus
from sgpo_jax.plan.planner import make, without_files
from sgpo_jax.plan.report import show
from sgpo_jax.plan.roofline import Reached
from sgpo_jax.plan.workload import Assumed
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
        cli.folder("json", str(Path(given.json).parent))
    assumed = Assumed(
        given.response_tokens or max(config.rl.max_new_tokens // 4, 1),
        given.prompt_tokens or max(config.data.max_prompt_tokens // 4, 1),
        given.correct, given.problems, given.eval_problems,
    )  # fmt: skip
    limits = {"response_tokens": config.rl.max_new_tokens, "prompt_tokens": config.data.max_prompt_tokens}
    for name, most in limits.items():
        if not 1 <= getattr(assumed, name) <= most:
            raise ValueError(f"--{name}={getattr(assumed, name)}: must be between 1 and {most}")
    reached = Reached(given.flops_share, given.hbm_share, given.ici_share, given.network_share)
    plan = make(
        config, given.chips if auto else given.topology, auto, assumed, reached,
        memory_share=given.memory_share, price=given.price,
    )  # fmt: skip
    if given.json:
        files.write_text(Path(given.json), json.dumps(plan, indent=1) + "\n")
    show(plan)


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "Chips to plan for, as in v5e:16x16, h100:8 or h100:4x8; auto searches.")
    flags.DEFINE_string("chips", "", "With --topology=auto: the chips to search a mesh for, as in v5e:16x16.")
    flags.DEFINE_string("json", "", "File that the plan is written to as JSON.")
    flags.DEFINE_integer("response_tokens", 0, "Mean length of responses; 0 is a quarter of rl.max_new_tokens.")
    flags.DEFINE_integer("prompt_tokens", 0, "Length of prompts; 0 is a quarter of data.max_prompt_tokens.")
    flags.DEFINE_float("correct", 0.5, "Share of the responses that are correct.", 0.0, 1.0)
    flags.DEFINE_integer("problems", 8500, "Rows of the training data.", lower_bound=1)
    flags.DEFINE_integer(
        "eval_problems", 500, "Problems of an evaluation set that is not in the paper.", lower_bound=1
    )
    flags.DEFINE_float("flops_share", Reached().flops, "Share of the peak FLOP/s that is reached.", 0.01, 1.0)
    flags.DEFINE_float("hbm_share", Reached().hbm, "Share of the peak HBM bandwidth that is reached.", 0.01, 1.0)
    flags.DEFINE_float(
        "ici_share", Reached().ici, "Share of the peak bandwidth between chips that is reached.", 0.01, 1.0
    )
    flags.DEFINE_float(
        "network_share", Reached().network, "Share of the peak bandwidth between hosts that is reached.", 0.01, 1.0
    )
    flags.DEFINE_float(
        "memory_share", gpus.MEMORY_SHARE, "Share of a GPU's memory that JAX takes, XLA_PYTHON_CLIENT_MEM_FRACTION of "
        "the run.", 0.01, 1.0,
    )  # fmt: skip
    flags.DEFINE_float("price", 0.0, "Dollars for a chip and hour; 0 takes the price that docs/plan.md states.", 0.0)
    cli.start(main, required=["config", "topology"])
