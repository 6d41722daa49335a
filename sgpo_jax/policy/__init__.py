"""The policy of a config: its model, tokenizer and prompts, and its graded responses."""

from sgpo_jax.policy import memory, positions
from sgpo_jax.policy.policy import Policy, Run, check_weights, load, place, scratch_config, with_system

__all__ = [
    "Policy", "Run", "check_weights", "load", "memory", "place", "positions", "scratch_config", "with_system"
]  # fmt: skip
