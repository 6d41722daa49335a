"""An append-only JSONL file of replies that were paid for or sampled, from which a killed process resumes.

Every record is on disk when `append` returns. The first record has the settings that all others were made with.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

Key = tuple[str, str, int, str]  # a reply's problem, stage, index and digest of the prompt


class Journal:
    """An open journal. One process at a time can open it; `append` and `reply` may be called from any thread.

    Every record is a dict with the entry `kind`: "settings", "reply" (whose `Key` is id, stage, index and prompt) or
    "verdict" (with id; the last one of an id counts). Records of other kinds are for people. Only the records'
    offsets are held in memory.

    Args:
      path: the file; it and its folder are created if missing.
      settings: name -> plain value of every setting that the records depend on.

    Raises:
      ValueError: the file was made with other settings, another process has it open, or a line before the last is
        broken.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.Lock()
        self._replies: dict[Key, int] = {}
        self._verdicts: dict[str, int] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._open(settings)
        except BaseException:
            os.close(self._file)
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self._path}: another process is writing to it") from error
        except OSError as error:  # some network file systems have no locks
            print(f"{self._path}: cannot be locked ({error}); make sure that no other process writes to it", flush=True)
        end, before = 0, None
        for start, record, after in _records(self._path):
            before, end = before or record, after
            self._index(record, start)
        # Nothing has used a record that a killed process left half written.
        os.ftruncate(self._file, end)
        if end and os.pread(self._file, 1, end - 1) != b"\n":
            os.write(self._file, b"\n")
        now = {"kind": "settings", **settings}
        if before is None or not (self._replies or self._verdicts):  # no record depends on earlier settings
            os.ftruncate(self._file, 0)
            self.append(now)
            return
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{name}={now.get(name)!r}: {self._path} was made with {before.get(name)!r}; "
                    "resume with the same value, or choose another --workdir"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def append(self, record: dict[str, Any]) -> None:
        """Appends a record, which is on disk when this returns.

        Raises:
          OSError: the disk is full or gone; the file then ends with the previous record.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock:
            start = os.fstat(self._file).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
                os.fsync(self._file)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, start)
                raise
            self._index(record, start)

    def reply(self, key: Key) -> dict[str, Any] | None:
        """Returns the reply recorded under `key`, or None."""
        start = self._replies.get(key)
        return None if start is None else self._read(start)

    def verdict(self, id: str) -> dict[str, Any] | None:
        """Returns the last verdict on a problem, or None."""
        start = self._verdicts.get(id)
        return None if start is None else self._read(start)

    def replies(self) -> Iterator[dict[str, Any]]:
        """Returns an iterator over all replies in the order of the file."""
        return (record for _, record, _ in _records(self._path) if record["kind"] == "reply")

    def _index(self, record: dict[str, Any], start: int) -> None:
        if record["kind"] == "reply":
            self._replies[record["id"], record["stage"], record["index"], record["prompt"]] = start
        elif record["kind"] == "verdict":
            self._verdicts[record["id"]] = start

    def _read(self, start: int) -> dict[str, Any]:
        parts: list[bytes] = []
        while not parts or b"\n" not in parts[-1]:
            part = os.pread(self._file, 65536, start + 65536 * len(parts))
            if not part:
                break
            parts.append(part)
        return json.loads(b"".join(parts).split(b"\n", 1)[0])


def verdicts(path: Path) -> dict[str, dict[str, Any]]:
    """Returns {id: last verdict} of a journal, which another process may be writing to."""
    return {record["id"]: record for _, record, _ in _records(path) if record["kind"] == "verdict"}


def settings(path: Path) -> dict[str, Any]:
    """Returns the settings that a journal was made with; empty for an empty file."""
    return next((record for _, record, _ in _records(path)), {})


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yields (start, record, end) of every whole record, without a half-written last line."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or "kind" not in record:
                    raise ValueError("not a record of a journal")
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}: broken ({error}); remove that line to resume") from error
            yield start, record, start + len(line)
            start += len(line)
