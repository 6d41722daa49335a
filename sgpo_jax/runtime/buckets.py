"""Objects of buckets by their URLs: gs:// (Google Cloud Storage), s3:// (Amazon S3), and hf:// (the Hugging Face hub).

Writing an object is atomic on these stores: others see the old or the new one, whole. On the hub all changes of a
folder can be one such step: see `hub`. The clients find credentials, and the address of another server, where they
always do, such as in the variables of the environment.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

READABLE = ("gs", "s3", "hf")  # and folders of these are written to
WRITABLE = ("gs", "s3")  # files of their own are
_URL = re.compile(r"(\w+)://[^/\s]+(/.*)?", re.DOTALL)
_SMALL = 2**28  # bytes; a file up to this size is read before it is sent, because a run may be appending to it
_PATIENCE = 120.0  # seconds in which a request is repeated
_SHORT = 10.0  # seconds, of a request that need not succeed
_LONGEST = 16.0  # seconds between two tries
_SILENCE = 30.0  # seconds without a byte after which a request to gs:// counts as lost
# Errors that another try does not change, and words in the messages of others.
_FINAL = (
    FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError, ImportError, ValueError,
)  # fmt: skip
_REFUSED = (
    "Forbidden", "Anonymous caller", "NoCredentials", "Unable to locate credentials", "not valid",
    "OfflineModeIsEnabled",
)  # fmt: skip

T = TypeVar("T")


class Periods(NamedTuple):
    """The periods in which a run writes to a store, in seconds."""

    send: float  # between two times that its files are sent
    apart: float  # at least between two such times, unless it ends
    beat: float  # in which its lock is written again
    lease: float  # in which a lock is not written again if its holder is dead
    look: float  # between two looks at a lock whose holder may be dead


# The hub allows about 128 commits an hour.
PERIODS = {
    "gs": Periods(send=30, apart=0, beat=10, lease=60, look=2),
    "s3": Periods(send=30, apart=0, beat=10, lease=60, look=2),
    "hf": Periods(send=300, apart=60, beat=60, lease=180, look=10),
}


class Object(NamedTuple):
    """An object of a bucket, as its listing has it."""

    size: int  # bytes
    tag: str  # changes with the content: "crc32c:...", "etag:..." or "blob:..."


def is_url(name: str) -> bool:
    """Returns whether a name is a URL, of any kind, rather than a path."""
    return _URL.fullmatch(name) is not None


def periods(url: str) -> Periods:
    """Returns how often a run writes to the store of a URL."""
    return PERIODS[url.partition("://")[0]]


def is_atomic(url: str) -> bool:
    """Returns whether all changes of a folder are one step there."""
    return url.startswith("hf://")


def check_url(what: str, name: str, allowed: Sequence[str]) -> None:
    """Checks the kind of a URL.

    Raises:
      ValueError: it is none of the kinds; the message begins with `what`.
    """
    if name.partition("://")[0] not in allowed:
        kinds = ", ".join(f"{kind}://" for kind in allowed)
        hint = "; --push writes to the hub" if name.startswith("hf://") else ""
        raise ValueError(f"{what}={name}: must be a folder, or in a bucket with one of {kinds}{hint}")


def check_folder(what: str, url: str, allowed: Sequence[str] = READABLE) -> None:
    """Checks that a URL can be that of a folder to write to, before its store is asked; raises as `check_url`."""
    check_url(what, url, allowed)
    if url.startswith("hf://"):
        from sgpo_jax.runtime import hub

        hub.check(what, url)


def patiently(action: Callable[[], T], url: str, seconds: float = _PATIENCE) -> T:
    """Returns `action()`, repeated for some time while the store is busy, down or cut off.

    Args:
      action: may be called several times.
      url: for messages.
      seconds: time after which the error counts.

    Raises:
      OSError: it failed until the end; the message has the last error.
    """
    until, wait = time.monotonic() + seconds, 0.5
    while True:
        try:
            return action()
        except _FINAL:
            raise
        except Exception as error:  # the clients of the stores have no common class of errors
            refused = any(word in f"{type(error).__name__}: {error}" for word in _REFUSED)
            if refused or time.monotonic() + wait > until:
                raise OSError(f"{url}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST)


def listing(url: str) -> dict[str, Object]:
    """Returns the objects under a folder by their names below it; empty where there is no such folder.

    Raises:
      ValueError: a name would, as that of a file, lead out of the folder.
    """
    fs, root = _at(url)

    def ask() -> Mapping[str, Any]:
        try:
            return fs.find(root, detail=True)
        except FileNotFoundError:
            return {}

    found = patiently(ask, url)
    for name in found:
        if ".." in name.removeprefix(root).split("/"):
            raise ValueError(f"{url}: holds an object named {name!r}; must have no '..' in it")
    return {
        name.removeprefix(root).lstrip("/"): Object(int(info["size"]), _tag(info))
        for name, info in found.items() if info["type"] == "file" and name != root and not name.endswith("/")
    }  # fmt: skip


def read(url: str) -> bytes:
    """Returns the content of an object.

    Raises:
      FileNotFoundError: there is none.
    """
    fs, path = _at(url)
    return patiently(lambda: fs.cat_file(path), url)


def write(url: str, content: bytes) -> None:
    """Writes an object, in place of an earlier one."""
    fs, path = _at(url)
    patiently(lambda: fs.pipe_file(path, content), url)


def create(url: str, content: bytes) -> None:
    """Writes an object that must not be there yet, which the store itself makes sure of.

    Raises:
      FileExistsError: it is there; or it was written by a try whose answer got lost.
    """
    fs, path = _at(url)
    patiently(lambda: fs.pipe_file(path, content, mode="create"), url)


def delete(url: str) -> None:
    """Deletes an object, if it is there."""
    fs, path = _at(url)
    with contextlib.suppress(FileNotFoundError):
        patiently(lambda: fs.rm_file(path), url)


def change(
    url: str,
    files: Mapping[str, bytes | Path],
    gone: Sequence[str] = (),
    last: Callable[[], Mapping[str, bytes]] = dict,
) -> None:
    """Writes and deletes objects of a folder: in one step where the store has such steps, else one after another.

    Args:
      url: of the folder.
      files: name below it -> content, or the file that has it.
      gone: names of objects to delete, if they are there.
      last: returns more files, and may raise to prevent the rest. The store refuses one step where something has been
        written since.
    """
    if is_atomic(url):
        fs, root = _at(url)
        return patiently(lambda: fs.commit(root, files, gone, last), url)
    for name, content in [*files.items(), *last().items()]:
        write(f"{url}/{name}", content) if isinstance(content, bytes) else upload(content, f"{url}/{name}")
    for name in gone:
        delete(f"{url}/{name}")


def squash(url: str) -> None:
    """Frees the room of deleted objects in a store that keeps them in a history.

    Raises:
      OSError: it cannot.
    """
    if is_atomic(url):
        fs, root = _at(url)
        patiently(lambda: fs.squash(root), url, _SHORT)


def content(file: Path) -> bytes | None:
    """Returns what a file has now, to which a run may be appending; None for a large one, which is not read."""
    size = file.stat().st_size
    if size > _SMALL:
        return None
    with file.open("rb") as opened:
        return opened.read(size)


def upload(file: Path, url: str) -> None:
    """Writes a file to an object. A file that grows meanwhile is cut at the size that it had."""
    if (read := content(file)) is not None:
        return write(url, read)
    fs, path = _at(url)
    patiently(lambda: fs.put_file(str(file), path), url)


def download(url: str, files: Mapping[str, Path]) -> None:
    """Reads objects under a folder into files, several at a time. A file is whole, or not there.

    Args:
      url: of the folder.
      files: name below it -> file; their folders are created.

    Raises:
      FileNotFoundError: there is no such object.
    """
    fs, root = _at(url)
    partial = {name: file.with_name(f".{file.name}.{os.getpid()}.partial") for name, file in files.items()}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    if files:
        sources, targets = [f"{root}/{name}" if name else root for name in files], [str(p) for p in partial.values()]
        patiently(lambda: fs.get(sources, targets), url)
    for name, file in files.items():
        os.replace(partial[name], file)


def fetch(url: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Returns a local copy of an object, or of a folder of them, which is kept for the next time.

    The copies are in ~/.cache/sgpo_jax (or $XDG_CACHE_HOME/sgpo_jax). A copy is used again as long as the bucket has
    the same content; who needs the room may delete them.

    Args:
      url: of the object or folder.
      wanted: tells which names below the folder to copy.

    Raises:
      ValueError: there is nothing of this name, or it cannot be read.
    """
    check_url("source", url, READABLE)
    url = url.rstrip("/")
    try:
        fs, root = _at(url)
        if patiently(lambda: fs.isfile(root), url):
            info = patiently(lambda: fs.info(root), url)
            found = {"": Object(int(info["size"]), _tag(info))}
        else:
            found = {name: about for name, about in sorted(listing(url).items()) if wanted(name)}
    except OSError as error:
        raise ValueError(f"{url}: cannot be read ({error})") from error
    if not found:
        raise ValueError(f"{url}: there is nothing of this name in the bucket")
    digest = hashlib.sha256(repr((url, found)).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgpo_jax"
    place, name = cache / digest, url.rpartition("/")[2]
    if not place.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{digest}.", dir=cache))
        try:
            download(url, {below: unfinished / name / below for below in found})
            with contextlib.suppress(OSError):  # another process has just finished the same copy
                os.rename(unfinished, place)
        except OSError as error:
            raise ValueError(f"{url}: cannot be read ({error})") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return place / name


def check_writable(url: str) -> None:
    """Checks that a folder can be written to, by an object that is removed at once.

    Raises:
      OSError: it cannot.
      ValueError: it has a name that no bucket can have.
    """
    name = f"{url}/.probe.{os.getpid()}"
    write(name, b"")
    delete(name)


def _tag(info: Mapping[str, Any]) -> str:
    for key, kind in (("crc32c", "crc32c"), ("ETag", "etag"), ("etag", "etag"), ("blob_id", "blob")):
        if info.get(key):
            return f"{kind}:{info[key]}"
    return ""


def _at(url: str) -> tuple[Any, str]:
    kind, _, path = url.partition("://")
    if kind == "hf":
        from sgpo_jax.runtime import hub  # its client takes a second to import

        return hub.Files(), path.rstrip("/")
    try:
        return client(kind), path.rstrip("/")
    except ImportError as error:
        raise ValueError(f"{url}: needs the extra 'buckets': pip install 'sgpo_jax[buckets]' ({error})") from error


@functools.cache
def client(kind: str) -> Any:
    """Returns the client of a store, gs or s3, from which Orbax has its own."""
    import fsspec  # it and the clients take a second to import

    settings = fsspec.config.conf.setdefault(kind, {})
    # Also for Orbax, whose arrays reach the bucket past the client: a cached listing lacks them.
    settings.setdefault("use_listings_cache", False)
    if kind == "gs":
        import aiohttp

        # By default gcsfs waits for an answer for ever, and all processes of the run with it.
        settings.setdefault("requests_timeout", aiohttp.ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE))
    else:
        # By default s3fs gives up after four seconds, and Orbax with it. These tries take half a minute, as gcsfs's do.
        settings.setdefault("config_kwargs", {"retries": {"mode": "standard", "max_attempts": 8}})
    return fsspec.filesystem(kind)
