"""FLOPs of the matrix products in a traced program, with loop bodies counted as often as they run.

XLA's own cost analysis counts the body of a loop once, and it cannot look into a Pallas kernel. Here a product of
`[M,K]` and `[K,N]` costs 2 M K N, and element-wise work is not counted. The numbers are totals over all devices.
"""

import math
from collections import defaultdict
from typing import Any

from jax.extend.core import jaxprs_in_params

from sgpo_jax.plan.phases import Scopes


def matmul_flops(jaxpr: Any, scopes: Scopes) -> dict[str, float]:
    """Returns phase -> FLOPs. The most expensive branch of a `cond` counts.

    Args:
        jaxpr: of a traced program, as in `jitted.trace(...).jaxpr`.
        scopes: phases, and the trip count of each `while`. A `scan` states its own.

    Raises:
        ValueError: `scopes` has no trip count for a `while`.
    """
    return dict(_walk(getattr(jaxpr, "jaxpr", jaxpr), "", scopes))


def _walk(jaxpr: Any, outer: str, scopes: Scopes) -> dict[str, float]:
    """Returns phase -> FLOPs of a jaxpr that stands at the path `outer`."""
    total: dict[str, float] = defaultdict(float)
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        path = "/".join(filter(None, (outer, str(equation.source_info.name_stack))))
        if name == "dot_general":
            total[scopes.phase(path)] += _product(equation)
            continue
        inner, times = path, 1.0
        if name in ("scan", "while"):
            inner = f"{path}/while/body"
            times = params["length"] if name == "scan" else scopes.trip_count(f"{path}/while")
        elif name == "shard_map":
            times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        elif name == "pallas_call":
            times = _kernel_runs(params["grid_mapping"].grid, path)
        elif name == "jit":
            inner = f"{path}/jit({params['name']})"
        parts = [_walk(getattr(part, "jaxpr", part), inner, scopes) for part in jaxprs_in_params(params)]
        if name == "cond":
            parts = [max(parts, key=lambda part: sum(part.values()))]
        for part in parts:
            for phase, count in part.items():
                total[phase] += times * count
    return total


def _product(equation: Any) -> float:
    """Returns the FLOPs of a dot_general."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _kernel_runs(grid: tuple[int, ...], path: str) -> float:
    """Returns how often the body of a Pallas kernel runs: once for each point of its grid.

    A causal splash kernel has a square grid of query and key blocks, and skips the blocks above the diagonal.
    """
    share = (grid[-1] + 1) / (2 * grid[-1]) if "splash" in path else 1.0
    return math.prod(grid) * share
