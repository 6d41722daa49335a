"""Problems: reads, checks, filters, splits and generates rows."""

from sgpo_jax.data.filtering import Sieve, sift
from sgpo_jax.data.rows import load, load_parts
from sgpo_jax.data.splits import batches, split_sft, split_validation, steps_per_epoch

__all__ = ["Sieve", "batches", "load", "load_parts", "sift", "split_sft", "split_validation", "steps_per_epoch"]
