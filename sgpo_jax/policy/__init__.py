"""The policy that a config names: its model, tokenizer and prompts, and graded responses from it."""

from sgpo_jax.policy.policy import Policy, load, place, scratch_config
from sgpo_jax.policy.run import Run

__all__ = ["Policy", "Run", "load", "place", "scratch_config"]
