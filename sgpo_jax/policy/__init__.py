"""The policy of a config: its model, tokenizer and prompts, and its graded responses."""

from sgpo_jax.policy import memory, positions
from sgpo_jax.policy.policy import Policy, Run, load, place, scratch_config, with_system

__all__ = ["Policy", "Run", "load", "memory", "place", "positions", "scratch_config", "with_system"]
