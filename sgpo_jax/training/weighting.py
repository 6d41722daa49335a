"""Who gets which advantage, and how much each problem's target weighs. Runs on the host.

Axis key: B problems, G1 autonomous and G2 guided responses.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sgpo_jax import losses

Array = Any


@dataclass(frozen=True)
class Weighting:
    """Advantages, targets and their weights. Units and sources are in `config.base`; the defaults are the paper's."""

    # "strategy" or "self": the guided responses are sampled with the strategy, and only the correct ones may be
    # targets; "demonstration": they are the expert's, and are targets as they are.
    guide: str = "strategy"
    # "reachable" selects one for each problem (Eq. 4), "mean" takes all with equal parts of the weight (Eq. 2). "own"
    # takes the student's autonomous responses, right or wrong, of which each has the weight 1 / G1.
    target: str = "reachable"
    # "group" (Eq. 1); "centred": not divided by the deviation (Dr. GRPO); "mixed": centred in the group that the
    # demonstration joins (LUFFY); "gated": centred, and 0 where the demonstration takes over (HPT); "none".
    advantage: str = "group"
    # "adaptive" (Eq. 6), "group_advantage" (Eq. 8), "fixed" (1); "mixed": the demonstration's advantage (LUFFY);
    # "gated": `sft_weight` where the demonstration takes over (HPT).
    weight: str = "adaptive"
    alpha0: float = 0.5  # Eq. 6
    gamma: float = 0.1  # Eq. 6
    alpha_max: float = 0.8  # Eq. 6, 8
    gate: float = 0.0  # mean reward; HPT
    sft_weight: float = 1.0  # coefficient of the imitation loss; HPT
    overlong_buffer: int = 0  # tokens before the limit over which a penalty of length grows; DAPO
    overlong_penalty: float = 1.0  # reward at the limit, subtracted; DAPO
    mask_cut: bool = False  # responses that are cut at the limit have advantage 0; DAPO
    guided_grpo: float = 0.0  # above 0: the guided responses have a policy loss too
    reference_kl: float = 0.0  # above 0: or a KL to the reference
    teacher: str = "live"  # a "gated" teacher needs the batch's mean reward: see `teacher.Teaching`

    @classmethod
    def from_config(cls, rl: ConfigDict) -> "Weighting":
        """Reads the section `rl` of a config."""
        return cls(**{field.name: rl[field.name] for field in fields(cls)})


def weigh(
    auto: Array, guided: Array, weighting: Weighting, penalty: Array = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the advantages of the autonomous responses and the weight of each problem's target.

    Args:
      auto: `[B,G1]` rewards.
      guided: `[B,G2]` rewards; G2 = 0 makes all weights 0.
      weighting: by which rules.
      penalty: `[B,G1]`, added to the rewards for the advantages, at most 0.

    Returns:
      (advantages `[B,G1]`, alpha `[B]`), float32.
    """
    centred = jax.vmap(partial(losses.group_advantages, scale=False))
    gate = jax.vmap(partial(losses.hpt_gate, gate=weighting.gate))
    eq8 = jax.vmap(partial(losses.group_advantage_weight, alpha_max=weighting.alpha_max))
    size, scored = auto.shape[1], auto + penalty

    def eq6():
        coefficients = weighting.alpha0, weighting.gamma, weighting.alpha_max
        return losses.adaptive_weight(auto.mean(axis=1), guided.mean(axis=1), *coefficients)

    def mixed():
        return np.asarray(centred(np.concatenate([scored, guided], axis=1)))

    advantages = {
        "group": lambda: jax.vmap(losses.group_advantages)(scored),
        "centred": lambda: centred(scored),
        "mixed": lambda: mixed()[:, :size],
        "gated": lambda: centred(scored) * gate(auto)[:, None],
        "none": lambda: np.zeros_like(auto),
    }
    weights = {
        "adaptive": eq6,
        "group_advantage": lambda: eq8(auto, guided.max(axis=1)),
        "fixed": lambda: np.ones(len(auto)),
        "mixed": lambda: mixed()[:, size],
        "gated": lambda: weighting.sft_weight * (1 - gate(auto)),
    }
    alpha = weights[weighting.weight]() if guided.size else np.zeros(len(auto))
    return np.asarray(advantages[weighting.advantage](), np.float32), np.asarray(alpha, np.float32)
