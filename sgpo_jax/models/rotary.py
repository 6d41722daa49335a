"""The frequencies of rotary position embeddings, and the rules that stretch them, read from and written to config.json.

A key of a rotary dictionary that its rule does not use is refused: most such keys ask for another embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgpo_jax.models.checks import positive_int, positive_number, required

# rope_type: the keys of its rotary dictionary, in addition to those of every type.
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    },
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings"},
}  # fmt: skip
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """The "linear" rule: all frequencies are divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        positive_number("rope_scaling.factor", self.factor)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The constants of the "llama3" rule, which stretches the slow rotary frequencies.

    Wavelengths (in positions) above `original_max_positions / low_freq_factor` are multiplied by `factor`, those below
    `original_max_positions / high_freq_factor` are kept, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        for field in ("factor", "low_freq_factor", "high_freq_factor"):
            positive_number(f"rope_scaling.{field}", getattr(self, field))
        positive_int("rope_scaling.original_max_positions", self.original_max_positions)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be above "
                f"low_freq_factor, which is {self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """The constants of the "yarn" rule (arXiv 2309.00071).

    Frequencies with more than `beta_fast` rotations in `original_max_positions` are kept, those with fewer than
    `beta_slow` are divided by `factor`, and those between are interpolated over their index. `truncate` rounds the ends
    of that range outwards. Cosine and sine are multiplied by `attention_factor`, and so the scores by its square.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for field in ("factor", "attention_factor", "beta_fast", "beta_slow"):
            positive_number(f"rope_scaling.{field}", getattr(self, field))
        positive_int("rope_scaling.original_max_positions", self.original_max_positions)
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"rope_scaling.beta_fast is {self.beta_fast}; it must not be below beta_slow, which is {self.beta_slow}"
            )
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope_scaling.truncate is {self.truncate!r}; allowed: True, False")


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """The constants of the "longrope" rule (arXiv 2402.13753), of which only sequences of the original length are run.

    There each frequency is divided by its short factor. Longer sequences would take the long factors, for their first
    tokens too, which contradicts a cache. Cosine and sine are multiplied by `attention_factor`.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    stretched_max_positions: int  # max_position_embeddings

    def __post_init__(self) -> None:
        for field in ("original_max_positions", "stretched_max_positions"):
            positive_int(f"rope_scaling.{field}", getattr(self, field))
        for field in ("short_factor", "long_factor"):
            for value in getattr(self, field):
                positive_number(f"rope_scaling.{field}", value)

    @property
    def attention_factor(self) -> float:
        """Returns the factor of cosine and sine."""
        stretch = self.stretched_max_positions / self.original_max_positions
        return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(self.original_max_positions))


Scaling = LinearScaling | LongRope | RopeScaling | YarnScaling


def frequencies(theta: float, size: int, scaling: Scaling | None) -> np.ndarray:
    """Returns the frequencies of the rotary embedding `[size/2]` in radians per position.

    Args:
      theta: base of the wavelengths.
      size: rotated features of a head.
      scaling: the rule that stretches them.
    """
    # Rounded to float32 where transformers rounds: the last bit of a frequency is visible at position 10,000.
    exponent = np.arange(0, size, 2, dtype=np.float32) / size
    wavelength = (theta ** exponent.astype(np.float64)).astype(np.float32)
    frequency = 1 / wavelength
    if scaling is None:
        return frequency
    if isinstance(scaling, LinearScaling):
        return frequency / np.float32(scaling.factor)
    if isinstance(scaling, LongRope):
        return 1 / (np.array(scaling.short_factor, np.float32) * wavelength)
    if isinstance(scaling, YarnScaling):
        first, last = _interpolated(theta, size, scaling)
        index = np.arange(size // 2, dtype=np.float32)
        stretch = np.clip((index - np.float32(first)) / np.float32(last - first), 0, 1)
        return 1 / (np.float32(scaling.factor) * wavelength) * stretch + frequency * (1 - stretch)
    # Long wavelengths are multiplied by `factor`, short ones are kept, and those between are interpolated.
    rotations = scaling.original_max_positions * (1 / (2 * np.pi * (1 / frequency)))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * frequency / scaling.factor + keep * frequency


def _interpolated(theta: float, size: int, scaling: YarnScaling) -> tuple[float, float]:
    """Returns the indices between which "yarn" interpolates."""

    def index(rotations):
        return size * math.log(scaling.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    return first, last + 0.001 * (first == last)


def factor(scaling: Scaling | None) -> float | None:
    """Returns the factor of cosine and sine; None where a rule has none."""
    return scaling.attention_factor if isinstance(scaling, YarnScaling | LongRope) else None


def read(rope: Mapping[str, Any], field: str, kinds: tuple[str, ...], max_positions: int) -> Scaling | None:
    """Returns the rule that a rotary dictionary of config.json asks for; None for plain embeddings.

    Args:
      rope: the dictionary.
      field: its name, for messages.
      kinds: the rules that transformers computes for the family.
      max_positions: of the model.

    Raises:
      ValueError: the rule or one of its keys is not computed; the message names it.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in [*kinds]:
        raise ValueError(f"{field}.rope_type is {kind!r}; supported: {', '.join(map(repr, kinds))}")
    if rope.get("type", kind) != kind:
        raise ValueError(f"{field}.type is {rope['type']!r}; rope_type beside it is {kind!r}")
    for key in sorted(rope.keys() - _KEYS[kind] - _COMMON):
        if rope[key] is not None:
            allowed = ", ".join(sorted(_KEYS[kind] | _COMMON))
            raise ValueError(f"{field}.{key} is {rope[key]!r}; supported with rope_type {kind!r}: {allowed}")
    if kind == "default":
        return None
    if kind == "longrope":
        factors = {}
        for name in ("short_factor", "long_factor"):
            factors[name] = required(rope, name, field)
            if not isinstance(factors[name], list):
                raise ValueError(f"{field}.{name} is {factors[name]!r}; it must be a list")
        short, long = map(tuple, factors.values())
        return LongRope(
            short_factor=short,
            long_factor=long,
            original_max_positions=required(rope, "original_max_position_embeddings", field),
            stretched_max_positions=max_positions,
        )
    stretch = required(rope, "factor", field)
    if kind == "linear":
        return LinearScaling(factor=stretch)
    original = required(rope, "original_max_position_embeddings", field)
    if kind == "llama3":
        return RopeScaling(
            factor=stretch,
            low_freq_factor=required(rope, "low_freq_factor", field),
            high_freq_factor=required(rope, "high_freq_factor", field),
            original_max_positions=original,
        )
    positive_number(f"{field}.factor", stretch)
    given = {name: rope[name] for name in ("beta_fast", "beta_slow", "truncate") if rope.get(name) is not None}
    chosen = rope.get("attention_factor")
    return YarnScaling(
        factor=stretch,
        original_max_positions=original,
        attention_factor=_attention_factor(rope, field) if chosen is None else chosen,
        **given,
    )


def _attention_factor(rope: Mapping[str, Any], field: str) -> float:
    """Returns the attention factor of a "yarn" dictionary without one, as transformers derives it."""

    def scale(mscale):
        return 1.0 if rope["factor"] <= 1 else 0.1 * mscale * math.log(rope["factor"]) + 1.0

    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    for name, value in (("mscale", over), ("mscale_all_dim", under)):
        if value:
            positive_number(f"{field}.{name}", value)
    return scale(over) / scale(under) if over and under else scale(1)


def write(scaling: Scaling | None) -> dict[str, Any] | None:
    """Returns the rotary dictionary of a rule, without its base.

    That of "longrope" lacks the original length, which such files have outside of it.
    """
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, LongRope):
        return {
            "type": "longrope",
            "short_factor": [*scaling.short_factor],
            "long_factor": [*scaling.long_factor],
        }
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "attention_factor": float(scaling.attention_factor),
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
