"""Files that a kill leaves whole."""

import json
import os
from pathlib import Path
from typing import Any


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows of a JSONL file.

    A last line that a killed process left half written is ignored.

    Raises:
        ValueError: for any other line that is not a JSON object, naming file and line.
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
