"""TPU chips: their peak speeds and prices, and topologies to compile for on a machine that has no TPU."""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from sgpo_jax.plan.roofline import Chip

# From the system architecture pages of the Cloud TPU documentation. They give the total of all links of a chip, both
# directions: 400 GB/s on 4 links, 800 on 4, 1200 on 6. A ring uses two links, and a link has half its rate each way.
# The prices are Google's for one hour on demand in us-east5; docs/pods.md has their source.
CHIPS = {
    "v5e": Chip(flops=197e12, hbm=819e9, ici=100e9, price=1.20),
    "v6e": Chip(flops=918e12, hbm=1638e9, ici=200e9, price=2.70),
    "v5p": Chip(flops=459e12, hbm=2765e9, ici=200e9, price=4.20),
}

# Without these, libtpu asks a metadata server which slice this host belongs to, and logs that there is no answer.
_ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-64",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # safe: no device is opened
}
_MEMORY = re.compile(r"\(?([\d.]+)([KMGT]?)\)? exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def devices(name: str) -> list[jax.Device]:
    """Returns the devices of a topology such as "v5e:16x16". They can only be compiled for.

    Raises:
        ValueError: the topology does not exist, or libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, the compiler for TPUs, is not installed: pip install 'sgpo_jax[tpu]'")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # libtpu raises types of its own
        raise ValueError(f"--topology={name}: libtpu knows no such topology ({error})") from error
    return list(description.devices)


def hbm_limit(device: jax.Device) -> int:
    """Returns the bytes of HBM that the compiler allows a program on the device.

    It compiles a program that is too large for any chip and reads the limit from the error message.

    Raises:
        ValueError: that program compiled.
    """
    huge = jax.ShapeDtypeStruct((2**40,), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if sizes := too_large(error):
            return sizes[1]
        raise
    raise ValueError(f"{device.device_kind}: a program of 8 TiB compiled, so the limit of its HBM is unknown")


def too_large(error: Exception) -> tuple[int, int] | None:
    """Returns (bytes needed, bytes available) from the compiler's error that a program does not fit.

    The result is None for any other error.
    """
    match = _MEMORY.search(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
    if not match:
        return None
    return int(float(match[1]) * _UNITS[match[2]]), int(float(match[3]) * _UNITS[match[4]])
