"""Sampling and grading benchmark sets: avg@k, pass@k, maj@k, resumable problem by problem."""

from sgpo_jax.evaluation.sets import Chosen, Settings, check_sets, evaluate, evaluate_sets, summarize

__all__ = ["Chosen", "Settings", "check_sets", "evaluate", "evaluate_sets", "summarize"]
