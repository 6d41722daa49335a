"""A small model of every family, and random parameters and adapters for it."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from sgpo_jax.models import LongRope, ModelConfig, RopeScaling, YarnScaling, init, lora

SHAPE = dict(
    vocab_size=151,
    hidden_size=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_size=20,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_positions=64,
)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16)
YARN = YarnScaling(factor=4.0, original_max_positions=16, attention_factor=1.2)
CONFIGS = {
    "qwen2": ModelConfig(architecture="Qwen2ForCausalLM", qkv_bias=True, tie_embeddings=False, **SHAPE),
    "qwen3": ModelConfig(architecture="Qwen3ForCausalLM", qk_norm=True, tie_embeddings=True, **SHAPE),
    "llama": ModelConfig(architecture="LlamaForCausalLM", tie_embeddings=False, rope_scaling=SCALING, **SHAPE),
    "mistral": ModelConfig(
        architecture="MistralForCausalLM", tie_embeddings=False, window=3, sliding=(True,) * 3, **SHAPE
    ),
    "olmo2": ModelConfig(architecture="Olmo2ForCausalLM", tie_embeddings=False, qk_norm=True, **SHAPE),
    "olmo3": ModelConfig(
        architecture="Olmo3ForCausalLM", tie_embeddings=False, qk_norm=True, window=3, sliding=(True, False, True),
        sliding_rope_theta=1e3, rope_scaling=YARN, **SHAPE,
    ),
    "qwen3moe": ModelConfig(
        architecture="Qwen3MoeForCausalLM", tie_embeddings=False, qk_norm=True, experts=6, experts_per_token=2,
        normalize_experts=True, **SHAPE,
    ),
    "phi3": ModelConfig(
        architecture="Phi3ForCausalLM", tie_embeddings=False, partial_rotary=0.75, window=4, sliding=(True,) * 3,
        rope_scaling=LongRope(
            short_factor=(1.0, 1.5), long_factor=(2.0, 3.0), original_max_positions=32, stretched_max_positions=64
        ), **SHAPE,
    ),
    "gemma3": ModelConfig(
        architecture="Gemma3ForCausalLM", tie_embeddings=True, qk_norm=True, window=3, sliding=(False, True, True),
        sliding_rope_theta=1e3, query_scalar=9, **SHAPE,
    ),
}  # fmt: skip


def random_params(config, dtype=np.float32, seed=0):
    """Returns a tree of random values, biases and norms too, which `init` leaves at zero and one."""
    rng = np.random.default_rng(seed)
    tree = jax.eval_shape(lambda: init(jax.random.key(0), config))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), tree)


def random_adapters(config, chosen, seed=0):
    """Returns adapters of a `Lora` with a random B too, which `lora.init` leaves at zero."""
    leaves, tree = jax.tree.flatten(lora.init(jax.random.key(seed), config, chosen))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


def assert_same(left, right):
    left, right = flatten_dict(left), flatten_dict(right)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        assert left[path].tobytes() == right[path].tobytes(), path
