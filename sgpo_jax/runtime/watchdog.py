"""Connections between the processes of a run: how they meet, and how the end of one becomes the end of all.

The first process holds a connection to every other one. Whoever fails says so; whose connection breaks without a word
has died. The first process passes it on, and all of them exit, whatever they are doing: without that they would wait
in a collective for one that never comes. They trust each other, as processes of one run on one network.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any

PATIENCE = 300.0  # seconds in which all processes have to come
DIED = "has died without a word (killed, out of memory, or its host is gone)"
_HELLO = 10.0  # seconds for a stranger to say who it is
_LONGEST = 1_000_000  # bytes of a message
_REASON = 1_000  # characters of a reason
# Seconds until the first question whether a silent host is still there, and between two; and how many go unanswered.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class _Stream:
    """Messages, a line of JSON each, over a connection."""

    def __init__(self, connection: socket.socket, seconds: float):
        connection.settimeout(seconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()

    def wait(self, seconds: float | None) -> None:
        """From now on reading waits so long; None is for ever."""
        self._connection.settimeout(seconds)

    def send(self, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):  # of one that has died the reader learns
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> dict[str, Any] | None:
        """The next message, or None when there is none and will be none."""
        try:
            message = json.loads(self._lines.readline(_LONGEST))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


class _Peers:
    """This process, and those it is connected with: the first with all, the others with the first."""

    def __init__(self, process: int, hosts: list[str], streams: dict[int, _Stream]):
        self.process = process
        self.hosts = hosts
        self.streams = streams
        self.over = False
        self._ending = threading.Lock()
        for other, stream in streams.items():
            stream.wait(None)
            threading.Thread(target=self._listen, args=(other, stream), daemon=True).start()

    def _listen(self, other: int, stream: _Stream) -> None:
        message = stream.read() or {"process": other, "reason": DIED, "code": 1}
        if message["reason"] and not self.over:
            self._end(message)

    def _end(self, message: dict[str, Any]) -> None:
        with self._ending:  # never released: the first reason is the one that counts
            if self.process == 0:
                self.send(message)
            number = message["process"]
            text = f"process {number} of {len(self.hosts)}, on host {self.hosts[number]}, {message['reason']}"
            with contextlib.suppress(OSError):
                os.write(2, f"sgpo_jax: {text}; this one, {self.process}, stops too\n".encode(errors="replace"))
            os._exit(message["code"])

    def send(self, message: dict[str, Any]) -> None:
        for other, stream in self.streams.items():
            if other != message["process"]:
                stream.send(message)


_mine: _Peers | None = None


def listen(port: int = 0) -> socket.socket:
    """A socket at which the first process waits for the others; port 0 is any that is free."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=128
    )


def accept(listener: socket.socket, count: int) -> None:
    """The first of `count` processes waits for the others, and watches over them from then on.

    Raises:
      ValueError: some have not come in time.
    """
    deadline = time.monotonic() + PATIENCE
    hosts, streams = {0: socket.gethostname()}, {}
    with listener:
        while len(hosts) < count:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(count) if i not in hosts)
                raise ValueError(f"process {missing} of {count} has not come within {PATIENCE:g} s") from None
            stream = _Stream(connection, _HELLO)
            hello = stream.read() or {}
            if refusal := _refusal(hello, hosts, count):
                stream.send({"refused": refusal})
                stream.close()
            else:
                hosts[hello["process"]], streams[hello["process"]] = hello["host"], stream
    names = [hosts[i] for i in range(count)]
    for stream in streams.values():
        stream.send({"hosts": names})
    _watch(_Peers(0, names, streams))


def _refusal(hello: dict[str, Any], hosts: dict[int, str], count: int) -> str:
    """Why a process cannot be one of the `count`, of which `hosts` are there; "" if it can."""
    match hello:
        case {"process": int(process), "processes": int(processes), "host": str()}:
            if processes != count:
                return f"--processes={processes}: the first process has {count}"
            if process in hosts:
                return f"--process={process}: there is one already, on host {hosts[process]}"
            return "" if 0 < process < count else f"--process={process}: must be from 0 to {count - 1}"
    return "this is no process of sgpo_jax"


def connect(host: str, port: int, process: int, count: int) -> None:
    """Another of `count` processes finds the first one, and is watched over from then on.

    Raises:
      ValueError: it does not answer in time, or refuses.
    """
    deadline, address = time.monotonic() + PATIENCE, f"{host}:{port}"
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_HELLO)
            if connection.getsockname() != connection.getpeername():
                break
            connection.close()  # on one host, a port that nobody listens at may be given to this very connection
            raise ConnectionRefusedError("nobody listens there")
        except OSError as error:  # a name that is not known may become so while machines start
            if time.monotonic() > deadline:
                raise ValueError(f"process 0 does not answer at {address} in {PATIENCE:g} s ({error})") from error
            time.sleep(0.2)
    stream = _Stream(connection, PATIENCE)
    stream.send({"process": process, "processes": count, "host": socket.gethostname()})
    match stream.read():
        case {"refused": str(refusal)}:
            raise ValueError(refusal)
        case {"hosts": list(hosts)} if len(hosts) == count:
            _watch(_Peers(process, hosts, {0: stream}))
        case _:
            raise ValueError(f"process 0 at {address} has ended, or something else answers there")


def _watch(mine: _Peers) -> None:
    global _mine
    _mine = mine


def are_there() -> bool:
    """Whether this process has met others."""
    return _mine is not None


def tell(reason: str, code: int = 1) -> None:
    """Says to the others that this process ends, and why; they exit with `code`. With "" all have reached the end."""
    if _mine is not None:
        _mine.over = True
        reason = " ".join(reason.split())[:_REASON]
        _mine.send({"process": _mine.process, "reason": reason, "code": code})
        sys.stdout.flush()
