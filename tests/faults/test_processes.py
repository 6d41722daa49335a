"""Several processes: how they meet, share work, and all end when one does, in whatever way."""

import json
import os
import re
import signal
import socket
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
from helpers.forks import Fork

from sgpo_jax import config as configs
from sgpo_jax.cli.processes import join
from sgpo_jax.data import filtering
from sgpo_jax.runtime import distributed, watchdog
from sgpo_jax.training import inputs

HOST = re.escape(socket.gethostname())


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run(count, how, slurm=False, **more):
    """Returns [(exit code, stdout, stderr)] of all processes, and the seconds from the first end to the last."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "SLURM"))}
    processes = []
    for i in range(count):
        flags = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}"]
        if slurm:
            flags = ["--distributed"]
            environment |= {
                "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "JAX_COORDINATOR_PORT": str(port),
            }  # fmt: skip
        flags += ["--config=configs/quickstart.py", f"--how={how}", "--config.grace=0.5", *more.get(f"flags{i}", [])]
        processes.append(Fork("helpers.processes", flags, environment))
    ended = {}
    deadline = time.monotonic() + 180
    while len(ended) < count - (how == "frozen") and time.monotonic() < deadline:
        ended |= {i: time.monotonic() for i, one in enumerate(processes) if i not in ended and one.poll() is not None}
        time.sleep(0.01)
    for one in processes:
        one.kill()
    outputs = [one.communicate() for one in processes]
    times = sorted(ended.values())
    return [(one.returncode, *texts) for one, texts in zip(processes, outputs, strict=True)], times[-1] - times[0]


def own_words(errors):
    """Returns the lines of the command itself, without those of jaxlib when it loses its coordinator."""
    return [line for line in errors.splitlines() if line.startswith("sgpo_jax: ")]


@pytest.mark.parametrize("slurm", [False, True])
def test_they_find_each_other_and_share_work(slurm):
    results, _ = run(3 if slurm else 2, "well", slurm)
    assert [(code, errors) for code, _, errors in results] == [(0, "")] * len(results)
    spoken = [[line for line in output.splitlines() if not line.startswith("[Gloo]")] for _, output, _ in results]
    count = len(results)
    assert spoken[0][0].startswith(f"{count} processes, {count} x cpu (cpu), jax ")
    assert [spoken[0][1:], *spoken[1:]] == [[f"0 of {count} is done"], *[[]] * (count - 1)], "only the first one talks"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "codes", "reason"),
    [
        ("one is killed", [1, 1, -9], "process 2 of 3, on host HOST, has died without a word .*"),
        pytest.param("in a collective", [1, -9], "process 1 of 2, on host HOST, has died without .*", marks=SLOW),
        pytest.param("one fails", [1, 1], "process 1 of 2, on host HOST, has failed: nothing .*", marks=SLOW),
        ("a bug", [1, 1], "process 1 of 2, on host HOST, has failed: a bug"),
        ("SIGTERM in a long step", [0, 0], "process 1 of 2, on host HOST, was stopped by SIGTERM in the middle of .*"),
    ],
)
def test_one_ends_and_the_others_say_so_and_stop(how, codes, reason):
    results, seconds = run(len(codes), how)
    assert [code for code, _, _ in results] == codes
    assert seconds < 30
    for i, (_, _, errors) in enumerate(results[:-1]):
        line = f"sgpo_jax: {reason.replace('HOST', HOST)}; this one, {i}, stops too\n"
        assert re.fullmatch(line, errors), errors
    ours = {"one fails": "sgpo_jax: nothing but a test in 1\n", "a bug": "ZeroDivisionError: a bug\n"}.get(how, "")
    assert results[-1][2].endswith(ours) and ("Traceback" in results[-1][2]) == (how == "a bug")


def test_the_first_is_killed_and_the_other_says_so_and_stops():
    """The coordinator dies with it, so jaxlib may end the other process before this package does."""
    results, seconds = run(2, "the first is killed")
    assert results[0][0] == -signal.SIGKILL and results[1][0] in (1, -signal.SIGABRT) and seconds < 30
    line = f"sgpo_jax: process 0 of 2, on host {HOST}, has died without a word .*; this one, 1, stops too"
    assert "Terminating process because the JAX distributed service detected fatal errors" in results[1][2] or [
        re.fullmatch(line, said) for said in own_words(results[1][2])
    ]


def test_sigterm_to_one_stops_all_at_the_same_step():
    results, _ = run(2, "stopped between steps")
    assert [(code, errors) for code, _, errors in results] == [(0, "")] * 2
    assert results[0][1].splitlines()[-1] == (
        "sgpo_jax: stopped by SIGTERM; the finished work is saved; the same command resumes"
    )


def test_a_frozen_process_ends_the_others():
    """jaxlib's heartbeats notice it, in this test after 6 s."""
    started = time.monotonic()
    results, _ = run(2, "frozen")
    assert time.monotonic() - started < 90
    assert results[0][0] == -signal.SIGABRT and "stopped sending heartbeats" in results[0][2]
    assert distributed.HEARTBEAT < 60


