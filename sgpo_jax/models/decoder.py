"""Defines one decoder-only transformer for all families of `families.FAMILIES`; ModelConfig switches its parts.

Axis key: B batch, T tokens, S cache length, D hidden, H query heads, K key/value heads, N head size, L layers.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sgpo_jax.models import experts, quantised, rotary
from sgpo_jax.models.attention import append, cache_shape, fill
from sgpo_jax.models.attention_plain import SAVED
from sgpo_jax.models.cache_codes import empty
from sgpo_jax.models.config import ModelConfig
from sgpo_jax.models.layout import layer_name
from sgpo_jax.models.norms import make_norm
from sgpo_jax.models.parameters import Weight, draw_with
from sgpo_jax.models.products import dot_in_blocks, low_rank
from sgpo_jax.models.sequences import Sequences, attend_whole
from sgpo_jax.models.windows import attend, attend_cache
from sgpo_jax.sharding import ROWS, constrain, context_ways, dividing, exact_products, fit_spec, spec_for

Cache = dict[str, Any]  # see `init_cache`

ACTIVATIONS: dict[str, Any] = {"silu": nn.silu, "gelu_pytorch_tanh": nn.gelu}

# What a layer keeps for its backward pass besides its input. The backward pass computes the rest again.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # every product of activations and weights
}


def rotate(x: jax.Array, angle: jax.Array, factor: Any = None) -> jax.Array:
    """Applies the rotary position embedding to x `[B,T,heads,N]`, times a factor.

    angle `[B,T,M/2]` is in radians; of the features of a head the first M are rotated.
    """
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    if factor is not None:
        cos, sin = cos * factor, sin * factor
    rotated = 2 * angle.shape[-1]
    first, second = jnp.split((x if rotated == x.shape[-1] else x[..., :rotated]).astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return out if rotated == x.shape[-1] else jnp.concatenate([out, x[..., rotated:]], axis=-1)


def other_rows(split: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the axes that split rows where weights are split over the axes `split`."""
    return tuple(axis for axis in ROWS if axis not in split)


