"""TPU chips that need not be there: their speeds, and what the compiler says of a topology on a machine without any."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

GIB = 2**30


class Chip(NamedTuple):
    """Peak speeds of a chip."""

    flops: float  # per second, bfloat16
    hbm: float  # bytes per second
    ici: float  # bytes per second that a chip sends round a ring along one axis of the torus, both ways together


# From the pages on system architecture of the Cloud TPU documentation. They give the links of a chip together, both
# directions: 400 GB/s on 4 links, 800 on 4, 1200 on 6. A ring takes two links, and a link half of its rate each way.
CHIPS = {
    "v5e": Chip(flops=197e12, hbm=819e9, ici=100e9),
    "v6e": Chip(flops=918e12, hbm=1638e9, ici=200e9),
    "v5p": Chip(flops=459e12, hbm=2765e9, ici=200e9),
}
HOP = 1e-6  # seconds that one step of a ring takes at least

# libtpu asks a metadata server, and logs that it found none, unless it is told that it is on a host of some slice.
_ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-64",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened, so there is nothing to be alone with
}
_MEMORY = re.compile(r"\(?([\d.]+)([KMGT]?)\)? exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def topology(name: str) -> tuple[Chip, list[jax.Device]]:
    """(chip, devices) of a topology such as "v5e:16x16", to be compiled for; libtpu must be installed.

    Raises:
      ValueError: there is no such topology, or no libtpu.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(
            f"--topology={name}: must be {', '.join(CHIPS)}, ':' and a shape, as in v5e:16x16 or v5p:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, the compiler for TPUs, is not installed: pip install 'sgpo_jax[tpu]'")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # libtpu's own kinds
        raise ValueError(f"--topology={name}: libtpu knows no such topology ({error})") from error
    return CHIPS[kind], list(found.devices)


def hbm_limit(device: jax.Device) -> int:
    """Bytes of HBM that the compiler lets a program have, found out from a program that is too large for any chip."""
    huge = jax.ShapeDtypeStruct((2**40,), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if sizes := too_large(error):
            return sizes[1]
        raise
    raise ValueError(f"{device.device_kind}: a program of 8 TiB compiled, so its limit is not known")


def too_large(error: Exception) -> tuple[int, int] | None:
    """(bytes needed, bytes available) of the compiler's message that a program does not fit; None for another one."""
    found = _MEMORY.search(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
    if not found:
        return None
    return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])
