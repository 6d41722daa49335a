"""Checksums of checkpoint folders, stored beside them, so that a damaged file is noticed before it is read.

A checkpoint that was finished when the process died, but whose checksums were not written yet, counts as whole. In a
bucket the store's own checksums are recorded, which its listing has, so nothing is read. Where a folder was copied
between a bucket and a disk, its sizes are compared alone.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from etils import epath

from sgpo_jax.runtime import buckets
from sgpo_jax.runtime.files import write_text

SUFFIX = ".files.json"
SMALL = 65_536  # bytes; the quick check reads files up to this size


def write(folder: Path) -> None:
    """Writes the size and SHA-256 of every file in `folder` to FOLDER.files.json."""
    if buckets.is_url(str(folder)):
        buckets.write(str(_seal(folder)), json.dumps(buckets.listing(str(folder))).encode())
        return
    files = {str(path.relative_to(folder)): [path.stat().st_size, _sha256(path)] for path in _files(folder)}
    write_text(_seal(folder), json.dumps(files))


def is_written(folder: Path) -> bool:
    """Returns whether the checksums of a folder have been written."""
    return _seal(folder).is_file()


def damage(folder: Path, quick: bool) -> str | None:
    """Returns a description of the first file that is missing, new or different, or None if the folder is whole.

    Args:
      folder: a checkpoint's folder.
      quick: compare only the sizes of files larger than SMALL.
    """
    if not is_written(folder):
        return None
    try:
        files = json.loads(_seal(folder).read_text(encoding="utf-8"))
        recorded = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
    except (ValueError, TypeError, AttributeError) as error:
        return f"its checksums {_seal(folder).name} cannot be read: {error}"
    present = _present(folder)
    for name, (size, digest) in recorded.items():
        if name not in present:
            return f"{name} is missing"
        current_size, current_digest = present[name]
        if current_size != size:
            return f"{name} has {current_size} bytes instead of {size}"
        if (size <= SMALL or not quick) and not _agree(current_digest(), digest):
            return f"{name} has changed since it was saved"
    return next((f"{name} was not there when it was saved" for name in present if name not in recorded), None)


def set_aside(folder: Path) -> Path:
    """Renames a damaged folder to NAME.damaged, replacing an earlier one, and returns its new path."""
    aside = folder.with_name(folder.name + ".damaged")
    if buckets.is_url(str(folder)):  # the store moves one object after another
        if aside.is_dir():
            epath.Path(aside).rmtree()
        folder.rename(aside)
        return aside
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    return aside


def forget_missing(parent: Path) -> None:
    """Removes the checksums of folders that no longer exist."""
    for seal in parent.glob("*" + SUFFIX):
        if not (parent / seal.name.removesuffix(SUFFIX)).is_dir():
            seal.unlink(missing_ok=True)


def _present(folder: Path) -> dict[str, tuple[int, Callable[[], str]]]:
    """Returns {name: (size, function that returns the checksum)} of the files of a folder."""
    if buckets.is_url(str(folder)):
        return {name: (size, partial(str, tag)) for name, (size, tag) in buckets.listing(str(folder)).items()}
    paths = {str(path.relative_to(folder)): path for path in _files(folder)}
    return {name: (path.stat().st_size, partial(_sha256, path)) for name, path in paths.items()}


def _agree(one: str, other: str) -> bool:
    """Returns False for different checksums of one kind; those of a store begin with their kind and a colon."""
    return one == other or one.rpartition(":")[0] != other.rpartition(":")[0]


def _seal(folder: Path) -> Path:
    return folder.with_name(folder.name + SUFFIX)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
