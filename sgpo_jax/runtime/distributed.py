"""Several processes that run one program: how they start, share work, decide alike, and end together.

Every process issues the same device computations in the same order. So what only one can know (what a file says, how
an answer was graded, what the clock did) reaches all of them through `gather`, `first` or `split` before anything
depends on it. Values travel as JSON; with one process they stay what they are.
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
from jax._src import distributed as detected  # the one place that has what `initialize` found out
from jax.experimental import multihost_utils

from sgpo_jax.runtime import watchdog

HEARTBEAT = 50  # seconds until jaxlib gives up a process that is there but frozen
_LAG = 90.0  # seconds after which a network file system shows everyone the same file
_NEWS = 2.0  # seconds in which an error of a collective is explained by the death of another process

T = TypeVar("T")


def start(coordinator: str = "", processes: int = 0, process: int = 0) -> None:
    """Makes this process one of several; before any device is touched.

    Args:
      coordinator: HOST:PORT at which the first process can be reached; "" leaves all three to JAX, which knows TPU
        pods, SLURM, Open MPI and Kubernetes.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      ValueError: JAX finds no cluster, or the others do not come.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is for `preemption`
    if coordinator:
        host, _, port = coordinator.rpartition(":")
        _meet(host.strip("[]"), int(port), process, processes)
        # The same port again: the connections of those who have met do not keep others from listening at it.
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT)
    else:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"--distributed: JAX finds no TPU pod, SLURM, Open MPI or Kubernetes here ({error}); "
                "give --coordinator, --processes and --process"
            ) from error
    if jax.default_backend() == "cpu":
        # What XLA reads back from its cache runs collectives in an order that differs between processes, and fails.
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
    """As `_meet`, at a port that the first process chooses."""
    found = detected.global_state
    listener = None if found.process_id else watchdog.listen()
    (port,) = (port for port in gather(listener and listener.getsockname()[1]) if port)
    if listener:
        watchdog.accept(listener, found.num_processes)
    else:
        host = str(found.coordinator_address).rpartition(":")[0].strip("[]")
        watchdog.connect(host, port, found.process_id, found.num_processes)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is done inside ends in all processes, or fails in all. With one process nothing is different."""
    try:
        yield
        if watchdog.are_there():
            multihost_utils.sync_global_devices("the end")  # nobody leaves while others work
    except BaseException as error:
        if watchdog.are_there():
            time.sleep(_NEWS)  # if another has died, this process ends here, with the news of it
            atexit.register(_leave)  # before JAX's own, which would wait for the others
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


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order, in every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size, np.int32))
    width = 1 << int(sizes.max() - 1).bit_length()  # few widths, as each is compiled
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first(make: Callable[[], T]) -> T:
    """What `make()` returns in the first process, the only one that calls it, in every process."""
    return gather(make() if is_first() else None)[0]


def split(work: Callable[[Sequence[Any]], list[T]], items: Sequence[Any]) -> list[T]:
    """`work(items)`, a list of one result an item; each process works on its share, and all get the whole list."""
    count = jax.process_count()
    results: list[Any] = [None] * len(items)
    for process, part in enumerate(gather(work(items[jax.process_index() :: count]))):
        results[process::count] = part
    return results


def wait_for(path: Path) -> None:
    """Waits until every process sees the file as the first one does, which has just written it.

    Raises:
      ValueError: one does not, though a network file system has had time to show it.
    """
    text, deadline = first(path.read_text), time.monotonic() + _LAG
    while not (path.is_file() and path.read_text() == text):
        if time.monotonic() > deadline:
            raise ValueError(f"{path.parent}: process {jax.process_index()} does not see there what process 0 wrote; "
                             "it must be a folder that all of them share")  # fmt: skip
        time.sleep(0.2)


def agree(values: Mapping[str, Any]) -> None:
    """Raises ValueError where a value, by its name, is not the same in all processes."""
    all_values = gather(dict(values))
    for process, others in enumerate(all_values):
        for name in {**all_values[0], **others}:
            ours, theirs = all_values[0].get(name), others.get(name)
            if ours != theirs:
                raise ValueError(f"{name} is {ours!r} in process 0 and {theirs!r} in process {process}; must be equal")
