"""The policy that a config names: its model, tokenizer and prompts, and graded responses from it."""

from sgpo_jax.policy.policy import Policy, load, place, scratch_config

__all__ = ["Policy", "load", "place", "scratch_config"]
