"""Roofline estimates: the time of work on a chip that reaches stated shares of its peak speeds."""

from collections.abc import Sequence
from typing import NamedTuple

from sgpo_jax.plan.hardware import HOP, Chip
from sgpo_jax.plan.hlo_cost import Collective


class Reached(NamedTuple):
    """Shares of the peak speeds that a program is assumed to reach, from 0 to 1."""

    flops: float = 0.4
    hbm: float = 0.65
    ici: float = 0.65


class Seconds(NamedTuple):
    """Time of one phase by the resource it waits for, in seconds."""

    compute: float
    hbm: float
    ici: float

    @property
    def least(self) -> float:
        """Lower bound: full overlap."""
        return max(self)

    @property
    def most(self) -> float:
        """Upper bound: no overlap."""
        return sum(self)


def seconds(flops: float, hbm: float, collectives: Sequence[Collective], chip: Chip, reached: Reached) -> Seconds:
    """Returns the time of a phase on one chip.

    Args:
        flops: FLOPs of the chip.
        hbm: bytes of HBM that the chip reads and writes.
        collectives: those that the chip takes part in, each in a ring along one axis of the torus.
        chip, reached: peak speeds, and the shares of them.
    """
    ici = sum(collective.times * collective_seconds(collective, chip, reached) for collective in collectives)
    return Seconds(flops / (chip.flops * reached.flops), hbm / (chip.hbm * reached.hbm), ici)


def collective_seconds(collective: Collective, chip: Chip, reached: Reached) -> float:
    """Returns the time of one collective, in seconds.

    Bandwidth decides for large arrays. For small ones it is the latency of the steps halfway round the ring.
    """
    return max(collective.sent / (chip.ici * reached.ici), collective.devices / 2 * HOP)
