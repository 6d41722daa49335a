"""A program that runs as several processes, which share work; one of them then ends in the way that --how names."""

import os
import signal
import time

from sgpo_jax import cli
from sgpo_jax.cli.processes import join
from sgpo_jax.runtime import distributed, preemption, watchdog

LONG = "€" * 100_000


def share_work(process):
    met = watchdog._peers.met
    values = distributed.gather({"process": process, "text": LONG * process, "number": 0.1, "none": None})
    assert values == [{"process": i, "text": LONG * i, "number": 0.1, "none": None} for i in range(len(values))]
    assert met < watchdog._peers.met, "which is when the processes were last seen alive"
    met = watchdog._peers.met
    preemption.check()
    assert met < watchdog._peers.met
    asked = []
    assert distributed.first(lambda: asked.append(process) or f"{process} was asked") == "0 was asked"
    assert asked == [0] * (process == 0)
    for content in (b"", bytes(range(256)) * 100 + b"end"):
        assert distributed.first_bytes(lambda content=content: asked.append(process) or content) == content
    assert asked == [0, 0, 0] * (process == 0)
    for letters in ("", "a", "ab", "abcdefg"):
        by_whom = distributed.split(lambda part: [[letter, process] for letter in part], letters)
        assert by_whom == [[letter, i % len(values)] for i, letter in enumerate(letters)]


def main(config, flag_values):
    if flag_values.how == "frozen":
        distributed.HEARTBEAT = 6
    join(config, flag_values)
    import jax  # only now, because join must run before any device is used

    assert not jax.config.jax_enable_compilation_cache, "on CPU its programs are not safe"
    process, last = jax.process_index(), jax.process_index() == jax.process_count() - 1
    preemption.watch(config.grace)
    share_work(process)
    print(f"{process} of {jax.process_count()} is done", flush=True)
    if flag_values.how == "one fails" and last:
        raise ValueError(f"nothing\n but a test in {process}")
    if flag_values.how == "a bug" and last:
        raise ZeroDivisionError("a bug")
    if flag_values.how == "one is killed" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    if flag_values.how == "the first is killed" and process == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if flag_values.how == "SIGTERM in a long step" and last:
        os.kill(os.getpid(), signal.SIGTERM)
    if flag_values.how == "frozen" and last:
        os.kill(os.getpid(), signal.SIGSTOP)
    if flag_values.how == "stopped between steps":
        if last:
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10_000):
            preemption.check()
    if flag_values.how == "in a collective":
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.gather(None)
    if flag_values.how != "well":
        time.sleep(600)


if __name__ == "__main__":
    how = cli.Flag("how", "How it ends.", default="well")
    cli.start("test", cli.Command("", "__main__:main", (how,), processes=True, announced=False))
