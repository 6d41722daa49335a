"""Runs' folders in repositories of the hub, on a stand-in: whole commits, one holder of the lock, a short history."""

import json
import threading
import time

import huggingface_hub
import pytest
from helpers.bucket_servers import hugging_face

from sgpo_jax import cli
from sgpo_jax.runtime import buckets, checksums, hub, lease, lock, mirror

URL, OTHERS = "hf://me/runs/first", "hf://me/runs"
PLACE = "models/me/runs"
QUICK = buckets.Periods(send=0.1, apart=0, beat=0.1, lease=1.0, look=0.1)
RARE = buckets.Periods(send=1000, apart=1000, beat=1000, lease=1000, look=1000)  # nothing is done of itself


@pytest.fixture(scope="module")
def server():
    with hugging_face() as server:
        yield server


@pytest.fixture(autouse=True)
def clean(server, monkeypatch):
    for kept in (server.hub.repositories, server.hub.files, server.hub.history, server.hub.commits, server.hub.fails):
        kept.clear()
    server.fails.clear()
    monkeypatch.setitem(buckets.PERIODS, "hf", QUICK)
    yield
    mirror._mirrors.clear()


@pytest.fixture
def ended(monkeypatch):
    """What is set where the process would end."""
    event = threading.Event()

    def end(code):
        event.set()
        raise ValueError("the process has ended")

    monkeypatch.setattr(lease.os, "_exit", end)
    return event


def slowly(monkeypatch):
    monkeypatch.setitem(buckets.PERIODS, "hf", RARE)


def content(server, below="first/"):
    return {name.removeprefix(below): data for name, data in server.hub.files[PLACE].items() if name.startswith(below)}


def test_a_change_is_one_commit_of_a_private_repository_and_leaves_other_folders(server, tmp_path):
    buckets.write(f"{OTHERS}/second/a.txt", b"of another run")
    assert server.hub.repositories == {PLACE: True}
    (tmp_path / "large").write_bytes(bytes(1000))
    first = {"a.txt": b"one", "b/c.txt": b"", "large": tmp_path / "large"}
    buckets.change(URL, first)
    assert content(server) == {"a.txt": b"one", "b/c.txt": b"", "large": bytes(1000)}
    assert bytes(1000) in server.hub.objects.values(), "it went as an LFS object"
    buckets.change(URL, {"a.txt": b"two"}, ["large", "never there"], lambda: {"last": b"3"})
    assert content(server) == {"a.txt": b"two", "b/c.txt": b"", "last": b"3"}
    assert content(server, "second/") == {"a.txt": b"of another run"} and len(server.hub.commits) == 3
    assert buckets.listing(URL).keys() == {"a.txt", "b/c.txt", "last"}
    assert buckets.listing(f"{URL}/b").keys() == {"c.txt"}
    buckets.change(URL, {}, ["large"])
    buckets.change("hf://datasets/me/rows/run", {"a": b"1"})
    assert len(server.hub.commits) == 4, "nothing to change is no commit"
    assert server.hub.files["datasets/me/rows"] == {"run/a": b"1"}
    assert buckets.read("hf://datasets/me/rows/run/a") == b"1"


def test_what_others_write_is_seen_at_once(server, tmp_path):
    buckets.write(f"{URL}/a", b"one")
    before, first = buckets.listing(URL), server.hub.history[PLACE][-1][0]
    huggingface_hub.HfApi().upload_file(
        path_or_fileobj=b"another", path_in_repo="first/a", repo_id="me/runs", commit_message="by hand"
    )
    assert buckets.listing(URL)["a"].size == 7 and buckets.listing(URL)["a"].tag != before["a"].tag
    assert buckets.read(f"{URL}/a") == b"another" and buckets.read(f"{OTHERS}@{first}/first/a") == b"one"
    buckets.download(URL, {"a": tmp_path / "a"})
    assert (tmp_path / "a").read_bytes() == b"another"


def test_what_is_read_in_the_moment_of_a_squash_is_read_again(server, monkeypatch, tmp_path):
    buckets.write(f"{URL}/a", b"one")
    real, squashes = huggingface_hub.HfFileSystem, []

    def squash_first(**more):
        if len(squashes) < 2:
            squashes.append(None)
            server.hub.requests.append("")  # or the commit would have the name of the one before
            server.hub._commit(PLACE, "squashed", server.hub.files[PLACE])
            del server.hub.history[PLACE][:-1]
        return real(**more)

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", squash_first)
    assert buckets.read(f"{URL}/a") == b"one" and len(squashes) == 2
    squashes.clear()
    buckets.download(URL, {"a": tmp_path / "a"})
    assert (tmp_path / "a").read_bytes() == b"one" and len(squashes) == 2


