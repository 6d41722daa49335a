"""Two processes never work in one folder, and a dead one leaves it free."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from sgpo_jax.runtime import lock

HOLDER = """
import sys, time
from pathlib import Path
from sgpo_jax.runtime import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_with_host_and_pid_until_the_first_is_dead(tmp_path, holder):
    holder_pattern = rf"process {holder.pid} on host {socket.gethostname()} \(since 20.*\)"
    expected = f"{tmp_path}: already in use by {holder_pattern}; wait .* another --workdir"
    for _ in range(2):  # to be refused does not disturb the first one's lock
        with pytest.raises(ValueError, match=expected), lock.hold(tmp_path):
            pytest.fail("it is held")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == holder.pid, "a dead process cleans nothing up"
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    assert (tmp_path / lock.FILE).read_text() == ""


def test_a_child_process_does_not_keep_the_lock(tmp_path):
    with lock.hold(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with lock.hold(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_folder_is_made_and_can_be_held_again(tmp_path):
    for _ in range(2):
        with lock.hold(tmp_path / "new" / "folder"):
            assert (tmp_path / "new" / "folder" / lock.FILE).is_file()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.hold(tmp_path):
        assert "cannot be locked ([Errno 38] Function not implemented)" in capsys.readouterr().out
