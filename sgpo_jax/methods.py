"""The methods that are compared: SGPO, the paper's baselines and its ablations, each as changes of a config.

`--config=configs/qwen7b.py:luffy` selects one. All begin from the same warm-up and have the same number of samples for
a problem in a step; "self_strategies" takes more before the first. docs/methods.md has the equations, and where a
method differs from its authors' code.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

# What LUFFY and HPT share: the demonstration, no clipping of the ratio, every token of a batch with the same weight.
_DEMONSTRATION: dict[str, Any] = {
    "guide": "demonstration", "guided": 1, "clip_low": 1.0, "clip_high": float("inf"), "normaliser": "constant",
    "entropy_bonus": 0.001,
}  # fmt: skip

# name -> (config.rl as it is -> what is changed in it)
METHODS: dict[str, Callable[[ConfigDict], dict[str, Any]]] = {
    "sgpo": lambda rl: {},
    # Baselines: Table 1.
    "sft": lambda rl: {},  # and no stage rl
    "grpo": lambda rl: {"autonomous": rl.autonomous + rl.guided, "guided": 0},
    "luffy": lambda rl: {
        **_DEMONSTRATION, "autonomous": rl.autonomous + rl.guided - 1,
        "advantage": "mixed", "weight": "mixed", "distillation": "shaped",
    },
    "hpt": lambda rl: {
        **_DEMONSTRATION, "autonomous": rl.autonomous + rl.guided, "learning_rate": 5 * rl.learning_rate,
        "advantage": "gated", "weight": "gated", "distillation": "nll",
    },
    # Ablations: Tables 2, 3, 6, 7. Without strategy distillation it is "grpo".
    "no_grpo": lambda rl: {"advantage": "none"},
    "no_proximal": lambda rl: {"delta": float("inf"), "target": "mean"},
    "no_kl_clip": lambda rl: {"delta": float("inf")},
    "no_target_selection": lambda rl: {"target": "mean"},
    "fixed_weight": lambda rl: {"weight": "fixed"},
    "group_advantage_weight": lambda rl: {"weight": "group_advantage"},
    "reverse_kl": lambda rl: {"distillation": "reverse_kl"},
    "direct_sft": lambda rl: {"distillation": "nll"},
    # Beyond the paper: SDPO's signals, and strategies of the student's own.
    "jensen_shannon": lambda rl: {"distillation": "jensen_shannon"},
    "top_k_kl": lambda rl: {"distillation": "top_k_kl"},
    "self_strategies": lambda rl: {"guide": "self"},
}  # fmt: skip


def select(config: ConfigDict, method: str) -> ConfigDict:
    """The config, changed in place to train by the method.

    Raises:
      ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"config:{method}: must be one of {', '.join(METHODS)}")
    config.rl.update(METHODS[method](config.rl))
    if method == "sft":
        config.stages = ("sft", "eval")
    return config
