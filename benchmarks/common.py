"""Shared parts of the benchmarks: workers measured from outside, environments of the peers, statistics and JSON.

A benchmark alternates short worker processes of all sides, so that a change in the load of the machine affects all of
them. A worker reads its task from a JSON file and writes its result to another one. Its peak memory (RSS) and CPU time
are those that the kernel counts for the process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sgpo_jax_benchmarks"
# The torch of PyPI is built for CUDA. PIP_EXTRA_INDEX_URL can name an index with a smaller one.
PEERS = {
    "tunix": ("google-tunix==0.1.7",),
    "torch": ("torch==2.13.0", "trl==1.16.0", "transformers==5.24.0"),
}


class Side(NamedTuple):
    """One of the compared programs: a worker script, its environment and its settings."""

    name: str
    peer: str = ""  # key of PEERS; "" is the environment of this process
    settings: dict[str, Any] = {}  # additions to the task that all sides get

    @property
    def worker(self) -> Path:
        """The script that the side runs."""
        return Path(__file__).parent / f"worker_{self.peer or 'sgpo'}.py"


def arguments(description: str, **extra: Any) -> argparse.ArgumentParser:
    """Returns a parser with --json and a flag for each `name=(default, help)`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", default="", help="file for the figures")
    for name, (default, text) in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=text)
    return parser


def environment(peer: str, cache: Path = CACHE) -> Path:
    """Returns the Python of a peer's environment, `cache`/peer. The first call creates it."""
    folder = cache / peer
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(PEERS[peer])
    if not done.is_file() or done.read_text() != wanted:
        print(f"installing {' '.join(PEERS[peer])} in {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[peer]], check=True)
        done.write_text(wanted)
    return python


def run(side: Side, task: dict[str, Any], cache: Path = CACHE) -> dict[str, Any]:
    """Runs a worker; returns its result with `peak_rss` (bytes), `process_cpu` and `process_wall` (seconds).

    Raises:
        RuntimeError: the worker failed; the message has the end of its output.
    """
    python = environment(side.peer, cache) if side.peer else sys.executable
    # OpenMP threads that spin while they wait would take the cores from other threads of their process.
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    variables["PYTHONPATH"] = "" if side.peer else os.pathsep.join([str(ROOT), *sys.path])
    with tempfile.TemporaryDirectory() as folder:
        task_file, result_file, log = (Path(folder) / name for name in ("task.json", "result.json", "log"))
        task_file.write_text(json.dumps({**task, **side.settings}))
        started = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                [python, side.worker, task_file, result_file], env=variables, stdout=output, stderr=subprocess.STDOUT,
                cwd=folder,
            )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{side.name} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        return json.loads(result_file.read_text()) | {
            "peak_rss": usage.ru_maxrss * 1024,
            "process_cpu": usage.ru_utime + usage.ru_stime,
            "process_wall": time.perf_counter() - started,
        }


def alternate(sides: Sequence[Side], task: dict[str, Any], rounds: int, cache: Path) -> dict[str, list[dict]]:
    """Runs every side once in each round; returns side -> results."""
    results: dict[str, list[dict]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            results[side.name].append(run(side, {**task, "seed": number}, cache))
            seconds = results[side.name][-1]["process_wall"]
            print(f"round {number + 1} of {rounds}: {side.name} {seconds:.0f} s", flush=True)
    return results


def timed(call: Callable[[int], Any], calls: int, warm_up: int = 1) -> tuple[list[Any], dict[str, list[float]]]:
    """Times calls after `warm_up` calls that compile; returns their results, and all times in seconds by kind."""
    results, wall, cpu = [], [], []
    for number in range(warm_up + calls):
        started = time.perf_counter(), time.process_time()
        results.append(call(number))
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    warm, later = slice(warm_up), slice(warm_up, None)
    return results[later], {"warm_up": wall[warm], "warm_up_cpu": cpu[warm], "seconds": wall[later], "cpu": cpu[later]}


def pooled(results: Iterable[dict], field: str) -> list[float]:
    """Returns the measurements of a field in all rounds; a round has one or a list of them."""
    rounds = [result[field] for result in results if field in result]
    return [x for values in rounds for x in (values if isinstance(values, list) else [values])]


def spread(values: Sequence[float], format: str = ".3g") -> str:
    """Formats median and range, such as `1.2 (1.1-1.4)`; `-` for no values."""
    if not values:
        return "-"
    low, middle, high = (f"{x:{format}}" for x in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float | None:
    """Returns the ratio of the medians; None where one side has no values."""
    return statistics.median(numerator) / statistics.median(denominator) if numerator and denominator else None


def machine() -> dict[str, Any]:
    """Describes the machine, without JAX, so that this process stays small."""
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "processor": model[0] if model else "",
        "cpus": os.cpu_count(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "load": os.getloadavg(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of those of the packages that are installed in this environment."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def save(path: str, script: str, **content: Any) -> None:
    """Writes the figures to a JSON file, with the benchmark, its flags and the machine. No path writes nothing."""
    if path:
        flags = {name: value for name, value in content.pop("flags").items() if name not in ("json", "cache")}
        figures = {"benchmark": Path(script).stem, "flags": flags, "machine": machine(), **content}
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
