"""Several processes that run one program: how they start, share work, decide alike, and end together.

Every process must issue the same device computations in the same order. So a value that only one process knows (the
content of a file, a verdict, the time) is shared by `gather`, `first` or `split` before anything depends on it. Shared
values travel as JSON. With one process they are returned unchanged.
"""

import atexit
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed as detected  # no public name has the cluster that `initialize` detected
from jax.experimental import multihost_utils

from sgpo_jax.runtime import watchdog

HEARTBEAT = 50  # seconds until jaxlib gives up a process that is alive but frozen
_LAG = 90.0  # seconds in which a network file system shows every process the same file
_NEWS = 2.0  # seconds to wait for the news that another process died, which explains the error of a collective

T = TypeVar("T")


def start(coordinator: str = "", processes: int = 0, process: int = 0) -> None:
    """Makes this process one of several. Must be called before any device is used.

    Args:
      coordinator: HOST:PORT of the first process; "" lets JAX detect all three arguments, which it can on TPU pods,
        SLURM, Open MPI and Kubernetes.
      processes: number of processes.
      process: index of this process, from 0.

    Raises:
      ValueError: JAX detects no cluster, or the other processes do not connect in time.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # `preemption` handles SIGTERM
    if coordinator:
        host, _, port = coordinator.rpartition(":")
        _meet(host.strip("[]"), int(port), process, processes)
        # The port of the watchdog can be used again: its open connections do not keep others from listening there.
        # Without the detection, which inside SLURM or Open MPI would leave this process one GPU of its host.
        jax.distributed.initialize(
            coordinator, processes, process, cluster_detection_method="deactivate", heartbeat_timeout_seconds=HEARTBEAT
        )
    else:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"--distributed: JAX finds no TPU pod, SLURM, Open MPI or Kubernetes here ({error}); "
                "give --coordinator, --processes and --process"
            ) from error
    if jax.default_backend() == "cpu":
        # A program from XLA's cache runs collectives in an order that differs between processes, and fails.
        jax.config.update("jax_enable_compilation_cache", False)
    if not coordinator and jax.process_count() > 1:
        _meet_detected()
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def _meet(host: str, port: int, process: int, processes: int) -> None:
    if process == 0:
        watchdog.accept(watchdog.listen(port), processes)
    else:
        watchdog.connect(host, port, process, processes)


def _meet_detected() -> None:
    """Like `_meet`, at a port that the first process chooses."""
    cluster = detected.global_state
    listener = None if cluster.process_id else watchdog.listen()
    (port,) = (port for port in gather(listener and listener.getsockname()[1]) if port)
    if listener:
        watchdog.accept(listener, cluster.num_processes)
    else:
        host = str(cluster.coordinator_address).rpartition(":")[0].strip("[]")
        watchdog.connect(host, port, cluster.process_id, cluster.num_processes)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes the block inside succeed in all processes or fail in all of them. With one process it changes nothing."""
    try:
        yield
        if watchdog.has_peers():
            multihost_utils.sync_global_devices("the end")  # no process leaves while others work
    except BaseException as error:
        if watchdog.has_peers():
            time.sleep(_NEWS)  # if another process has died, this one ends here, with the news of it
            atexit.register(_leave)  # runs before JAX's exit handler, which would wait for the other processes
            watchdog.tell(f"has failed: {error or type(error).__name__}")
        raise
    watchdog.tell("")


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def is_first() -> bool:
    """Returns whether this is the first process, the one that writes files and prints."""
    return jax.process_index() == 0


def index() -> int:
    """Returns the number of this process, from 0, without opening its devices."""
    return int(detected.global_state.process_id or 0)


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in process order, in every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size, np.int32))
    width = 1 << int(sizes.max() - 1).bit_length()  # few different widths, because each one is compiled
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    watchdog.met()
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first(make: Callable[[], T]) -> T:
    """Calls `make()` in the first process only and returns its result in every process."""
    return gather(make() if is_first() else None)[0]


def first_bytes(make: Callable[[], bytes]) -> bytes:
    """Calls `make()` in the first process only and returns its bytes in every process. They may be many."""
    if jax.process_count() == 1:
        return make()
    content = make() if is_first() else b""
    size = gather(len(content))[0]
    if not size:
        return b""
    shared = multihost_utils.broadcast_one_to_all(np.frombuffer(content.ljust(size), np.uint8))
    watchdog.met()
    return np.asarray(shared, np.uint8).tobytes()


def split(work: Callable[[Sequence[Any]], list[T]], items: Sequence[Any]) -> list[T]:
    """Returns `work(items)`, one result per item; each process works on its share, and all get the whole list."""
    count = jax.process_count()
    results: list[Any] = [None] * len(items)
    for process, part in enumerate(gather(work(items[jax.process_index() :: count]))):
        results[process::count] = part
    return results


def wait_for(look: Callable[[], str], folder: Path) -> None:
    """Waits until every process sees the text that the first process has just written.

    Args:
      look: returns the text, "" where there is none.
      folder: where it is, for the message.

    Raises:
      ValueError: a process does not see it even after the time that a network file system may need.
    """
    text, deadline = first(look), time.monotonic() + _LAG
    while look() != text:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder}: process {jax.process_index()} does not see what process 0 wrote there; "
                "must be a folder that all processes share"
            )
        time.sleep(0.2)


def agree(values: Mapping[str, Any]) -> None:
    """Checks that every named value is the same in all processes.

    Raises:
      ValueError: a value differs; the message has its name and both values.
    """
    all_values = gather(dict(values))
    for process, others in enumerate(all_values):
        for name in {**all_values[0], **others}:
            first_value, value = all_values[0].get(name), others.get(name)
            if first_value != value:
                raise ValueError(
                    f"{name} is {first_value!r} in process 0 and {value!r} in process {process}; must be equal"
                )
