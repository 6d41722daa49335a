"""Faults of what is around a run: file systems, streams, keys, numbers beyond reason, machines that are late."""

import errno
import fcntl
import io
import json
import socket
import sys
import threading
import time

import pytest
from helpers.chat_server import ChatServer, completion
from helpers.configs import extraction

from sgpo_jax import cli, strategies
from sgpo_jax.cli import COMMANDS
from sgpo_jax.runtime import journal, lock, tables, watchdog
from sgpo_jax.strategies import clients, faults, replies


@pytest.fixture
def no_locks(monkeypatch):
    """Makes every file system one without locks."""

    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_without_locks_is_used_with_a_warning(no_locks, tmp_path, capsys):
    with lock.hold(tmp_path), journal.Journal(tmp_path / "journal", {"seed": 1}) as open_journal:
        open_journal.append({"kind": "verdict", "id": "a"})
    with journal.Journal(tmp_path / "journal", {"seed": 1}) as open_journal:
        assert open_journal.verdict("a") == {"kind": "verdict", "id": "a"}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("cannot be locked ([Errno 37] No locks available)" in line for line in said)


def test_a_journal_that_another_process_writes_to_is_still_refused(tmp_path):
    with journal.Journal(tmp_path / "journal", {}):
        with pytest.raises(ValueError, match="another process is writing to it"):
            journal.Journal(tmp_path / "journal", {})


@pytest.mark.parametrize("key", ["sk-canary-0123456789\n", "sk canary 0123456789", "sk-canary-€", "\tsk-canary"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="needs the extra 'extract'")
    (tmp_path / "problems.jsonl").write_text(json.dumps({"id": "a", "problem": "1+1", "answer": "2"}) + "\n")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=r"OPENAI_API_KEY .*: has a space, a line break or a character") as refused:
        strategies.run(extraction(tmp_path, "http://127.0.0.1:9/v1"), tmp_path / "work", tmp_path / "out.jsonl")
    assert "canary" not in str(refused.value)


def test_a_key_with_a_line_break_does_not_get_into_an_error():
    pytest.importorskip("openai", reason="needs the extra 'extract'")
    with ChatServer(lambda *_: completion("five")) as server:
        endpoint = clients.Endpoint("m", server.url, "sk-canary-0123456789\n", temperature=1, top_p=1, retries=0)
        with pytest.raises(faults.Unavailable, match=r"Illegal header value b'Bearer \[key\]"):
            clients.endpoint(endpoint)(replies.Request("1", "What is 2 + 3?", 1, 50))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_stream_that_lacks_a_character_does_not_end_a_run(encoding, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    cli.start("train", COMMANDS["train"], ["--version"])
    text = "gewöhnlich €, and a file name that is no text: \udcff"
    for stream in streams.values():
        print(text, file=stream, flush=True)
        shown = stream.buffer.getvalue().decode(encoding).splitlines()[-1]
        assert shown == text.encode(encoding, "backslashreplace").decode(encoding)


def test_a_table_is_readable_where_lines_cannot_be_drawn(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    tables.table("Problems", ["", "number"], [("read", 3)])
    assert "| read |      3 |" in stream.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("flag", ["workdir", "to"])
def test_a_folder_whose_name_is_no_text_is_refused(flag, tmp_path):
    """Python has such a name for bytes that are not UTF-8, and the checkpoints' library cannot take it."""
    with pytest.raises(ValueError, match=rf"--{flag}='.*\\udcff': must be a name in UTF-8"):
        cli.folder(flag, f"{tmp_path}/\udcff")
    assert cli.folder(flag, f"{tmp_path}/wörk dir [1] #%20;x?y")


@pytest.mark.parametrize("value", ["", " "])
def test_a_folder_without_a_name_is_not_the_current_one(value):
    with pytest.raises(ValueError, match=r"--workdir= ?: must name a folder; '\.' is the current one"):
        cli.folder("workdir", value)
    assert str(cli.folder("workdir", ".")) == "."


def test_links_to_folders_are_followed_and_those_to_nothing_are_named(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    assert cli.folder("workdir", f"{tmp_path}/link/run") == tmp_path / "link/run"
    for name in ("broken", "broken/run"):
        with pytest.raises(ValueError, match=rf"--workdir=.*/{name}: .*/broken is a link to a place that does not"):
            cli.folder("workdir", f"{tmp_path}/{name}")


def test_a_hello_that_came_too_late_is_said_again(monkeypatch):
    """A process that is started on a busy machine may stand still for longer than the first one waits."""
    monkeypatch.setattr(watchdog, "_HELLO", 0.2)
    monkeypatch.setattr(watchdog, "_peers", None)
    ended, sent, send = [], [], watchdog._Stream.send
    monkeypatch.setattr(watchdog._Peers, "_end", lambda self, message: ended.append(message))

    def late(stream, message):
        if "processes" in message:
            sent.append(message)
            time.sleep(0.5 if len(sent) == 1 else 0)
        send(stream, message)

    monkeypatch.setattr(watchdog._Stream, "send", late)
    listener = watchdog.listen()
    first = threading.Thread(target=watchdog.accept, args=(listener, 2))
    port = listener.getsockname()[1]
    first.start()
    watchdog.connect("127.0.0.1", port, 1, 2)
    first.join(10)
    assert len(sent) == 2 and not first.is_alive() and not ended


def test_whoever_waits_for_the_first_process_says_so(monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "_WORD", 0.1)
    monkeypatch.setattr(watchdog, "PATIENCE", 0.8)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ValueError, match=f"process 0 does not answer at 127.0.0.1:{port} in 0.8 s"):
        watchdog.connect("127.0.0.1", port, 1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"waiting up to 0.8 s for process 0 at 127.0.0.1:{port} (")
