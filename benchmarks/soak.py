"""Trains in the quickstart world for an hour, and fits slopes to memory, file handles and time per step.

    python benchmarks/soak.py [--seconds=3600] [--workdir=DIR] [--json=OUT.json] [--config.FIELD=VALUE ...]

The training command runs in a separate process, with evaluations, checkpoints and the page. Its learning rate is so
small that every step is the same work. At the end it gets SIGTERM. Every few seconds this process reads /proc for the
run and its grading workers. Slopes are least squares over the means of equal stretches of time, from the second
evaluation on, with 95 % intervals. Time per step is CPU time, averaged over the steps between two evaluations: other
work on the machine hardly changes it. It is also given in units of a fixed piece of work that is timed along with the
run, since a busy machine slows both in the same way.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from sgpo_jax.runtime import tables
from sgpo_jax.runtime.files import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
EVERY = 25  # RL steps between two evaluations, and two checkpoints
STRETCHES = 30  # of time, each a point of the fit
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
FIELDS = {
    "sft.steps": 40, "sft.validate_every": 20, "rl.steps": 10**6, "rl.learning_rate": 1e-12, "rl.eval_every": EVERY,
    "checkpoint.every": EVERY, "report_seconds": 30.0, "stages": "('sft','rl')", "grace": 120.0,
}  # fmt: skip


class Process(NamedTuple):
    """Resources of a process, from /proc."""

    parent: int
    memory: float  # MB resident
    threads: int
    handles: int
    cpu: float  # seconds, including its children that have ended


def process(pid: int) -> Process:
    """Reads the resources of a process.

    Raises:
        OSError: the process has ended.
    """
    # The name, in parentheses, can contain any character.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = sum(map(int, fields[11:15]))
    handles = len(os.listdir(f"/proc/{pid}/fd"))
    return Process(int(fields[1]), int(fields[21]) * PAGE / 1e6, int(fields[17]), handles, ticks / TICK)


def sample(pid: int) -> dict[str, float]:
    """Returns the resources of a process, and the sums over its children."""
    parent, children = process(pid), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            other = process(int(path.name))
        except OSError:
            continue
        if other.parent == pid:
            children.append(other)
    return {
        "memory": parent.memory, "memory_children": sum(child.memory for child in children),
        "handles": parent.handles, "threads": parent.threads, "children": len(children),
        "cpu": parent.cpu + sum(child.cpu for child in children),
    }  # fmt: skip


def fixed_work() -> float:
    """Does a fixed piece of work; returns its CPU seconds, which grow with the load of the machine."""
    started = time.process_time()
    hashlib.sha256(bytes(8_000_000)).digest()
    np.linalg.norm(np.ones((300, 300)) @ np.ones((300, 300)))
    return time.process_time() - started


def slope(times: np.ndarray, values: np.ndarray, stretches: int = STRETCHES) -> dict[str, float]:
    """Returns the least-squares slope per hour with its 95 % interval, over the means of stretches of time.

    Args:
        times: `[n]` seconds, rising.
        values: `[n]`.
        stretches: largest number of points of the fit. Neighbouring samples are correlated, so a point for each of them
            would make the interval too narrow.
    """
    edges = np.linspace(times[0], times[-1], min(stretches, len(times)) + 1)
    place = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, len(edges) - 2)
    used = np.unique(place)
    hours, means = (np.array([x[place == p].mean() for p in used]) for x in (times / 3600, values))
    fit = stats.linregress(hours, means)
    margin = float(stats.t.ppf(0.975, len(used) - 2) * fit.stderr)
    return {
        "first": float(means[0]), "last": float(means[-1]), "mean": float(means.mean()), "slope": float(fit.slope),
        "low": float(fit.slope - margin), "high": float(fit.slope + margin),
    }  # fmt: skip


def between_evaluations(samples: list[dict[str, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the CPU time of a step between two evaluations.

    The three arrays `[n]` are: the end of each interval in seconds, CPU seconds per step, and the same in units of the
    fixed work.
    """
    marks, rows = range(EVERY, int(samples[-1]["step"]) + 1, EVERY), []
    steps = [row["step"] for row in samples]
    cpu = np.interp(marks, steps, [row["cpu"] for row in samples])
    times = np.interp(marks, steps, [row["time"] for row in samples])
    for start, end, used in zip(times, times[1:], np.diff(cpu) / EVERY, strict=False):
        pieces = [row["fixed_work"] for row in samples if start <= row["time"] <= end]
        rows.append((end, used, used / np.median(pieces or [samples[-1]["fixed_work"]])))
    return tuple(np.array(rows).T) if rows else (np.zeros(0),) * 3


