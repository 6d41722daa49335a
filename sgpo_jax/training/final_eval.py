"""The last stage: the evaluation sets before and after RL, as a table, a figure, and a few answers side by side."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import policy as policies
from sgpo_jax.evaluation import evaluate_sets
from sgpo_jax.policy import Policy
from sgpo_jax.report import figures
from sgpo_jax.runtime import distributed, tables
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.stats.benchmark import gain
from sgpo_jax.training import stage

SHOWN = 3  # problems of each set whose answers are printed


def write(config: ConfigDict, workdir: Path, policy: Policy, initial: Callable[[], Any], mesh: Mesh) -> dict[str, Any]:
    """Evaluates the parameters RL started from and those it ended with; writes `workdir/eval`.

    Each evaluation is kept as it finishes, so a run that is killed goes on with the next one.

    Returns:
      {"before" or "after": {"unguided" or "guided": {set name: result of `evaluate`}}}.
    """
    folder = workdir / "eval"
    results: dict[str, Any] = {}
    for when, step in (("before", 0), ("after", _rl_step(config, workdir))):
        if step is None:
            continue
        params = None
        for kind in ("unguided", "guided") if config.eval.guided else ("unguided",):
            path = folder / f"{when}_{kind}.json"
            wanted = {"config": json.loads(config.eval.to_json()), "seed": config.seed, "step": step}
            scores = distributed.first(partial(_finished, path, wanted))
            if scores is None:
                if params is None:
                    params = initial() if when == "before" else stage.best_params(config, workdir, "rl", policy, mesh)
                    params = policies.place(params, mesh)
                print(f"evaluating {when} RL, {kind}", flush=True)
                with jax.set_mesh(mesh):
                    scores = evaluate_sets(config, folder / when, policy, params, mesh, step, guided=kind == "guided")
                if jax.process_index() == 0:
                    _write_json(path, {**wanted, "results": scores})
            results.setdefault(when, {})[kind] = scores
    if jax.process_index() == 0:
        _show(config, workdir, folder, results)
    return results


def _rl_step(config: ConfigDict, workdir: Path) -> int | None:
    if not distributed.first((workdir / "rl" / "checkpoints").is_dir):
        return None
    with stage.checkpoints(config, workdir, "rl") as saved:
        return saved.best_step()


def _finished(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The results of an evaluation of the same step with the same settings, if it is there."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["results"] if {name: found.get(name) for name in wanted} == wanted else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _show(config: ConfigDict, workdir: Path, folder: Path, results: dict[str, Any]) -> None:
    columns = ["set", "prompt", "avg@k before", "avg@k after", "gain", "pass@k", "tokens", "truncated"]
    lines = []
    before, after = results["before"], results.get("after")
    for kind, sets in before.items():
        for name, old in sets.items():
            new = after and after[kind][name]
            line = [f"{name} (k={config.eval.sets[name].samples})", kind, _interval(old)]
            line += [_interval(new), _gain(old, new)] if new else ["-", "-"]
            k = config.eval.sets[name].samples
            for metric, form in ((f"pass@{k}", ".3f"), ("length", ".1f"), ("truncated", ".3f")):
                line.append(" -> ".join(f"{result[metric]:{form}}" for result in (old, new) if result))
            lines.append(line)
    title = "Accuracy with 95 % bootstrap intervals over problems" + (", before and after RL" if after else "")
    table = tables.table(title, columns, lines)
    (folder / "table.txt").write_text(table, encoding="utf-8")
    for name in config.eval.sets:
        _show_answers(folder, name)
    rows = read_jsonl(workdir / "rl.jsonl") if (workdir / "rl.jsonl").is_file() else []
    if after and rows:
        first = next(iter(before["unguided"]))
        old_bars, new_bars = (
            {kind: (sets[first]["accuracy"], *sets[first]["intervals"]["accuracy"]) for kind, sets in when.items()}
            for when in (before, after)
        )
        figures.summary(rows, old_bars, new_bars, workdir / "summary.png")
        figures.training_curves(rows, workdir / "training.png")
        print(f"Figures: {workdir / 'summary.png'}, {workdir / 'training.png'}", flush=True)
    print(f"Every answer with its verdict: {folder}", flush=True)


def _interval(result: dict[str, Any]) -> str:
    low, high = result["intervals"]["accuracy"]
    return f"{result['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _gain(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Difference in accuracy, with an interval paired over problems."""
    mean, low, high = gain(old["per_problem"], new["per_problem"])
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _show_answers(folder: Path, name: str) -> None:
    """What the policy says to the first problems of a set, unguided, before and after."""
    files = {when: sorted((folder / when).glob(f"{name}_unguided_*.jsonl")) for when in ("before", "after")}
    answers = {
        when: [row for row in read_jsonl(paths[-1]) if row["sample"] == 0]
        for when, paths in files.items()
        if paths
    }
    for i, row in enumerate(answers["before"][:SHOWN]):
        print(f"\n{name}, {row['id']} (answer {row['answer']}): {row['problem']}")
        for when, rows in answers.items():
            print(f"  {when} [{rows[i]['outcome']}] {rows[i]['response']}")
    print(flush=True)
