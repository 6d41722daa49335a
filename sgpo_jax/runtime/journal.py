"""An append-only JSONL file of what was paid for or sampled, which a killed process can be resumed from.

Every record is on disk when `append` returns. The first one holds the settings that all others were made with.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

Key = tuple[str, str, int, str]  # of a reply: problem, stage, number, digest of the prompt


class Journal:
    """The file, opened by one process at a time; `append` and `reply` may be called from any thread.

    Records are dicts with the entry `kind`: "settings", "reply" (with id, stage, index, prompt: its `Key`) or "verdict"
    (with id; the last one of an id counts). Only their places in the file are held in memory.

    Args:
      path: made when absent, with its folder.
      settings: name -> plain value, of whatever shapes the records.

    Raises:
      ValueError: other settings made the file, another process has it open, or a line that is not the last is broken.
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
        except OSError as error:
            raise ValueError(f"{self._path}: another process is writing to it") from error
        end, before = 0, None
        for start, record, after in _records(self._path):
            before, end = before or record, after
            self._index(record, start)
        # What a killed process left half written was not used for anything yet.
        os.ftruncate(self._file, end)
        if end and os.pread(self._file, 1, end - 1) != b"\n":
            os.write(self._file, b"\n")
        now = {"kind": "settings", **settings}
        if before is None or not (self._replies or self._verdicts):  # nothing depends on other settings yet
            os.ftruncate(self._file, 0)
            self.append(now)
            return
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{name}={now.get(name)!r}: {self._path} was made with {before.get(name)!r}; "
                    "go on with the same value, or choose another --workdir"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record; it is on disk when this returns.

        Raises:
          OSError: the disk is full or gone; the file then ends with the record before.
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
        """The reply that was recorded under `key`, or None."""
        start = self._replies.get(key)
        return None if start is None else self._read(start)

    def verdict(self, id: str) -> dict[str, Any] | None:
        """The last verdict on a problem, or None."""
        start = self._verdicts.get(id)
        return None if start is None else self._read(start)

    def replies(self) -> Iterator[dict[str, Any]]:
        """Every reply that was ever recorded, in order."""
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
    """id -> last verdict of a journal that another process may be writing to."""
    return {record["id"]: record for _, record, _ in _records(path) if record["kind"] == "verdict"}


def settings(path: Path) -> dict[str, Any]:
    """The settings a journal was made with; empty for an empty file."""
    return next((record for _, record, _ in _records(path)), {})


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(start, record, end) of every whole record; a broken last line is left out."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or "kind" not in record:
                    raise ValueError("no record of this file")
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}: broken ({error}); remove the line to go on") from error
            yield start, record, start + len(line)
            start += len(line)
