"""Grading processes: each grades one item at a time and can be killed."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Literal, cast, get_args

from sgpo_jax.rewards import structure
from sgpo_jax.rewards.answers import readings, with_signs

Outcome = Literal["correct", "wrong", "no_box", "timeout", "crash", "invalid"]


class Worker:
    """A grading process, used by one thread at a time.

    It is a plain program on pipes: that avoids forking a process that runs jax, importing the user's __main__ again,
    and pickle.

    Args:
      seconds: wall-clock limit of one grading.
      megabytes: limit of the process's address space.
      reward: `module:function` of a user's reward function; "" is the verifier.

    Raises:
      RuntimeError: the process cannot start.
    """

    def __init__(self, seconds: float, megabytes: int, reward: str = ""):
        self.seconds = seconds
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
        # The worker searches a user's module in the same folders as this program.
        path = json.dumps([os.path.abspath(folder) for folder in sys.path])
        # -P keeps this folder off sys.path. The hash seed makes sympy's orderings repeatable. In its own session the
        # worker gets no Ctrl-C; it ends when its stdin closes.
        self.process = subprocess.Popen(
            [sys.executable, "-P", program, str(0.75 * seconds), str(megabytes), reward, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        self.stdin = cast(IO[bytes], self.process.stdin)
        self.stdout = cast(IO[bytes], self.process.stdout)
        os.set_blocking(self.stdin.fileno(), False)
        try:
            error = self._read(120.0)["error"]  # imports: 0.5 s, on a busy host much longer
        except (TimeoutError, EOFError, ValueError, RecursionError, TypeError, KeyError) as failure:
            error = f"{type(failure).__name__}, status {self.process.poll()}"
        if error is not None:
            self.kill()
            raise RuntimeError(f"a grading worker did not start: {error}")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply to a request, with its "outcome". The process may be dead afterwards."""
        try:
            self._write(json.dumps(request).encode() + b"\n", self.seconds)
            reply = _checked(self._read(self.seconds))
        except TimeoutError:
            self.kill()
            return {"outcome": "timeout"}
        except (EOFError, OSError, ValueError, RecursionError):
            self.kill()
            return {"outcome": "timeout" if self.process.returncode == -signal.SIGALRM else "crash"}
        if reply["retire"]:
            self.kill()
        return reply

    def _write(self, line: bytes, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self.stdin, select.POLLOUT)
        while line:
            if not poller.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                raise TimeoutError
            line = line[os.write(self.stdin.fileno(), line) :]

    def _read(self, seconds: float) -> Any:
        poller = select.poll()  # select() fails when the run has over 1024 open files
        poller.register(self.stdout, select.POLLIN)
        if not poller.poll(1000 * seconds):
            raise TimeoutError
        line = os.read(self.stdout.fileno(), select.PIPE_BUF)  # a reply is written at once
        if not line:
            raise EOFError
        if line.count(b"\n") != 1:  # json would accept an empty line before the reply
            raise ValueError(f"a grading worker replied {line!r:.100}")
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process and closes its pipes."""
        with self.process:  # its exit waits and closes the pipes
            self.process.kill()


def _checked(reply: Any) -> dict[str, Any]:
    """Returns a valid reply, else raises ValueError: code that writes to every open file can forge any reply."""
    match reply:
        case {"outcome": str(outcome), "retire": bool()} if outcome in get_args(Outcome):
            reward = reply.get("reward", 0.0)
            if type(reward) in (int, float) and 0 <= reward <= 1 and isinstance(reply.get("note", ""), str):
                return reply
    raise ValueError(f"a grading worker replied {reply!r:.100}")


def _request(gold: str, answer: str) -> dict[str, Any]:
    """Returns what a worker has to compare: the parts of two ratios, or readings of both answers with their items."""
    ratios = [structure.ratio(text) for text in structure.with_colons(gold, answer)]
    if all(ratios):
        return {"ratios": ratios}
    pairs = readings(gold, answer)
    # In a list, 1 and \pm 1 have an item in common.
    written = [[(with_signs(text) or [text])[0] for text in pair] for pair in pairs]
    return {"pairs": pairs, "items": [structure.items(*pair) for pair in written]}


class Pool:
    """A pool of grading processes. Each is driven by its own thread and starts with that thread's first item.

    Args:
      workers: number of processes; None is one per CPU, at most 8.
      seconds: wall-clock limit of one grading. A process ends itself after 75 % of it, which leaves time to start the
        next one. A process that hangs is killed at the limit.
      megabytes: limit of each process's address space.
      reward: `module:function` of a user's reward function; "" is the verifier.
    """

    def __init__(self, workers: int | None = None, seconds: float = 6.0, megabytes: int = 1024, reward: str = ""):
        count = min(8, os.cpu_count() or 1) if workers is None else workers
        for name, value in [("workers", count), ("seconds", seconds), ("megabytes", megabytes)]:
            if not value > 0:
                raise ValueError(f"{name} is {value!r}; it must be positive")
        self._arguments = (seconds, megabytes, reward)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="grading")
        self._workers: dict[int, Worker] = {}  # by thread

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Grades (gold, answer) pairs of normalised answers; the outcomes are in the same order."""
        return [reply["outcome"] for reply in self.ask([_request(*pair) for pair in pairs])]

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the workers' replies, in the order of the requests."""
        return list(self._threads.map(self._ask, requests))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        thread = threading.get_ident()
        worker = self._workers.get(thread)
        if worker is None or worker.process.poll() is not None:
            if worker is not None:
                worker.kill()  # closes the pipes of a dead process
            worker = self._workers[thread] = Worker(*self._arguments)
        return worker.ask(request)

    def close(self) -> None:
        """Drops waiting items and ends the threads and processes; takes at most the time of one grading."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers.values():
            worker.kill()
