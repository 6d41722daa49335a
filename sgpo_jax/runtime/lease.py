"""A lock on a folder of a bucket, as a lease that its holder renews.

The folder's `lock/` has numbered objects, and the one with the highest number holds the lock. The store creates an
object only where there is none of its name (generation 0 on gs://, If-None-Match on s3://, the parent of a commit on
hf://), so two processes never get one number. The holder writes its object again and again, at hf:// in every commit.
Where nothing is written for the time of a lease the holder is dead, and the next number is free. How often is in
`buckets.PERIODS`. No clock of one machine is compared with that of another.

What a store cannot promise: a process that stands still for longer than a lease, with its machine, does not know that
it has lost the lock. It ends at its next beat, before which it may still write. On hf:// it cannot: see `renewed`.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sgpo_jax.runtime import buckets, watchdog


@dataclass
class _Lease:
    """A lock that this process holds."""

    url: str
    number: int
    holder: dict[str, Any]  # its content
    written: float = field(default_factory=time.monotonic)  # when it was last written, or tried to
    writing: threading.Lock = field(default_factory=threading.Lock)

    def renewed(self) -> dict[str, bytes]:
        """Returns the lock as it is to be written next; ends the process if another one has taken the lock."""
        if max(_numbers(self.url), default=0) > self.number:
            _end(self.url)
        with self.writing:
            self.holder, self.written = {**self.holder, "beat": self.holder["beat"] + 1}, time.monotonic()
            return {_name(self.number): _text(self.holder)}


_held: dict[str, _Lease] = {}


@contextlib.contextmanager
def hold(url: str) -> Iterator[None]:
    """Holds the lock of a folder. If its holder was killed, this waits until that is certain.

    Raises:
      ValueError: another process holds the lock; the message names its host and pid.
    """
    buckets.delete(f"{url}/lock")  # of a run that was copied from a disk; on the hub no folder could have its name
    number = _free_number(url)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "token": uuid.uuid4().hex, "beat": 0}
    with contextlib.suppress(FileExistsError):  # by another process, or by a try of this one whose answer got lost
        buckets.create(f"{url}/{_name(number)}", _text(mine))
    newest, holder = _newest(url)
    if newest != number or holder.get("token") != mine["token"]:
        raise _refusal(url, holder)
    lease, stop = _Lease(url, number, mine), threading.Event()
    beating = threading.Thread(target=_beat, args=(lease, stop), name=f"lock of {url}", daemon=True)
    _held[url] = lease
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        del _held[url]
        released, earlier = _text({**mine, "released": True}), [n for n in _numbers(url) if n < number]
        buckets.change(url, {_name(number): released}, [*map(_name, earlier)])


def renewed(url: str) -> dict[str, bytes]:
    """Returns what is written with the other files of a folder: its lock, if this process holds it.

    If another process has taken the lock, this one ends. On hf:// it is called for every commit, after the commit on
    which it is to be made was looked at. The hub refuses it where the lock was taken since. So a process that has lost
    the lock changes nothing.
    """
    return _held[url].renewed() if url in _held else {}


def seen(url: str) -> str:
    """Returns what tells the holder of a folder's lock from all others; "" where nobody holds it."""
    holder = _newest(url)[1]
    return "" if holder.get("released") else str(holder.get("token", ""))


def _free_number(url: str) -> int:
    """Returns the number that the next holder takes, once the last one has released its lock or is dead."""
    number, holder = _newest(url)
    if not number or holder.get("released"):
        return number + 1
    periods = buckets.periods(url)
    waiting = f"waiting {periods.lease:g} s for a sign of life"
    print(f"{url}: the lock of {_described(holder)} is there; {waiting}", flush=True)
    until = time.monotonic() + periods.lease
    while time.monotonic() < until:
        time.sleep(periods.look)
        newest, now = _newest(url)
        if now.get("released"):
            return newest + 1
        if (newest, now) != (number, holder):
            raise _refusal(url, now)
    return number + 1


def _beat(lease: _Lease, stop: threading.Event) -> None:
    period = buckets.periods(lease.url).beat
    while not stop.wait(max(lease.written + period - time.monotonic(), 0)):
        lease.written = time.monotonic()
        # The bucket may not be reached, or not be written to; who holds the lock shows when it can.
        with contextlib.suppress(OSError, ValueError):
            buckets.change(lease.url, {}, (), lease.renewed)


def _end(url: str) -> None:
    holder, period = _described(_newest(url)[1]), buckets.periods(url).lease
    reason = f"has lost the lock of {url} to {holder}: it gave no sign of life for {period:g} s"
    print(f"sgpo_jax: this process {reason}", flush=True)
    watchdog.tell(reason)
    os._exit(1)


def _newest(url: str) -> tuple[int, dict[str, Any]]:
    """Returns (number, content) of the object that holds the lock; (0, {}) where there is none.

    The content is {} where it cannot be understood: somebody holds the lock, who is not known.
    """
    numbers = _numbers(url)
    if not numbers:
        return 0, {}
    try:
        content = json.loads(buckets.read(f"{url}/{_name(numbers[-1])}"))
    except FileNotFoundError:  # a later one has just taken its place
        return _newest(url)
    except ValueError:
        content = {}
    return numbers[-1], content if isinstance(content, dict) else {}


def _numbers(url: str) -> list[int]:
    return sorted(int(name) for name in buckets.listing(f"{url}/lock") if re.fullmatch(r"\d{8}", name))


def _name(number: int) -> str:
    return f"lock/{number:08}"


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _refusal(url: str, holder: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{url}: already in use by {_described(holder)}; wait for it to finish, or choose another --workdir"
    )


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that is not known"
    return f"process {holder.get('pid')} on host {holder.get('host')} (since {holder.get('since')})"
