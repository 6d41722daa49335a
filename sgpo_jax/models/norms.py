"""The norms of the families: RMS norms, some of which multiply by 1 + scale."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sgpo_jax.models.config import ModelConfig


class OffsetNorm(nn.Module):
    """The RMS norm that multiplies by 1 + scale."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],))
        normed = nn.RMSNorm(epsilon=self.epsilon, dtype=jnp.promote_types(jnp.float32, self.dtype), use_scale=False)(x)
        return (normed * (1 + scale)).astype(self.dtype)


def make_norm(config: ModelConfig, dtype: Any, name: str) -> nn.Module:
    """Returns a norm of the family."""
    return (OffsetNorm if config.family.norm_offset else nn.RMSNorm)(epsilon=config.norm_eps, dtype=dtype, name=name)
