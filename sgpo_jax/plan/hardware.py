"""The chips that a run can be planned for: TPUs and NVIDIA GPUs, by the name of their topology."""

import re
from importlib import metadata

import jax

from sgpo_jax.plan import gpus, tpus
from sgpo_jax.plan.roofline import Chip

GIB = 2**30


def topology(name: str) -> tuple[Chip, list[jax.Device]]:
    """Returns (chip, devices) of a topology such as "v5e:16x16" or "h100:4x8". The devices can only be compiled for.

    Raises:
        ValueError: the topology does not exist, or its compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind in tpus.CHIPS and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        return tpus.CHIPS[kind], tpus.devices(name)
    sizes = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    if kind in gpus.CHIPS and sizes and int(sizes[2]) <= gpus.MOST:
        return gpus.CHIPS[kind], gpus.devices(kind, int(sizes[1] or 1), int(sizes[2]))
    raise ValueError(
        f"--topology={name}: must be {', '.join(tpus.CHIPS)}, ':' and the shape of a slice, as in v5e:16x16 or "
        f"v5p:4x4x4; or {', '.join(gpus.CHIPS)}, ':' and the GPUs of a host, at most {gpus.MOST}, as in h100:8, or of "
        "several hosts, as in h100:4x8"
    )


def is_gpu(name: str) -> bool:
    """Returns whether a topology is one of GPUs."""
    return name.partition(":")[0] in gpus.CHIPS


def hbm_limit(name: str, device: jax.Device, memory_share: float) -> int:
    """Returns the bytes of HBM that a program may take on the device of a topology.

    A TPU's is the compiler's own. On a GPU it is the share of the card that JAX takes for itself when it starts.
    """
    kind = name.partition(":")[0]
    return int(memory_share * gpus.memory(kind)) if kind in gpus.CHIPS else tpus.hbm_limit(device)


def versions(name: str) -> dict[str, str]:
    """Returns package -> version of what compiles for a topology."""
    return {package: metadata.version(package) for package in ("jax", gpus.plugin() if is_gpu(name) else "libtpu")}
