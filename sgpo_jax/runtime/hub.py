"""Repositories of the Hugging Face hub as folders of objects; every change is one commit on the newest one.

Nothing is answered from a cache. What depends on each other is read at one commit, and a commit is made only on the one
that was looked at: where another process was faster the hub refuses it (412), and all is looked at again. So a change
is whole or not there, and two processes never both create an object.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import huggingface_hub
from huggingface_hub import utils
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

_TITLE = "Files of a run of sgpo_jax"  # of all commits
_TITLES = (_TITLE, "initial commit")  # the hub makes the second one
_SILENCE = 90.0  # seconds without a byte after which a request counts as lost; the hub works on a commit for up to 60
_TRIES = 10  # of a commit that others come before
# HTTP status -> what to do about it
_ADVICE = {
    401: "the hub does not accept the token: `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: it needs write access to this owner's repositories",
    404: "there is no such owner or repository, or the token may not see it",
    409: "something else is being written there: try again",
    429: "the hub has had too many requests: try again later",
}

T = TypeVar("T")
_committing = threading.Lock()  # or the threads of this process would come before each other


class Unavailable(OSError):
    """The hub is busy or down, or has changed meanwhile: another try may succeed."""


class _Place(NamedTuple):
    """A path in a repository."""

    kind: str  # "model" or "dataset"
    repository: str  # OWNER/NAME
    path: str

    def at(self, commit: str) -> str:
        """Returns the path at a commit, as the client's file system reads it."""
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        return f"{prefix}{self.repository}@{commit}/{self.path}"

    def below(self, name: str) -> str:
        """Returns the path in the repository of a name below this one."""
        return f"{self.path}/{name}" if self.path else name


def advice(error: HfHubHTTPError) -> str:
    """Returns what can be done about an error of the hub, with its status and its words."""
    status = error.response.status_code
    hint = _ADVICE.get(status, "the hub is down or busy: try again later" if status >= 500 else "the hub refuses")
    return f"{hint} [{status}]" + (f" ({error.server_message})" if error.server_message else "")


def check(what: str, url: str) -> None:
    """Checks that a URL names a folder that can be written to, before the hub is asked.

    Raises:
      ValueError: it does not; the message begins with `what`.
    """
    form = "must be hf://OWNER/NAME or hf://datasets/OWNER/NAME, with an optional folder below"
    path = url.removeprefix("hf://")
    kind, _, rest = path.partition("/")
    if kind == "buckets":
        owner, _, name = rest.partition("/")
        raise ValueError(
            f"{what}={url}: {form}; a bucket of the hub is s3://{name or 'NAME'} with AWS_ENDPOINT_URL="
            f"https://s3.hf.co/{owner or 'OWNER'}, because only there a lock can be held (docs/buckets.md)"
        )
    if kind in ("models", "spaces", "kernels"):
        raise ValueError(f"{what}={url}: {form}")
    try:
        utils.validate_repo_id(_place(path).repository)
    except ValueError as error:
        raise ValueError(f"{what}={url}: {form} ({error})") from error


