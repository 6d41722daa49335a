"""Language models: one decoder as functions of arrays, and its parameters read from and written to checkpoints."""

from sgpo_jax.models.config import ModelConfig, RopeScaling
from sgpo_jax.models.decoder import (
    REMAT,
    Cache,
    apply,
    decode,
    for_decoding,
    head,
    head_weight,
    init,
    init_cache,
    other_rows,
    positions_of,
)

__all__ = [
    "Cache",
    "ModelConfig",
    "REMAT",
    "RopeScaling",
    "apply",
    "decode",
    "for_decoding",
    "head",
    "head_weight",
    "init",
    "init_cache",
    "other_rows",
    "positions_of",
]
