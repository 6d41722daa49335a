"""What the benchmarks share: workers measured from outside, peers in environments of their own, tables and JSON.

A benchmark alternates short worker processes, ours and the peers', so that a change of the machine's mood meets all of
them. A worker reads its task from a JSON file and writes its result to another; its peak memory (RSS) and its CPU time
are those that the kernel counted for the process.
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
# A plain torch of PyPI is one for CUDA; PIP_EXTRA_INDEX_URL chooses a smaller one.
PEERS = {
    "tunix": ("google-tunix==0.1.7",),
    "torch": ("torch==2.13.0", "trl==1.16.0", "transformers==5.24.0"),
}


class Side(NamedTuple):
    """One of the programs that are compared: a worker script, and who runs it."""

    name: str
    peer: str = ""  # environment in PEERS; "": this one
    settings: dict[str, Any] = {}  # what its task has besides the task of all

    @property
    def worker(self) -> Path:
        return Path(__file__).parent / f"worker_{self.peer or 'sgpo'}.py"


def arguments(description: str, **extra: Any) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", default="", help="file for the figures")
    for name, (default, text) in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=text)
    return parser


def environment(peer: str, cache: Path = CACHE) -> Path:
    """The Python of a peer's environment, which is made if it is not there: `cache`/peer."""
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
    """The result of a worker, with `peak_rss` (bytes), `process_cpu` and `process_wall` (seconds) of its process.

    Raises:
      RuntimeError: the worker failed; the message has the end of what it printed.
    """
    python = environment(side.peer, cache) if side.peer else sys.executable
    # Threads of OpenMP that spin while they wait take the cores from the others of the same process.
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    variables["PYTHONPATH"] = "" if side.peer else os.pathsep.join([str(ROOT), *sys.path])
    with tempfile.TemporaryDirectory() as folder:
        ask, answer, log = (Path(folder) / name for name in ("task.json", "result.json", "log"))
        ask.write_text(json.dumps({**task, **side.settings}))
        started = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                [python, side.worker, ask, answer], env=variables, stdout=output, stderr=subprocess.STDOUT, cwd=folder
            )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{side.name} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        return json.loads(answer.read_text()) | {
            "peak_rss": usage.ru_maxrss * 1024,
            "process_cpu": usage.ru_utime + usage.ru_stime,
            "process_wall": time.perf_counter() - started,
        }


def alternate(sides: Sequence[Side], task: dict[str, Any], rounds: int, cache: Path) -> dict[str, list[dict]]:
    """The results of `rounds` rounds, in each of which every side runs once."""
    results: dict[str, list[dict]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            results[side.name].append(run(side, {**task, "seed": number}, cache))
            seconds = results[side.name][-1]["process_wall"]
            print(f"round {number + 1} of {rounds}: {side.name} {seconds:.0f} s", flush=True)
    return results


def timed(call: Callable[[int], Any], calls: int, warm_up: int = 1) -> tuple[list[Any], dict[str, list[float]]]:
    """(results of `calls` calls after `warm_up` ones that compile, their seconds of wall and of CPU time)."""
    results, wall, cpu = [], [], []
    for number in range(warm_up + calls):
        started = time.perf_counter(), time.process_time()
        results.append(call(number))
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    warm, later = slice(warm_up), slice(warm_up, None)
    return results[later], {"warm_up": wall[warm], "warm_up_cpu": cpu[warm], "seconds": wall[later], "cpu": cpu[later]}


def pooled(results: Iterable[dict], field: str) -> list[float]:
    """The measurements of a field in all rounds; a round has one or a list of them."""
    found = [result[field] for result in results if field in result]
    return [x for values in found for x in (values if isinstance(values, list) else [values])]


def spread(values: Sequence[float], format: str = ".3g") -> str:
    """Median and range, such as `1.2 (1.1-1.4)`; `-` for no values."""
    if not values:
        return "-"
    low, middle, high = (f"{x:{format}}" for x in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Median of ours over median of theirs."""
    return statistics.median(ours) / statistics.median(theirs) if ours and theirs else None


def machine() -> dict[str, Any]:
    """What the figures were measured on. It starts no JAX, so that this process stays small."""
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "processor": model[0] if model else "",
        "cpus": os.cpu_count(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "load": os.getloadavg(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed where it is called."""
    known = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {name: known[name] for name in packages if name in known}


def save(path: str, script: str, **content: Any) -> None:
    """Writes the figures with the machine they were measured on, if a path is given."""
    if path:
        flags = {name: value for name, value in content.pop("flags").items() if name not in ("json", "cache")}
        everything = {"benchmark": Path(script).stem, "flags": flags, "machine": machine(), **content}
        Path(path).write_text(json.dumps(everything, indent=1) + "\n")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
