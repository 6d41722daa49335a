"""Titles of a run: its method, model, data and commit."""

from collections.abc import Mapping, Sequence
from typing import Any

from sgpo_jax import methods

# Methods that are called by their own name; the others are variants of SGPO.
_OWN = (
    "sgpo", "sft", "grpo", "luffy", "hpt", "sdpo", "opsd", "sdft", "dr_grpo", "dapo", "gspo", "cispo", "truncated_is",
)  # fmt: skip
_SHOWN = 3  # joined sources of the data


def title_of(config: Mapping[str, Any]) -> str:
    """Returns the title of a run: its method, model and data.

    Args:
      config: as in config.json.
    """
    name = methods.named(config)
    variant = f"SGPO, {name.replace('_', ' ')}" if name else "a method of its own"
    return f"{name.upper().replace('_', ' ') if name in _OWN else variant} · {model_of(config)} · {data_of(config)}"


def model_of(config: Mapping[str, Any]) -> str:
    """Returns a short name of the model that a run starts from."""
    model = config["model"]
    if model["source"] == "scratch":
        return f"scratch, {model['layers']} layers of {model['hidden']}"
    return _last(model["source"])


def data_of(config: Mapping[str, Any]) -> str:
    """Returns a short name of the problems that a run trains on."""
    source = config["data"]["train"] or config["sft"]["train"]
    names = [_last(part.partition("?")[0].partition(",")[0]) for part in source.split(";")]
    return " + ".join(names[:_SHOWN]) + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)


def _last(path: str) -> str:
    """Returns the last name of a path or a hub id."""
    return path.strip().rstrip("/").rpartition("/")[2]


def commit_of(starts: Sequence[tuple[str, Sequence[Any]]]) -> str:
    """Returns the commit of the code at the last start; "" where it is not known.

    Args:
      starts: (name, its value at each start) of the environment.
    """
    commit = next((values[-1] for name, values in starts if name == "commit"), None)
    return f"commit {commit[:10]}{'-dirty' * commit.endswith('-dirty')}" if commit else ""