class Block(nn.Module):
    """A layer: attention and a gated MLP, with norms before or after each, or both.

    The carry is the residual stream and, when there is a cache, its keys and values of all layers.
    """

    config: ModelConfig
    dtype: Any
    split: tuple[str, ...] = ("tensor",)  # axes that split the weights; more than the tensor axis in decoding alone
    each: int = 1  # tokens of a row of the cache that are decoded at once; each is a row of its own but for the cache

    @nn.compact
    def __call__(self, carry, layer, angle, segments, lengths, stacks):
        config, dtype, family = self.config, self.dtype, self.config.family
        x, keys, values = carry
        batch, length = x.shape[:2]
        # In training both axes split the residual stream by token. A single decoded token is not divisible.
        residual, features = (ROWS, dividing(length, ("context", "tensor")), None), (ROWS, "context", "tensor")

        def dense(name, features, bias=False):
            _, *spec = spec_for(f"layers/{name}/kernel", (config.num_layers, 1, features))
            beside = {} if self.is_initializing() else self.get_variable("params", name)

            def dot(x, kernel, *_, **__):
                if keys is not None and "kernel_scale" in beside:
                    product = quantised.column_product(x, beside["kernel"], beside["kernel_scale"])
                elif "kernel_scale" in beside:
                    codes = {leaf: beside[leaf] for leaf in ("kernel", "kernel_scale")}
                    product = quantised.product(x, codes, tuple(spec))
                elif keys is not None:  # sampling takes the fastest product, and has its own layout of the weights
                    product = x @ kernel
                else:
                    # The kernel already has this layout. The constraint gives it to the gradient too, which would
                    # otherwise be summed whole on every device.
                    product = dot_in_blocks(x, constrain(kernel, *spec))
                if "lora_a" not in beside:
                    return product
                a, b = beside["lora_a"], beside["lora_scale"] * beside["lora_b"]  # see `lora.attach`
                a, b = constrain(a, spec[0], None), constrain(b, None, spec[1])
                return product + low_rank(x, a.astype(dtype), b.astype(dtype))

            return nn.Dense(
                features, use_bias=bias, dtype=dtype, dot_general=dot, name=name,
                kernel_init=draw_with(self, nn.linear.default_kernel_init),
            )  # fmt: skip

        def project(x, bias=False, **features):
            """Returns the products of x with the kernels of these names, and as many features as the numbers say."""
            names, sizes = tuple(features), tuple(features.values())
            if names not in stacks:
                return [dense(name, size, bias)(x) for name, size in features.items()]
            from sgpo_jax.models import products_gpu

            outs = products_gpu.products(x[:, 0], names, sizes, stacks[names], layer, self.split)
            biases = [self.get_variable("params", name)["bias"].astype(dtype) if bias else 0 for name in names]
            return [(out + bias)[:, None] for out, bias in zip(outs, biases, strict=True)]

        norm = partial(make_norm, config, dtype)

        def spread(x, size=1):
            """Moves rows `[B,1,D]`, or features of weights `size` wide, to the devices that split the weights."""
            if self.split == ("tensor",):
                return x
            return constrain(x, other_rows(self.split), None, dividing(size, self.split))

        def by_head(name, out):
            out = constrain(spread(out, out.shape[-1]), *features)
            if family.whole_qk_norm and name != "v":
                out = norm(f"{name}_norm")(out)
            return out.reshape(batch, length, -1, config.head_dim)

        def joined(x):
            """Joins tokens that the tensor axis splits: else gradients of weights would gather the whole batch."""
            return constrain(x, ROWS, "context", None) if context_ways() > 1 else x

        def before(name):
            """Returns what a part of the layer reads."""
            return spread(joined(norm(name)(x) if family.pre_norm else x))

        def after(name, out):
            """Returns what a part of the layer adds to the residual stream."""
            return norm(name)(constrain(joined(out), *residual)) if family.post_norm else joined(out)

        slides = config.sliding or (False,)
        sliding = slides[0] if len(set(slides)) == 1 else jnp.asarray(slides)[layer]
        h = before("attn_norm")
        counts = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        sizes = {name: count * config.head_dim for name, count in counts.items()}
        query, key, value = map(by_head, sizes, project(h, config.qkv_bias, **sizes))
        if config.qk_norm and not family.whole_qk_norm:
            query, key = norm("q_norm")(query), norm("k_norm")(key)
        if config.query_scalar not in (None, config.head_dim):
            query = query * (config.head_dim / config.query_scalar) ** 0.5  # `attend` divides by the root of head_dim
        factor = rotary.factor(config.rope_scaling)
        if config.sliding_rope_theta is not None:
            angle = jnp.where(sliding, angle[1], angle[0])
            factor = None if factor is None else jnp.where(sliding, 1.0, factor)
        query, key = rotate(query, angle, factor), rotate(key, angle, factor)
        if lengths is None:
            over = attend_whole if isinstance(segments, Sequences) else attend
            attention = over(query, key, value, segments, config.window, sliding)
            if keys is not None:
                # The scan carries the cache and writes it in place: stacking the layers' outputs would copy it.
                keys, values = (fill(cache, new, layer) for cache, new in ((keys, key), (values, value)))
        else:
            keys, values = (
                append(cache, new[:, 0], layer, lengths, self.each) for cache, new in ((keys, key), (values, value))
            )
            reached = jnp.where(segments[:, 0] > 0, lengths + 1, 1)  # of a row that is not decoded nothing is read
            attention = attend_cache(
                query[:, 0], keys, values, layer, reached, config.window, sliding, self.each
            )[:, None]
        attention = checkpoint_name(constrain(attention, *features), SAVED)
        attention = spread(attention, attention.shape[-1])
        (out,) = project(attention, o=config.hidden_size)
        x = constrain(x + after("attn_post_norm", out), *residual)

        h = before("mlp_norm")
        if config.experts:
            out = self.mixture(h, segments.real if isinstance(segments, Sequences) else segments)
        else:
            gate, up = project(h, gate=config.mlp_size, up=config.mlp_size)
            gated = ACTIVATIONS[family.activation](gate) * up
            # Without this, the partitioner gathers the MLP and all-reduces full-width weight gradients.
            gated = constrain(gated, *features) if len(self.split) == 1 else spread(gated, config.mlp_size)
            (out,) = project(gated, down=config.hidden_size)
        x = constrain(x + after("mlp_post_norm", out), *residual)
        return (x, keys, values), None

    def mixture(self, h, segments):
        """Returns what the experts of each token make of it, and counts the tokens of each expert."""
        config, count = self.config, self.config.experts
        sizes = (count, config.hidden_size, config.mlp_size)
        kernels = []
        for name, shape in (("gate", sizes), ("up", sizes), ("down", (count, config.mlp_size, config.hidden_size))):
            _, *spec = spec_for(f"layers/experts_{name}/kernel", (config.num_layers, *shape))
            init = draw_with(self, nn.initializers.lecun_normal(batch_axis=0))
            kernels.append(constrain(Weight("kernel", shape, init, name=f"experts_{name}")().astype(self.dtype), *spec))
        router = Weight("weight", (count, config.hidden_size), nn.initializers.normal(0.02), name="router")()
        chosen, weights = experts.route(h, router, config.experts_per_token, config.normalize_experts)
        real = jnp.broadcast_to((segments != 0)[..., None], chosen.shape)
        self.sow("load", "tokens", jnp.zeros(count, jnp.int32).at[chosen].add(real.astype(jnp.int32)))
        places = fit_spec(h.shape, (ROWS if len(self.split) == 1 else other_rows(self.split), "context"))
        return experts.mix(h, chosen, weights, experts.Kernels(*kernels), places, dividing(count, self.split))


