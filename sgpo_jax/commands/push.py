"""Pushes files to a repository of the Hugging Face hub, in one commit."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from sgpo_jax.runtime import hub


def check(name: str) -> None:
    """Checks the name of a repository, and that there is a token, before any long work.

    Raises:
      ValueError: the name is not OWNER/NAME, or this machine has no token.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--push={name}: must be OWNER/NAME of a repository of the hub: {error}") from error
    if "/" not in name:
        raise ValueError(f"--push={name}: must be OWNER/NAME of a repository of the hub")
    if huggingface_hub.get_token() is None:
        raise ValueError(f"--push={name}: must have a token of the hub: `hf auth login`, or set HF_TOKEN")


def push(files: Mapping[str, Path], name: str, kind: str, public: bool, again: str) -> None:
    """Creates a repository if it is not there, adds the files in one commit, and prints the address.

    Args:
      files: name in the repository -> file.
      name: OWNER/NAME.
      kind: "model" or "dataset".
      public: whether anyone may read it; a new repository is private otherwise.
      again: what can be done after a failure, for the message.

    Raises:
      OSError: the hub cannot be reached, or refuses; the message says why.
      ValueError: the repository is public, and `public` is not set.
    """
    api = huggingface_hub.HfApi()
    with _explaining(name, again):
        url = api.create_repo(name, repo_type=kind, private=not public, exist_ok=True)
        readable = not api.repo_info(name, repo_type=kind).private
    if readable and not public:
        raise ValueError(f"--push={name}: is a public repository; must be a private one, or --public be given. {again}")
    with _explaining(name, again):
        operations = [huggingface_hub.CommitOperationAdd(place, file) for place, file in files.items()]
        api.create_commit(name, operations, repo_type=kind, commit_message="Written by sgpo_jax")
    print(f"pushed to {url} ({'public' if readable else 'private'})", flush=True)


@contextlib.contextmanager
def _explaining(name: str, again: str) -> Iterator[None]:
    """Turns the errors of the client, which have no common class, into one that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        raise OSError(f"--push={name}: not pushed: {hub.advice(error)}. {again}") from error
    except Exception as error:
        raise OSError(f"--push={name}: not pushed: {type(error).__name__}: {error}. {again}") from error
