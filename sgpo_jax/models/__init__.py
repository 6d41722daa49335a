"""The language models. Everything above reaches them through these functions of arrays."""

from sgpo_jax.models.config import ModelConfig
from sgpo_jax.models.decoder import REMAT, Cache, apply, head, head_weight, init, init_cache, positions_of

__all__ = ["REMAT", "Cache", "ModelConfig", "apply", "head", "head_weight", "init", "init_cache", "positions_of"]