def test_another_config_is_refused_by_name():
    results, _ = run(2, "well", flags1=["--config.rl.batch=7"])
    said = "sgpo_jax: config.rl.batch is 32 in process 0 and 7 in process 1; must be equal"
    assert [code for code, _, _ in results] == [1, 1]
    for _, _, errors in results:  # its own words, or the news of the other's
        assert own_words(errors) and said.removeprefix("sgpo_jax: ") in own_words(errors)[0], errors


def test_other_rows_in_another_process_are_refused(monkeypatch, tmp_path):
    def gather(values):
        return [values, values | {name: 5 for name in values if changed in name}]

    monkeypatch.setattr(distributed, "gather", gather)
    for changed in ("number", "content"):
        sieve = filtering.Sieve({"s": [{"id": "a", "problem": "p", "answer": "1"}]})
        with pytest.raises(ValueError, match=rf"^the {changed} of rows of the rl stage is .* in process 0 and 5 in"):
            inputs.account(sieve, tmp_path, "rl")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_the_same_everywhere_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "_LAG", 0.5)
    monkeypatch.setattr(distributed, "first", lambda make: "what process 0 wrote")
    path = tmp_path / "lock"

    def look():
        return path.read_text() if path.is_file() else ""

    with pytest.raises(ValueError, match=rf"^{tmp_path}: process 0 does not see what process 0 wrote there; must"):
        distributed.wait_for(look, tmp_path)
    path.write_text("of another run")
    writer = threading.Timer(0.1, path.write_text, ["what process 0 wrote"])
    writer.start()
    distributed.wait_for(look, tmp_path)
    writer.join()


# ---- the flags

