"""What a run will need on TPUs that are not there: memory, work, communication, and time.

    python -m sgpo_jax.plan --config=configs/qwen7b.py --topology=v5e:16x16 [--json=FILE]
    python -m sgpo_jax.plan --config=configs/qwen7b.py --topology=auto --chips=v5e:16x16

Every jitted program of the run is compiled for the chips on this machine's CPU; see docs/plan.md.
"""

import json
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from sgpo_jax import chips, cli, config_checks, estimate, models, search, sharding
from sgpo_jax import config as configs
from sgpo_jax.chips import GIB
from sgpo_jax.estimate import Result
from sgpo_jax.programs import load_shape, programs
from sgpo_jax.recipe import Assumed
from sgpo_jax.roofline import Reached, Seconds
from sgpo_jax.runtime.tables import table
from sgpo_jax.traffic import KINDS


def make(config: ConfigDict, topology: str, auto: bool, assumed: Assumed, reached: Reached) -> dict[str, Any]:
    """The plan, as plain data.

    Args:
      config: of the run; its rows are not read.
      topology: as in "v5e:16x16".
      auto: search a mesh, micro-batches and slots.
      assumed, reached: what neither the config nor the compiler says.

    Raises:
      ValueError: there is no such topology, or the run does not divide over it.
    """
    shape = load_shape(config)
    chip, devices = chips.topology(topology)
    limit = chips.hbm_limit(devices[0])
    measure = partial(estimate.measure, chip=chip, reached=reached, limit=limit)
    tried: list[search.Tried] = []
    if auto:
        found, measured, tried = search.search(config, shape, devices, chip, assumed, limit, measure)
        config = found or config
        mesh = sharding.make_mesh(**config.mesh, devices=devices) if found else None
    else:
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        config_checks.check_mesh(config, sharding.row_ways(mesh))
        measured = []
        for program in programs(config, shape, mesh, assumed):
            print(f"compiling {program.name}", flush=True)
            measured.append((program, measure(program, mesh)))
    results = {program.name: result for program, result in measured}
    params = jax.eval_shape(partial(models.init, config=shape), jax.random.key(0))
    return {
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(mesh.shape) if mesh else None,
        "model": config.model.source,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "versions": {name: metadata.version(name) for name in ("jax", "libtpu")},
        "assumed": assumed._asdict() | {"reached": reached._asdict(), "chip": chip._asdict()},
        "fits": bool(results) and all(result["fits"] for result in results.values()),
        "programs": results,
        "hours": estimate.hours(results) if results else None,
        "advice": estimate.advice(measured, config, mesh, shape.num_kv_heads) if mesh else [],
        "tried": [each._asdict() for each in tried],
        "flags": search.flags(config) if auto and mesh else "",
        "config": json.loads(configs.to_json(config)),
    }


def show(plan: dict[str, Any]) -> None:
    """Prints a plan as tables."""
    mesh = ", ".join(f"mesh.{axis}={size}" for axis, size in (plan["mesh"] or {}).items())
    print(f"\n{plan['model']}, {plan['parameters'] / 1e9:.3f}e9 parameters, on the {plan['chips']} chips of ", end="")
    print(f"{plan['topology']}: {mesh or 'no mesh was found that fits'}\n", flush=True)
    if plan["tried"]:
        rows = [[each["mesh"]["fsdp"], each["mesh"]["tensor"], *list(each.values())[1:]] for each in plan["tried"]]
        table("Tried", ["mesh.fsdp", "mesh.tensor", "field", "value", "outcome"], rows)
    results = plan["programs"].items()
    if results:
        limit = _short(next(iter(plan["programs"].values()))["hbm"]["limit"] / GIB)
        rows = [[name, *_memory(result)] for name, result in results]
        table(f"HBM of a chip in GiB, of which the compiler allows {limit}", ["program", *_PARTS, "fits"], rows)
        columns = ["program", "array", "GiB", "from"]
        table("Its largest arrays", columns, [row for name, result in results for row in _largest(name, result)])
        columns = ["program, phase", "TFLOP", "HBM GB", "sent GB", "compute s", "HBM s", "ICI s", "least s", "most s"]
        rows = [row for name, result in results for row in _work(name, result)]
        table("A call, on one chip: work, and seconds at the shares of peak speeds assumed", columns, rows)
        columns = ["program, collective", "count", "results GB", "sent GB"]
        rows = [row for name, result in results for row in _collectives(name, result)]
        table("Collectives of a call, on one chip", columns, rows)
        columns = ["program", "calls", "response tokens", "least s", "most s", "tokens/s at most"]
        table("A call, on all chips", columns, [_speed(name, result) for name, result in results])
    if plan["hours"]:
        rows = [[stage, *map(_short, each.values())] for stage, each in plan["hours"].items()]
        table(
            "Hours", ["stage", "least", "most"], rows
        )
    print("Assumed:", ", ".join(f"{name}={value:g}" for name, value in configs.flat(plan["assumed"]).items()))
    print("Not in the hours: grading, packing, loading and saving, compilation")
    for line in plan["advice"]:
        print(line)
    if plan["flags"]:
        print(f"Run it with {plan['flags']}")
    print("fits" if plan["fits"] else "does not fit", flush=True)


