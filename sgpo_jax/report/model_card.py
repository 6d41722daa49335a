"""The model card of an exported model: what it is, how it was made, how well it answers, and what it is not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgpo_jax.report import page, titles
from sgpo_jax.runtime import buckets
from sgpo_jax.stats import paper

_LIMITS = (
    "It was trained to answer problems like those above. Its answers were judged by their final result alone; the "
    "reasoning before it can be wrong.",
    "Nothing was done about harmful, private or copyrighted content; it has what its base model and the data have.",
    "The intervals are about the problems of the sets, for one training run. Another seed gives other numbers.",
)


def model_card(workdir: Path, config: Mapping[str, Any], stage: str, step: int, dtype: str) -> str:
    """Returns the text of a model's README.md for the Hugging Face hub.

    Args:
      workdir: folder of the run.
      config: of the run, as in config.json.
      stage, step: of the checkpoint that is exported.
      dtype: of the exported weights.

    Raises:
      ValueError: a file of the run is broken.
    """
    starts = json.loads((workdir / "environment.json").read_text()) if (workdir / "environment.json").is_file() else []
    last = starts[-1] if starts else {}
    source, lora = config["model"]["source"], config.get("lora", {"rank": 0})
    elsewhere = buckets.is_url(source) or Path(source).expanduser().exists()
    base = source if "/" in source and not elsewhere else ""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- sgpo", "- reasoning"]
    head += [f"base_model: {base}"] * bool(base) + ["---"]
    title = titles.title_of(config)
    lines = [
        *head, "", f"# {title}", "",
        f"A language model trained with [sgpo_jax](https://arxiv.org/abs/2606.24064), by {title.partition(' ·')[0]}. "
        f"The weights are those after step {step} of the stage {stage!r}, in {dtype}.", "",
        "| | |", "|---|---|", f"| base model | {_cell(source)} |",
        *[f"| adapters | r = {lora['rank']}, trained over the base in {lora['base_dtype']} |"] * bool(lora["rank"]),
        f"| data | {_cell(config['data']['train'])} |",
        f"| warm-up | {_cell(config['sft']['train'] or 'a share of the data')} |", f"| seed | {config['seed']} |",
        f"| commit | {_cell(last.get('commit') or 'not known')} |",
        f"| sgpo_jax, JAX | {_cell(last.get('sgpo_jax', '?'))}, {_cell(last.get('jax', '?'))} |",
        f"| devices | {_cell(last.get('device', '?'))} |", "",
        *(["```", last["command"], "```", ""] if "command" in last else []),
        "## Use", "",
        "The prompt is the chat template around the problem"
        + (f", with the system's turn {config['data']['system']!r}" if config["data"].get("system") else "")
        + ". In training it ended with the line that `data.instruction` names. No strategy is needed.", "",
        *_accuracy(page.read_results(workdir), config, stage), *_account(workdir),
        "## Limits", "", *(f"* {text}" for text in _LIMITS),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _accuracy(results: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], stage: str) -> list[str]:
    """Returns the table of the final evaluation; the paper's row where it has one for this model and method."""
    ends = ("before", "after") if stage == "rl" else ("before",)
    found = {when: results[when]["unguided"] for when in ends if "unguided" in results[when]}
    if not found:
        return ["## Accuracy", "", "It was not evaluated.", ""]
    reported = {name.lower(): value for name, value in paper.nearest_row(config).items()}
    lines = ["## Accuracy", "", "avg@k in percent on problems without strategies, with 95 % bootstrap intervals over "
             "problems" + (f"; the first {config['eval']['limit']} of each set" if config["eval"].get("limit") else "")
             + ".", ""]  # fmt: skip
    heads = ["set", "problems", "k", *(f"{when} RL" for when in found)] + ["the paper's"] * bool(reported)
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, first in next(iter(found.values())).items():
        k = max(int(key.partition("@")[2]) for key in first if key.startswith("pass@"))
        cells = [name, str(first["problems"]), str(k)]
        for sets in found.values():
            low, high = sets[name]["intervals"]["accuracy"]
            cells.append(f"{100 * sets[name]['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        if reported:
            cells.append(f"{reported[name.lower()]:.1f}" if name.lower() in reported else "")
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return [*lines, ""]


def _account(workdir: Path) -> list[str]:
    """Returns the table of what became of the rows of the data."""
    path = workdir / "data.json"
    if not path.is_file():
        return []
    lines = ["## Data", "", "| stage | source | rows read | kept | left out |", "|---|---|---|---|---|"]
    for stage, content in json.loads(path.read_text(encoding="utf-8")).items():
        for source, count in content["sources"].items():
            reasons = ", ".join(f"{number} {reason}" for reason, number in count["left_out"].items() if number)
            cells = (stage, source, count["read"], count["kept"], reasons)
            lines.append("| " + " | ".join(_cell(str(cell)) for cell in cells) + " |")
    return [*lines, ""]