class Files:
    """The operations of `buckets` on the hub, by paths such as OWNER/NAME/FOLDER/FILE, named as in fsspec."""

    def __init__(self) -> None:
        utils.get_session().timeout = _SILENCE  # by default the client waits for an answer for ever

    def find(self, path: str, detail: bool = True) -> dict[str, Any]:
        """Returns path -> what is known of the file, for all files under a folder."""
        with _explaining(path):
            return _reader().find(path, detail=detail)

    def info(self, path: str) -> dict[str, Any]:
        """Returns what is known of a file or folder."""
        with _explaining(path):
            return _reader().info(path)

    def isfile(self, path: str) -> bool:
        """Returns whether there is a file of this name."""
        try:
            return self.info(path)["type"] == "file"
        except FileNotFoundError:
            return False

    def cat_file(self, path: str) -> bytes:
        """Returns the content of a file, all of it of one commit."""
        with _explaining(path):
            return _at_one_commit([path], lambda pinned: _reader().cat_file(pinned[0]))

    def get(self, paths: Sequence[str], targets: Sequence[str]) -> None:
        """Reads files of one repository, all at the same commit, into local ones."""
        with _explaining(paths[0]):
            _at_one_commit(paths, lambda pinned: _reader().get(pinned, list(targets)))

    def pipe_file(self, path: str, content: bytes, mode: str = "overwrite") -> None:
        """Writes a file.

        Args:
          path: of the file.
          content: of the file.
          mode: "create" raises FileExistsError where there is a file of this name.
        """
        folder, _, name = path.rpartition("/")

        def absent() -> dict[str, bytes]:
            if mode == "create" and self.isfile(path):
                raise FileExistsError(f"hf://{path}")
            return {}

        self.commit(folder, {name: content}, (), absent)

    def rm_file(self, path: str) -> None:
        """Deletes a file, if it is there."""
        folder, _, name = path.rpartition("/")
        self.commit(folder, {}, [name])

    def commit(
        self,
        folder: str,
        files: Mapping[str, bytes | Path],
        gone: Sequence[str] = (),
        last: Callable[[], Mapping[str, bytes]] = dict,
    ) -> None:
        """Writes and deletes files of a folder in one commit. The repository is created, private, if it is not there.

        Args:
          folder: with the repository.
          files: name below the folder -> content, or the file that has it.
          gone: names of files to delete; those that are not there are left out.
          last: returns more files. It is called after the newest commit was looked at, on which this one is made, and
            may raise to prevent it.

        Raises:
          ValueError: the repository is public.
        """
        place, hub = _place(folder), huggingface_hub.HfApi()
        name, kind = place.repository, place.kind
        utils.disable_progress_bars()

        def additions(files: Mapping[str, bytes | Path]) -> list[Any]:
            return [huggingface_hub.CommitOperationAdd(place.below(name), content) for name, content in files.items()]

        with _explaining(folder):
            first = additions(files)
            if first:  # large files are sent before the newest commit is looked at, because others may commit meanwhile
                _head(place)
                hub.preupload_lfs_files(name, first, repo_type=kind, free_memory=False)
            with _committing:
                for _ in range(_TRIES):
                    parent = _head(place)
                    there = _names(place, parent) if gone else ()
                    deleted = [path for path in map(place.below, gone) if path in there]
                    changes = [*first, *additions(last()), *map(huggingface_hub.CommitOperationDelete, deleted)]
                    if not changes:
                        return
                    try:
                        hub.create_commit(name, changes, commit_message=_TITLE, repo_type=kind, parent_commit=parent)
                        return
                    except HfHubHTTPError as error:
                        if error.response.status_code != 412:
                            raise
            raise Unavailable("others write there all the time")

    def squash(self, path: str) -> None:
        """Makes one commit of the history of a repository, which keeps every deleted file.

        Raises:
          PermissionError: others have written there, whose history it is too.
        """
        place, hub = _place(path), huggingface_hub.HfApi()
        with _explaining(path):
            titles = [commit.title for commit in hub.list_repo_commits(place.repository, repo_type=place.kind)]
            if others := [title for title in titles if title not in _TITLES]:
                raise PermissionError(f"hf://{path}: the repository has commits of others, such as {others[0]!r}")
            if len(titles) > 1:
                hub.super_squash_history(place.repository, repo_type=place.kind, commit_message=_TITLE)


def _reader() -> Any:
    """Returns the client's file system, which remembers what it has seen, without a memory."""
    return huggingface_hub.HfFileSystem(skip_instance_cache=True)


def _place(path: str) -> _Place:
    """Returns the place that a path names; the repository may be no name that the hub accepts."""
    first, _, rest = path.partition("/")
    kind, path = ("dataset", rest) if first == "datasets" else ("model", path)
    owner, name, below = (*path.split("/", 2), "", "")[:3]
    return _Place(kind, f"{owner}/{name}", below)


def _at_one_commit(paths: Sequence[str], action: Callable[[list[str]], T]) -> T:
    """Returns `action` of paths in a repository at its newest commit; those at a revision stay as they are."""

    def pinned() -> list[str]:
        places = [_place(path) for path in paths]
        commit = huggingface_hub.HfApi().repo_info(places[0].repository, repo_type=places[0].kind).sha
        return [place.at(str(commit)) for place in places]

    if any("@" in path or path.startswith(("spaces/", "buckets/")) for path in paths):
        return action(list(paths))
    before = pinned()
    try:
        return action(before)
    except FileNotFoundError:
        if pinned() == before:
            raise
        raise Unavailable("the repository has just changed") from None


def _names(place: _Place, commit: str) -> set[str]:
    files = huggingface_hub.HfApi().list_repo_tree(
        place.repository, recursive=True, revision=commit, repo_type=place.kind
    )
    return {file.path for file in files}


def _head(place: _Place) -> str:
    """Returns the newest commit of a private repository, which is created if it is not there."""
    hub = huggingface_hub.HfApi()
    try:
        info = hub.repo_info(place.repository, repo_type=place.kind)
    except RepositoryNotFoundError:
        hub.create_repo(place.repository, repo_type=place.kind, private=True, exist_ok=True)
        info = hub.repo_info(place.repository, repo_type=place.kind)
    if not info.private:
        raise ValueError(
            f"hf://{place.repository}: is a public repository; must be a private one, because the files of a run have "
            "rows of its data; `sgpo export --push` publishes a model"
        )
    return str(info.sha)


@contextlib.contextmanager
def _explaining(path: str) -> Iterator[None]:
    """Turns errors of the client into those of files, with what can be done about them."""
    try:
        yield
    except RevisionNotFoundError as error:  # the commit was the newest one, until the history was squashed
        raise Unavailable("the repository has just changed") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"hf://{path}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (408, 409, 412, 429) or status >= 500:
            raise Unavailable(advice(error)) from error
        raise PermissionError(f"hf://{path}: {advice(error)}") from error
