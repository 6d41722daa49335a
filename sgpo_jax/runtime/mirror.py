"""Local copies of folders in buckets, on which a command works as on any other folder.

A command copies the folder when it begins, and sends what it has changed: at its end, and in a run also every few
seconds or minutes (`buckets.PERIODS`) and before every checkpoint. So the bucket always has the run as it was some time
ago, and a run that is killed loses no row before its last checkpoint. Checkpoints are written to gs:// by Orbax itself,
by all processes, and are not copied; to s3:// too, if there are several processes. Elsewhere they are files like
others, at hf:// of the first process alone. On s3:// these are sent after the rest, Orbax's mark of success and the
seal last; a checkpoint that has neither is not whole. On hf:// all is sent in one commit, with whole ones alone.
"""

import contextlib
import itertools
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Container, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import jax
from etils import epath

from sgpo_jax.runtime import buckets, distributed, lease

_POLL = 1.0  # seconds between two looks at whether it is time to send
_LAST = 600.0  # seconds in which the files are sent at the end
_ARRAYS = "checkpoints"  # folders of this name hold checkpoints
_SEAL = ".files.json"  # see `checksums`
_MARK = "commit_success.txt"  # Orbax's own, which it writes last
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
        self.direct = url.startswith("gs://") and not whole  # Orbax writes the checkpoints to the bucket; see `share`
        self.of_first = False  # the first process alone has the files of checkpoints; see `share`
        self.failed = False
        self._periods = buckets.periods(url)
        self._due, self._soonest = 0.0, 0.0  # when, in monotonic time, the files are to be sent, and may be
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
        if self.direct or buckets.is_atomic(self.url):
            return
        found = buckets.listing(self.url)
        for name in found:
            if not _is_whole(name, found):
                buckets.delete(f"{self.url}/{name}")

    def push(self) -> None:
        """Sends the files that have changed, and deletes those that are gone.

        Raises:
          OSError: the bucket cannot be reached.
        """
        with self._sending:
            now = dict(self._files())
            if buckets.is_atomic(self.url):
                self._send_at_once(now)
            else:
                self._send(now)
            self._due = time.monotonic() + self._periods.send
            self._soonest = time.monotonic() + self._periods.apart

    def push_soon(self) -> None:
        """Does the same, unless it was done so lately that the store would count it as too often: then it is done soon.

        Raises:
          OSError: the bucket cannot be reached.
        """
        if time.monotonic() >= self._soonest:
            self.push()
        else:
            self._due = min(self._due, self._soonest)

    def _send(self, now: dict[str, tuple[int, int]]) -> None:
        changed = [name for name, state in now.items() if self._sent.get(name) != state]
        for name in sorted(changed, key=lambda name: (_in_arrays(name), _vouches(name), now[name][1])):
            with contextlib.suppress(FileNotFoundError):  # it has just been removed
                buckets.upload(self.folder / name, f"{self.url}/{name}")
                self._sent[name] = now[name]
        for name in sorted(self._sent.keys() - now.keys(), key=_vouches, reverse=True):
            buckets.delete(f"{self.url}/{name}")
            del self._sent[name]

    def _send_at_once(self, now: dict[str, tuple[int, int]]) -> None:
        """Sends all in one step, but no checkpoint that is being written, and keeps one that is being removed."""
        now = {name: state for name, state in now.items() if _is_whole(name, now)}
        gone = [name for name in self._sent.keys() - now.keys() if _seal_of(name) not in now]
        files: dict[str, bytes | Path] = {}
        for name in [name for name, state in now.items() if self._sent.get(name) != state]:
            with contextlib.suppress(FileNotFoundError):  # it has just been removed
                content = None if _in_arrays(name) else buckets.content(self.folder / name)
                files[name] = self.folder / name if content is None else content
        if files or gone:
            buckets.change(self.url, files, gone, partial(lease.renewed, self.url))
        self._sent = {name: state for name, state in self._sent.items() if name not in gone}
        self._sent |= {name: now[name] for name in files}

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
        self._due = time.monotonic() + self._periods.send
        while not stop.wait(min(_POLL, self._periods.send)):
            if time.monotonic() < self._due:
                continue
            try:
                self.push()
                silent = False
            except Exception as error:
                if not silent:
                    print(f"warning: {error}; the run goes on, and its files are sent later", flush=True)
                silent, self._due = True, time.monotonic() + self._periods.send

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
    if not folder.exists() and not (mirror.of_first and distributed.index()):
        mirror.pull(str(folder.relative_to(mirror.folder)))
    return folder


def is_of_first(folder: Path) -> bool:
    """Returns whether the first process alone has the files of a folder of checkpoints."""
    mirror = _of(folder)
    return mirror is not None and mirror.of_first


def share(folder: Path) -> None:
    """Makes the processes of a run write their checkpoints to a folder together.

    Each writes its own part to gs:// and s3://. To hf:// the first one writes all of it, because only commits write
    there.

    Raises:
      ValueError: they cannot.
      OSError: the bucket cannot be reached.
    """
    mirror = _of(folder)
    if mirror is None or mirror.direct or jax.process_count() == 1:
        return
    if buckets.is_atomic(mirror.url):
        mirror.of_first = True
        return
    from sgpo_jax.runtime import s3_arrays  # it imports Orbax

    s3_arrays.allow(mirror.url)
    mirror.direct = True


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Sends the files of a local copy to its bucket during the block inside, and the last ones at its end.

    The copy is brought up to date first: the caller has the lock of the folder.
    """
    mirror, stop = _of(folder), threading.Event()
    assert mirror is not None
    mirror.pull()
    mirror.drop_unfinished()
    _squash(mirror.url)
    thread = threading.Thread(target=mirror.keep_pushing, args=(stop,), name=mirror.url, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        mirror.push_last()
        _squash(mirror.url)


def push() -> None:
    """Sends the changed files of all local copies, at once or soon: see `buckets.Periods.apart`.

    Raises:
      OSError: a bucket cannot be reached.
    """
    for mirror in _mirrors.values():
        mirror.push_soon()


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


def _squash(url: str) -> None:
    try:
        buckets.squash(url)
    except OSError as error:
        print(f"warning: {error}; deleted checkpoints stay in the history, and count against the quota", flush=True)


def _of(path: Path) -> _Mirror | None:
    return next((mirror for mirror in _mirrors.values() if Path(path).is_relative_to(mirror.folder)), None)


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _is_local(name: str) -> bool:
    return name in _CACHES or any(part in name for part in _LOCAL)


def _in_arrays(name: str) -> bool:
    return _ARRAYS in name.split("/")[:-1]


def _vouches(name: str) -> int:
    """Returns 2 for a seal, 1 for Orbax's mark, 0 for other files. A lower number is sent first and deleted last."""
    return 2 if name.endswith(_SEAL) else int(name.endswith(f"/{_MARK}"))


def _is_whole(name: str, names: Container[str]) -> bool:
    """Returns False for a file of a checkpoint of which the names have neither the seal nor Orbax's mark."""
    seal = _seal_of(name)
    return not seal or seal in names or f"{seal.removesuffix(_SEAL)}/{_MARK}" in names


def _seal_of(name: str) -> str:
    """Returns the name of the seal of the checkpoint that a file belongs to; "" if it belongs to none."""
    if not _in_arrays(name):
        return ""
    parts = name.split("/")
    step = list(itertools.takewhile(lambda part: part != _ARRAYS, parts))
    step += parts[len(step) : len(step) + 2]
    return "/".join(step) + _SEAL if step[-1].isdigit() else ""
