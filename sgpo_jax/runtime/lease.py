"""A lock on a folder of a bucket, as a lease that its holder renews.

The folder's `lock/` has numbered objects, and the one with the highest number holds the lock. The store creates an
object only where there is none of its name (generation 0 on gs://, If-None-Match on s3://), so two processes never get
one number. The holder writes its object again every `BEAT` seconds. Where nothing is written for `LEASE` seconds the
holder is dead, and the next number is free. No clock of one machine is compared with that of another.

What a store cannot promise: a process that stands still for longer than `LEASE`, with its machine, does not know that
it has lost the lock. It ends at its next beat, before which it may still write.
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
from datetime import datetime
from typing import Any

from sgpo_jax.runtime import buckets, watchdog

BEAT = 10.0  # seconds
LEASE = 60.0  # seconds
_LOOK = 2.0  # seconds between two looks at a lock that may be dead


@contextlib.contextmanager
def hold(url: str) -> Iterator[None]:
    """Holds the lock of a folder. If its holder was killed, this waits until that is certain.

    Raises:
      ValueError: another process holds the lock; the message names its host and pid.
    """
    number = _free_number(url)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "token": uuid.uuid4().hex, "beat": 0}
    with contextlib.suppress(FileExistsError):  # by another process, or by a try of this one whose answer got lost
        buckets.create(_name(url, number), _text(mine))
    newest, holder = _newest(url)
    if newest != number or holder.get("token") != mine["token"]:
        raise _refusal(url, holder)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(url, number, mine, stop), name=f"lock of {url}", daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        buckets.write(_name(url, number), _text({**mine, "released": True}))
        for earlier in _numbers(url):
            if earlier < number:
                buckets.delete(_name(url, earlier))


def seen(url: str) -> str:
    """Returns what tells the holder of a folder's lock from all others; "" where nobody holds it."""
    holder = _newest(url)[1]
    return "" if holder.get("released") else str(holder.get("token", ""))


def _free_number(url: str) -> int:
    """Returns the number that the next holder takes, once the last one has released its lock or is dead."""
    number, holder = _newest(url)
    if not number or holder.get("released"):
        return number + 1
    print(f"{url}: the lock of {_described(holder)} is there; waiting {LEASE:g} s for a sign of life", flush=True)
    until = time.monotonic() + LEASE
    while time.monotonic() < until:
        time.sleep(min(_LOOK, LEASE / 4))
        newest, now = _newest(url)
        if now.get("released"):
            return newest + 1
        if (newest, now) != (number, holder):
            raise _refusal(url, now)
    return number + 1


def _beat(url: str, number: int, mine: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        try:
            newest, holder = _newest(url)
            if newest > number:
                break
            mine = {**mine, "beat": mine["beat"] + 1}
            buckets.write(_name(url, number), _text(mine))
        except OSError:
            continue  # the bucket cannot be reached; who holds the lock shows when it can
    else:
        return
    reason = f"has lost the lock of {url} to {_described(holder)}: it gave no sign of life for {LEASE:g} s"
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
        content = json.loads(buckets.read(_name(url, numbers[-1])))
    except FileNotFoundError:  # a later one has just taken its place
        return _newest(url)
    except ValueError:
        content = {}
    return numbers[-1], content if isinstance(content, dict) else {}


def _numbers(url: str) -> list[int]:
    return sorted(int(name) for name in buckets.listing(f"{url}/lock") if re.fullmatch(r"\d{8}", name))


def _name(url: str, number: int) -> str:
    return f"{url}/lock/{number:08}"


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