_PARTS = ("arguments", "outputs", "temporaries", "code", "resident", "needed")
_LARGEST = 3  # arrays of each program that are shown


def _memory(result: Result) -> list[str]:
    cells = [_short(result["hbm"][part] / GIB) if part in result["hbm"] else "-" for part in _PARTS]
    return [*cells, "yes" if result["fits"] else "no"]


def _largest(name: str, result: Result) -> list[list[str]]:
    return [
        [name, each["array"], _short(each["bytes"] / GIB), each["from"][-90:]]
        for each in result.get("largest", [])[:_LARGEST]
    ]


def _work(name: str, result: Result) -> list[list[str]]:
    rows = []
    for phase, each in result["phases"].items():
        seconds = Seconds(**each["seconds"])
        sent = sum(kind["sent"] for kind in each["collectives"].values())
        cells = [each["flops"] / 1e12, each["hbm_bytes"] / 1e9, sent / 1e9, *seconds, seconds.least, seconds.most]
        rows.append([f"{name}, {phase}", *map(_short, cells)])
    return rows


def _collectives(name: str, result: Result) -> list[list[str]]:
    rows = []
    for kind in KINDS:
        found = [each["collectives"][kind] for each in result["phases"].values() if kind in each["collectives"]]
        count, results, sent = (sum(each[part] for each in found) for part in ("count", "bytes", "sent"))
        if count:
            rows.append([f"{name}, {kind}", _short(count), _short(results / 1e9), _short(sent / 1e9)])
    return rows


def _speed(name: str, result: Result) -> list[str]:
    cells = [name, str(result["calls"]), _short(result["tokens"])]
    if not result["compiled"]:
        return [*cells, "-", "-", "-"]
    least, most = estimate.seconds(result)
    return [*cells, _short(least), _short(most), _short(result["tokens"] / least)]


def _short(value: float) -> str:
    """Four digits, or all those before the point."""
    if 0 < value < 1e-3:
        return "<0.001"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main(config: ConfigDict, given: Any) -> None:
    # On a host with TPUs the run there is left alone.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # nor can what was compiled for absent chips be read back
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
    reached = Reached(given.flops_share, given.hbm_share, given.ici_share)
    plan = make(config, given.chips if auto else given.topology, auto, assumed, reached)
    if given.json:
        Path(given.json).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    show(plan)


def without_files(config: ConfigDict) -> ConfigDict:
    """The config with other names for the data, which a plan does not read, and which need not be there."""
    config = ConfigDict(config.to_dict()).lock()
    for section in (config.data, config.sft):
        section.train = "rows" if section.train else ""
    for chosen in config.eval.sets.values():
        chosen.source = "rows"
    return config


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "Chips to plan for, as in v5e:16x16, v6e:8x8, v5p:4x4x4; auto searches.")
    flags.DEFINE_string("chips", "", "With --topology=auto, the chips that there are, as in v5e:16x16.")
    flags.DEFINE_string("json", "", "File that the plan is written to as JSON.")
    flags.DEFINE_integer("response_tokens", 0, "Mean length of responses; 0 is a quarter of rl.max_new_tokens.")
    flags.DEFINE_integer("prompt_tokens", 0, "Length of prompts; 0 is a quarter of data.max_prompt_tokens.")
    flags.DEFINE_float("correct", 0.5, "Share of the responses that are correct.", 0.0, 1.0)
    flags.DEFINE_integer("problems", 8500, "Rows of the training data.", lower_bound=1)
    flags.DEFINE_integer(
        "eval_problems", 500, "Problems of an evaluation set that is none of the paper's.", lower_bound=1
    )
    flags.DEFINE_float("flops_share", Reached().flops, "Share of the peak FLOP/s that is reached.", 0.01, 1.0)
    flags.DEFINE_float("hbm_share", Reached().hbm, "Share of the peak HBM bandwidth that is reached.", 0.01, 1.0)
    flags.DEFINE_float(
        "ici_share", Reached().ici, "Share of the peak bandwidth between chips that is reached.", 0.01, 1.0
    )
    cli.start(main, required=["config", "topology"])
