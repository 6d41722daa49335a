"""SGPO, the paper's baselines and its ablations, each as changes of a config.

`--config=configs/qwen7b.py:luffy` selects a method, `:h100x32` cards that the run is to fit, `:luffy,h100x32` both. All
methods start from the same warm-up and draw the same number of samples per problem and step; only "self_strategies"
draws more, before the first step. docs/methods.md has the equations, and says where a method differs from its authors'
code.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

# LUFFY and HPT both use the demonstration, do not clip the ratio, and weigh all tokens of a batch equally.
_DEMONSTRATION: dict[str, Any] = {
    "guide": "demonstration", "guided": 1, "clip_low": 1.0, "clip_high": float("inf"), "normaliser": "constant",
    "entropy_bonus": 0.001,
}  # fmt: skip

# name -> function of config.rl that returns the fields to change
METHODS: dict[str, Callable[[ConfigDict], dict[str, Any]]] = {
    "sgpo": lambda rl: {},
    # Baselines: Table 1.
    "sft": lambda rl: {},  # `select` also drops the stage rl
    "grpo": lambda rl: {"autonomous": rl.autonomous + rl.guided, "guided": 0},
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
}  # fmt: skip


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
