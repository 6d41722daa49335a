"""Evaluation on benchmarks: avg@k, pass@k and maj@k of a checkpoint or a model, beside what the paper reports.

    sgpo evaluate --config=configs/NAME.py --checkpoint=WORKDIR[:best|last|STEP] [--out=DIR]
    sgpo evaluate --config=configs/NAME.py --model=FOLDER --out=DIR

The sets, the number of samples and the decoding are the config's (`eval`). --model takes a Hugging Face folder or hub
id, a .gguf file, or "smollm2". Every response goes to DIR with its verdict; the same command resumes after a kill.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sgpo_jax import cli, config_checks, rewards, sharding
from sgpo_jax import config as configs
from sgpo_jax.cli.processes import join
from sgpo_jax.commands import trained
from sgpo_jax.evaluation import check_sets, evaluate_sets
from sgpo_jax.runtime import is_first, mirror, preemption, tables, write_text
from sgpo_jax.stats import benchmark, paper
from sgpo_jax.training import stage


def run(config: ConfigDict, checkpoint: str | None, out: str | None, paper_row: str, limit: int) -> dict[str, Any]:
    """Evaluates what `checkpoint` names, or the config's model, and writes and prints the results.

    Args:
      config: with `eval.sets`; its model is what is evaluated, or what the checkpoint was trained from.
      checkpoint: "WORKDIR", "WORKDIR:best", "WORKDIR:last" or "WORKDIR:STEP", or None.
      out: folder of the results; None is WORKDIR/evaluate.
      paper_row: see `paper.row`; "" is none.
      limit: first problems of each set; 0 is `eval.limit` of the config.

    Returns:
      {"unguided" or "guided": {set: result of `evaluation.evaluate`}}.

    Raises:
      ValueError: no such checkpoint, set or paper row, or `out` holds an evaluation with other settings.
    """
    limit = limit or config.eval.limit
    reported = paper.row(paper_row) if paper_row else None
    rewards.check(config.rl.reward)
    mesh = sharding.make_mesh(**config.mesh)
    config_checks.check_mesh(config, mesh)
    workdir, trained_in, step = trained.find(config, "checkpoint", checkpoint) if checkpoint else (None, "", 0)
    if not (out or workdir):
        raise ValueError("--out: must be given with --model")
    folder = cli.folder("out", out) if out else Path(str(workdir)) / "evaluate"
    run, initial = stage.open_run(config, workdir or folder, mesh)
    check_sets(run, limit)
    if workdir:
        params = stage.weights_at(run, trained_in, step)
        model = mirror.shown(f"{workdir} after {trained_in} step {step}")
    else:
        params, model = stage.weights(run, initial()), config.model.source
    results = {}
    for kind in benchmark.contexts(config.eval.guided):
        with jax.set_mesh(mesh):
            results[kind] = evaluate_sets(run, params, folder, step, kind == "guided", limit, model, restart=False)
    if is_first():
        _report(config, folder, model, results, reported, limit)
    return results


def _report(
    config: ConfigDict,
    folder: Path,
    model: str,
    results: dict[str, dict[str, dict[str, Any]]],
    reported: tuple[str, dict[str, float]] | None,
    limit: int,
) -> None:
    """Prints the table; writes it and all numbers to `folder`."""
    title, cells = reported or ("", {})
    cells = {name.lower(): value for name, value in cells.items()}
    columns = ["set", "problems", "k", "avg@k, %", "pass@k, %", "maj@k, %", "tokens", "cut, %"]
    lines = []
    order = {name.lower(): i for i, name in enumerate(paper.SETS)}
    for kind, sets in results.items():
        for name in sorted(sets, key=lambda name: order.get(name.lower(), len(order))):
            result = sets[name]
            k = config.eval.sets[name].samples
            label = name if kind == "unguided" else f"{name}, guided"
            line = _line(label, result, f"{result['problems']} of {result['available']}", k)
            lines.append([*line, _cell(cells, name) if kind == "unguided" else ""])
            if "solvable" in result:
                few = result["solvable"]
                lines.append([*_line(f"{label}, solvable as stated", few, str(few["problems"]), k), ""])
        if len(sets) > 1:
            means, value = _average(sets)
            low, high = benchmark.interval(means)
            label = "Average" if kind == "unguided" else "Average, guided"
            average = f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            lines.append([label, "", "", average, "", "", "", "", _cell(cells, label)])
    head = f"{model}; 95 % bootstrap intervals over problems"
    if limit:
        head = f"SUBSET, the first {limit} problems of each set (--limit): no benchmark result. {head}"
    if reported:
        columns.append(f"paper: {title}")
    table = tables.table(head, columns, [line[: len(columns)] for line in lines])
    write_text(folder / "table.txt", table)
    content = {
        "model": model, "limit": limit, "seed": config.seed, "reward": config.rl.reward,
        "eval": configs.to_dict(config.eval), "results": results,
        "paper": {"row": title, "percent": reported[1]} if reported else None,
    }  # fmt: skip
    write_text(folder / "results.json", json.dumps(content, indent=1) + "\n")
    print(mirror.shown(f"Every response with its verdict: {folder}"), flush=True)


def _line(label: str, result: dict[str, Any], problems: str, k: int) -> list[str]:
    def percent(name: str) -> str:
        low, high = result["intervals"][name]
        return f"{100 * result[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    rates = [percent(name) for name in ("accuracy", f"pass@{k}", f"maj@{k}")]
    return [label, problems, str(k), *rates, f"{result['length']:.0f}", f"{100 * result['truncated']:.1f}"]


def _average(sets: dict[str, dict[str, Any]]) -> tuple[np.ndarray, float]:
    """Returns (bootstrapped means, value) of the plain mean of the sets' accuracies; each set is resampled alone."""
    means = [
        benchmark.bootstrap_means(np.array(result["per_problem"]), seed) for seed, result in enumerate(sets.values())
    ]
    return np.mean(means, axis=0), float(np.mean([result["accuracy"] for result in sets.values()]))


def _cell(cells: dict[str, float], name: str) -> str:
    return f"{cells[name.lower()]:.1f}" if name.lower() in cells else ""


def main(config, given) -> None:
    """Checks the config and the flags, joins the other processes, and evaluates."""
    if given.checkpoint and given.model:
        raise ValueError("--checkpoint and --model: give one of them")
    config.stages, config.data.train, config.sft.train = ("eval",), "", ""  # training reads these, this does not
    config.model.source = given.model or config.model.source
    config_checks.check(config)
    join(config, given)
    preemption.watch(config.grace)
    run(config, given.checkpoint, given.out, given.paper, given.limit)
