"""Lays parameters out as `decode` reads them fastest on each platform."""

import math
from typing import Any

import jax

from sgpo_jax.sharding import platform

LARGE = 2**20  # parameters of a layer; fewer stay in a core's cache, where a copy costs nothing


def for_decoding(params: dict[str, Any], split: tuple[str, ...], often: bool = False) -> dict[str, Any]:
    """Returns parameters from which `decode` reads fastest.

    On GPUs, kernels that multiply the same rows are joined. On a CPU, each layer has arrays of its own, if it is large
    and the program runs often: a product with a layer of a stack would copy it first. Such a program has all layers, so
    it takes several times as long to compile.
    """
    if platform() == "gpu":
        return _joined(params, split)
    return _apart(params) if platform() == "cpu" and often else params


def layer_name(index: int) -> str:
    """Returns the name of the parameters of a layer that has arrays of its own."""
    return f"layer_{index}"


def _apart(params: dict[str, Any]) -> dict[str, Any]:
    leaves = jax.tree.leaves(params["layers"])
    count = len(leaves[0])
    if sum(math.prod(leaf.shape[1:]) for leaf in leaves) < LARGE:
        return params
    layers = {layer_name(i): jax.tree.map(lambda stack, i=i: stack[i], params["layers"]) for i in range(count)}
    return {name: leaf for name, leaf in params.items() if name != "layers"} | layers


def _joined(params: dict[str, Any], split: tuple[str, ...]) -> dict[str, Any]:
    from sgpo_jax.models import products_gpu

    stacks = products_gpu.stacks(params["layers"], split)
    joined = {name for group in stacks for name in group}
    layers = {
        name: {leaf: value for leaf, value in leaves.items() if leaf != "kernel" or name not in joined}
        for name, leaves in params["layers"].items()
    }
    return params | {"layers": layers, "stacks": stacks}
