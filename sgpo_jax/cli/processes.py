"""A command that several processes run together: how they join, and what must be the same in all of them."""

from types import SimpleNamespace

from sgpo_jax import config as configs
from sgpo_jax.runtime import distributed, environment


def join(config: configs.ConfigDict, given: SimpleNamespace) -> None:
    """Makes this process one of several if the flags ask for it.

    Raises:
      ValueError: the flags do not go together, the other processes do not connect, or they run with another config,
        other packages or another commit.
    """
    cluster = {name: getattr(given, name) for name in ("coordinator", "processes", "process")}
    missing = [f"--{name}" for name, value in cluster.items() if value is None]
    if len(missing) == len(cluster):
        if not given.distributed:
            return
        distributed.start()
    elif missing:
        raise ValueError(f"{', '.join(missing)}: missing; --coordinator, --processes and --process go together")
    else:
        _check_processes(**cluster)
        distributed.start(**cluster)
    fields = {f"config.{name}": value for name, value in configs.flat(configs.to_dict(config)).items()}
    # Hosts of one run may have different kernels.
    versions = {name: value for name, value in environment.describe().items() if name != "system"}
    distributed.agree(fields | versions)
    print(f"{versions['processes']} processes, {versions['device']}, jax {versions['jax']}", flush=True)


def _check_processes(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ValueError(f"--coordinator={coordinator}: must be HOST:PORT, with a port from 1 to 65535")
    if processes < 1:
        raise ValueError(f"--processes={processes}: must be at least 1")
    if not 0 <= process < processes:
        raise ValueError(f"--process={process}: must be from 0 to {processes - 1}, as --processes={processes}")
