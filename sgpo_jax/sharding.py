"""Decides where arrays live: one mesh with axes data, fsdp, context and tensor, and rules for every parameter's path.

The mesh uses Auto axes. The code places inputs, parameters and a few activations; the compiler derives the rest.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp", "context")  # the axes that split the rows of a batch
ROWS = ("data", "fsdp")  # the axes that split rows whose tokens are split over the context axis
SHARDS = ("fsdp", "context")  # the axes that split a parameter, besides the tensor axis
HEADS = ("tensor", "context")  # the axes that split heads where a device attends to whole rows

# The first matching rule wins. Layer parameters carry a leading layer axis, which is never split.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding$", P("tensor", SHARDS)),
    (r"head/kernel$", P(SHARDS, "tensor")),
    (r"layers/(q|k|v|gate|up)/kernel(_scale)?$", P(None, SHARDS, "tensor")),
    (r"layers/(o|down)/kernel(_scale)?$", P(None, "tensor", SHARDS)),
    (r"layers/experts_(gate|up)/kernel$", P(None, "tensor", SHARDS, None)),
    (r"layers/experts_down/kernel$", P(None, "tensor", None, SHARDS)),
    (r"layers/router/weight$", P()),
    (r"layers/(q|k|v)/bias$", P(None, "tensor")),
    (r"(^|/)\w*norm/scale$", P()),
)


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list | None = None, *, context: int = 1
) -> Mesh:
    """Returns a mesh over the devices.

    Args:
      data, fsdp, tensor, context: sizes of the axes; one of them may be -1, which takes the devices that remain.
      devices: all devices of JAX by default.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or JAX finds no devices.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except (RuntimeError, AssertionError) as error:
        chosen = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(f"JAX_PLATFORMS={chosen!r}: JAX finds no such devices here ({error})") from error
    shape = mesh_shape((data, fsdp, context, tensor), len(devices))
    # jax.make_mesh refuses shapes that divide an axis of the torus, such as 16 x 4 on 8 x 8 chips.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes: tuple[int, ...], num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of AXES with a -1 replaced by the number of devices that remain.

    Raises:
      ValueError: the sizes do not fit the number of devices.
    """
    wanted = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"{wanted}: every size must be at least 1, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    resolved = tuple(num_devices // known if size == -1 else size for size in sizes)
    if math.prod(resolved) != num_devices:
        raise ValueError(f"{wanted} needs a multiple or product of {known} devices; there are {num_devices}")
    return resolved


def decoding_mesh(mesh: Mesh, ways: tuple[int, ...]) -> Mesh:
    """Returns the mesh whose axes split the weights of decoding, with the devices and the rows of `mesh`.

    Its fsdp axis are neighbours along data, fsdp and context, as many as the stages of decoding ask for. Its context
    axis is 1: a sampled row is one device's.

    Args:
      mesh: of the training.
      ways: of each stage, see `weight_axes`; one of them may be other than 1 and data * fsdp * context.
    """
    rows = row_ways(mesh)
    inner = [count for count in ways if 1 < count < rows] or [mesh.shape["fsdp"] * mesh.shape["context"]]
    return Mesh(mesh.devices.reshape(rows // inner[0], inner[0], 1, -1), AXES, axis_types=mesh.axis_types)


def weight_axes(ways: int) -> tuple[str, ...]:
    """Returns the axes of `decoding_mesh` that split weights `ways` times as often as the tensor axis alone.

    They begin with the tensor axis. So a device has its part of a wider split already, and no weight moves.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or ways == 1:
        return ("tensor",)
    return ("tensor", "fsdp") if ways == mesh.shape["fsdp"] else ("tensor", "fsdp", "data")


