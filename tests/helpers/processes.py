"""One of several processes that share work, and one of which then ends in the way that --how names."""

import contextlib
import os
import signal
import time

from absl import flags

from sgpo_jax import cli
from sgpo_jax.runtime import distributed, preemption

LONG = "€" * 100_000


def share_work(process):
    values = distributed.gather({"process": process, "text": LONG * process, "number": 0.1, "none": None})
    assert values == [{"process": i, "text": LONG * i, "number": 0.1, "none": None} for i in range(len(values))]
    asked = []
    assert distributed.first(lambda: asked.append(process) or f"{process} was asked") == "0 was asked"
    assert asked == [0] * (process == 0)
    for letters in ("", "a", "ab", "abcdefg"):
        by_whom = distributed.split(lambda part: [[letter, process] for letter in part], letters)
        assert by_whom == [[letter, i % len(values)] for i, letter in enumerate(letters)]


def main(config, given):
    if given.how == "frozen":
        distributed.HEARTBEAT = 6
    cli.join(config, given)
    import jax  # the devices are there from now on

    assert not jax.config.jax_enable_compilation_cache, "on CPU what comes out of it is not safe"
    process, last = jax.process_index(), jax.process_index() == jax.process_count() - 1
    preemption.watch(config.grace)
    share_work(process)
    print(f"{process} of {jax.process_count()} is done", flush=True)
    if given.how == "one fails" and last:
        raise ValueError(f"nothing\n but a test in {process}")
    if given.how == "a bug" and last:
        raise ZeroDivisionError("a bug")
    if given.how == "one is killed" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    if given.how == "the first is killed" and process == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if given.how == "SIGTERM in a long step" and last:
        os.kill(os.getpid(), signal.SIGTERM)
    if given.how == "frozen" and last:
        os.kill(os.getpid(), signal.SIGSTOP)
    if given.how == "stopped between steps":
        if last:
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10_000):
            preemption.check()
    if given.how == "in a collective":
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.gather(None)
    if given.how != "well":
        time.sleep(600)


if __name__ == "__main__":
    flags.DEFINE_string("how", "well", "How it ends.")
    cli.define_processes()
    with contextlib.suppress(KeyboardInterrupt):
        cli.start(main, required=["config"])