def test_a_public_repository_is_refused_and_nothing_is_written(server):
    server.hub.repositories[PLACE] = False
    server.hub._commit(PLACE, "initial commit", {})
    with pytest.raises(ValueError, match=f"^{OTHERS}: is a public repository; must be a private one, because "):
        cli.folder("workdir", URL)
    assert not server.hub.commits


def test_a_lost_answer_is_no_error_and_no_second_commit(server):
    buckets.change(URL, {"a": b"1", "old": b"2"})
    server.fails[:] = [("POST .*commit", "lost")]
    buckets.change(URL, {"a": b"3"}, ["old"])
    assert not server.fails and content(server) == {"a": b"3"} and len(server.hub.commits) == 2


def test_a_commit_that_others_come_before_is_made_on_theirs_or_given_up(server):
    buckets.write(f"{URL}/a", b"1")
    others = iter(range(100))

    def write_first(until):
        if (number := next(others)) < until:
            write_now(server, f"other/{number}")
        return {"looked": str(number).encode()}

    hub.Files().commit("me/runs/first", {"a": b"2"}, (), lambda: write_first(2))
    assert content(server) == {"a": b"2", "looked": b"2"} and content(server, "other/").keys() == {"0", "1"}
    with pytest.raises(hub.Unavailable, match="others write there all the time"):
        hub.Files().commit("me/runs/first", {"a": b"3"}, (), lambda: write_first(100))
    assert content(server)["a"] == b"2"


def write_now(server, path):
    """Makes a commit at the hub itself, as another process."""
    lines = [{"key": "header", "value": {"summary": "Files of a run of sgpo_jax"}},
             {"key": "file", "value": {"path": path, "content": ""}}]  # fmt: skip
    server.hub.requests.append("")
    with server.hub._answering:
        assert server.hub._change(PLACE, lines)[0] == 200