class Decoder(nn.Module):
    """The decoder: embedding, `num_layers` blocks, final norm. `logprobs` applies the output head.

    The blocks are under one scan, unless each has parameters of its own, see `layout.for_decoding`.
    """

    config: ModelConfig
    dtype: Any
    remat: str
    split: tuple[str, ...] = ("tensor",)

    @nn.compact
    def __call__(self, tokens, positions, mask, cache, stacks):
        config, length = self.config, tokens.shape[1]
        if cache is None and (ways := context_ways()) > 1:
            tokens, positions, mask = (
                constrain(jnp.pad(x, ((0, 0), (0, -length % ways))), ROWS, "context") for x in (tokens, positions, mask)
            )
        draw = draw_with(self, nn.linear.default_embed_init)
        embed = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=draw, name="embed")
        x = embed(constrain(tokens, other_rows(self.split), None)) if len(self.split) > 1 else embed(tokens)
        if config.family.scaled_embedding:
            x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        x = constrain(x, ROWS, "context", None)

        def angles(theta, scaling):
            frequencies = jnp.asarray(rotary.frequencies(theta, config.rotary_size, scaling))
            return constrain(positions[..., None] * frequencies, ROWS, "context", None)

        angle = angles(config.rope_theta, config.rope_scaling)
        if config.sliding_rope_theta is not None:
            angle = angle, angles(config.sliding_rope_theta, None)
        keys, values = (None, None) if cache is None else (cache["key"], cache["value"])
        decoding = cache is not None and tokens.shape[1] == 1
        lengths = constrain(cache["length"], ROWS) if decoding else None
        each = len(tokens) // len(lengths) if decoding else 1
        if each > 1:
            lengths = (lengths[:, None] + jnp.arange(each)).reshape(-1)

        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        settings = config, self.dtype, self.split, each
        carry, rest = (x, keys, values), (angle, jax.tree.map(lambda x: x.astype(jnp.int32), mask), lengths, stacks)
        if self.has_variable("params", layer_name(0)):
            for i in range(config.num_layers):
                carry, _ = block(*settings, name=layer_name(i))(carry, i, *rest)
        else:
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "load": 0},
                split_rngs={"params": True},
                in_axes=(0, *[nn.broadcast] * 4),
                length=config.num_layers,
                # It traces a layer twice; `init` draws as it always did.
                check_constancy_invariants=self.is_initializing(),
            )(*settings, name="layers")
            carry, _ = layers(carry, jnp.arange(config.num_layers), *rest)
        x, keys, values = carry
        if cache is not None:
            mask = mask.reshape(-1, each * mask.shape[1])
            cache = {"key": keys, "value": values, "length": cache["length"] + mask.sum(axis=1, dtype=jnp.int32)}
        hidden = make_norm(config, self.dtype, "norm")(x)
        if not config.tie_embeddings and self.is_initializing():
            nn.Dense(config.vocab_size, use_bias=False, name="head")(hidden[:, :1])
        return hidden if hidden.shape[1] == length else hidden[:, :length], cache


