"""Folders of a run and of a lab, made by hand, with texts that attack the page."""

import json
import runpy

import numpy as np

from helpers.paths import ROOT
from sgpo_jax import config as configs
from sgpo_jax import lab
from sgpo_jax.evaluation import summarize
from sgpo_jax.lab.grid import grid_cells, tuning_cells, with_warm_ups
from sgpo_jax.report import reasoning_steps
from sgpo_jax.runtime import files
from sgpo_jax.stats.benchmark import CONTEXTS

HOSTILE = "</script><script>window.owned=1</script><img src=x onerror=\"window.owned=1\">{{ 7 * 7 }}'&lt;" + 200 * "w"
OUTCOMES = ("correct", "wrong", "no_box", "correct")


def config_of(file):
    return runpy.run_path(str(ROOT / "configs" / file))["get_config"]()


def write_jsonl(path, rows):
    files.write_text(path, files.jsonl(rows))


def metrics_rows(count, reward=0.5):
    step = {"reward_guided": 0.5, "alpha": 0.25, "token_kl": 0.125, "entropy": 0.5, "response_length": 7.0}
    return [{"step": i, "reward_auto": reward * i / count, **step, "seconds_step": 60.0} for i in range(1, count + 1)]


def generations(outcomes, step):
    """Returns rows with two samples of a problem for each outcome: one with that outcome, one that is wrong."""
    return [
        {"step": step, "id": f"p{i}", "sample": k, "problem": f"problem {i} {HOSTILE}", "answer": "4",
         "response": f"response {i} {HOSTILE}" if k == 0 else "second sample", "extracted": "4",
         "outcome": outcome if k == 0 else "wrong", "reward": float(k == 0 and outcome == "correct"), "tokens": 5,
         "truncated": outcome == "correct" and i == 3, "vote": 0}
        for i, outcome in enumerate(outcomes) for k in range(2)
    ]  # fmt: skip


def analysis_line(pieces=("(a)", " add", " 2", ".\n", "(b)", HOSTILE), kl=(0.0, 0.25, 0.0, 0.0, 0.5, 2.0), delta=1.0):
    return {
        "id": f"id {HOSTILE}", "set": "heldout", "problem": HOSTILE, "strategy": HOSTILE, "answer": "4",
        "response": "".join(pieces), "outcome": "correct", "truncated": False, "stage": "rl", "step": 6, "delta": delta,
        "tokens": list(pieces), "token_kl": list(kl), "steps": [s._asdict() for s in reasoning_steps.steps(pieces, kl)],
    }  # fmt: skip


def make_run(folder):
    """Makes a finished run of six steps and four problems, one of them newly correct and none newly wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of("quickstart.py")
    config.model.source = f"scratch {HOSTILE}"
    (folder / "config.json").write_text(configs.to_json(config))
    (folder / "environment.json").write_text(json.dumps([{"started": "2026-01-01T00:00:00+00:00", "jax": HOSTILE}]))
    write_jsonl(folder / "sft.jsonl", [{"step": 1, "loss": 2.0, "validation_loss": 1.5, "seconds_step": 60.0}])
    write_jsonl(folder / "rl.jsonl", metrics_rows(6))
    for when, step, outcomes in (("before", 0, ("wrong", "wrong", "no_box", "wrong")), ("after", 6, OUTCOMES)):
        for context in CONTEXTS:
            rewards = np.array([[o == "correct", 0.0] for o in outcomes], float)
            numbers = np.zeros((4, 2, 5))
            numbers[..., 0] = rewards
            result = summarize(numbers) | {"available": 4}
            (folder / "eval").mkdir(exist_ok=True)
            (folder / "eval" / f"{when}_{context}.json").write_text(json.dumps({"results": {"heldout": result}}))
            write_jsonl(folder / "eval" / when / f"heldout_{context}_{step:06d}.jsonl", generations(outcomes, step))
    write_jsonl(folder / "analysis.jsonl", [analysis_line()])
    return folder


def make_lab(folder, finished=1.0):
    """Makes a lab of three methods, two seeds, two rates and two worlds, with the first share of its runs finished."""
    config = config_of("lab.py")
    config.lab.update({"methods": ("sft", "grpo", "sgpo"), "seeds": (0, 1), "rates": (1.0, 2.0)})
    config.lab.update({"worlds": ("base", "rare-success"), "world_methods": ("grpo", "sgpo")})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(configs.to_json(config))
    value = {"sft": 0.25, "grpo": 0.5, "sgpo": 0.75}

    def row(cell):
        accuracy = value[cell.method] + 0.01 * cell.seed % 1 + (cell.rate == 2.0) * 0.0625
        return {**cell._asdict(), "config": lab.digest(lab.cell_config(config, cell)), "accuracy": accuracy,
                "sets": {"heldout": accuracy}, "seconds": 1.0}  # fmt: skip

    tuning = tuning_cells(config)
    rates = dict.fromkeys((cell[:2] for cell in tuning), 2.0)
    cells = [*with_warm_ups(tuning), *with_warm_ups(grid_cells(config, rates))]
    cells = cells[: round(finished * len(cells))]
    for cell in cells:
        run = folder / str(cell)
        write_jsonl(run / "environment.json", [[{"jax": "1.2.3"}]])
        if cell.method == "sft":
            write_jsonl(run / "eval/heldout_unguided_000000.jsonl", generations(("wrong",) * 4, 0))
        else:
            write_jsonl(run / "rl.jsonl", metrics_rows(4))
            write_jsonl(run / "eval/heldout_unguided_000060.jsonl", generations(OUTCOMES, 60))
    write_jsonl(folder / "results.jsonl", map(row, cells))
    return folder
