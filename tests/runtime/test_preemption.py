"""SIGTERM in a process that is in the middle of something."""

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, time
import jax
from sgpo_jax.runtime import preemption
preemption.watch(float(sys.argv[1]))
assert not preemption.requested()
print("ready", flush=True)
if sys.argv[2] == "steps":
    while True:
        time.sleep(0.05)
        preemption.check()
jax.jit(lambda x: jax.lax.fori_loop(0, 2 * 10**9, lambda i, x: jax.numpy.sin(x), x))(1.0).block_until_ready()  # minutes
"""


def terminated(grace, work):
    """Sends SIGTERM to a program and returns (exit code, stdout, stderr, seconds until it ended)."""
    arguments = [sys.executable, "-c", PROGRAM, str(grace), work]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, errors, time.monotonic() - started


def test_between_two_steps_it_is_noticed_at_once():
    code, output, errors, seconds = terminated(50, "steps")
    assert "SIGTERM: will save and exit after this step, or exit without saving in 50 s" in output and seconds < 20
    assert "Preempted: stopped by SIGTERM" in errors and code == 1, "a command turns this into a line and exit code 0"


@pytest.mark.parametrize("grace", [0.2, 1.5])
def test_a_step_that_outlasts_the_grace_is_abandoned(grace):
    code, output, errors, seconds = terminated(grace, "one long step")
    assert code == 0 and not errors and grace <= seconds < grace + 15
    assert output.endswith("the next start resumes from the last checkpoint\n")
