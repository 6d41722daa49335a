"""Checks of numbers that come from a file: each refuses by name what is not a size or a positive number."""

from collections.abc import Mapping
from typing import Any

MAX_SIZE = 2**24  # for every size, so that a damaged file is refused before memory is taken for it


def required(values: Mapping[str, Any], name: str, parent: str = "config.json") -> Any:
    """Returns the value of a field. Raises ValueError where it is absent or null."""
    if values.get(name) is None:
        raise ValueError(f"{parent} has no {name}, which is required")
    return values[name]


def required_int(values: Mapping[str, Any], name: str) -> int:
    """Returns the value of a field that is a size. Raises ValueError where it is absent or no size."""
    value = required(values, name)
    positive_int(name, value)
    return value


def positive_int(field: str, value: Any) -> None:
    """Raises ValueError unless a value is an integer from 1 to MAX_SIZE."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{field} is {value!r}; it must be an integer of at least 1, and at most {MAX_SIZE}")


def positive_number(field: str, value: Any) -> None:
    """Raises ValueError unless a value is a finite number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise ValueError(f"{field} is {value!r}; it must be a number above 0")
