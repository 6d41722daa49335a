"""Runs commands of sgpo_jax again and again, and kills them with SIGKILL in a given phase each time.

    python kill_in.py FILE

FILE holds a JSON list of plans: module, arguments, folder, sick, and kills, a list of [phase, number, seconds]. The
process is killed `seconds` after the phase began for the `number`th time, or at the end of that phase. Every process is
a fork of this one, so that the imports run once. After the last kill, the command runs to its end. The output has a
list for each plan: [exit code, names of unfinished checkpoints, last line of output] of each process, up to the first
that was not killed.

Responses to the batches at the positions `sick` count as truncated, so that the monitor sees a collapse.
"""

import importlib
import itertools
import json
import os
import runpy
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import jax._src.compiler
import tensorboardX  # noqa: F401  once for all forks: it imports every package that it can use, such as torch

from sgpo_jax.evaluation import sets
from sgpo_jax.report import figures  # noqa: F401  matplotlib, once for all forks
from sgpo_jax.runtime import buckets, journal
from sgpo_jax.training import checkpoint, rl, rollback, sft

# phase -> (where a function is, its name)
PHASES = {
    "compilation": (jax._src.compiler, "backend_compile_and_load"),
    "SFT update": (sft, "make_update"),
    "validation": (sft, "validation_loss"),
    "rollout": (rl, "respond_in_groups"),
    "grading": (rl, "grade"),
    "RL update": (rl, "make_update"),
    "checkpoint": (checkpoint.Checkpoints, "save"),
    "evaluation": (sets, "evaluate"),
    "part of an evaluation": (sets, "append_text"),
    "rollback": (rollback, "_keep_rows"),
    "rolled back": (rollback, "go_back"),
    "extraction": (journal.Journal, "append"),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(phase, number, seconds):
    """Makes this process kill itself in the phase."""
    if phase == "start-up":
        threading.Timer(seconds, die).start()
        return
    place, name = PHASES[phase]
    function, calls = getattr(place, name), itertools.count(1)
    if phase == "compilation":
        jax.config.update("jax_enable_compilation_cache", False)

    def until_killed(function):
        def call(*arguments, **more):
            if next(calls) != number:
                return function(*arguments, **more)
            if phase == "checkpoint" and not buckets.is_url(str(arguments[0]._folder)):
                saved = arguments[0]
                threading.Thread(target=when_writing, args=(saved._folder, seconds), daemon=True).start()
            else:
                threading.Timer(seconds, die).start()
            try:
                result = function(*arguments, **more)
                if phase == "checkpoint":
                    arguments[0].wait()
                return result
            finally:
                die()

        return call

    if name == "make_update":
        setattr(place, name, lambda *arguments, **more: until_killed(function(*arguments, **more)))
    else:
        setattr(place, name, until_killed(function))


def when_writing(folder, seconds):
    while not any(any(path.iterdir()) for path in unfinished(folder)):
        time.sleep(0.001)
    time.sleep(seconds)
    die()


def unfinished(folder):
    return [path for path in Path(folder).glob("*.orbax-checkpoint-tmp*") if path.is_dir()]


def make_sick(positions):
    noise_key, measure, visited = rl.noise_key, rl._rollout_metrics, []

    def key(seed, purpose, position):
        visited.append(position)
        return noise_key(seed, purpose, position)

    def measured(*graded):
        return measure(*graded) | {"truncated": float(visited[-1] in positions)}

    rl.noise_key, rl._rollout_metrics = key, measured


def run(plan, kill, output):
    """Runs the command in a fork and returns its exit code."""
    child = os.fork()
    if not child:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        make_sick(plan["sick"])
        if kill:
            arm(*kill)
        sys.argv = [plan["module"], *plan["arguments"]]
        runpy.run_module(plan["module"], run_name="__main__", alter_sys=True)
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempts(plan, output):
    """Returns the results of one plan."""
    results = []
    for kill in [*plan["kills"], None]:
        code = run(plan, kill, output)
        cut = [path.name for stage in Path(plan["folder"]).glob("*/checkpoints") for path in unfinished(stage)]
        lines = output.read_text(errors="replace").splitlines()
        results.append([code, cut, (lines or [""])[-1]])
        if code != -signal.SIGKILL:
            break
    return results


for kind, periods in buckets.PERIODS.items():  # a killed process still holds the lock of a folder in a bucket
    buckets.PERIODS[kind] = periods._replace(apart=0, beat=0.2, lease=1.0, look=0.2)
warnings.simplefilter("ignore")  # jax warns of forks, but none of its threads is running yet
plans = json.loads(Path(sys.argv[1]).read_text())
for plan in plans:
    module = plan["module"].removeprefix("sgpo_jax.").replace("main", "train")
    importlib.import_module(f"sgpo_jax.commands.{module}")
    # What the processes would import themselves.
    more = ["tensorboardX"] * (module == "train") + ["gcsfs", "google.cloud.storage"] * plan["folder"].startswith("gs:")
    for name in more:
        importlib.import_module(name)
print(json.dumps([attempts(plan, Path(sys.argv[1]).with_suffix(".output")) for plan in plans]))
