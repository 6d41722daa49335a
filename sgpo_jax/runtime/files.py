"""Files that stay whole when the process is killed: replaced by a finished copy, or extended by whole lines."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, and moves the file written there to `path` at the end.

    The file reaches the disk before it is moved, so not even a power cut leaves `path` half written. After an error
    `path` is unchanged. Its folder is created if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.partial{path.suffix}")  # with the suffix, which numpy would add
    yield unfinished
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file in UTF-8; after an error the old file is unchanged."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def sync(file: IO[Any]) -> None:
    """Puts everything that was written to an open file on disk."""
    file.flush()
    os.fsync(file.fileno())


def append_text(path: Path, text: str) -> None:
    """Appends text to a file; it is on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        sync(file)


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """Returns the text of a JSONL file: one object a line, without escapes for characters beyond ASCII."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows of a JSONL file. A last line that a killed process left half written is ignored.

    Raises:
        ValueError: any other line is not a JSON object; the message names file and line.
    """
    rows = []
    lines = Path(path).read_bytes().split(b"\n")  # a torn line may end inside a character
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object: {line[:80]!r}")
        rows.append(row)
    return rows
