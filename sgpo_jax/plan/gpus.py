"""NVIDIA GPUs: their peak speeds and prices, and topologies to compile for on a machine that has no GPU."""

import importlib.util
import re
from importlib import resources

import jax
from jax.experimental import topologies

from sgpo_jax.plan.roofline import Chip

# Speeds are those of NVIDIA's data sheets for the SXM cards: FLOPs without sparsity; NVLink one way, half of the total.
# A GeForce has no NVLink but PCIe 4.0, and sums of bfloat16 products in float32.
# The network is an assumption: each GPU has its own network card, of 400 Gbit/s, or of 200 beside an A100, as in DGX.
# Prices are for a GPU in a node of eight, on demand, from the SkyPilot catalogue: Nebius at commit 0082b04, and Lambda
# at 0f40703 for the A100. RunPod's is for a single GeForce. Latencies are the constants of NCCL's tuning model for its
# protocol of the least latency: to start, 0.6 us a step over NVLink and 2.7 us to another host. It goes round the ring
# one way, so half the steps count twice.
_NCCL = {"start": 6.6e-6, "hop": 2 * 0.6e-6, "network_hop": 2 * 2.7e-6}
CHIPS = {
    "h100": Chip(flops=989.4e12, hbm=3352e9, ici=450e9, network=50e9, price=2.95, **_NCCL),
    "h200": Chip(flops=989.4e12, hbm=4800e9, ici=450e9, network=50e9, price=3.50, **_NCCL),
    "b200": Chip(flops=2250e12, hbm=7672e9, ici=900e9, network=50e9, price=5.50, **_NCCL),
    "a100": Chip(flops=312e12, hbm=2039e9, ici=300e9, network=25e9, price=2.79, **_NCCL),
    "a100-40gb": Chip(flops=312e12, hbm=1555e9, ici=300e9, network=25e9, price=1.99, **_NCCL),
    "rtx4090": Chip(flops=165.2e12, hbm=1008e9, ici=32e9, network=25e9, price=0.74, **_NCCL),
}
MOST = 8  # GPUs of a host
MEMORY_SHARE = 0.75  # of a card, which JAX takes for itself unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def plugin() -> str:
    """Returns the package of XLA's compiler for GPUs.

    Raises:
        ValueError: it is not installed.
    """
    for name in PLUGINS:
        if importlib.util.find_spec(name):
            return name
    raise ValueError("XLA's compiler for GPUs is not installed: pip install 'sgpo_jax[gpu-compiler]'")


def devices(kind: str, hosts: int, each: int) -> list[jax.Device]:
    """Returns the devices of `hosts` hosts with `each` GPUs of a kind in CHIPS. They can only be compiled for.

    Raises:
        ValueError: the compiler is not installed.
    """
    plugin()
    description = topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=_description(kind), topology=f"1x{hosts}x{each}"
    )
    return list(description.devices)


def memory(kind: str) -> int:
    """Returns the bytes of a card's memory, as the card reports them."""
    (size,) = re.findall(r"device_memory_size: (\d+)", _description(kind))
    return int(size)


def _description(kind: str) -> str:
    """Returns the card in the compiler's terms: a GpuTargetConfigProto as text."""
    return resources.files("sgpo_jax.plan").joinpath("cards", f"{kind}.txtpb").read_text(encoding="utf-8")
