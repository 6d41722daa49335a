"""Kernels in 8 or 4 bits: frozen ones under adapters, as in QLoRA (arXiv 2305.14314), and those of a rollout.

qwix quantises and dequantises.

The kernels of the layers, one matrix each (not those of experts), become codes, and `kernel_scale` stands beside them:
a scale for each tile of a column, of at most 64 of its rows. The kernel that they stand for is the bfloat16 number
nearest code times scale. All other parameters are bfloat16. In a rollout a whole column is a tile, see `by_column`.

Axis key: L layers, D features into a kernel, F out of it, S tiles of a column, R rows of a tile.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sgpo_jax import sharding
from sgpo_jax.models.products import dot_in_blocks
from sgpo_jax.sharding import constrain, exact_products

CODES = {"int8": jnp.int8, "nf4": jnp.uint4}  # base_dtype -> type of its codes
TILE = 64  # most rows of a tile, as in QLoRA; a tile divides the rows
# What holds without qwix, for the two fields that need it.
BASE_RULE = "config.lora.base_dtype: must be 'float32' or 'bfloat16'"
ROLLOUT_RULE = "config.rl.rollout_weights: must be ''"
Leaves = dict[str, jax.Array]  # of a kernel: {"kernel"}, or {"kernel", "kernel_scale"}, and others beside them


def import_qwix(rule: str = BASE_RULE) -> ModuleType:
    """Imports qwix.

    Raises:
      ValueError: it is not installed; the message begins with `rule`.
    """
    try:
        import qwix
    except ImportError as error:
        raise ValueError(
            f"{rule} without the extra 'quantised', which the others need: pip install 'sgpo_jax[quantised]' ({error})"
        ) from error
    return qwix


def dtype_of(base_dtype: str) -> Any:
    """Returns the type that `lora.base_dtype` gives to parameters that are not quantised."""
    return jnp.dtype(jnp.bfloat16 if base_dtype in CODES else base_dtype)


def quantise(params: dict[str, Any], kind: str, mesh: Mesh) -> dict[str, Any]:
    """Returns a whole model's parameters with codes `[L,D,F]` for each kernel, and scales `[L,S,F]` float32.

    A tile's scale is its largest absolute value, in "int8" over 127.5. A code is the nearest one, in float32.

    Args:
      params: on the mesh. Codes and scales lie as their kernel does; the scales whole where the mesh does not divide S.
      kind: "int8" or "nf4".
    """
    places = sharding.tree_shardings(shapes(params, kind), mesh)["layers"]

    def quantise_kernel(name, kernel):
        wanted = {leaf: places[name][leaf] for leaf in ("kernel", "kernel_scale")}
        return jax.jit(partial(_quantise_layers, kind), out_shardings=wanted)(kernel)

    return _with_codes(params, quantise_kernel)


def shapes(params: dict[str, Any], kind: str) -> dict[str, Any]:
    """Returns what `quantise` does, for parameters that are shapes."""
    return _with_codes(params, lambda _, kernel: jax.eval_shape(partial(_quantise_layers, kind), kernel))


def by_column(params: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters with int8 codes `[L,D,F]` for each kernel, and a scale for each column `[L,1,F]`; traceable.

    The scale is that of the whole column, however its rows are split over devices. `column_product` multiplies by them.
    """
    import_qwix(ROLLOUT_RULE)
    return _with_codes(params, lambda _, kernel: _quantise_layers("int8", kernel, kernel.shape[1]))


def column_product(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies x `[...,D]` by codes `[D,F]` of `by_column`, and the sums by the columns' scales `[1,F]`.

    Whole numbers up to 128 are exact in bfloat16, so the product reads one byte for each weight and rounds none.
    """
    return x @ codes.astype(x.dtype) * scale[0].astype(x.dtype)


def _with_codes(params: dict[str, Any], quantise_kernel: Callable[[str, Any], Leaves]) -> dict[str, Any]:
    layers = {}
    for name, leaves in params["layers"].items():
        matrices = "kernel" in leaves and leaves["kernel"].ndim == 3
        layers[name] = leaves | quantise_kernel(name, leaves["kernel"]) if matrices else leaves
    return params | {"layers": layers}


def _quantise_layers(kind: str, kernel: jax.Array, most: int = TILE) -> Leaves:
    rows = kernel.shape[1]
    tile = max(size for size in range(1, most + 1) if rows % size == 0)

    def quantise_tile(values):  # [R]
        quantised = import_qwix().quantize(values, kind)
        return quantised.qvalue, quantised.scale

    def quantise_layer(kernel):  # one at a time: qwix may hold the distance of every weight to each of 16 codes
        tiles = kernel.astype(jnp.float32).reshape(-1, tile, kernel.shape[1])
        codes, scales = jax.vmap(jax.vmap(quantise_tile, 1, 1))(tiles)
        return {"kernel": codes.reshape(kernel.shape), "kernel_scale": scales[:, 0]}

    return jax.lax.map(quantise_layer, kernel)


def kernel(leaves: Leaves) -> jax.Array:
    """Returns a layer's kernel `[D,F]`: as it is, or bfloat16 from codes and scales."""
    codes, scales = leaves["kernel"], leaves.get("kernel_scale")
    if scales is None:
        return codes
    kind = next(kind for kind, dtype in CODES.items() if dtype == codes.dtype)

    # By element: qwix itself flattens the codes of NF4, which a mesh that splits rows and columns would have to gather.
    @jnp.vectorize
    def dequantise(code, scale):
        return import_qwix().dequantize(import_qwix().QArray(code, scale, qtype=kind))

    values = dequantise(codes.reshape(len(scales), -1, codes.shape[1]), scales[:, None]).reshape(codes.shape)
    return jax.lax.reduce_precision(values, 8, 7).astype(jnp.bfloat16)  # a cast alone may be undone by one to float32


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, leaves: Leaves, spec: tuple[Any, ...]) -> jax.Array:
    """Multiplies x `[...,D]` by a quantised kernel, which lies on the mesh by `spec`; only x has a gradient.

    The backward pass dequantises again: kept between the two are the codes, whatever `model.remat` says.
    """
    return dot_in_blocks(x, constrain(kernel(leaves), *spec).astype(x.dtype))


def _product_forward(x, leaves, spec):
    return product(x, leaves, spec), leaves


def _product_backward(spec, leaves, gradient):
    with exact_products(gradient.dtype):
        return gradient @ constrain(kernel(leaves), *spec).astype(gradient.dtype).T, None


product.defvjp(_product_forward, _product_backward)
