"""The results of Table 1 of arXiv 2606.24064, accuracy in percent, to print beside measured results."""

from collections.abc import Mapping
from typing import Any

from sgpo_jax import methods

SETS = ("MATH500", "AMC23", "OlympiadBench", "AIME24", "Average")
MODELS = {"qwen1p5b": "Qwen2.5-1.5B-Instruct", "qwen7b": "Qwen2.5-7B-Instruct", "llama8b": "Llama 8B Instruct"}
METHODS = {
    "base": "base", "sft": "SFT", "sft_grpo": "SFT+GRPO", "hpt": "HPT", "luffy": "LUFFY", "sgpo": "SGPO",
}  # fmt: skip

# model -> method -> one number for each of SETS, or only the average where the paper gives no more.
TABLE: dict[str, dict[str, tuple[float, ...]]] = {
    "qwen7b": {
        "base": (75.2, 43.0, 38.8, 11.8, 42.2),
        "sft": (76.4, 42.1, 40.0, 12.4, 42.7),
        "sft_grpo": (80.3, 52.7, 48.4, 18.0, 49.9),
        "hpt": (79.1, 53.5, 48.8, 17.0, 49.6),
        "luffy": (78.0, 53.0, 47.6, 16.4, 48.8),
        "sgpo": (82.7, 55.9, 50.0, 19.7, 52.1),
    },
    "qwen1p5b": {
        "base": (23.2,), "sft": (22.2,), "sft_grpo": (26.9,), "hpt": (28.2,), "luffy": (28.5,), "sgpo": (29.9,),
    },
    "llama8b": {
        "base": (20.4,), "sft": (22.4,), "sft_grpo": (25.2,), "hpt": (26.3,), "luffy": (26.5,), "sgpo": (27.6,),
    },
}  # fmt: skip


def nearest_row(config: Mapping[str, Any]) -> dict[str, float]:
    """Returns {set: accuracy in percent} that the paper reports for a run's model and method; {} where it has none.

    Args:
      config: as in config.json.
    """
    source = str(config["model"]["source"]).rstrip("/").rpartition("/")[2]
    model = next((key for key, name in MODELS.items() if name == source), "")
    method = methods.named(config)
    method = "sft_grpo" if method == "grpo" else method
    return row(f"{model}:{method}")[1] if method in TABLE.get(model, {}) else {}


def row(name: str) -> tuple[str, dict[str, float]]:
    """Returns (title, {set: accuracy in percent}) of "model:method", with the sets that the paper reports.

    Raises:
      ValueError: the name is not in the table.
    """
    model, _, method = name.partition(":")
    if method not in TABLE.get(model, {}):
        raise ValueError(f"--paper={name}: must be one of {', '.join(MODELS)}, ':', and one of {', '.join(METHODS)}")
    cells = TABLE[model][method]
    sets = SETS if len(cells) == len(SETS) else SETS[-1:]
    return f"{MODELS[model]}, {METHODS[method]}", dict(zip(sets, cells, strict=True))
