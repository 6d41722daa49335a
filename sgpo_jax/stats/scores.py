"""The rule for scores: what is not a finite number chooses nothing, no checkpoint, no rate and no verdict."""

import math
from numbers import Real
from typing import Any, TypeGuard


def is_score(value: Any) -> TypeGuard[float]:
    """Checks that a value is a finite number; None, NaN, an infinity and a bool are no scores."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
