"""SGPO, the paper's baselines and its ablations, each as changes of a config.

`--config=configs/qwen7b.py:luffy` selects a method, `:h100x32` cards that the run is to fit, `:luffy,h100x32` both. All
methods start from the same warm-up and draw the same number of samples per problem and step; only "self_strategies"
draws more, before the first step. docs/methods.md has the equations, and says where a method differs from its authors'
code.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from sgpo_jax.config import base

# LUFFY and HPT both use the demonstration, do not clip the ratio, and weigh all tokens of a batch equally.
_DEMONSTRATION: dict[str, Any] = {
    "guide": "demonstration", "guided": 1, "clip_low": 1.0, "clip_high": float("inf"), "normaliser": "constant",
    "entropy_bonus": 0.001,
}  # fmt: skip


def _unguided(rl: ConfigDict) -> dict[str, Any]:
    """Returns the fields by which all samples are autonomous."""
    return {"autonomous": rl.autonomous + rl.guided, "guided": 0}


def _own(rl: ConfigDict) -> dict[str, Any]:
    """Returns the fields by which the student's own responses are distilled, and there is no policy loss."""
    return {**_unguided(rl), "target": "own", "weight": "fixed", "advantage": "none", "token_rule": "none"}


# name -> function of config.rl that returns the fields to change
METHODS: dict[str, Callable[[ConfigDict], dict[str, Any]]] = {
    "sgpo": lambda rl: {},
    # Baselines: Table 1.
    "sft": lambda rl: {},  # `select` also drops the stage rl
    "grpo": lambda rl: _unguided(rl),
    "luffy": lambda rl: {
        **_DEMONSTRATION, "autonomous": rl.autonomous + rl.guided - 1,
        "advantage": "mixed", "weight": "mixed", "distillation": "shaped",
    },
    "hpt": lambda rl: {
        **_DEMONSTRATION, "autonomous": rl.autonomous + rl.guided, "learning_rate": 5 * rl.learning_rate,
        "advantage": "gated", "weight": "gated", "distillation": "nll",
    },
    # Ablations: Tables 2, 3, 6, 7. The one without strategy distillation is "grpo".
    "no_grpo": lambda rl: {"advantage": "none"},
    "no_proximal": lambda rl: {"delta": float("inf"), "target": "mean"},
    "no_kl_clip": lambda rl: {"delta": float("inf")},
    "no_target_selection": lambda rl: {"target": "mean"},
    "fixed_weight": lambda rl: {"weight": "fixed"},
    "group_advantage_weight": lambda rl: {"weight": "group_advantage"},
    "reverse_kl": lambda rl: {"distillation": "reverse_kl"},
    "direct_sft": lambda rl: {"distillation": "nll"},
    # Not in the paper: SDPO's divergences, and strategies that the student writes.
    "jensen_shannon": lambda rl: {"distillation": "jensen_shannon"},
    "top_k_kl": lambda rl: {"distillation": "top_k_kl"},
    "self_strategies": lambda rl: {"guide": "self"},
    # A teacher that does not forget, and a pull that does not vanish; then each part alone, and other rules for both.
    "anchored": lambda rl: {"teacher": "frozen", "teacher_dtype": "bfloat16", "token_rule": "scale"},
    "anchored_guided": lambda rl: {
        "teacher": "frozen", "teacher_dtype": "bfloat16", "token_rule": "scale",
        "reference_kl": 1.0, "reference_kl_kind": "full",
    },
    "scaled_kl": lambda rl: {"token_rule": "scale"},
    "quantile_clip": lambda rl: {"delta_quantile": 0.9},
    "frozen_teacher": lambda rl: {"teacher": "frozen"},
    "ema_teacher": lambda rl: {"teacher": "ema"},
    "trust_region": lambda rl: {"teacher": "trust_region"},
    "gated_teacher": lambda rl: {"teacher": "gated"},
    "guided_grpo": lambda rl: {"guided_grpo": 1.0},
    "reference_kl": lambda rl: {"reference_kl": 0.04},
    # Self-distillation of the student's own responses.
    "sdpo": lambda rl: {
        **_own(rl), "guide": "sibling", "distillation": "jensen_shannon", "teacher": "ema", "normaliser": "tokens",
    },
    "opsd": lambda rl: {**_own(rl), "guide": "solution", "teacher": "frozen"},
    "sdft": lambda rl: {**_own(rl), "guide": "solution", "distillation": "reverse_kl", "teacher": "ema"},
    # The family of GRPO: all samples are autonomous.
    "dr_grpo": lambda rl: {**_unguided(rl), "advantage": "centred", "normaliser": "constant"},
    "dapo": lambda rl: {
        **_unguided(rl), "normaliser": "tokens", "overlong_buffer": rl.max_new_tokens // 5, "resample": 3,
    },
    "gspo": lambda rl: {**_unguided(rl), "surrogate": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": lambda rl: {**_unguided(rl), "surrogate": "cispo", "normaliser": "tokens", "clip_low": 1.0},
    "truncated_is": lambda rl: {**_unguided(rl), "importance": "token"},
}  # fmt: skip


def named(config: Mapping[str, Any]) -> str:
    """Returns the name of the method that a config trains with, as in `METHODS`; "" for one that is not there.

    Args:
      config: with the fields of `config.base()`, as in config.json.
    """
    if "rl" not in config["stages"]:
        return "sft"
    recipe = base().rl
    changes = {name: change(recipe) for name, change in METHODS.items() if name != "sft"}
    fields = sorted({field for changed in changes.values() for field in changed} - set(_TUNED))
    ours = _signature({**recipe, **config["rl"]}, fields)
    return next((name for name, changed in changes.items() if _signature({**recipe, **changed}, fields) == ours), "")


_TUNED = ("autonomous", "learning_rate", "clip_low", "clip_high", "entropy_bonus")  # tell no method from another


def _signature(rl: Mapping[str, Any], fields: Iterable[str]) -> list[Any]:
    """Returns what tells methods apart: the words among the fields, and of a number whether it is 0 or infinite."""
    return [value if isinstance(value := rl[name], str | bool) else (value > 0, math.isinf(value)) for name in fields]


def select(config: ConfigDict, choice: str, cards: Mapping[str, dict[str, Any]] | None = None) -> ConfigDict:
    """Changes a config in place to train with a method, on certain cards, and returns it.

    Args:
      config: to change.
      choice: the name of a method, of an entry of `cards`, or both with a comma between them.
      cards: name -> fields, such as "rl.slots", with the values with which the run fits the cards.

    Raises:
      ValueError: a name is unknown, or there are two of a kind.
    """
    names, cards = choice.split(","), cards or {}
    unknown = [name for name in names if name not in METHODS and name not in cards]
    if unknown:
        raise ValueError(f"config:{unknown[0]}: must be one of {', '.join([*METHODS, *cards])}")
    for kind in (METHODS, cards):
        if len(chosen := [name for name in names if name in kind]) > 1:
            raise ValueError(f"config:{choice}: {' and '.join(chosen)} cannot be chosen together")
    for name in names:
        if name in cards:
            config.update_from_flattened_dict(cards[name])
        else:
            config.rl.update(METHODS[name](config.rl))
            config.stages = ("sft", "eval") if name == "sft" else config.stages
    return config
