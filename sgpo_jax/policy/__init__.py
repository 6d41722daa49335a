"""The policy of a config: its model, tokenizer and prompts, and its graded responses."""

from sgpo_jax.policy.policy import Policy, load, place, scratch_config
from sgpo_jax.policy.run import Run

__all__ = ["Policy", "Run", "load", "place", "scratch_config"]