FLAGS = {
    "no number": ({"coordinator": "h:1", "processes": 2}, r"^--process: missing; --coordinator, --processes and --pro"),
    "a number only": ({"process": 0}, r"^--coordinator, --processes: missing"),
    "no port": ({"coordinator": "host", "processes": 2, "process": 0}, r"^--coordinator=host: must be HOST:PORT"),
    "no host": ({"coordinator": ":123", "processes": 2, "process": 0}, r"^--coordinator=:123: must be HOST:PORT"),
    "a port too high": ({"coordinator": "h:65536", "processes": 2, "process": 0}, r"^--coordinator=h:65536: .* 65535"),
    "no process": ({"coordinator": "h:1", "processes": 0, "process": 0}, r"^--processes=0: must be at least 1"),
    "one too many": ({"coordinator": "h:1", "processes": 2, "process": 2}, r"^--process=2: must be from 0 to 1, as"),
    "a negative one": ({"coordinator": "h:1", "processes": 2, "process": -1}, r"^--process=-1: must be from 0 to 1"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_do_not_go_together_are_refused(name):
    given, message = FLAGS[name]
    flags = {"coordinator": None, "processes": None, "process": None, "distributed": True} | given
    with pytest.raises(ValueError, match=message):
        join(configs.base(), SimpleNamespace(**flags))


# ---- the meeting


@pytest.fixture
def hurry(monkeypatch):
    """Shortens the waiting times, and records an end in place of exiting."""
    ended = []
    monkeypatch.setattr(watchdog, "PATIENCE", 1.0)
    monkeypatch.setattr(watchdog, "_HELLO", 0.3)
    monkeypatch.setattr(watchdog, "_peers", None)
    monkeypatch.setattr(watchdog._Peers, "_end", lambda self, message: ended.append(message))
    return ended


def say(port, line):
    """Returns the answer of the first process to a line; the connection stays open for 3 s."""
    with socket.create_connection(("127.0.0.1", port), timeout=3) as connection, connection.makefile("rb") as lines:
        connection.sendall(line)
        return lines.readline()


def test_a_process_that_does_not_come_is_named(hurry):
    with pytest.raises(ValueError, match=r"^process 1, 2 of 3 has not come within 1 s$"):
        watchdog.accept(watchdog.listen(), 3)


def test_a_first_process_that_does_not_answer_is_named(hurry):
    port = free_port()
    with pytest.raises(ValueError, match=rf"^process 0 does not answer at 127\.0\.0\.1:{port} in 1 s \(.*refused.*\)$"):
        watchdog.connect("127.0.0.1", port, 1, 2)


def test_who_meets_nobody_for_long_says_where_it_is(monkeypatch, tmp_path, capfd):
    for place, name, value in ((watchdog, "SILENCE", 0.2), (distributed, "_LAG", 0.8), (distributed, "first", str)):
        monkeypatch.setattr(place, name, value)
    peers = watchdog._Peers(1, ["first", "second"], {})
    monkeypatch.setattr(watchdog, "_peers", peers)
    with pytest.raises(ValueError, match="process 0 does not see"):
        distributed.wait_for(str, tmp_path)
    peers.over = True
    said = "process 1 of 2, on host second, has not met the others for 0 min; it is at runtime/distributed.py:"
    assert re.search(rf"^sgpo_jax: {said}\d+ wait_for$", capfd.readouterr().err, re.MULTILINE)


def test_a_connection_to_itself_is_none(hurry, monkeypatch):
    """On one host the system may give the free port to the process that connects to it."""
    port = free_port()

    def connect(address, timeout):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.bind(address)
        connection.connect(address)
        return connection

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ValueError, match=rf"^process 0 does not answer at 127\.0\.0\.1:{port} in 1 s \(nobody listens"):
        watchdog.connect("127.0.0.1", port, 1, 2)


def test_something_else_at_the_address(hurry):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        with pytest.raises(ValueError, match="has ended, or something else answers there"):
            watchdog.connect("127.0.0.1", port, 1, 2)
        thread.join()


def hello(process, count, host="h"):
    return json.dumps({"process": process, "processes": count, "host": host}).encode() + b"\n"


def test_strangers_do_not_count_and_everyone_hears_of_an_end(hurry):
    listener = watchdog.listen()
    port = listener.getsockname()[1]
    thread = threading.Thread(target=watchdog.accept, args=(listener, 3))
    thread.start()
    for line in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[]\n", b"{}\n", b"", hello("1", 3), hello(3, 3), hello(0, 3)):
        assert b"refused" in say(port, line)
    assert json.loads(say(port, hello(1, 2))) == {"refused": "--processes=2: the first process has 3"}
    one = socket.create_connection(("127.0.0.1", port), timeout=3)
    one.sendall(hello(1, 3, "first host"))
    while b"there is one already, on host first host" not in say(port, hello(1, 3)):
        time.sleep(0.01)
    with closing(one), socket.create_connection(("127.0.0.1", port), timeout=3) as two:
        two.sendall(hello(2, 3, "second host"))
        thread.join(3)
        for connection in (one, two):
            assert json.loads(connection.recv(1000)) == {"hosts": [socket.gethostname(), "first host", "second host"]}
        two.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 3
        while not hurry and time.monotonic() < deadline:
            time.sleep(0.01)
        assert hurry == [{"process": 2, "reason": watchdog.DIED, "code": 1}]
        one.sendall(b'{"process": 1, "reason": "", "code": 1}\n')  # an end that all have reached is none
    time.sleep(0.1)
    assert len(hurry) == 1
