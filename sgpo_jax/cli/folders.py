"""Folders and files that flags name, on this machine or in a bucket.

A folder in a bucket is a local copy of it: see `runtime.mirror`.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def folder(flag: str, value: str, whole: bool = False) -> Path:
    """Returns the folder that a flag names, after checking that it can be written to; it need not exist yet.

    Args:
      flag: its name.
      value: a path or URL.
      whole: whether a copy of a folder in a bucket has its checkpoints too, which are then files like others.

    Raises:
      ValueError: the folder cannot be created or written to, or has a name that its files cannot have.
    """
    if not value.strip():  # as after a variable that is not set
        raise ValueError(f"--{flag}={value}: must name a folder; '.' is the current one")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--{flag}={value!a}: must be a name in UTF-8, as checkpoints need it") from error
    if _is_url(value):
        return _in_bucket(flag, value, lambda url, mirror: mirror.copy(url, whole))
    path = Path(os.path.expanduser(value))
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise ValueError(f"--{flag}={value}: there is no such home folder")
    existing = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not os.path.exists(existing):
        raise ValueError(f"--{flag}={value}: {existing} is a link to a place that does not exist")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"--{flag}={value}: must be a folder that can be written to ({error})") from error
    return path


def new_folder(flag: str, value: str) -> Path:
    """Returns the folder that a flag names for new files; raises as `folder`, and where a bucket has files there."""
    if not _is_url(value):
        return folder(flag, value)
    from sgpo_jax.runtime import buckets

    def make(url: str, mirror: Any) -> Path:
        if buckets.listing(url):
            raise ValueError(f"--{flag}={value}: has files already; must be a new folder")
        return mirror.blank(url)

    return _in_bucket(flag, value, make, buckets.WRITABLE)


def existing_folder(flag: str, value: str) -> Path:
    """Returns the folder of a run that a flag names, which is only read, or changed by whole files.

    Raises:
      ValueError: a bucket cannot be read.
    """
    if not _is_url(value):
        return Path(value).expanduser()
    return _in_bucket(flag, value, lambda url, mirror: mirror.copy(url), check=False)


def existing_file(flag: str, value: str) -> Path:
    """Returns the file that a flag names, to read.

    Raises:
      ValueError: a bucket does not have it.
    """
    if not _is_url(value):
        return Path(value).expanduser()
    from sgpo_jax.runtime import buckets

    buckets.check_url(f"--{flag}", value, buckets.READABLE)
    return buckets.fetch(value)


def file(flag: str, value: str) -> Path:
    """Returns the file that a flag names, to write; raises as `folder` where there can be no such file."""
    if not _is_url(value):
        path = Path(value).expanduser()
        folder(flag, str(path.parent))
        return path
    from sgpo_jax.runtime import buckets

    parent, _, name = value.rpartition("/")
    return _in_bucket(flag, parent, lambda url, mirror: mirror.blank(url), buckets.WRITABLE) / name


def _is_url(value: str) -> bool:
    return "://" in value


def _in_bucket(
    flag: str, value: str, action: Callable[[str, Any], Path], kinds: Sequence[str] = (), check: bool = True
) -> Path:
    from sgpo_jax.runtime import buckets, mirror  # they import JAX

    buckets.check_folder(f"--{flag}", value, kinds or buckets.READABLE)
    try:
        if check:
            buckets.check_writable(value.rstrip("/"))
        return action(value.rstrip("/"), mirror)
    except OSError as error:
        raise ValueError(f"--{flag}={value}: must be in a bucket that can be read and written ({error})") from error
