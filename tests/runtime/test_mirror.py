"""Local copies of folders in buckets: what is sent when, in which order; and the lease that is their lock."""

import json
import os
import shutil
import threading
import time

import pytest
from helpers.bucket_servers import google

from sgpo_jax import cli
from sgpo_jax.runtime import buckets, checksums, lease, lock, mirror

URL = "gs://bucket/run"


@pytest.fixture(scope="module")
def server():
    with google() as server:
        yield server


@pytest.fixture(autouse=True)
def clean(server, monkeypatch):
    for name in buckets.listing("gs://bucket"):
        buckets.delete(f"gs://bucket/{name}")
    monkeypatch.setitem(buckets.PERIODS, "gs", buckets.Periods(send=30, apart=0, beat=0.1, lease=1.0, look=0.1))
    yield
    mirror._mirrors.clear()


def names(url=URL):
    return {name for name in buckets.listing(url) if not name.startswith("lock/")}


@pytest.fixture
def sent(monkeypatch):
    """The names of the objects that files were sent to, in their order."""
    urls, upload = [], buckets.upload

    def record(file, url):
        upload(file, url)
        urls.append(url.removeprefix(f"{URL}/"))

    monkeypatch.setattr(buckets, "upload", record)
    return urls


def test_what_a_command_changes_is_sent_and_what_it_removes_is_deleted(sent):
    for name in ("config.json", "eval/a.jsonl", "old.txt", "rl/checkpoints/2/state", "lock/00000001"):
        buckets.write(f"{URL}/{name}", name.encode())
    with mirror.closing():
        folder = mirror.copy(URL)
        assert folder.name == "run" and mirror.copy(f"{URL}/") == folder
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert found == {"config.json", "eval/a.jsonl", "old.txt"}, "neither checkpoints nor the lock"
        (folder / "eval/a.jsonl").write_text("longer than before")
        (folder / "new").mkdir()
        (folder / "new/b.partial.txt").write_text("not finished")
        (folder / "new/b.txt").write_text("b")
        (folder / "old.txt").unlink()
    assert not folder.exists() and sorted(sent) == ["eval/a.jsonl", "new/b.txt"]
    assert names() == {"config.json", "eval/a.jsonl", "new/b.txt", "rl/checkpoints/2/state"}
    assert buckets.read(f"{URL}/eval/a.jsonl") == b"longer than before"


def test_checkpoints_that_are_files_are_sent_last_and_are_whole_with_their_mark_or_seal(sent, monkeypatch):
    folder = mirror.copy(URL, whole=True)
    step = folder / "rl/checkpoints/2"
    step.mkdir(parents=True)
    (step / "commit_success.txt").write_text("by Orbax")
    (step / "array").write_text("numbers")
    checksums.write(step)
    time.sleep(0.02)
    (folder / "rl.jsonl").write_text("a row that is later than the checkpoint\n")
    mirror.push()
    parts = ["rl/checkpoints/2/array", "rl/checkpoints/2/commit_success.txt", "rl/checkpoints/2.files.json"]
    assert sent == ["rl.jsonl", *parts]
    buckets.write(f"{URL}/rl/checkpoints/3/array", b"of a process that was killed after the mark")
    buckets.write(f"{URL}/rl/checkpoints/3/commit_success.txt", b"by Orbax")
    buckets.write(f"{URL}/rl/checkpoints/4/array", b"of a process that was killed before the seal")
    mirror._mirrors.clear()
    again = mirror.copy(URL, whole=True)
    assert [path.name for path in sorted((again / "rl/checkpoints").iterdir())] == ["2", "2.files.json", "3"]
    assert checksums.damage(again / "rl/checkpoints/2", quick=False) is None
    with mirror.writing(again):
        assert "rl/checkpoints/4/array" not in names()
    deleted, delete = [], buckets.delete
    monkeypatch.setattr(buckets, "delete", lambda url: deleted.append(url.removeprefix(f"{URL}/")) or delete(url))
    shutil.rmtree(again / "rl/checkpoints/2")
    (again / "rl/checkpoints/2.files.json").unlink()
    mirror.push()
    assert deleted == parts[::-1]


def test_a_run_sends_its_files_while_it_runs_and_outlives_an_outage(monkeypatch, capfd):
    monkeypatch.setitem(buckets.PERIODS, "gs", buckets.PERIODS["gs"]._replace(send=0.1))
    folder = mirror.copy(URL)

    def appears(text):
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if "rl.jsonl" in names() and buckets.read(f"{URL}/rl.jsonl") == text:
                return True
            time.sleep(0.05)
        return False

    with mirror.writing(folder):
        (folder / "rl.jsonl").write_bytes(b"1")
        assert appears(b"1")
        real, down = buckets.upload, threading.Event()
        down.set()

        def upload(file, url):
            if down.is_set():
                raise OSError(f"{url}: down")
            real(file, url)

        monkeypatch.setattr(buckets, "upload", upload)
        (folder / "rl.jsonl").write_bytes(b"12")
        time.sleep(0.5)
        down.clear()
        assert appears(b"12")
    assert capfd.readouterr().out.count("the run goes on, and its files are sent later") == 1


def test_what_cannot_be_sent_at_the_end_stays_and_is_named(monkeypatch):
    monkeypatch.setattr(mirror, "_LAST", 0.0)

    def fail(file, url):
        raise OSError(f"{url}: down")

    monkeypatch.setattr(buckets, "upload", fail)
    with pytest.raises(OSError, match="rl.jsonl: down; files that the bucket does not have are in /") as raised:
        with mirror.closing():
            folder = mirror.copy(URL)
            (folder / "rl.jsonl").write_text("row")
    assert (folder / "rl.jsonl").read_text() == "row" and str(folder) in str(raised.value)


