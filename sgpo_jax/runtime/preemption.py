"""SIGTERM, as a scheduler sends it before it takes a machine away: save, say so, exit 0 within the grace period."""

import os
import signal
import socket
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from sgpo_jax.runtime import watchdog

_requested = threading.Event()


class Preempted(Exception):
    """The run was asked to stop, and has saved what it had."""


def watch(grace: float) -> None:
    """From now on SIGTERM is a request; `grace` seconds later the process exits, even in the middle of a step.

    If it is one of several, the others exit with it.

    A thread listens, because Python's own handlers wait for the main thread, which may be in a long computation.
    """
    _requested.clear()
    listener, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(listener, writer, grace), daemon=True).start()


def _listen(listener: socket.socket, writer: socket.socket, grace: float) -> None:
    while signal.SIGTERM not in listener.recv(64):
        pass
    print(f"SIGTERM: the run saves and exits after this step, or in {grace:g} s without it", flush=True)
    _requested.set()
    threading.Event().wait(grace)
    print("SIGTERM: the step took too long; the next start goes on from the last checkpoint", flush=True)
    watchdog.tell("was stopped by SIGTERM in the middle of a step", code=0)
    os._exit(0)


def requested() -> bool:
    """Whether SIGTERM has come to this process, or to any of several: all call this and stop at the same step."""
    if jax.process_count() == 1:
        return _requested.is_set()
    return bool(np.any(multihost_utils.process_allgather(np.array(_requested.is_set()))))


def check() -> None:
    """Raises Preempted when it is `requested`."""
    if requested():
        raise Preempted("stopped by SIGTERM, what was done is saved; the same command goes on")
