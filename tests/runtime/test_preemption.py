"""SIGTERM and Ctrl-C in a process that is in the middle of something."""

import signal
import subprocess
import sys
import time

import pytest

from sgpo_jax.runtime import preemption

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


def terminated(grace, work, *signals):
    """Sends signals to a program and returns (exit code, stdout, stderr, seconds until it ended)."""
    arguments = [sys.executable, "-c", PROGRAM, str(grace), work]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    for number in signals or (signal.SIGTERM,):
        process.send_signal(number)
        time.sleep(0.3)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, errors, time.monotonic() - started


def test_between_two_steps_it_is_noticed_at_once():
    code, output, errors, seconds = terminated(50, "steps")
    assert "SIGTERM: will save and exit after this step, or exit without saving in 50 s" in output and seconds < 20
    assert "Preempted: stopped by SIGTERM" in errors and code == 1, "a command turns this into a line and exit code 0"


def test_ctrl_c_asks_to_stop_and_has_a_status_of_its_own():
    code, output, errors, _ = terminated(50, "steps", signal.SIGINT)
    assert "Ctrl-C: will save and exit after this step; a second Ctrl-C leaves at once" in output
    assert "Preempted: stopped by Ctrl-C; the finished work is saved; the same command resumes" in errors
    with pytest.raises(preemption.Preempted) as stopped:
        preemption.stop(signal.SIGINT, "saved at step 3")
    assert stopped.value.code == 130 and "saved at step 3; the same command resumes" in str(stopped.value)
    preemption.stop(0)


def test_a_second_ctrl_c_leaves_at_once():
    code, output, errors, seconds = terminated(50, "one long step", signal.SIGINT, signal.SIGINT)
    assert code == 130 and not errors and seconds < 20
    assert output.endswith("Ctrl-C: left at once; the next start resumes from the last checkpoint\n")


@pytest.mark.parametrize("grace", [0.2, 1.5])
def test_a_step_that_outlasts_the_grace_is_abandoned(grace):
    code, output, errors, seconds = terminated(grace, "one long step")
    assert code == 0 and not errors and grace <= seconds < grace + 15
    assert output.endswith("the next start resumes from the last checkpoint\n")
