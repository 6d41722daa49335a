"""Handles SIGTERM, which a scheduler sends before it takes a machine away, and Ctrl-C: save, then exit.

After SIGTERM the run exits with 0, in the grace period; after Ctrl-C with 130. A second Ctrl-C leaves at once.
"""

import os
import signal
import socket
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from sgpo_jax.runtime import watchdog

_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}  # exit status
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

_received = 0  # the signal that asked this process to stop; 0 is none


class Preempted(Exception):
    """The run was asked to stop, and its progress is saved."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code  # exit status


def watch(grace: float) -> None:
    """Makes SIGTERM and Ctrl-C requests to stop from now on.

    A thread listens for the signals, because Python's own handlers wait for the main thread, which may be in a long
    computation.

    Args:
      grace: seconds after SIGTERM until the process exits, even in the middle of a step. The other processes of the
        run exit with it. After Ctrl-C the step has all the time it needs, or until the next Ctrl-C.
    """
    global _received
    _received = 0
    listener, writer = socket.socketpair()
    writer.setblocking(False)
    for name in _CODES:
        signal.signal(name, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(listener, writer, grace), daemon=True).start()


def _listen(listener: socket.socket, writer: socket.socket, grace: float) -> None:
    while True:
        for number in listener.recv(64):
            if number == signal.SIGTERM and _received != signal.SIGTERM:
                line = f"SIGTERM: will save and exit after this step, or exit without saving in {grace:g} s"
                _request(signal.SIGTERM, line)
                threading.Thread(target=_leave_after, args=(grace,), daemon=True).start()
            elif number == signal.SIGINT and not _received:
                _request(signal.SIGINT, "Ctrl-C: will save and exit after this step; a second Ctrl-C leaves at once")
            elif number == signal.SIGINT:
                _leave(signal.SIGINT, "Ctrl-C: left at once; the next start resumes from the last checkpoint")


def _request(number: int, line: str) -> None:
    global _received
    _received = number
    print(line, flush=True)


def _leave_after(grace: float) -> None:
    threading.Event().wait(grace)
    _leave(signal.SIGTERM, "SIGTERM: the step took too long; the next start resumes from the last checkpoint")


def _leave(number: int, line: str) -> None:
    show_cursor = "\x1b[?25h" * sys.stdout.isatty()  # the progress line has hidden it
    print(show_cursor + line, flush=True)
    code = _CODES[signal.Signals(number)]
    watchdog.tell(f"was stopped by {_NAMES[signal.Signals(number)]} in the middle of a step", code=code)
    os._exit(code)


def requested() -> int:
    """Returns the signal that has asked any process of the run to stop; 0 for none.

    All processes call this together, so they stop at the same step.
    """
    if jax.process_count() == 1:
        return _received
    received = multihost_utils.process_allgather(np.array(_received, np.int32))
    watchdog.met()
    return int(np.max(received))


def check(saved: str = "the finished work is saved") -> None:
    """Raises Preempted if a stop is `requested`.

    Args:
      saved: says what is saved, for the message.
    """
    stop(requested(), saved)


def stop(number: int, saved: str = "the finished work is saved") -> None:
    """Raises Preempted for a signal that `requested` returned; does nothing for 0."""
    if number:
        name = signal.Signals(number)
        raise Preempted(f"stopped by {_NAMES[name]}; {saved}; the same command resumes", _CODES[name])
