"""XLA's flags for tests, which compile much and compute little."""

from importlib.metadata import version

KNOWN = version("jaxlib").startswith("0.10.")
# For `jax.jit` of a test that compares two programs to the last bit, which XLA's older fusions round differently.
EXACT = {"xla_cpu_use_fusion_emitters": True} if KNOWN else None


def quick(devices: int) -> str:
    """So many fake CPU devices, and a compiler that is several times faster.

    Without LLVM's optimisations, and where XLA still has its older way to make fusions with that, which halves the time
    once more: an unknown flag would end the process.
    """
    flags = f" --xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return flags + " --xla_cpu_use_fusion_emitters=false" * KNOWN
