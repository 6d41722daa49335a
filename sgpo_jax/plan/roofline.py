"""How long work takes on a chip that reaches stated shares of its peak speeds."""

from collections.abc import Sequence
from typing import NamedTuple

from sgpo_jax.plan.hardware import HOP, Chip
from sgpo_jax.plan.hlo_cost import Collective


class Reached(NamedTuple):
    """Shares of the peak speeds that are assumed to be reached."""

    flops: float = 0.4
    hbm: float = 0.65
    ici: float = 0.65


class Seconds(NamedTuple):
    """Time of one phase by what it waits for."""

    compute: float
    hbm: float
    ici: float

    @property
    def least(self) -> float:
        """With everything at once: the roofline."""
        return max(self)

    @property
    def most(self) -> float:
        """With one after the other."""
        return sum(self)


def seconds(flops: float, hbm: float, moved: Sequence[Collective], chip: Chip, reached: Reached) -> Seconds:
    """Time of a phase on one chip.

    Args:
      flops: FLOPs of the chip.
      hbm: bytes that it reads and writes.
      moved: collectives that it takes part in, each in a ring along one axis of the torus.
      chip, reached: peak speeds and the shares of them.
    """
    ici = sum(each.times * collective_seconds(each, chip, reached) for each in moved)
    return Seconds(flops / (chip.flops * reached.flops), hbm / (chip.hbm * reached.hbm), ici)


def collective_seconds(each: Collective, chip: Chip, reached: Reached) -> float:
    """Of one collective: its bytes, or, where they are few, the steps halfway round the ring."""
    return max(each.sent / (chip.ici * reached.ici), each.devices / 2 * HOP)
