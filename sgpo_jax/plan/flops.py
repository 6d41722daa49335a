"""FLOPs of the matrix products in a traced program, every loop counted as often as it runs.

XLA's own cost analysis counts the body of a loop once and knows nothing of what a Pallas kernel computes. Here a
product of `[M,K]` and `[K,N]` is 2 M K N, and element-wise work is not counted. The numbers are those of all devices
together.
"""

import math
from collections import defaultdict
from typing import Any

from jax.extend.core import jaxprs_in_params

from sgpo_jax.plan.phases import Scopes


def matmul_flops(jaxpr: Any, scopes: Scopes) -> dict[str, float]:
    """FLOPs by phase.

    Args:
      jaxpr: of a traced program, as in `jitted.trace(...).jaxpr`. A `scan` says how often it runs, a `while` does not;
        of a `cond` the branch with the most work counts.
      scopes: phases, and how often each `while` runs.

    Raises:
      ValueError: for a `while` that `scopes` does not know.
    """
    return dict(_walk(getattr(jaxpr, "jaxpr", jaxpr), "", scopes))


def _walk(jaxpr: Any, path: str, scopes: Scopes) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        here = "/".join(filter(None, (path, str(equation.source_info.name_stack))))
        if name == "dot_general":
            total[scopes.phase(here)] += _product(equation)
            continue
        within, times = here, 1.0
        if name in ("scan", "while"):
            within = f"{here}/while/body"
            times = params["length"] if name == "scan" else scopes.runs(f"{here}/while")
        elif name == "shard_map":
            times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        elif name == "pallas_call":
            times = _kernel_runs(params["grid_mapping"].grid, here)
        elif name == "jit":
            within = f"{here}/jit({params['name']})"
        parts = [_walk(getattr(each, "jaxpr", each), within, scopes) for each in jaxprs_in_params(params)]
        if name == "cond":
            parts = [max(parts, key=lambda part: sum(part.values()))]
        for part in parts:
            for phase, count in part.items():
                total[phase] += times * count
    return total


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _kernel_runs(grid: tuple[int, ...], path: str) -> float:
    """How often a Pallas kernel's body runs: once for each point of its grid.

    The grid of a causal splash kernel has as many blocks of queries as of keys, and does nothing above the diagonal.
    """
    share = (grid[-1] + 1) / (2 * grid[-1]) if "splash" in path else 1.0
    return math.prod(grid) * share