def test_only_one_of_many_creates_an_object(server):
    buckets.write(f"{URL}/a", b"")
    together, made, refused = threading.Barrier(4), [], []

    def create(name):
        together.wait()
        try:
            buckets.create(f"{URL}/lock/00000001", name)
            made.append(name)
        except FileExistsError:
            refused.append(name)

    hub._committing, kept = NoLock(), hub._committing  # as threads of different processes
    try:
        threads = [threading.Thread(target=create, args=(name,)) for name in (b"a", b"b", b"c", b"d")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        hub._committing = kept
    assert len(made) == 1 and len(refused) == 3 and buckets.read(f"{URL}/lock/00000001") == made[0]


class NoLock:
    def __enter__(self):
        pass

    def __exit__(self, *exception):
        pass


def test_threads_of_one_process_do_not_come_before_each_other(server, monkeypatch):
    buckets.write(f"{URL}/a", b"1")
    statuses, change = [], server.hub._change

    def record(place, lines):
        answer = change(place, lines)
        statuses.append(answer[0])
        return answer

    monkeypatch.setattr(server.hub, "_change", record)
    together = threading.Barrier(2)

    def write(name):
        together.wait()
        hub.Files().commit("me/runs/first", {}, (), lambda: time.sleep(0.1) or {name: b""})

    threads = [threading.Thread(target=write, args=(name,)) for name in "bc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200, 200] and content(server).keys() == {"a", "b", "c"}


def test_of_a_change_of_nothing_the_client_is_not_asked_for_a_commit(server, monkeypatch):
    """It makes none, but warns of it, and every start of a run deletes a file that is hardly ever there."""
    buckets.write(f"{URL}/a", b"1")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", None)
    buckets.delete(f"{URL}/never there")


def test_a_run_that_was_copied_from_a_disk_with_its_lock_is_locked(server):
    buckets.change(URL, {"lock": b"", "rl.jsonl": b"{}"})
    with lock.hold(mirror.copy(URL)):
        assert content(server).keys() == {"lock/00000001", "rl.jsonl"}


@pytest.mark.parametrize(("process", "count"), [(0, 1), (0, 2), (1, 2)])
def test_the_first_of_several_processes_alone_has_checkpoints(server, monkeypatch, process, count):
    """Another one has the other files of the run, as they were when it began."""
    buckets.change(URL, {"config.json": b"{}", "rl/checkpoints/1/a": b"1", "rl/checkpoints/1.files.json": b"{}"})
    monkeypatch.setattr(mirror.jax, "process_count", lambda: count)
    monkeypatch.setattr(mirror.distributed, "index", lambda: process)
    folder = mirror.copy(URL)
    mirror.share(folder)
    place = mirror.arrays(folder / "rl/checkpoints")
    assert place == folder / "rl/checkpoints" and (place / "1/a").exists() == (process == 0)
    assert (folder / "config.json").exists() and mirror.is_of_first(place) == (count == 2)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, PermissionError, r"^hf://me/runs/first: the hub does not accept the token: `hf auth login`.* \[401\]"),
        (403, PermissionError, r"^hf://me/runs/first: the token may not write there.* \[403\] \(as the test wants\)"),
        (404, PermissionError, r"^hf://me/runs/first: there is no such owner or repository.* \[404\]"),
        (422, PermissionError, r"^hf://me/runs/first: the hub refuses \[422\]"),
        (409, hub.Unavailable, r"^something else is being written there: try again \[409\]"),
        (429, hub.Unavailable, r"^the hub has had too many requests: try again later \[429\]"),
        (503, hub.Unavailable, r"^the hub is down or busy: try again later \[503\]"),
    ],
)
def test_errors_say_what_to_do_and_only_some_are_repeated(server, monkeypatch, status, error, message):
    monkeypatch.setattr(buckets, "_SHORT", 0.6)
    buckets.write(f"{URL}/a", b"1")
    server.hub.fails["/commit/"] = [status] * 9
    with pytest.raises(error, match=message):
        hub.Files().commit("me/runs/first", {"a": b"2"})
    again = error is hub.Unavailable
    server.hub.fails["/commit/"] = [status]
    if again:
        buckets.write(f"{URL}/a", b"2")
    else:
        with pytest.raises(error):
            buckets.write(f"{URL}/a", b"2")
    assert content(server)["a"] == (b"2" if again else b"1")


def test_a_request_without_an_answer_is_repeated(server, monkeypatch):
    buckets.write(f"{URL}/a", b"1")
    monkeypatch.setattr(hub, "_SILENCE", 0.5)
    server.fails[:] = [("POST .*commit", "mute")]
    buckets.write(f"{URL}/a", b"2")
    assert content(server)["a"] == b"2" and not server.fails


def test_the_lock_is_held_refused_released_and_taken_from_the_dead(server, capfd):
    with lease.hold(URL):
        assert lease.seen(URL) != ""
        with pytest.raises(ValueError, match=rf"^{URL}: already in use by process \d+ on host "), lease.hold(URL):
            pytest.fail("it is held")
    assert lease.seen(URL) == "" and "waiting 1 s for a sign of life" in capfd.readouterr().out
    dead = json.dumps({"host": "gone", "pid": 1, "since": "yesterday", "token": "x", "beat": 7}).encode()
    buckets.write(f"{URL}/lock/00000009", dead)
    started = time.monotonic()
    server.fails[:] = [("POST .*commit", "lost")]
    with lease.hold(URL):
        assert not server.fails, "and a lost answer does not cost the lock"
        assert time.monotonic() - started >= 1.0
    assert content(server).keys() == {"lock/00000010"}


def test_what_a_holder_sends_is_its_sign_of_life(server, monkeypatch):
    slowly(monkeypatch)
    folder = mirror.copy(URL)
    with lock.hold(folder):
        first, commits = content(server)["lock/00000001"], len(server.hub.commits)
        (folder / "rl.jsonl").write_text("row\n")
        mirror._mirrors[URL].push()
        assert content(server)["rl.jsonl"] == b"row\n" and content(server)["lock/00000001"] != first
        assert len(server.hub.commits) == commits + 1


