"""One run in a folder at a time."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

FILE = "lock"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made when absent. The system frees it when the process ends, in any way.

    Raises:
      ValueError: another process holds it; the message names its host and pid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            message = f"{folder}: {_holder(file.read())} is running in it; wait for its end, or choose another"
            raise ValueError(message) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{folder}: cannot be locked ({error}); make sure that nothing else runs in it", flush=True)
        file.truncate(0)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now}, file)
        file.flush()
        yield
        file.truncate(0)


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on host {found['host']} (since {found['since']})"
    except (ValueError, KeyError):  # it is just being written
        return "another process"
