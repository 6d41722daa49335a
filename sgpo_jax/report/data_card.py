"""The card of a data set of strategies: what it holds, which model wrote it and how, and what it is not."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgpo_jax.runtime import journal
from sgpo_jax.runtime.files import read_jsonl

_COLUMNS = {
    "id": "of the problem",
    "problem": "as the source has it",
    "answer": "as the source has it",
    "solution": "the expert's, from the source or written by the model",
    "strategy": "problem type, approach and steps, without numbers and without the answer",
}
_LIMITS = (
    "A strategy was accepted by rules about its form and about leaks, and by the scores of the model that wrote it. "
    "Rules miss leaks: an answer that is described rather than written, for example.",
    "The problems have the licence and the content of their source; nothing was done about either.",
)


def data_card(workdir: Path, rows: Path, source: str, name: str) -> str:
    """Returns the text of the README.md of a data set for the Hugging Face hub.

    Args:
      workdir: folder of the extraction.
      rows: its JSONL file of problems with strategies.
      source: where the problems were read from.
      name: OWNER/NAME of the data set.

    Raises:
      ValueError: a file of the extraction is broken.
    """
    kept = read_jsonl(rows)
    path = workdir / "extraction.jsonl"
    settings = {key: value for key, value in journal.settings(path).items() if key != "kind"}
    rejected = Counter(verdict["reason"] for verdict in journal.verdicts(path).values() if verdict["reason"] != "kept")
    columns = dict.fromkeys(column for row in kept for column in row)
    lines = [
        "---", "task_categories:", "- text-generation", "tags:", "- sgpo", "- reasoning", "configs:",
        "- config_name: default", "  data_files: train.jsonl", "---", "", f"# {name.rpartition('/')[2]}", "",
        f"{len(kept)} problems with strategies, by which language models learn to reason with "
        "[sgpo_jax](https://arxiv.org/abs/2606.24064).", "",
        "```bash", f"sgpo train --config=FILE --workdir=DIR '--config.data.train={name}?split=train'", "```", "",
        "| column | |", "|---|---|",
        *(f"| `{column}` | {_COLUMNS.get(column, 'as the source has it')} |" for column in columns), "",
        "## How it was made", "",
        f"A model saw problem and solution and wrote candidates; the one with the highest score was kept. "
        f"Of {len(kept) + rejected.total()} problems, {rejected.total()} have no strategy"
        + f" ({', '.join(f'{count} {reason}' for reason, count in rejected.most_common())})" * bool(rejected) + ".", "",
        "| | |", "|---|---|", f"| problems | {_cell(source)} |",
        *(f"| {_cell(key)} | {_cell(value)} |" for key, value in settings.items()), "",
        *_audit(workdir / "audit.jsonl"), "## Limits", "", *(f"* {text}" for text in _LIMITS),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _audit(path: Path) -> list[str]:
    """Returns what a judge thought of a sample, if there was an audit."""
    verdicts: list[Mapping[str, Any]] = [*journal.verdicts(path).values()] if path.is_file() else []
    means = [verdict["mean"] for verdict in verdicts if verdict["mean"] is not None]
    if not means:
        return []
    judge = journal.settings(path).get("model")
    return [f"{judge} rated {len(means)} of them {sum(means) / len(means):.2f} on average, from 0 to 1.", ""]


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