@pytest.mark.parametrize("moment", ["before it looks", "after it has looked"])
def test_a_process_that_has_lost_the_lock_changes_nothing(server, monkeypatch, ended, capfd, moment):
    slowly(monkeypatch)
    folder, numbers = mirror.copy(URL), lease._numbers
    with pytest.raises(ValueError, match="the process has ended"), lock.hold(folder):
        (folder / "rl.jsonl").write_text("row\n")

        def look(url):
            found = numbers(url)
            if found[-1] == 1:
                write_now(server, "first/lock/00000002")
            return found

        if moment == "before it looks":
            write_now(server, "first/lock/00000002")
        else:
            monkeypatch.setattr(lease, "_numbers", look)
        commits = len(server.hub.commits)
        with pytest.raises(ValueError, match="the process has ended"):
            mirror._mirrors[URL].push()
        assert ended.is_set() and "rl.jsonl" not in content(server)
        assert len(server.hub.commits) == commits + (moment != "before it looks")
    assert f"has lost the lock of {URL} to a process that is not known" in capfd.readouterr().out
    assert "rl.jsonl" not in content(server)


def test_only_whole_checkpoints_are_sent_and_one_that_is_being_removed_stays_until_it_is_gone(server, monkeypatch):
    slowly(monkeypatch)
    sent = mirror.copy(URL)
    send = mirror._mirrors[URL].push
    step = sent / "rl/checkpoints/2"
    step.mkdir(parents=True)
    (step / "array").write_bytes(b"numbers")
    (step / "metadata").write_bytes(b"{}")
    (sent / "rl.jsonl").write_text("row\n")
    send()
    assert content(server).keys() == {"rl.jsonl"}, "it has no seal yet"
    checksums.write(step)
    send()
    whole = {"rl.jsonl", "rl/checkpoints/2/array", "rl/checkpoints/2/metadata", "rl/checkpoints/2.files.json"}
    assert content(server).keys() == whole and len(server.hub.commits) == 2
    (step / "array").unlink()
    send()
    assert content(server).keys() == whole
    checksums.forget_missing(step.parent)
    (step / "metadata").unlink()
    (sent / "rl/checkpoints/2.files.json").unlink()
    send()
    assert content(server).keys() == {"rl.jsonl"} and len(server.hub.commits) == 3


def test_a_run_with_many_checkpoints_commits_no_more_often_than_the_hub_allows(server, monkeypatch):
    monkeypatch.setattr(mirror, "_POLL", 0.05)
    monkeypatch.setitem(buckets.PERIODS, "hf", RARE._replace(apart=1.0))
    folder = mirror.copy(URL)
    with lock.hold(folder):
        (folder / "rl.jsonl").write_text("1")
        mirror.push()
        assert content(server)["rl.jsonl"] == b"1"
        commits, started = len(server.hub.commits), time.monotonic()
        for i in range(5):
            (folder / "rl.jsonl").write_text(f"1{i}")
            mirror.push()
        while content(server)["rl.jsonl"] != b"14" and time.monotonic() < started + 20:
            time.sleep(0.02)
        assert content(server)["rl.jsonl"] == b"14" and len(server.hub.commits) == commits + 1
        assert time.monotonic() >= started + 0.5


def test_the_history_is_squashed_at_both_ends_of_a_run_unless_others_have_written_it(server, monkeypatch, capfd):
    slowly(monkeypatch)
    buckets.write(f"{URL}/rl.jsonl", b"0")
    folder = mirror.copy(URL)
    with lock.hold(folder):
        assert len(server.hub.history[PLACE]) == 1
        for i in range(3):
            (folder / "rl.jsonl").write_text(str(i))
            mirror._mirrors[URL].push()
        assert len(server.hub.history[PLACE]) == 4
    assert len(server.hub.history[PLACE]) == 2, "the lock is released after it"
    assert content(server)["rl.jsonl"] == b"2" and "warning" not in capfd.readouterr().out
    huggingface_hub.HfApi().upload_file(
        path_or_fileobj=b"", path_in_repo="notes", repo_id="me/runs", commit_message="My notes"
    )
    with lock.hold(folder):
        pass
    assert len(server.hub.history[PLACE]) > 4
    warning = f"warning: {URL}: the repository has commits of others, such as 'My notes'; deleted checkpoints stay in"
    assert capfd.readouterr().out.count(warning) == 2
    server.hub.fails["/commits/"] = [403, 403]
    with lock.hold(folder):
        pass
    assert capfd.readouterr().out.count("warning: hf://me/runs/first: the token may not write there") == 2
