"""Language models: one decoder as functions of arrays, and its parameters read from and written to checkpoints."""

from sgpo_jax.models.attention_heads import check_heads
from sgpo_jax.models.config import ModelConfig
from sgpo_jax.models.decoder import (
    REMAT,
    Cache,
    apply,
    decode,
    expert_load,
    head,
    head_weight,
    init,
    init_cache,
    other_rows,
    positions_of,
)
from sgpo_jax.models.layout import for_decoding
from sgpo_jax.models.rotary import LinearScaling, LongRope, RopeScaling, YarnScaling
from sgpo_jax.models.sequences import Sequences

__all__ = [
    "Cache",
    "LinearScaling",
    "LongRope",
    "ModelConfig",
    "REMAT",
    "RopeScaling",
    "Sequences",
    "YarnScaling",
    "apply",
    "check_heads",
    "decode",
    "expert_load",
    "for_decoding",
    "head",
    "head_weight",
    "init",
    "init_cache",
    "other_rows",
    "positions_of",
]
