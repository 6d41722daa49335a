"""Where arrays live: one mesh with axes data, fsdp and tensor, and ordered rules from parameter path to PartitionSpec.

The mesh uses Auto axes: the code places inputs, parameters and a few activations, and the compiler derives the rest.
"""

import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes over which rows of a batch are split

# The first matching rule wins. Layer parameters carry a leading layer axis, which is never split.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"layers/(q|k|v|gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/(o|down)/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/(q|k|v)/bias$", P(None, "tensor")),
    (r"(^|/)\w*norm/scale$", P()),
)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """Mesh over `devices` (default: all); one size may be -1, meaning whatever remains.

    Raises ValueError when the sizes do not multiply to the number of devices, or JAX finds none.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except (RuntimeError, AssertionError) as error:
        chosen = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(f"JAX_PLATFORMS={chosen!r}: JAX finds no such devices here ({error})") from error
    shape = mesh_shape((data, fsdp, tensor), len(devices))
    # jax.make_mesh refuses shapes that divide an axis of the torus, such as 16 x 4 on 8 x 8 chips.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes: tuple[int, int, int], num_devices: int) -> tuple[int, int, int]:
    """Resolves a -1 in (data, fsdp, tensor) against the number of devices, or raises ValueError."""
    wanted = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"{wanted}: every size must be at least 1, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    resolved = tuple(num_devices // known if size == -1 else size for size in sizes)
    if math.prod(resolved) != num_devices:
        raise ValueError(f"{wanted} needs a multiple or product of {known} devices; there are {num_devices}")
    return resolved  # type: ignore[return-value]


def row_ways(mesh: Mesh) -> int:
    """Ways in which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def path_name(path: tuple[Any, ...]) -> str:
    """`params/layers/q/kernel` from a pytree key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(name: str, shape: tuple[int, ...]) -> P:
    """PartitionSpec of the parameter or optimizer moment called `name`; scalars are replicated.

    Raises ValueError for a name that no rule matches.
    """
    if not shape:
        return P()
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return spec
    raise ValueError(f"no sharding rule matches {name!r} of shape {shape}; add one to sharding.RULES")


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding for every leaf (array or ShapeDtypeStruct) of parameters, optimizer state or a whole TrainState.

    Raises ValueError for a leaf without a rule, or whose size is not divisible by the mesh axes of its rule.
    """

    def place(path, leaf):
        name = path_name(path)
        spec = spec_for(name, leaf.shape)
        for dim, axis in enumerate(spec):
            if axis is not None and leaf.shape[dim] % mesh.shape[axis]:
                raise ValueError(
                    f"{name}: dimension {dim} of shape {leaf.shape} is not divisible by mesh axis "
                    f"{axis!r} of size {mesh.shape[axis]}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def put(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Host arrays onto the mesh, each as its PartitionSpec says. Every process passes the same arrays."""
    return place(jax.tree.map(np.asarray, tree), jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), tree, specs))


def place(tree: Any, shardings: Any) -> Any:
    """Arrays onto devices, each as its sharding says.

    Of arrays in host memory every process passes the same ones and copies its own parts of them, unchecked:
    `jax.device_put` would send them all to all processes to compare.
    """

    def one(x, sharding):
        if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Host arrays `[B, ...]` onto the mesh, rows split over data and fsdp. Every process passes the same arrays."""
    return put(tree, jax.tree.map(lambda _: P(BATCH), tree), mesh)


def fetch(tree: Any) -> Any:
    """Device arrays as numpy arrays in host memory, whole on every process."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Pins the layout of an activation; a dimension that its mesh axes do not divide is left whole.

    Does nothing outside `jax.set_mesh`, so models and engine also run without a mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*fitting(x.shape, spec)))


def fitting(shape: tuple[int, ...], spec: tuple[Any, ...]) -> tuple[Any, ...]:
    """The mesh axes of each dimension in `spec` that divide it; None for the others, and without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()

    def ways(axes):
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))

    if mesh.empty:
        return (None,) * len(spec)
    return tuple(axes if size % ways(axes) == 0 else None for size, axes in zip(shape, spec, strict=False))


def platform() -> str:
    """"cpu", "gpu" or "tpu": where a computation traced now will run, which need not be where it is compiled."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend()
    kind = mesh.abstract_device.device_kind.lower()  # as in "TPU v5 lite", "cpu", "NVIDIA H100"
    return next((name for name in ("cpu", "tpu") if kind.startswith(name)), "gpu")
