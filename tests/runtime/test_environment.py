"""The record of a run's environment."""

import json
import subprocess

import jax

from sgpo_jax.runtime import environment


def test_a_start_is_written_down_once_and_another_environment_beside_it(tmp_path, monkeypatch):
    environment.record(tmp_path)
    environment.record(tmp_path)
    (first,) = json.loads((tmp_path / "environment.json").read_text())
    assert first["jax"] == jax.__version__ and first["device"] == f"8 x {jax.devices()[0].device_kind} (cpu)"
    assert first["started"].endswith("+00:00")
    monkeypatch.setattr(environment.platform, "python_version", lambda: "3.99.0")
    environment.record(tmp_path)
    assert [start["python"] for start in json.loads((tmp_path / "environment.json").read_text())][1:] == ["3.99.0"]


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_codes_own_checkout(tmp_path, monkeypatch):
    assert environment._commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "other.py").write_text("")
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-m", "other")
    assert environment._commit(tmp_path) is None, "code that was only put into a checkout"
    git(tmp_path, "add", "__init__.py")
    git(tmp_path, "commit", "-m", "all")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert environment._commit(tmp_path) == head
    (tmp_path / "__init__.py").write_text("changed")
    assert environment._commit(tmp_path) == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert environment._commit(tmp_path) is None, "no git"
