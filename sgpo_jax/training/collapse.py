"""Signs that a policy is collapsing, from the metrics rows of its training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sgpo_jax.stats import is_score

# field of config.monitor -> (metric, whether the limit is the least, the most, or the largest fall since the first
# window, what it is a sign of)
LIMITS = {
    "least_entropy": ("entropy", "least", "the policy hardly explores"),
    "least_length": ("response_length", "least", "responses are shrinking away"),
    "most_truncated": ("truncated", "most", "responses do not end"),
    "most_identical": ("identical", "most", "all responses to a problem are the same, and teach nothing"),
    "most_clipped": ("kl_clip_share", "most", "the KL clip masks what it should distil"),
    "least_guidance": ("guidance", "least", "guided responses are worse than unguided ones"),
    "most_forgotten": ("reward_guided", "fall", "the policy forgets how to follow its guidance"),
    "most_lost": ("solved", "fall", "fewer problems have a correct response"),
}


def sound_steps(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> int:
    """Finds the last step before the window in which the present signs appeared.

    Args:
      rows: of the training so far; the last one has a sign, as may some before it.
      limits: as in `signs`.

    Returns:
      The step; 0 is the state before the first step.
    """
    first = len(rows)
    while signs(rows[: first - 1], limits):
        first -= 1
    return max(rows[first - 1]["step"] - limits["window"], 0)


def signs(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> dict[str, str]:
    """Finds the limits that the mean of the last `limits["window"]` rows breaks.

    Args:
      rows: of the training so far, the last one last. Fewer rows than the window give no sign, nor does a metric that
        is missing or not finite in one of them.
      limits: `window` (rows) and the fields of LIMITS.

    Returns:
      Field of the limit -> a message.
    """
    window = limits["window"]
    if len(rows) < window:
        return {}
    messages = {}
    for field, (metric, kind, meaning) in LIMITS.items():
        values = [row.get(metric) for row in rows[-window:]]
        if not all(is_score(value) for value in values):
            continue
        mean = float(np.mean(values))  # type: ignore[arg-type]
        if kind == "fall":
            start = [row.get(metric) for row in rows[:window]]
            fall = float(np.mean(start)) - mean if all(is_score(value) for value in start) else 0.0  # type: ignore[arg-type]
            if fall > limits[field]:
                limit = f"above monitor.{field}={limits[field]:g}"
                messages[field] = f"{metric} is {mean:.4g}, a fall by {fall:.4g}, {limit}: {meaning}"
        elif mean < limits[field] if kind == "least" else mean > limits[field]:
            side = "below" if kind == "least" else "above"
            messages[field] = f"{metric} is {mean:.4g}, {side} monitor.{field}={limits[field]:g}: {meaning}"
    return messages


class Watch:
    """Watches the metrics of a training for signs of a collapse.

    Args:
      limits: `config.monitor`.
      before: all rows before the first step that is watched; their signs are known already.
    """

    def __init__(self, limits: Any, before: Sequence[Mapping[str, Any]]):
        self._limits = limits
        self._rows = list(before)
        self._known = set(signs(self._rows, limits))

    def __call__(self, metrics: Mapping[str, Any]) -> str:
        """Prints a sign when it appears; returns why to stop or go back, or "" to continue."""
        self._rows.append(metrics)
        messages = signs(self._rows, self._limits)
        for field in messages.keys() - self._known:
            print(f"warning: {messages[field]}", flush=True)
        self._known = set(messages)
        return "; ".join(messages.values()) if self._limits.action != "warn" else ""
