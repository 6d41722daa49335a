"""Local copies of folders in buckets, on which a command works as on any other folder.

A command copies the folder when it begins, and sends what it has changed: at its end, and in a run also every `PERIOD`
seconds and before every checkpoint. So the bucket always has the run as it was some seconds ago, and a run that is
killed loses no row before its last checkpoint. Checkpoints are written to gs:// by Orbax itself, by all processes, and
are not copied. On s3://, where Orbax cannot write, they are files like others, sent after the rest, their seals last; a
checkpoint without a seal is not whole.
"""

import contextlib
import itertools
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import jax
from etils import epath

from sgpo_jax.runtime import buckets, distributed

PERIOD = 30.0  # seconds between two times that a run sends its files
_LAST = 600.0  # seconds in which the files are sent at the end
_ARRAYS = "checkpoints"  # folders of this name hold checkpoints
_SEAL = ".files.json"  # see `checksums`
_OWN = re.compile(r"lock(/.*)?|\.probe\..*")  # objects that are no files of a run
_LOCAL = (".partial", ".orbax-checkpoint-tmp")  # names of files that are not finished have this
_CACHES = ("compiled",)  # folders that stay here


class _Mirror:
    """A folder of a bucket and its local copy; `push` may be called from any thread."""

    def __init__(self, url: str, whole: bool):
        self.url = url
        self.folder = Path(tempfile.mkdtemp(prefix="sgpo_")) / url.rpartition("/")[2]
        self.folder.mkdir()
        self.whole = whole
        self.direct = url.startswith("gs://") and not whole  # Orbax writes the checkpoints to the bucket
        self.failed = False
        self._sent: dict[str, tuple[int, int]] = {}  # name -> size and time of the file that the bucket has
        self._tags: dict[str, str] = {}
        self._sending = threading.Lock()

    def pull(self, below: str = "") -> None:
        """Copies what is new in the bucket: everything but checkpoints, or those `below` a folder of checkpoints."""
        found = {name: about for name, about in buckets.listing(self.url).items() if not _OWN.fullmatch(name)}
        found = {name: about for name, about in found.items() if _is_whole(name, found)}
        wanted = {
            name: about.tag for name, about in found.items()
            if (name.startswith(f"{below}/") if below else self.whole or not _in_arrays(name))
        }  # fmt: skip
        new = [name for name, tag in wanted.items() if self._tags.get(name) != tag or not tag]
        if (size := sum(found[name].size for name in new)) > 2**30:
            print(f"{self.url}: reading {len(new)} files, {size / 2**30:.1f} GiB, to {self.folder}", flush=True)
        buckets.download(self.url, {name: self.folder / name for name in new})
        for name in [] if below else self._tags.keys() - wanted.keys():
            if not _in_arrays(name):
                (self.folder / name).unlink(missing_ok=True)
                self._sent.pop(name, None)
        self._tags |= wanted
        self._sent |= {name: _state(self.folder / name) for name in new}

    def drop_unfinished(self) -> None:
        """Deletes the checkpoints in the bucket that a process was sending when it was killed."""
        found = buckets.listing(self.url)
        for name in found if not self.direct else ():
            if not _is_whole(name, found):
                buckets.delete(f"{self.url}/{name}")

    def push(self) -> None:
        """Sends the files that have changed, and deletes those that are gone.

        Raises:
          OSError: the bucket cannot be reached.
        """
        with self._sending:
            now = dict(self._files())
            changed = [name for name, state in now.items() if self._sent.get(name) != state]
            for name in sorted(changed, key=lambda name: (_in_arrays(name), name.endswith(_SEAL), now[name][1])):
                with contextlib.suppress(FileNotFoundError):  # it has just been removed
                    buckets.upload(self.folder / name, f"{self.url}/{name}")
                    self._sent[name] = now[name]
            for name in sorted(self._sent.keys() - now.keys(), key=lambda name: name.count("/")):  # a seal goes first
                buckets.delete(f"{self.url}/{name}")
                del self._sent[name]

    def push_last(self) -> None:
        """Sends what is left, or says where it stays."""
        try:
            buckets.patiently(self.push, self.url, _LAST)
        except OSError as error:
            self.failed = True
            raise OSError(f"{error}; files that the bucket does not have are in {os.fspath(self.folder)}") from error

    def keep_pushing(self, stop: threading.Event) -> None:
        """Sends the files again and again; an error is printed once, until it works again."""
        silent = False
        while not stop.wait(PERIOD):
            try:
                self.push()
                silent = False
            except Exception as error:
                if not silent:
                    print(f"warning: {error}; the run goes on, and its files are sent later", flush=True)
                silent = True

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for parent, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not _is_local(name)]
            for path in (Path(parent, name) for name in names if not _is_local(name)):
                with contextlib.suppress(FileNotFoundError):
                    if not path.is_symlink():
                        yield str(path.relative_to(self.folder)), _state(path)


