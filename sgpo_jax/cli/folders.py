"""Folders that flags name."""

import os
import tempfile
from pathlib import Path


def folder(flag: str, value: str) -> Path:
    """Returns the folder that a flag names, after checking that it can be written to; it need not exist yet.

    Raises:
      ValueError: the folder cannot be created or written to, or has a name that its files cannot have.
    """
    if not value.strip():  # as after a variable that is not set
        raise ValueError(f"--{flag}={value}: must name a folder; '.' is the current one")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--{flag}={value!a}: must be a name in UTF-8, as checkpoints need it") from error
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
