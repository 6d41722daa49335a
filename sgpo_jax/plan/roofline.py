"""Roofline estimates: the time of work on a chip that reaches stated shares of its peak speeds."""

from collections.abc import Sequence
from typing import NamedTuple

from sgpo_jax.plan.hlo_cost import Collective


class Chip(NamedTuple):
    """Peak speeds of a chip, TPU or GPU, and its price.

    Chips are linked by the torus of a TPU slice, or by NVLink inside a host. The network joins hosts of GPUs.
    """

    flops: float  # per second, in bfloat16
    hbm: float  # bytes per second
    ici: float  # bytes per second that a chip sends in a ring over the links between chips
    network: float = 0.0  # bytes per second that a chip sends to other hosts; 0 where the links reach all chips
    start: float = 0.0  # least seconds of a collective, however small
    hop: float = 1e-6  # least seconds of one step of a ring over the links
    network_hop: float = 0.0  # the same for a step from host to host
    price: float = 0.0  # dollars for an hour



class Reached(NamedTuple):
    """Shares of the peak speeds that a program is assumed to reach, from 0 to 1."""

    flops: float = 0.4
    hbm: float = 0.65
    ici: float = 0.65
    network: float = 0.65


class Seconds(NamedTuple):
    """Time of one phase by the resource it waits for, in seconds."""

    compute: float
    hbm: float
    ici: float
    network: float = 0.0

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
        collectives: those that the chip takes part in, each in a ring.
        chip, reached: peak speeds, and the shares of them.
    """
    links, network = (
        sum(collective.times * part(collective, chip, reached) for collective in collectives)
        for part in (link_seconds, network_seconds)
    )
    return Seconds(flops / (chip.flops * reached.flops), hbm / (chip.hbm * reached.hbm), links, network)


def link_seconds(collective: Collective, chip: Chip, reached: Reached) -> float:
    """Returns the time that a collective takes on the links between chips, in seconds.

    Bandwidth decides for large arrays. For small ones it is the latency of the steps halfway round the ring.
    """
    least = chip.start + collective.devices / 2 * chip.hop
    return max((collective.sent - collective.sent_to_hosts) / (chip.ici * reached.ici), least)


def network_seconds(collective: Collective, chip: Chip, reached: Reached) -> float:
    """Returns the time that a collective takes between hosts, in seconds; 0 where it stays inside one."""
    if collective.hosts == 1:
        return 0.0
    return max(collective.sent_to_hosts / (chip.network * reached.network), collective.hosts / 2 * chip.network_hop)