@partial(jax.jit, static_argnames="config")
def init(rng: jax.Array, config: ModelConfig) -> dict[str, Any]:
    """Returns random float32 parameters; `models.param_mapping.NAMES` lists the paths of the tree."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    module = Decoder(config, jnp.float32, remat="none")
    params = module.init(rng, tokens, tokens, tokens == 0, None, {})["params"]
    # GPT-2's deviation of 0.02: Flax's rows of unit variance would saturate the softmax of a tied head.
    embedding = params["embed"]["embedding"]
    scale = 0.02 / (1.0 / config.hidden_size**0.5)
    return {**params, "embed": {"embedding": embedding * scale}}


def apply(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array | Sequences,
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
        attends only within its segment. Or `Sequences` that share prompts, where no axis splits the tokens of rows.
      cache: from `init_cache`. Several tokens of a row (prefill) fill its empty cache, real tokens first and padding
        after them. A single token is decoded, see `decode`.
      dtype: of activations and matrix products; norms, rotary angles and softmax are float32.
      remat: a key of `REMAT`: what the backward pass computes again.

    Returns:
      (hidden `[B,T,D]` after the final norm, cache or None).
    """
    module = Decoder(config, dtype, remat)
    with exact_products(dtype):
        return module.apply({"params": params}, tokens, positions, mask, cache, {})  # type: ignore[return-value]


def expert_load(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array | Sequences,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Computes hidden states as `apply`, and counts the tokens that each expert of each layer takes, without padding.

    Args:
      params, config, tokens, positions, mask, dtype, remat: as in `apply`.

    Returns:
      (hidden `[B,T,D]`, tokens `[L,E]` int32).
    """
    module = Decoder(config, dtype, remat)
    with exact_products(dtype):
        (hidden, _), counted = module.apply({"params": params}, tokens, positions, mask, None, {}, mutable=["load"])
    return hidden, counted["load"]["layers"]["tokens"][0]


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
      params: as in `apply`, or from `for_decoding` with the same `split`.
      config, dtype: as in `apply`.
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
    params, stacks = {name: leaf for name, leaf in params.items() if name != "stacks"}, params.get("stacks", {})
    with exact_products(dtype):
        hidden, cache = module.apply({"params": params}, *columns, cache, stacks)  # type: ignore[assignment]
    return hidden[:, 0].reshape(*tokens.shape, -1), cache


def head(params: dict[str, Any], config: ModelConfig) -> jax.Array:
    """Returns the output projection `[D,V]`: the transposed embedding when tied."""
    weight = head_weight(params, config)
    return weight.T if config.tie_embeddings else weight


def head_weight(params: dict[str, Any], config: ModelConfig) -> jax.Array:
    """Returns the parameter behind `head`: `[D,V]`, or the embedding `[V,D]` when tied."""
    return params["embed"]["embedding"] if config.tie_embeddings else params["head"]["kernel"]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """Returns an empty cache for `slots` tokens a row: key and value `[K,L,B,S,N]`, `Codes` if int8; length `[B]`."""
    shape = (config.num_kv_heads, config.num_layers, batch, *cache_shape(slots, config.head_dim))
    return {"key": empty(shape, dtype), "value": empty(shape, dtype), "length": jnp.zeros(batch, jnp.int32)}


def positions_of(mask: jax.Array) -> jax.Array:
    """Returns positions `[B,T]` that count real tokens from 0; padding before them gets 0."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