def test_messages_name_the_bucket():
    with pytest.raises(ValueError, match=f"^{URL}/rl.jsonl, line 1: bad$"), mirror.closing():
        raise ValueError(f"{mirror.copy(URL) / 'rl.jsonl'}, line 1: bad")


def test_the_lock_is_held_refused_released_and_taken_from_the_dead(capfd):
    folder = mirror.copy(URL)
    assert lock.seen(folder) == ""
    with lock.hold(folder):
        assert lock.seen(folder) != ""
        with pytest.raises(ValueError, match=rf"^{URL}: already in use by process \d+ on host .* another --workdir$"):
            with lease.hold(URL):
                pytest.fail("it is held")
    assert lock.seen(folder) == "" and "sign of life" in capfd.readouterr().out
    started = time.monotonic()
    with lease.hold(URL):
        assert time.monotonic() - started < 0.9, "a released lock is free at once"
    dead = {"host": "gone", "pid": 1, "since": "yesterday", "token": "x", "beat": 7}
    buckets.write(f"{URL}/lock/00000009", json.dumps(dead).encode())
    started = time.monotonic()
    with lease.hold(URL):
        assert time.monotonic() - started >= 1.0
        assert lease._numbers(URL)[-1] == 10
    assert lease._numbers(URL) == [10]


def test_two_that_find_a_dead_lock_do_not_both_get_it(monkeypatch):
    dead = {"host": "gone", "pid": 1, "since": "yesterday", "token": "x", "beat": 7}
    buckets.write(f"{URL}/lock/00000001", json.dumps(dead).encode())
    both, held, refused = threading.Barrier(2), [], []

    def run(name):
        both.wait()
        try:
            with lease.hold(URL):
                held.append(name)
                time.sleep(1.5)
        except ValueError:
            refused.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == len(refused) == 1


def test_a_lost_answer_does_not_cost_the_lock(server):
    server.fails[:] = [("POST", "lost")]
    with lease.hold(URL):
        assert not server.fails


def test_a_holder_that_has_lost_its_lock_ends(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(lease.os, "_exit", lambda code: ended.set())
    with lease.hold(URL):
        later = {"host": "other", "pid": 2, "since": "now", "token": "y", "beat": 0}
        buckets.write(f"{URL}/lock/00000002", json.dumps(later).encode())
        assert ended.wait(20)
    assert f"has lost the lock of {URL} to process 2 on host other" in capfd.readouterr().out


def test_a_lock_that_cannot_be_read_is_that_of_an_unknown_holder(monkeypatch, capfd):
    for content in (b"[1]", b"\xff", b"{"):
        buckets.write(f"{URL}/lock/00000003", content)
        assert lease._newest(URL) == (3, {}) and lease.seen(URL) == ""
    started = time.monotonic()
    with lease.hold(URL):
        assert time.monotonic() - started >= 1.0, "it may be alive"
        assert "the lock of a process that is not known is there" in capfd.readouterr().out
        buckets.write(f"{URL}/lock/00000004", content)  # its own
        until = time.monotonic() + 10
        while lease._newest(URL)[1] == {} and time.monotonic() < until:
            time.sleep(0.05)
        assert lease._newest(URL)[1]["pid"] == os.getpid(), "it is written again, and nobody is dead"
        ended = threading.Event()
        monkeypatch.setattr(lease.os, "_exit", lambda code: ended.set())
        buckets.write(f"{URL}/lock/00000005", content)
        assert ended.wait(10), "a later lock is the end, whosever it is"


def test_seals_of_a_bucket_and_of_a_disk(tmp_path):
    from etils import epath

    step = epath.Path(f"{URL}/rl/checkpoints/2")
    buckets.write(f"{step}/array", b"numbers")
    checksums.write(step)
    assert checksums.is_written(step) and checksums.damage(step, quick=True) is None
    buckets.write(f"{step}/array", b"NUMBERS")
    assert checksums.damage(step, quick=True) == "array has changed since it was saved"
    buckets.write(f"{step}/array", b"more numbers")
    assert checksums.damage(step, quick=True) == "array has 12 bytes instead of 7"
    (tmp_path / "2").mkdir()
    (tmp_path / "2/array").write_bytes(b"numbers")
    buckets.download(f"{URL}/rl/checkpoints", {"2.files.json": tmp_path / "2.files.json"})
    assert checksums.damage(tmp_path / "2", quick=False) is None, "copied from the bucket: the sizes agree"
    aside = checksums.set_aside(step)
    assert aside.name == "2.damaged" and names() == {"rl/checkpoints/2.damaged/array", "rl/checkpoints/2.files.json"}


@pytest.mark.parametrize(
    ("call", "value", "message"),
    [
        (cli.new_folder, "hf://me/run", "--workdir=hf://me/run: must be .* gs://, s3://; --push writes to the hub"),
        (cli.file, "hf://me/run/a.html", "--workdir=hf://me/run: must be .* gs://, s3://; --push writes to the hub"),
        (cli.folder, "https://bucket/run", "--workdir=https://bucket/run: must be a folder, or in a bucket"),
        (cli.folder, "gs://no-such-bucket/run", "--workdir=gs://no-such-bucket/run: must be in a bucket that can be"),
    ],
)
def test_folders_that_cannot_be_are_refused(call, value, message):
    with pytest.raises(ValueError, match=message):
        call("workdir", value)
