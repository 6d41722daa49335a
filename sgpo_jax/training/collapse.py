"""Signs that a policy is collapsing, from the metrics rows of its training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# field of config.monitor -> (metric, whether the limit is the least or the most, what it is a sign of)
LIMITS = {
    "least_entropy": ("entropy", "least", "the policy hardly explores"),
    "least_length": ("response_length", "least", "responses are shrinking away"),
    "most_truncated": ("truncated", "most", "responses do not end"),
    "most_identical": ("identical", "most", "all responses to a problem are the same, and teach nothing"),
    "most_clipped": ("kl_clip_share", "most", "the KL clip masks what it should distil"),
}


def sound_steps(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> int:
    """The last step before the window in which the present signs appeared; 0 is the state before the first step.

    Args:
      rows: of the training so far; the last one has a sign, as may some before it.
      limits: as in `signs`.
    """
    first = len(rows)
    while signs(rows[: first - 1], limits):
        first -= 1
    return max(rows[first - 1]["step"] - limits["window"], 0)


def signs(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> dict[str, str]:
    """Field of each limit that the mean of the last `limits["window"]` rows breaks -> what to say of it.

    Args:
      rows: of the training so far, the last one last; nothing is said of fewer rows than the window, nor of a metric
        that is missing or not finite in one of them.
      limits: `window` (rows) and the fields of LIMITS.
    """
    window = limits["window"]
    if len(rows) < window:
        return {}
    found = {}
    for field, (metric, kind, meaning) in LIMITS.items():
        values = [row.get(metric) for row in rows[-window:]]
        if not all(isinstance(value, int | float) and np.isfinite(value) for value in values):
            continue
        mean = float(np.mean(values))  # type: ignore[arg-type]
        if mean < limits[field] if kind == "least" else mean > limits[field]:
            side = "below" if kind == "least" else "above"
            found[field] = f"{metric} is {mean:.4g}, {side} monitor.{field}={limits[field]:g}: {meaning}"
    return found