_mirrors: dict[str, _Mirror] = {}


def copy(url: str, whole: bool = False) -> Path:
    """Returns the local copy of a folder in a bucket, which is made at the first call.

    Args:
      url: of the folder; it need not be there.
      whole: with its checkpoints, which are then files like others.

    Raises:
      OSError: the bucket cannot be read.
    """
    if (url := url.rstrip("/")) not in _mirrors:
        mirror = _Mirror(url, whole)
        mirror.pull()
        _mirrors[url] = mirror
    return _mirrors[url].folder


def blank(url: str) -> Path:
    """Returns a local folder whose files will be sent to one in a bucket, without reading what is there."""
    if (url := url.rstrip("/")) not in _mirrors:
        _mirrors[url] = _Mirror(url, whole=True)
    return _mirrors[url].folder


def url_of(path: Path) -> str:
    """Returns the URL of a path in a local copy, or ""."""
    mirror = _of(path)
    return shown(path) if mirror else ""


def shown(path: str | Path) -> str:
    """Returns a path or a text with the URLs of buckets in place of their local copies, for messages."""
    text = str(path)
    for url, mirror in _mirrors.items():
        text = text.replace(str(mirror.folder), url)
    return text


def arrays(folder: Path) -> Path:
    """Returns where the checkpoints of a folder are: in the bucket itself, or in a folder on this machine."""
    mirror = _of(folder)
    if mirror is None:
        return folder
    if mirror.direct:
        return cast(Path, epath.Path(shown(folder)))
    if not folder.exists():
        mirror.pull(str(folder.relative_to(mirror.folder)))
    return folder


def check_processes(folder: Path) -> None:
    """Checks that the processes of a run can write their checkpoints to a folder together.

    Raises:
      ValueError: they cannot.
    """
    mirror = _of(folder)
    if mirror and not mirror.direct and jax.process_count() > 1:
        raise ValueError(
            f"--workdir={mirror.url}: several processes cannot write a checkpoint there, because Orbax writes to gs:// "
            "or to files; must be at gs://, or a folder that all processes share"
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Sends the files of a local copy to its bucket during the block inside, and the last ones at its end.

    The copy is brought up to date first: the caller has the lock of the folder.
    """
    mirror, stop = _of(folder), threading.Event()
    assert mirror is not None
    mirror.pull()
    mirror.drop_unfinished()
    thread = threading.Thread(target=mirror.keep_pushing, args=(stop,), name=mirror.url, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        mirror.push_last()


def push() -> None:
    """Sends the changed files of all local copies.

    Raises:
      OSError: a bucket cannot be reached.
    """
    for mirror in _mirrors.values():
        mirror.push()


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """Sends what the block inside has changed in local copies and removes them; errors name the buckets."""
    try:
        yield
    except (ValueError, OSError) as error:
        error.args = tuple(shown(part) if isinstance(part, str) else part for part in error.args)
        raise
    finally:
        if distributed.index() == 0:
            for mirror in _mirrors.values():
                if not mirror.failed:
                    mirror.push_last()
        for mirror in _mirrors.values():
            if not mirror.failed:
                shutil.rmtree(mirror.folder.parent, ignore_errors=True)
        _mirrors.clear()


def _of(path: Path) -> _Mirror | None:
    return next((mirror for mirror in _mirrors.values() if Path(path).is_relative_to(mirror.folder)), None)


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _is_local(name: str) -> bool:
    return name in _CACHES or any(part in name for part in _LOCAL)


def _in_arrays(name: str) -> bool:
    return _ARRAYS in name.split("/")[:-1]


def _is_whole(name: str, names: Iterable[str]) -> bool:
    """Returns False for a file of a checkpoint that has no seal among the names."""
    parts = name.split("/")
    if not _in_arrays(name):
        return True
    step = list(itertools.takewhile(lambda part: part != _ARRAYS, parts))
    step += parts[len(step) : len(step) + 2]
    return not step[-1].isdigit() or "/".join(step) + _SEAL in names

