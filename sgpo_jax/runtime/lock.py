"""A lock that lets one run at a time use a folder."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from sgpo_jax.runtime import lease, mirror

FILE = "lock"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is created if missing. The system frees it however the process ends.

    The lock of a local copy of a folder in a bucket is in the bucket: see `lease`. While it is held the copy's files
    are sent there.

    Raises:
      ValueError: another process holds the lock; the message names its host and pid.
    """
    if url := mirror.url_of(folder):
        with lease.hold(url), mirror.writing(folder):
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = _holder(file.read())
            raise ValueError(
                f"{folder}: already in use by {holder}; wait for it to finish, or choose another --workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{folder}: cannot be locked ({error}); make sure that no other process uses it", flush=True)
        file.truncate(0)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now}, file)
        file.flush()
        yield
        file.truncate(0)


def seen(folder: Path) -> str:
    """Returns the text that shows this process who holds the lock of a folder; "" where nobody does."""
    if url := mirror.url_of(folder):
        return lease.seen(url)
    return (folder / FILE).read_text(encoding="utf-8") if (folder / FILE).is_file() else ""


def _holder(text: str) -> str:
    """Returns a description of the process that wrote the text of a lock file."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on host {holder['host']} (since {holder['since']})"
    except (ValueError, KeyError):  # the file is just being written
        return "another process"
