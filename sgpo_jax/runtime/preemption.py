"""Handles SIGTERM, which a scheduler sends before it takes a machine away: save, then exit 0 in the grace period."""

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
    """The run was asked to stop, and its progress is saved."""


def watch(grace: float) -> None:
    """Makes SIGTERM a request to stop from now on.

    A thread listens for the signal, because Python's own handlers wait for the main thread, which may be in a long
    computation.

    Args:
      grace: seconds after SIGTERM until the process exits, even in the middle of a step. The other processes of the
        run exit with it.
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
    print(f"SIGTERM: will save and exit after this step, or exit without saving in {grace:g} s", flush=True)
    _requested.set()
    threading.Event().wait(grace)
    print("SIGTERM: the step took too long; the next start resumes from the last checkpoint", flush=True)
    watchdog.tell("was stopped by SIGTERM in the middle of a step", code=0)
    os._exit(0)


def requested() -> bool:
    """Returns whether SIGTERM has reached any process of the run.

    All processes call this together, so they stop at the same step.
    """
    if jax.process_count() == 1:
        return _requested.is_set()
    return bool(np.any(multihost_utils.process_allgather(np.array(_requested.is_set()))))


def check() -> None:
    """Raises Preempted if a stop is `requested`."""
    if requested():
        raise Preempted("stopped by SIGTERM; the finished work is saved and the same command resumes it")
