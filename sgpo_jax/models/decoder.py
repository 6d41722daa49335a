"""Defines one decoder-only transformer for Qwen2/2.5, Qwen3, Llama 3.x and SmolLM2; ModelConfig switches its parts.

Axis key: B batch, T tokens, S cache length, D hidden, H query heads, K key/value heads, N head size, L layers.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sgpo_jax.models.attention import SAVED, append, attend, attend_cache, cache_shape
from sgpo_jax.models.config import ModelConfig
from sgpo_jax.sharding import BATCH, constrain, dividing, exact_products, platform, spec_for

Cache = dict[str, jax.Array]

BLOCK = 128  # terms of a float32 product that a CPU sums in one chain

# What a layer keeps for its backward pass besides its input. The backward pass computes the rest again.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # every product of activations and weights
}


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the frequencies of the rotary embedding `[N/2]` in radians per position, with "llama3" scaling if set."""
    # Rounded to float32 where transformers rounds: the last bit of a frequency is visible at position 10,000.
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequency = 1 / (config.rope_theta ** exponent.astype(np.float64)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Long wavelengths are multiplied by `factor`, short ones are kept, and those between are interpolated.
    wavelength = 2 * np.pi * (1 / frequency)
    rotations = scaling.original_max_positions * (1 / wavelength)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * frequency / scaling.factor + keep * frequency


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Applies the rotary position embedding to x `[B,T,heads,N]`; angle `[B,T,N/2]` is in radians."""
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def dot_in_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies `[...,D]` by `[D,F]`; on CPU, a long float32 sum is split into blocks of about BLOCK terms.

    XLA's CPU product adds up all of D in one chain, whose rounding error is twice that of torch. Where residuals reach
    25,000, as in SmolLM2, the logits show it. Other types round the result so coarsely that the order does not matter.
    """
    if x.dtype != jnp.float32 or x.shape[-1] <= 4 * BLOCK or platform() != "cpu":
        return x @ kernel
    return _in_blocks(x, kernel)


@jax.custom_vjp
def _in_blocks(x, kernel):
    edges = np.linspace(0, x.shape[-1], -(-x.shape[-1] // BLOCK) + 1).astype(int)[1:-1].tolist()
    sums = [a @ b for a, b in zip(jnp.split(x, edges, axis=-1), jnp.split(kernel, edges), strict=True)]
    while len(sums) > 1:
        sums = [sums[i] if i + 1 == len(sums) else sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
    return sums[0]


def _in_blocks_backward(saved, gradient):
    # Automatic differentiation would make a product of every block, and none would have a shorter sum than these two.
    x, kernel = saved
    d_kernel = x.reshape(-1, x.shape[-1]).T @ gradient.reshape(-1, gradient.shape[-1])
    return gradient @ kernel.T, d_kernel


_in_blocks.defvjp(lambda x, kernel: (_in_blocks(x, kernel), (x, kernel)), _in_blocks_backward)


def other_rows(split: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the axes that split rows where weights are split over the axes `split`."""
    return tuple(axis for axis in BATCH if axis not in split)


class Block(nn.Module):
    """A layer: pre-norm attention and a gated MLP.

    The carry is the residual stream and, when there is a cache, its keys and values of all layers.
    """

    config: ModelConfig
    dtype: Any
    split: tuple[str, ...] = ("tensor",)  # axes that split the weights; more than the tensor axis in decoding alone
    each: int = 1  # tokens of a row of the cache that are decoded at once; each is a row of its own but for the cache

    @nn.compact
    def __call__(self, carry, layer, angle, segments, lengths):
        config, dtype = self.config, self.dtype
        x, keys, values = carry
        batch, length = x.shape[:2]
        # In training the tensor axis splits the residual stream by token. A single decoded token is not divisible.
        residual = (BATCH, "tensor", None)

        def dense(name, features, bias=False):
            _, *spec = spec_for(f"layers/{name}/kernel", (config.num_layers, 1, features))
            beside = {} if self.is_initializing() else self.get_variable("params", name)

            def dot(x, kernel, *_, **__):
                if keys is not None:  # sampling takes the fastest product, and has its own layout of the weights
                    product = x @ kernel
                else:
                    # The kernel already has this layout. The constraint gives it to the gradient too, which would
                    # otherwise be summed whole on every device.
                    product = dot_in_blocks(x, constrain(kernel, *spec))
                if "lora_a" not in beside:
                    return product
                a, b = beside["lora_a"], beside["lora_scale"] * beside["lora_b"]  # see `lora.attach`
                a, b = constrain(a, spec[0], None), constrain(b, None, spec[1])
                return product + x @ a.astype(dtype) @ b.astype(dtype)

            return nn.Dense(features, use_bias=bias, dtype=dtype, dot_general=dot, name=name)

        def norm(name):
            return nn.RMSNorm(epsilon=config.norm_eps, dtype=dtype, name=name)

        def spread(x, size=1):
            """Moves rows `[B,1,D]`, or features of weights `size` wide, to the devices that split the weights."""
            if self.split == ("tensor",):
                return x
            return constrain(x, other_rows(self.split), None, dividing(size, self.split))

        def heads(name, count):
            out = dense(name, count * config.head_dim, config.qkv_bias)(h)
            out = spread(out, count * config.head_dim)
            return constrain(out, BATCH, None, "tensor").reshape(batch, length, count, config.head_dim)

        h = spread(norm("attn_norm")(x))
        query, key = heads("q", config.num_heads), heads("k", config.num_kv_heads)
        value = heads("v", config.num_kv_heads)
        if config.qk_norm:
            query, key = norm("q_norm")(query), norm("k_norm")(key)
        query, key = rotate(query, angle), rotate(key, angle)
        if lengths is None:
            attention = attend(query, key, value, segments)
            if keys is not None:
                # The scan carries the cache and writes it in place: stacking the layers' outputs would copy it.
                keys, values = (
                    jax.lax.dynamic_update_slice(cache, new.transpose(2, 0, 1, 3)[:, None], (0, layer, 0, 0, 0))
                    for cache, new in ((keys, key), (values, value))
                )
        else:
            keys, values = (
                append(cache, new[:, 0], layer, lengths, self.each) for cache, new in ((keys, key), (values, value))
            )
            reached = jnp.where(segments[:, 0] > 0, lengths + 1, 1)  # of a row that is not decoded nothing is read
            attention = attend_cache(query[:, 0], keys, values, layer, reached, self.each)[:, None]
        attention = checkpoint_name(constrain(attention, BATCH, None, "tensor"), SAVED)
        attention = spread(attention, attention.shape[-1])
        x = constrain(x + dense("o", config.hidden_size)(attention), *residual)

        h = spread(norm("mlp_norm")(x))
        gated = nn.silu(dense("gate", config.mlp_size)(h)) * dense("up", config.mlp_size)(h)
        # Without this, the partitioner gathers the MLP and all-reduces full-width weight gradients.
        gated = constrain(gated, BATCH, None, "tensor") if len(self.split) == 1 else spread(gated, config.mlp_size)
        x = constrain(x + dense("down", config.hidden_size)(gated), *residual)
        return (x, keys, values), None


class Decoder(nn.Module):
    """The decoder: embedding, `num_layers` blocks under one scan, final norm. `logprobs` applies the output head."""

    config: ModelConfig
    dtype: Any
    remat: str
    split: tuple[str, ...] = ("tensor",)

    @nn.compact
    def __call__(self, tokens, positions, mask, cache):
        config = self.config
        embed = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype, name="embed")
        x = embed(constrain(tokens, other_rows(self.split), None)) if len(self.split) > 1 else embed(tokens)
        x = constrain(x, BATCH, None, None)
        angle = constrain(positions[..., None] * jnp.asarray(rope_frequencies(config)), BATCH, None, None)
        keys, values = (None, None) if cache is None else (cache["key"], cache["value"])
        decoding = cache is not None and tokens.shape[1] == 1
        lengths = constrain(cache["length"], BATCH) if decoding else None
        each = len(tokens) // len(lengths) if decoding else 1
        if each > 1:
            lengths = (lengths[:, None] + jnp.arange(each)).reshape(-1)

        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.num_layers,
        )(config, self.dtype, self.split, each, name="layers")
        layer = jnp.arange(config.num_layers)
        (x, keys, values), _ = layers((x, keys, values), layer, angle, mask.astype(jnp.int32), lengths)
        if cache is not None:
            mask = mask.reshape(-1, each * mask.shape[1])
            cache = {"key": keys, "value": values, "length": cache["length"] + mask.sum(axis=1, dtype=jnp.int32)}
        hidden = nn.RMSNorm(epsilon=config.norm_eps, dtype=self.dtype, name="norm")(x)
        if not config.tie_embeddings and self.is_initializing():
            nn.Dense(config.vocab_size, use_bias=False, name="head")(hidden[:, :1])
        return hidden, cache


@partial(jax.jit, static_argnames="config")
def init(rng: jax.Array, config: ModelConfig) -> dict[str, Any]:
    """Returns random float32 parameters; `models.param_mapping.NAMES` lists the paths of the tree."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    module = Decoder(config, jnp.float32, remat="none")
    params = module.init(rng, tokens, tokens, tokens == 0, None)["params"]
    # GPT-2's deviation of 0.02: Flax's rows of unit variance would saturate the softmax of a tied head.
    embedding = params["embed"]["embedding"]
    scale = 0.02 / (1.0 / config.hidden_size**0.5)
    return {**params, "embed": {"embedding": embedding * scale}}


def apply(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    cache: Cache | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> tuple[jax.Array, Cache | None]:
    """Computes final hidden states and, with a cache, appends these tokens to it.

    Args:
      params: parameter tree of `init` or of an import, float32 or bfloat16.
      config: the model's shape.
      tokens: `[B,T]` token ids.
      positions: `[B,T]` positions for the rotary embedding, 0 at each row's first real token.
      mask: `[B,T]` bool, False on padding, which no token attends to. Padding may stand anywhere. Without a cache the
        mask may be int32: several sequences packed into one row are segments 1, 2, ..., and 0 is padding. A token
        attends only within its segment.
      cache: from `init_cache`. Several tokens of a row (prefill) fill its empty cache, real tokens first and padding
        after them. A single token is decoded, see `decode`.
      dtype: of activations and matrix products; norms, rotary angles and softmax are float32.
      remat: a key of `REMAT`: what the backward pass computes again.

    Returns:
      (hidden `[B,T,D]` after the final norm, cache or None).
    """
    module = Decoder(config, dtype, remat)
    with exact_products(dtype):
        return module.apply({"params": params}, tokens, positions, mask, cache)  # type: ignore[return-value]


def decode(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: jax.Array,
    active: jax.Array,
    cache: Cache,
    *,
    dtype: Any = jnp.float32,
    split: tuple[str, ...] = ("tensor",),
) -> tuple[jax.Array, Cache]:
    """Appends a token of each row to the cache, or J of them. A token attends to all earlier ones of its row.

    Args:
      params, config, dtype: as in `apply`.
      tokens: `[B]` token ids, or `[B,J]`, the first one first.
      active: `[B]` bool; where it is False, the tokens are not counted, and the next ones take their slots.
      cache: of B rows. Tokens past its end are not kept, and their hidden states mean nothing.
      split: the axes of the mesh that split the weights, see `sharding.weight_axes`. Rows are gathered over those of
        them that split rows, for the products of weights alone.

    Returns:
      (hidden `[B,D]` or `[B,J,D]` after the final norm, cache). To take tokens back, lower the cache's lengths.
    """
    module = Decoder(config, dtype, "none", split)
    positions = cache["length"]
    if tokens.ndim == 2:  # the products see J times as many rows
        each = tokens.shape[1]
        positions, active = positions[:, None] + jnp.arange(each), jnp.repeat(active, each)
    columns = (x.reshape(-1)[:, None] for x in (tokens, positions, active))
    with exact_products(dtype):
        hidden, cache = module.apply({"params": params}, *columns, cache)  # type: ignore[assignment]
    return hidden[:, 0].reshape(*tokens.shape, -1), cache


def head(params: dict[str, Any], config: ModelConfig) -> jax.Array:
    """Returns the output projection `[D,V]`: the transposed embedding when tied."""
    weight = head_weight(params, config)
    return weight.T if config.tie_embeddings else weight


def head_weight(params: dict[str, Any], config: ModelConfig) -> jax.Array:
    """Returns the parameter behind `head`: `[D,V]`, or the embedding `[V,D]` when tied."""
    return params["embed"]["embedding"] if config.tie_embeddings else params["head"]["kernel"]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """Returns an empty cache for `slots` tokens a row: key and value `[K,L,B,S,N]`, and `[B]` tokens in each row."""
    shape = (config.num_kv_heads, config.num_layers, batch, *cache_shape(slots, config.head_dim))
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype), "length": jnp.zeros(batch, jnp.int32)}


def positions_of(mask: jax.Array) -> jax.Array:
    """Returns positions `[B,T]` that count real tokens from 0; padding before them gets 0."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
