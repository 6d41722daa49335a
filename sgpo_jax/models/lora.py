"""Low-rank adapters (LoRA, arXiv 2106.09685): beside a frozen kernel W, `y = x W + s (x A) B`; only A and B learn.

The adapters are a tree of their own, `{"layers": {name: {"lora_a", "lora_b"}}}`, with an entry for every kernel that
the rule names. `attach` puts them beside the base's kernels, as the decoder reads them in training. `merge` adds them
up for sampling: a kernel becomes `W + s A B`, summed in float32 and rounded once, to the type of W.

Axis key: L layers, D features into a kernel, F out of it, r rank.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from sgpo_jax.models import param_mapping as table
from sgpo_jax.models import quantised
from sgpo_jax.models.config import ModelConfig
from sgpo_jax.sharding import exact_products, path_name

Adapters = dict[str, dict[str, dict[str, jax.Array]]]


@dataclass(frozen=True)
class Lora:
    """The shape of adapters and their scale. Units and sources are in `config.base`."""

    rank: int  # r
    alpha: float
    targets: str  # regular expression of the names of the kernels, such as "q|v"
    rslora: bool  # s = alpha / sqrt(r), of arXiv 2312.03732, in place of alpha / r

    @classmethod
    def from_config(cls, lora: ConfigDict) -> "Lora | None":
        """Reads the section `lora` of a config; None where the rank is 0, which trains all parameters."""
        return cls(**{field.name: lora[field.name] for field in fields(cls)}) if lora.rank else None

    @property
    def scale(self) -> float:
        """s, the factor of A B."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def kernels(config: ModelConfig, targets: str = ".*") -> dict[str, tuple[int, ...]]:
    """Returns the kernels of the layers that a rule names, as name -> shape `[L,D,F]`.

    Raises:
      ValueError: the rule names none of them.
    """
    shapes = flatten_dict(table.shapes(config)["layers"], sep="/")
    # Experts have a kernel each, for which peft has no adapters that transformers 4 knows.
    found = {
        path.removesuffix("/kernel"): leaf.shape
        for path, leaf in shapes.items()
        if path.endswith("/kernel") and leaf.ndim == 3
    }
    chosen = {name: shape for name, shape in found.items() if re.fullmatch(targets, name)}
    if not chosen:
        raise ValueError(
            f"config.lora.targets={targets!r}: must be a regular expression that matches the whole name of one or more "
            f"kernels of a {config.architecture}: {', '.join(found)}"
        )
    return chosen


def base_shapes(config: ModelConfig, base_dtype: str) -> dict[str, Any]:
    """Returns the frozen parameters with a jax.ShapeDtypeStruct for every leaf, as `lora.base_dtype` has them."""
    dtype = quantised.dtype_of(base_dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), table.shapes(config))
    return quantised.shapes(params, base_dtype) if base_dtype in quantised.CODES else params


def merged_kernels(config: ModelConfig, lora: Lora, base_dtype: str) -> dict[str, tuple[int, ...]]:
    """Returns the kernels, as `kernels` does, of which `merge` makes new ones."""
    return kernels(config, ".*" if base_dtype in quantised.CODES else lora.targets)


@partial(jax.jit, static_argnames=("config", "lora"))
def init(rng: jax.Array, config: ModelConfig, lora: Lora) -> Adapters:
    """Returns adapters that change nothing yet: A `[L,D,r]` uniform in +-1/sqrt(D), as in peft, and B `[L,r,F]` 0."""
    layers = {}
    for i, (name, (count, rows, columns)) in enumerate(kernels(config, lora.targets).items()):
        bound, shape = rows**-0.5, (count, rows, lora.rank)
        a = jax.random.uniform(jax.random.fold_in(rng, i), shape, minval=-bound, maxval=bound)
        layers[name] = {"lora_a": a, "lora_b": jnp.zeros((count, lora.rank, columns))}
    return {"layers": layers}


def shapes(config: ModelConfig, lora: Lora) -> Adapters:
    """Returns the adapters with a jax.ShapeDtypeStruct for every leaf."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config, lora))


def attach(base: dict[str, Any], adapters: Adapters, scale: float) -> dict[str, Any]:
    """Returns the parameters of `models.apply`: the base, and beside each target's kernel A, B and s, once a layer."""
    # B goes in as it is: the scan over the layers adds gradients in place, to all of its inputs or to none.
    layers = {
        name: leaves | pair | {"lora_scale": jnp.full(len(pair["lora_a"]), scale)}
        for name, leaves, pair in _pairs(base, adapters)
    }
    return base | {"layers": base["layers"] | layers}


def merge(base: dict[str, Any], adapters: Adapters, scale: float) -> dict[str, Any]:
    """Returns the base with `W + s A B` for each target's W, summed in float32 and rounded once, to the type of W.

    Of a quantised base every kernel is merged, to bfloat16: W is what codes and scales stand for, see `quantised`. What
    else is no target is shared with the base, not copied. A merged kernel lies on the devices as its W does.
    """
    layers = {}
    for name, leaves in base["layers"].items():
        stored = {leaf: leaves[leaf] for leaf in ("kernel", "kernel_scale") if leaf in leaves}
        pair = adapters["layers"].get(name)
        merged = {leaf: value for leaf, value in leaves.items() if leaf not in stored}
        if pair or len(stored) > 1:
            stored = {"kernel": _merger(leaves["kernel"].sharding)(stored, pair, scale)}
        layers[name] = merged | stored
    return base | {"layers": layers}


def _pairs(base: dict[str, Any], adapters: Adapters) -> list[tuple[str, dict[str, Any], dict[str, jax.Array]]]:
    return [(name, base["layers"][name], pair) for name, pair in adapters["layers"].items()]


@cache
def _merger(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    return jax.jit(_merge_layers, static_argnames="scale", out_shardings=sharding)


def _merge_layers(stored, pair, scale):
    def merge_layer(layer):  # one at a time: the float32 sum of all layers would be twice a bfloat16 kernel
        stored, pair = layer
        kernel = quantised.kernel(stored)
        if pair is None:
            return kernel
        with exact_products(jnp.float32):
            product = pair["lora_a"].astype(jnp.float32) @ pair["lora_b"].astype(jnp.float32)
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    return jax.lax.map(merge_layer, (stored, pair))


def fingerprint(params: dict[str, Any]) -> str:
    """Returns 16 hexadecimal digits that tell parameters by their paths, shapes, types and every bit of their values.

    It does not depend on how they lie on devices: the sums are of whole numbers.
    """
    sums = jax.device_get(_checksums(params))
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(sums), strict=True)
    lines = [f"{path_name(path)} {leaf.shape} {leaf.dtype.name} {checksum}" for (path, leaf), checksum in leaves]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@jax.jit
def _checksums(params):
    return jax.tree.map(_checksum, params)


def _checksum(x: jax.Array) -> jax.Array:
    """Sums the bits of the numbers times odd factors that depend on the place, modulo 2**32."""
    whole = jnp.issubdtype(x.dtype, jnp.integer)  # codes
    bits = (x if whole else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (place * jnp.uint32(2654435761) | 1), dtype=jnp.uint32)
