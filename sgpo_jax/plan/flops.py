"""FLOPs of the matrix products in a traced program, with loop bodies counted as often as they run.

XLA's own cost analysis counts the body of a loop once, and it cannot look into a Pallas kernel. Here a product of
`[M,K]` and `[K,N]` costs 2 M K N, and element-wise work is not counted. The numbers are totals over all devices.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend.core import jaxprs_in_params

from sgpo_jax.plan.phases import Scopes

# What kernels compute the bounds of their loops with.
_SCALAR: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.floor_divide, "max": np.maximum,
    "min": np.minimum, "convert_element_type": np.asarray,
}  # fmt: skip


def matmul_flops(jaxpr: Any, scopes: Scopes) -> dict[str, float]:
    """Returns phase -> FLOPs. The most expensive branch of a `cond` counts, unless `scopes` has the branches' shares.

    Args:
        jaxpr: of a traced program, as in `jitted.trace(...).jaxpr`.
        scopes: phases, and the trip count of each `while`. A `scan` states its own.

    Raises:
        ValueError: `scopes` has no trip count for a `while`.
    """
    return dict(_walk(getattr(jaxpr, "jaxpr", jaxpr), "", scopes, {}))


def _walk(jaxpr: Any, outer: str, scopes: Scopes, loops: dict[int, float]) -> dict[str, float]:
    """Returns phase -> FLOPs of a jaxpr that stands at the path `outer`; `loops` are the result of `_kernel_loops`."""
    total: dict[str, float] = defaultdict(float)
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        path = "/".join(filter(None, (outer, str(equation.source_info.name_stack))))
        if name == "dot_general":
            total[scopes.phase(path)] += _product(equation)
            continue
        if name == "ragged_dot_general":
            total[scopes.phase(path)] += _grouped_product(equation)
            continue
        inner, times = path, 1.0
        if name in ("scan", "while"):
            inner = f"{path}/while/body"
            known = params["length"] if name == "scan" else loops.get(id(equation))
            times = scopes.trip_count(f"{path}/while") if known is None else known
        elif name == "shard_map":
            times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        elif name == "pallas_call":
            times = _kernel_runs(params["grid_mapping"].grid, path)
            loops = loops | _kernel_loops(params["jaxpr"], params["grid_mapping"])
        elif name == "jit":
            inner = f"{path}/jit({params['name']})"
        parts = [_walk(getattr(part, "jaxpr", part), inner, scopes, loops) for part in jaxprs_in_params(params)]
        shares: tuple[float, ...] = (1.0,) * len(parts)
        if name == "cond":
            most = max(range(len(parts)), key=lambda branch: sum(parts[branch].values()))
            shares = scopes.branch_shares(path) or tuple(float(branch == most) for branch in range(len(parts)))
        for share, part in zip(shares, parts, strict=True):
            for phase, count in part.items():
                total[phase] += times * share * count
    return total


def _product(equation: Any) -> float:
    """Returns the FLOPs of a dot_general."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _grouped_product(equation: Any) -> float:
    """Returns the FLOPs of a product whose rows have one matrix of a group each, as if all rows were in use."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, right = (atom.aval.shape for atom in equation.invars[:2])
    if numbers.rhs_group_dimensions:
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    return 2.0 * math.prod(left) * right[-1]  # the gradient of the matrices: each row adds to one of them


def _kernel_runs(grid: tuple[int, ...], path: str) -> float:
    """Returns how often the body of a Pallas kernel runs: once for each point of its grid.

    A causal splash kernel has a square grid of query and key blocks, and skips the blocks above the diagonal. With a
    window the grid is only as wide as the window, and the first rows of blocks, or the last, skip some too.
    """
    if "splash" not in path:
        return float(math.prod(grid))
    width, rows = grid[-1], grid[-3 if "dkv" in path else -2]
    return math.prod(grid) * sum(min(row + 1, width) for row in range(rows)) / (rows * width)


def _kernel_loops(kernel: Any, grid_mapping: Any) -> dict[int, float]:
    """Returns id of a `while` -> how often it runs on average, for loops that are bounded by the place in the grid.

    Such are the loops of JAX's flash attention for GPUs, which end at the diagonal or begin there. A loop whose bounds
    depend on data is not in the result.
    """
    axes = [size for axis, size in enumerate(grid_mapping.grid) if axis not in grid_mapping.vmapped_dims]
    known: dict[Any, Any] = {}  # variable -> its value at every place of the grid
    trips = {}

    def value(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known.get(atom)

    for equation in kernel.eqns:
        name, values = equation.primitive.name, [value(atom) for atom in equation.invars]
        if name == "program_id":
            axis = equation.params["axis"]
            shape = [size if i == axis else 1 for i, size in enumerate(axes)]
            known[equation.outvars[0]] = np.arange(axes[axis]).reshape(shape)
        elif name in _SCALAR and all(x is not None for x in values):
            known[equation.outvars[0]] = _SCALAR[name](*values)
        elif name == "while":
            bounds = _bounds(equation, values)
            if bounds is not None:
                trips[id(equation)] = float(np.maximum(bounds[1] - bounds[0], 0).mean())
    return trips


def _bounds(loop: Any, values: list[Any]) -> tuple[Any, Any] | None:
    """Returns (first, end) of a `while` that counts up by one; None where `values`, its arguments, lack one of them."""
    condition = loop.params["cond_jaxpr"].jaxpr
    compare = condition.eqns[-1]
    if len(condition.eqns) != 1 or compare.primitive.name != "lt":
        return None
    count = loop.params["cond_nconsts"]
    given = dict(zip(condition.invars, values[:count] + values[count + loop.params["body_nconsts"] :], strict=True))
    first, end = (atom.val if hasattr(atom, "val") else given[atom] for atom in compare.invars)
    return None if first is None or end is None else (first, end)
