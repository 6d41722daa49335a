"""Connections between the processes of a run, so that all of them exit when one fails or dies.

The first process holds a connection to every other process. A process that fails reports it; one whose connection
breaks without a report has died. The first process passes the news on, and every process exits, whatever it is doing.
Otherwise the rest would wait forever in a collective. The processes of a run trust each other and their network.

A process that is alive but does not come to where the others wait is no failure: it may have long work to do. After
`SILENCE` every process says where it is.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds that all processes have to connect
SILENCE = 1800.0  # seconds without a meeting of the processes after which each says where it is
DIED = "has died without a word (killed, out of memory, or its host is gone)"
_HELLO = 10.0  # seconds that a new connection has to identify itself
_WORD = 15.0  # seconds after which a process that waits for the first one says so
_STRANGER = "not a process of sgpo_jax"
_LONGEST = 1_000_000  # bytes of a message
_REASON = 1_000  # characters of a reason
# Seconds of silence before a host is probed, seconds between probes, and unanswered probes after which it is dead.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class _Stream:
    """A connection that carries messages, one line of JSON each."""

    def __init__(self, connection: socket.socket, seconds: float):
        connection.settimeout(seconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()

    def set_timeout(self, seconds: float | None) -> None:
        """Sets how long reading waits; None waits forever."""
        self._connection.settimeout(seconds)

    def send(self, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):  # the reading thread notices that the other side is dead
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> dict[str, Any] | None:
        """Returns the next message, or None after the last one."""
        try:
            message = json.loads(self._lines.readline(_LONGEST))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


class _Peers:
    """The connections of this process: from the first process to all others, from any other to the first."""

    def __init__(self, process: int, hosts: list[str], streams: dict[int, _Stream]):
        self.process = process
        self.hosts = hosts
        self.streams = streams
        self.over = False
        self.met = time.monotonic()
        self._ending = threading.Lock()
        threading.Thread(target=self._speak_up, daemon=True).start()
        for other, stream in streams.items():
            stream.set_timeout(None)
            threading.Thread(target=self._listen, args=(other, stream), daemon=True).start()

    def _listen(self, other: int, stream: _Stream) -> None:
        message = stream.read() or {"process": other, "reason": DIED, "code": 1}
        if message["reason"] and not self.over:
            self._end(message)

    def _end(self, message: dict[str, Any]) -> None:
        with self._ending:  # never released, so only the first reason is reported
            if self.process == 0:
                self.send(message)
            number = message["process"]
            text = f"process {number} of {len(self.hosts)}, on host {self.hosts[number]}, {message['reason']}"
            with contextlib.suppress(OSError):
                os.write(2, f"sgpo_jax: {text}; this one, {self.process}, stops too\n".encode(errors="replace"))
            os._exit(message["code"])

    def _speak_up(self) -> None:
        met, patience = self.met, SILENCE
        while not self.over:
            time.sleep(SILENCE / 60)
            if met != self.met:
                met, patience = self.met, SILENCE
            elif (waited := time.monotonic() - met) > patience:
                patience *= 2
                who = f"process {self.process} of {len(self.hosts)}, on host {self.hosts[self.process]},"
                since = f"has not met the others for {waited / 60:.0f} min"
                with contextlib.suppress(OSError):
                    os.write(2, f"sgpo_jax: {who} {since}; it is at {_place()}\n".encode(errors="replace"))

    def send(self, message: dict[str, Any]) -> None:
        for other, stream in self.streams.items():
            if other != message["process"]:
                stream.send(message)


def _place() -> str:
    """Returns the last lines of this package that the main thread is at, the outer ones first."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    package = Path(__file__).parents[1]
    ours = [(Path(at.filename), at) for at in traceback.extract_stack(frame) if at.filename.startswith(str(package))]
    return ", ".join(f"{path.relative_to(package)}:{at.lineno} {at.name}" for path, at in ours[-5:]) or "no known place"


_peers: _Peers | None = None


def listen(port: int = 0) -> socket.socket:
    """Returns the socket at which the first process waits for the others; port 0 takes any free port."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=128
    )


def accept(listener: socket.socket, count: int) -> None:
    """Waits, in the first of `count` processes, until all others have connected; then watches them.

    Raises:
      ValueError: a process did not connect in time; the message has its index.
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
    """Returns why a process cannot join the `count` processes, those in `hosts` being connected; "" if it can."""
    match hello:
        case {"process": int(process), "processes": int(processes), "host": str()}:
            if processes != count:
                return f"--processes={processes}: the first process has {count}"
            if process in hosts:
                return f"--process={process}: there is one already, on host {hosts[process]}"
            return "" if 0 < process < count else f"--process={process}: must be from 0 to {count - 1}"
    return _STRANGER


def connect(host: str, port: int, process: int, count: int) -> None:
    """Connects this one of `count` processes to the first process; then watches that connection.

    Raises:
      ValueError: the first process does not answer in time, or refuses.
    """
    started, address = time.monotonic(), f"{host}:{port}"
    while True:
        stream = _reach(host, port, started)
        stream.send({"process": process, "processes": count, "host": socket.gethostname()})
        match stream.read():
            case {"refused": str(refusal)} if refusal == _STRANGER and time.monotonic() < started + PATIENCE:
                stream.close()  # on a busy machine the hello came too late
            case {"refused": str(refusal)}:
                raise ValueError(refusal)
            case {"hosts": list(hosts)} if len(hosts) == count:
                return _watch(_Peers(process, hosts, {0: stream}))
            case _:
                raise ValueError(f"process 0 at {address} has ended, or something else answers there")


def _reach(host: str, port: int, started: float) -> _Stream:
    """Returns a connection to the first process, for which this one has waited since `started`."""
    said = False
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_HELLO)
            if connection.getsockname() != connection.getpeername():
                return _Stream(connection, PATIENCE)
            connection.close()  # on one host, the system may give the free port to this very connection
            raise ConnectionRefusedError("nobody listens there")
        except OSError as error:  # also for an unknown host name, which may become known while machines start
            waited, address = time.monotonic() - started, f"{host}:{port}"
            if waited > PATIENCE:
                raise ValueError(f"process 0 does not answer at {address} in {PATIENCE:g} s ({error})") from error
            if waited > _WORD and not said:
                said = True
                print(f"waiting up to {PATIENCE:g} s for process 0 at {address} ({error})", file=sys.stderr, flush=True)
            time.sleep(0.2)


def _watch(peers: _Peers) -> None:
    global _peers
    _peers = peers


def has_peers() -> bool:
    """Returns whether this process is connected to others."""
    return _peers is not None


def met() -> None:
    """Notes that all processes have just met, in a collective that each of them has left."""
    if _peers is not None:
        _peers.met = time.monotonic()


def tell(reason: str, code: int = 1) -> None:
    """Tells the other processes that this one ends.

    Args:
      reason: the cause, with which they exit as well; "" when all processes have reached the end of the program.
      code: their exit code.
    """
    if _peers is not None:
        _peers.over = True
        reason = " ".join(reason.split())[:_REASON]
        _peers.send({"process": _peers.process, "reason": reason, "code": code})
        sys.stdout.flush()
