"""A run without a model, in a folder that may be in a bucket: rows, a file, and checkpoints of a few numbers.

    python small_run.py WORKDIR KILLS

It is killed with SIGKILL at each moment of KILLS, a JSON list of [step, moment], and begins anew, in a fork each time.
The moments: "row" before the step is saved, "saving" when its checkpoint is being written, "saved" after it.
"""

import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp

from sgpo_jax import cli
from sgpo_jax.runtime import files, lease, lock, mirror
from sgpo_jax.runtime.metric_writer import Writer
from sgpo_jax.training import stage
from sgpo_jax.training.checkpoint import Checkpoints
from sgpo_jax.training.state import TrainState

STEPS = 6


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run(workdir: str, kill: list) -> None:
    folder = cli.folder("workdir", workdir)
    with mirror.closing(), lock.hold(folder):
        arrays = stage.folder_of(folder, "rl")
        with Checkpoints(arrays, keep=2, best="score", higher_is_better=True, seed=0) as saved:
            first = TrainState(jnp.int32(0), {"a": jnp.zeros(4)}, (), jnp.int32(0))
            state = saved.restore_latest(jax.tree.map(lambda x: jax.device_put(x), first)) or first
            with Writer(folder, STEPS, "rl", resume_step=int(state.step)) as writer:
                for step in range(int(state.step) + 1, STEPS + 1):
                    params = jax.tree.map(lambda x: x * 3 + 1, state.params)
                    state = state.replace(step=jnp.int32(step), params=params)
                    writer.write(step, {"sum": params["a"].sum()})
                    if kill == [step, "row"]:
                        die()
                    if step % 2 == 0:
                        writer.sync()
                        if kill == [step, "saving"]:
                            threading.Timer(0.05, die).start()
                        saved.save(step, state, float(step))
                        if kill == [step, "saved"]:
                            saved.wait()
                            die()
            saved.wait()
        files.write_text(folder / "eval" / "result.json", json.dumps({"steps": STEPS}))


def main(workdir: str, kills: list) -> None:
    lease.BEAT, lease.LEASE = 0.2, 1.0
    for client in {"gs": ("gcsfs", "google.cloud.storage"), "s3": ("s3fs",)}.get(workdir.partition("://")[0], ()):
        importlib.import_module(client)  # once, not in every fork
    for kill in [*kills, None]:
        child = os.fork()
        if not child:
            run(workdir, kill)
            sys.stdout.flush()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != (-signal.SIGKILL if kill else 0):
            sys.exit(f"{kill}: ended with {code}")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
    print(Path(__file__).stem, "is done")
