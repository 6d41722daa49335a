"""Runs without a model, in folders that may be in buckets: rows, a file, and checkpoints of a few numbers.

Each line of the standard input is a JSON object: workdir, processes, variables of the environment, and kills, a list of
[step, moment, process]. At each of these moments the process ends, and the run begins anew once its other processes
have ended too. `processes` is the number of them, or a list with that of each start. Every process is a fork of this
one, so that the imports run once. The moments:

    row     SIGKILL before the step is saved
    saving  SIGKILL when its checkpoint is being written
    sent    SIGKILL on the hub, when the files of its checkpoint are there, and their commit is not
    saved   SIGKILL after that
    robbed  another run takes the lock of the folder, as after a minute in which the machine stood still

The answer to a line is one with the exit codes of each start, one for each process. Their words are in the standard
error stream.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from functools import partial

import huggingface_hub
import jax
import jax.numpy as jnp

from sgpo_jax import cli, sharding
from sgpo_jax.runtime import buckets, distributed, files, is_first, lock, mirror, preemption
from sgpo_jax.runtime.metric_writer import Writer
from sgpo_jax.training import stage
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.state import TrainState
from tests.helpers.variables import adopt

STEPS = 6
commit = huggingface_hub.HfApi.create_commit
SIZE = 4  # numbers of the state, divisible by the number of devices


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_if_checkpoint(hub, name, operations, **more):
    if any("/checkpoints/" in operation.path_in_repo for operation in operations):
        die()
    return commit(hub, name, operations, **more)


def rob(workdir):
    buckets.write(f"{workdir}/lock/{10**7:08}", json.dumps({"host": "another", "pid": 1, "since": "then"}).encode())
    time.sleep(600)


def run(workdir: str, processes: int, process: int, port: int, kill: tuple[int, str] | None) -> None:
    folder = cli.folder("workdir", workdir)
    if processes > 1:
        distributed.start(f"127.0.0.1:{port}", processes, process)
    mirror.share(folder)
    mesh = sharding.make_mesh()
    split, whole = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in (["fsdp"], []))
    shardings = TrainState(whole, {"a": split}, (), whole)

    @partial(jax.jit, out_shardings=shardings)
    def begun():
        return TrainState(jnp.int32(0), {"a": jnp.zeros(SIZE)}, (), jnp.int32(0))

    @partial(jax.jit, out_shardings=(shardings, whole))
    def updated(state):
        params = jax.tree.map(lambda x: x * 3 + x.mean() + jnp.arange(SIZE), state.params)
        return state.replace(step=state.step + 1, params=params), params["a"].sum()

    with lock.hold(folder) if is_first() else contextlib.nullcontext():
        distributed.wait_for(partial(lock.seen, folder), folder)
        with Checkpoints(stage.folder_of(folder, "rl"), keep=2, best="score", higher_is_better=True, seed=0) as saved:
            state = saved.restore_latest(begun()) or begun()
            with Writer(folder, STEPS, "rl", resume_step=int(state.step), enabled=is_first()) as writer:
                for step in range(int(state.step) + 1, STEPS + 1):
                    state, total = updated(state)
                    writer.write(step, {"sum": total})
                    preemption.check()
                    if kill == (step, "row"):
                        die()
                    if kill == (step, "robbed"):
                        rob(workdir)
                    if step % 2 == 0:
                        writer.sync()
                        if kill == (step, "saving"):
                            threading.Timer(0.05, die).start()
                        if kill == (step, "sent"):
                            huggingface_hub.HfApi.create_commit = die_if_checkpoint
                        saved.save(step, state, float(step))
                        if kill == (step, "saved"):
                            saved.wait()
                            die()
            saved.wait()
        if is_first():
            files.write_text(folder / "eval" / "result.json", json.dumps({"steps": STEPS}))


def forked(workdir: str, processes: int, process: int, port: int, kill: list | None) -> int:
    """Starts a process of a run and returns its pid."""
    if child := os.fork():
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        with distributed.together(), mirror.closing():
            run(workdir, processes, process, port, tuple(kill[:2]) if kill and kill[2] == process else None)
        os._exit(0)
    except BaseException as error:
        print(f"sgpo_jax: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def main(workdir: str, processes: int | list[int], variables: dict, kills: list) -> list[list[int]]:
    adopt(variables)
    for client in {"gs": ("gcsfs", "google.cloud.storage"), "s3": ("s3fs",)}.get(workdir.partition("://")[0], ()):
        importlib.import_module(client)  # once, not in every fork
    codes = []
    counts = processes if isinstance(processes, list) else [processes] * (len(kills) + 1)
    for count, kill in zip(counts, [*kills, None], strict=True):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        children = [forked(workdir, count, i, port, kill) for i in range(count)]
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    return codes


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # jax warns of forks, but none of its threads is running yet
    for kind, periods in buckets.PERIODS.items():
        beat = 0.5 if kind == "hf" else 0.1
        buckets.PERIODS[kind] = periods._replace(apart=0, beat=beat, lease=0.5, look=0.1)
    buckets._SILENCE, os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = 1.0, "1"
    for line in sys.stdin:
        print(json.dumps(main(**json.loads(line))), flush=True)
