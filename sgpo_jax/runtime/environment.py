"""What a run runs on: versions, devices, the commit of the code; kept in environment.json beside the config."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("sgpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "math-verify", "numpy")


def describe() -> dict[str, Any]:
    """Versions of Python and packages, the system, the devices of all processes, and the commit of a git checkout."""
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
    """Adds this start to environment.json in `folder`, if it differs from the one before: [{"started": ..., ...}]."""
    path, now = folder / "environment.json", describe()
    starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if starts and {**starts[-1], "started": None} == {**now, "started": None}:
        return
    starts.append({"started": datetime.now(UTC).isoformat(timespec="seconds"), **now})
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(starts, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """Of the checkout that the code belongs to, "-dirty" where it was changed; None for an installed copy."""
    try:
        # A copy installed inside some other project's checkout is not that project's code.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