def dividing(size: int, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the first of the axes, as many as divide a dimension of this size together."""
    mesh = jax.sharding.get_abstract_mesh()
    counts = [n for n in range(len(axes) + 1) if size % axis_ways(mesh, axes[:n]) == 0]
    return axes[: counts[-1]]


def row_ways(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which the mesh splits the rows of a batch."""
    return axis_ways(mesh, BATCH)


def axis_ways(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    """Returns the number of parts into which one or several axes of the mesh, or None, split; 1 for an empty mesh."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in names)


def context_ways() -> int:
    """Returns the number of parts into which the current mesh splits the tokens of a row in training."""
    return axis_ways(jax.sharding.get_abstract_mesh(), "context")


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a pytree key path, such as `params/layers/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(name: str, shape: tuple[int, ...]) -> P:
    """Returns the PartitionSpec of the parameter or optimizer moment called `name`; scalars are replicated.

    Raises:
      ValueError: no rule matches the name.
    """
    if not shape:
        return P()
    if match := re.search(r"/lora_([ab])$", name):  # beside a kernel `[L,D,F]`: `[L,D,r]` or `[L,r,F]`, r whole
        *outer, rows, columns = spec_for(name[: match.start()] + "/kernel", shape)
        return P(*outer, rows, None) if match[1] == "a" else P(*outer, None, columns)
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return spec
    raise ValueError(f"no sharding rule matches {name!r} of shape {shape}; add one to sharding.RULES")


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of every leaf of parameters, optimizer state or a whole TrainState.

    Leaves are arrays or ShapeDtypeStructs.

    Raises:
      ValueError: no rule matches a leaf, or the mesh axes of its rule do not divide its size.
    """

    def leaf_sharding(path, leaf):
        name = path_name(path)
        spec = spec_for(name, leaf.shape)
        if name.endswith("/kernel_scale"):  # the mesh need not divide the tiles of the rows that it divides
            sizes = zip(spec, leaf.shape, strict=True)
            spec = P(*(None if size % axis_ways(mesh, axes) else axes for axes, size in sizes))
        for dim, axes in enumerate(spec):
            if leaf.shape[dim] % (ways := axis_ways(mesh, axes)):
                names = " * ".join(f"mesh.{axis}" for axis in ([axes] if isinstance(axes, str) else axes))
                raise ValueError(f"{name}: dimension {dim} of shape {leaf.shape} is not divisible by {names} = {ways}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def put(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Copies host arrays onto the mesh, each by its PartitionSpec. Every process passes the same arrays."""
    return place(jax.tree.map(np.asarray, tree), jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), tree, specs))


def place(tree: Any, shardings: Any) -> Any:
    """Copies arrays onto devices, each by its sharding.

    Every process passes the same host arrays and copies the parts of its own devices. That they are the same is not
    checked: `jax.device_put` would send each array to all processes to compare.
    """

    def place_leaf(x, sharding):
        if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place_leaf, tree, shardings)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Copies host arrays `[B, ...]` onto the mesh, rows split over data, fsdp and context; a number is on all devices.

    Every process passes the same arrays.
    """
    return put(tree, jax.tree.map(lambda x: P(BATCH) if np.ndim(x) else P(), tree), mesh)


def fetch(tree: Any) -> Any:
    """Returns device arrays as numpy arrays in host memory, whole on every process."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Pins the layout of an activation. A dimension that its mesh axes do not divide stays whole.

    Does nothing outside `jax.set_mesh`, so that the model and the sampler also run without a mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*fit_spec(x.shape, spec)))


def fit_spec(shape: tuple[int, ...], spec: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns `spec` with None for the dimensions that their mesh axes do not divide; without a mesh, all are None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return (None,) * len(spec)
    return tuple(axes if size % axis_ways(mesh, axes) == 0 else None for size, axes in zip(shape, spec, strict=False))


def per_device(local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Returns a function that runs `local` on each device's part, because the partitioner cannot split a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": where the computation being traced will run.

    It may be compiled on another platform: a plan for TPUs is compiled on a CPU.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend()
    kind = mesh.abstract_device.device_kind.lower()  # as in "TPU v5 lite", "cpu", "NVIDIA H100"
    return next((name for name in ("cpu", "tpu") if kind.startswith(name)), "gpu")


def exact_products(dtype: Any) -> contextlib.AbstractContextManager:
    """Returns a context in which GPUs multiply float32 as float32; by default they round the operands to TF32."""
    if dtype == np.float32 and platform() == "gpu":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
