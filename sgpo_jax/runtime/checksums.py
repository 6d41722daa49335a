"""Checksums of checkpoint folders, beside them: a file that was truncated, changed or lost is found before it is read.

A checkpoint that was finished but not yet sealed when the process died has no checksums; it counts as whole.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

SUFFIX = ".files.json"
SMALL = 65_536  # bytes; files up to this size are read by the quick check as well


def write(folder: Path) -> None:
    """Writes size and SHA-256 of every file of `folder` to FOLDER.files.json."""
    files = {str(path.relative_to(folder)): [path.stat().st_size, _sha256(path)] for path in _files(folder)}
    unfinished = folder.with_name(folder.name + ".partial")
    unfinished.write_text(json.dumps(files), encoding="utf-8")
    os.replace(unfinished, _seal(folder))


def is_written(folder: Path) -> bool:
    return _seal(folder).is_file()


def damage(folder: Path, quick: bool) -> str | None:
    """What is wrong with the folder: its first file that is missing, new or different, or None.

    Args:
      folder: of a checkpoint.
      quick: compare only the sizes of files larger than SMALL.
    """
    if not is_written(folder):
        return None
    try:
        files = json.loads(_seal(folder).read_text(encoding="utf-8"))
        recorded = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
    except (ValueError, TypeError, AttributeError) as error:
        return f"its checksums {_seal(folder).name} cannot be read: {error}"
    there = {str(path.relative_to(folder)): path for path in _files(folder)}
    for name, (size, digest) in recorded.items():
        if name not in there:
            return f"{name} is missing"
        found = there[name].stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if (size <= SMALL or not quick) and _sha256(there[name]) != digest:
            return f"{name} has changed since it was saved"
    return next((f"{name} was not there when it was saved" for name in there if name not in recorded), None)


def set_aside(folder: Path) -> Path:
    """Renames a damaged folder to NAME.damaged, in place of an earlier one, and returns its new path."""
    aside = folder.with_name(folder.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    return aside


def forget_missing(parent: Path) -> None:
    """Removes the checksums of folders that are no more."""
    for seal in parent.glob("*" + SUFFIX):
        if not (parent / seal.name.removesuffix(SUFFIX)).is_dir():
            seal.unlink(missing_ok=True)


def _seal(folder: Path) -> Path:
    return folder.with_name(folder.name + SUFFIX)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
