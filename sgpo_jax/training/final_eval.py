"""The last stage: the evaluation sets before and after RL, as a table, a figure, and a few answers side by side."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from sgpo_jax import config as configs
from sgpo_jax import policy as policies
from sgpo_jax.evaluation import evaluate_sets
from sgpo_jax.policy import Run
from sgpo_jax.runtime import distributed, is_first, mirror, read_jsonl, tables, write_text
from sgpo_jax.stats import benchmark
from sgpo_jax.stats.benchmark import gain
from sgpo_jax.training import stage

SHOWN = 3  # problems of each set whose answers are printed


def write(run: Run, initial: Callable[[], Any]) -> dict[str, Any]:
    """Evaluates the parameters before and after RL; writes `workdir/eval`.

    Each evaluation is saved when it finishes, so a run that is killed resumes with the next one.

    Args:
      run: the config, the folder, the policy and its mesh.
      initial: returns the parameters before RL.

    Returns:
      {"before" or "after": {"unguided" or "guided": {set name: result of `evaluate`}}}.
    """
    config, folder = run.config, run.workdir / "eval"
    results: dict[str, Any] = {}
    for when, step in (("before", 0), ("after", _rl_step(run))):
        if step is None:
            continue
        params = None
        for kind in benchmark.contexts(config.eval.guided):
            path = folder / f"{when}_{kind}.json"
            settings = {"config": configs.to_dict(config.eval), "seed": config.seed, "step": step}
            scores = distributed.first(partial(_read_finished, path, settings))
            if scores is None:
                if params is None:
                    params = initial() if when == "before" else stage.best_params(run, "rl")
                    params = policies.place(stage.weights(run, params), run.mesh)
                print(f"evaluating {when} RL, {kind}", flush=True)
                with jax.set_mesh(run.mesh):
                    scores = evaluate_sets(run, params, folder / when, step, guided=kind == "guided")
                if is_first():
                    write_text(path, json.dumps({**settings, "results": scores}) + "\n")
                for name, result in scores.items():
                    numbers = {metric: value for metric, value in result.items() if isinstance(value, float)}
                    run.trackers.log("eval", step, {f"{name}/{kind}/{metric}": numbers[metric] for metric in numbers})
            results.setdefault(when, {})[kind] = scores
    if is_first():
        _show(run, folder, results)
    return results


def _rl_step(run: Run) -> int | None:
    if not distributed.first(stage.folder_of(run.workdir, "rl").is_dir):
        return None
    with stage.checkpoints(run.config, run.workdir, "rl") as saved:
        return saved.best_step()


def _read_finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Reads the results of an evaluation with the same settings; returns None if there are none."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    # A run that is older than a field had its default.
    content["config"] = configs.to_dict(configs.base().eval) | content.get("config", {})
    return content["results"] if {name: content.get(name) for name in settings} == settings else None


def _show(run: Run, folder: Path, results: dict[str, Any]) -> None:
    config, workdir = run.config, run.workdir
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
    title += f"; the first {config.eval.limit} problems of each set (eval.limit)" if config.eval.limit else ""
    table = tables.table(title, columns, lines)
    (folder / "table.txt").write_text(table, encoding="utf-8")
    run.trackers.table("eval/accuracy", 0, [dict(zip(columns, line, strict=True)) for line in lines])
    for name in config.eval.sets:
        _show_answers(folder, name)
    rows = read_jsonl(workdir / "rl.jsonl") if (workdir / "rl.jsonl").is_file() else []
    if after and rows:
        from sgpo_jax.report import figures  # it imports matplotlib, which takes long

        first = next(iter(before["unguided"]))
        old_bars, new_bars = (
            {kind: (sets[first]["accuracy"], *sets[first]["intervals"]["accuracy"]) for kind, sets in when.items()}
            for when in (before, after)
        )
        figures.summary(rows, old_bars, new_bars, workdir / "summary.png")
        figures.training_curves(rows, workdir / "training.png")
        print(mirror.shown(f"Figures: {workdir / 'summary.png'}, {workdir / 'training.png'}"), flush=True)
    print(mirror.shown(f"Every answer with its verdict: {folder}"), flush=True)


def _interval(result: dict[str, Any]) -> str:
    low, high = result["intervals"]["accuracy"]
    return f"{result['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _gain(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Returns the difference in accuracy, with an interval paired over problems."""
    mean, low, high = gain(old["per_problem"], new["per_problem"])
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _show_answers(folder: Path, name: str) -> None:
    """Prints the unguided answers to the first problems of a set, before and after."""
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
