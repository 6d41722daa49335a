"""The environment of a run, recorded in environment.json: versions, devices and the commit of the code."""

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from sgpo_jax.runtime.files import write_text

_PACKAGES = ("sgpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "math-verify", "numpy")


def describe() -> dict[str, Any]:
    """Returns the versions of Python and packages, the system, the devices of all processes, and the code's commit."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "commit": _commit(Path(__file__).parent),
    }


def record(folder: Path) -> None:
    """Adds this start to the list in environment.json in `folder`, unless it equals the start before."""
    path, now = folder / "environment.json", describe() | {"command": shlex.join(_command())}
    starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if starts and {**starts[-1], "started": None} == {**now, "started": None}:
        return
    starts.append({"started": datetime.now(UTC).isoformat(timespec="seconds"), **now})
    write_text(path, json.dumps(starts, indent=1) + "\n")


def _command() -> list[str]:
    """Returns the command of this process, without the folder of its program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """Returns the commit of the checkout that holds the code, "-dirty" added if it was changed.

    An installed copy has no commit: None.
    """
    try:
        # A copy that is installed inside another project's checkout is not that project's code.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
    )
    return result.stdout.strip()