def watch(workdir: Path, seconds: float, interval: float, overrides: list[str]) -> tuple[list[dict[str, float]], int]:
    """Runs the training command for `seconds`, including its start; returns its samples and its exit code."""
    flags = [f"--config.{name}={value}" for name, value in FIELDS.items()] + overrides
    config = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    command = [sys.executable, "-m", "sgpo_jax.main", config, f"--workdir={workdir}", *flags]
    samples, metrics, started = [], workdir / "rl.jsonl", time.monotonic()
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "output.txt").open("w") as output, (workdir / "samples.jsonl").open("w") as file:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while run.poll() is None and time.monotonic() - started < seconds:
                time.sleep(interval)
                try:
                    row = sample(run.pid)
                except OSError:
                    break
                row |= {"time": time.monotonic() - started, "load": os.getloadavg()[0], "fixed_work": fixed_work()}
                row["step"] = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
                samples.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
            run.send_signal(signal.SIGTERM)
            return samples, run.wait(timeout=300)
        finally:
            run.kill()


def summarize(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Returns quantity -> `slope` from the second evaluation on.

    Raises:
        ValueError: the run has too few steps.
    """
    steady = [row for row in samples if row["step"] > 2 * EVERY]
    ends, cpu, relative = between_evaluations(samples)
    after = ends > (steady[0]["time"] if steady else np.inf)
    if after.sum() < 3:
        raise ValueError(f"{samples[-1]['step'] if samples else 0} steps are too few; more than {5 * EVERY} are needed")
    times = np.array([row["time"] for row in steady])
    names = ("memory", "memory_children", "handles", "threads", "children")
    slopes = {name: slope(times, np.array([row[name] for row in steady])) for name in names}
    return slopes | {
        "cpu_per_step": slope(ends[after], cpu[after]), "cpu_per_step_relative": slope(ends[after], relative[after])
    }  # fmt: skip


def machine(workdir: Path) -> dict:
    """Describes the machine, with the versions and the commit that the run has recorded."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]  # fmt: skip
    (start, *_) = json.loads((workdir / "environment.json").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * PAGE / 1e9
    processor = models[0] if models else platform.machine()
    return {"processor": processor, "cpus": os.cpu_count(), "memory_gb": memory} | start


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory, file handles and time per step of a long run.")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--workdir", default="", help="empty folder for the run; by default a temporary one")
    parser.add_argument("--json", default="", help="file for the figures")
    arguments, overrides = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # stops the run too
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(arguments.workdir or temporary).absolute()
        samples, code = watch(workdir, arguments.seconds, arguments.interval, overrides)
        if code:
            sys.exit(f"the run ended with {code}: {(workdir / 'output.txt').read_text()[-2000:]}")
        steps = [row["step"] for row in read_jsonl(workdir / "rl.jsonl")]
        if steps != [*range(1, len(steps) + 1)]:
            sys.exit("the metrics rows are not 1, 2, 3, ...")
        slopes, described = summarize(samples), machine(workdir)
    load = float(np.mean([row["load"] for row in samples]))
    units = {
        "memory": "MB", "memory_children": "MB", "handles": "", "threads": "", "children": "", "cpu_per_step": "s",
        "cpu_per_step_relative": "pieces of work",
    }  # fmt: skip
    lines = []
    for name, fit in slopes.items():
        scale, unit = (100 / fit["mean"], "%") if name.startswith("cpu") else (1.0, units[name])
        low, value, high = (fit[key] * scale for key in ("low", "slope", "high"))
        lines.append((name, f"{fit['first']:.5g}", f"{fit['last']:.5g}", units[name],
                      f"{value:+.3g} [{low:+.3g}, {high:+.3g}] {unit}"))  # fmt: skip
    title = f"{samples[-1]['time']:.0f} s, {len(steps)} RL steps, load {load:.1f}, {described['processor']}"
    tables.table(title, ("quantity", "first", "last", "unit", "slope per hour, 95 %"), lines)
    if arguments.json:
        result = {
            "seconds": samples[-1]["time"], "steps": len(steps), "load": load, "machine": described, "slopes": slopes,
        }  # fmt: skip
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
