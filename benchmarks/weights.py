"""Measures the host memory of importing and exporting a random model that is sharded over several processes.

    python benchmarks/weights.py [--gigabytes=2] [--processes=2] [--devices=2] [--folder=DIR] [--json=OUT.json]

It makes a checkpoint of that many gigabytes in bfloat16, with the shapes of Qwen2.5-1.5B and as many layers as fit.
Several processes of several CPU devices each import it as float32 and export it as bfloat16. The two folders are then
compared bit by bit.

On a CPU the memory of the devices is that of the host. So a process holds its shard, and at the peak it may hold one
more tensor as the checkpoint stores it. The measured memory is anonymous (RssAnon and RssShmem of /proc/PID/status,
read every few ms from outside), minus its value before the import. It does not contain mapped pages of the checkpoint's
files, which the system can drop at any time. The peak resident memory contains them. Linux only. The folder needs space
for two copies of the checkpoint, the memory for about three.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from sgpo_jax import sharding
from sgpo_jax.models import ModelConfig, huggingface, param_mapping
from sgpo_jax.models.config import to_hf
from sgpo_jax.runtime import environment, tables

SHARD = 10**9  # bytes of a file
SIZES = {  # vocabulary, hidden size, query heads, key and value heads, head size, MLP size
    "large": (151_936, 1536, 12, 2, 128, 8960),
    "small": (16_384, 512, 4, 2, 128, 1536),  # for less than 1.2 gigabytes
}


def shape(gigabytes: float) -> ModelConfig:
    """Returns the shape of a Qwen2 of about this size in bfloat16, with at least 2 layers and untied embeddings."""
    vocab, hidden, heads, kv_heads, size, mlp = SIZES["large" if gigabytes >= 1.2 else "small"]
    layer = 2 * hidden * (heads + kv_heads) * size + 3 * hidden * mlp
    return ModelConfig(
        architecture="Qwen2ForCausalLM", vocab_size=vocab, hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads,
        num_layers=max(2, round((gigabytes * 5e8 - 2 * vocab * hidden) / layer)), head_dim=size, mlp_size=mlp,
        rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, tie_embeddings=False, max_positions=32_768,
    )  # fmt: skip


def make(folder: Path, config: ModelConfig) -> None:
    """Writes a checkpoint of random numbers with the writer of safetensors."""
    rng, files, room = np.random.default_rng(0), [[]], SHARD
    for name, slot in param_mapping.layout(config).items():
        if 2 * math.prod(slot.shape) > room and files[-1]:
            files.append([])
            room = SHARD
        files[-1].append((name, slot.shape))
        room -= 2 * math.prod(slot.shape)
    folder.mkdir()
    weight_map = {}
    for i, tensors in enumerate(files):
        weight_map |= {name: f"random-{i}.safetensors" for name, _ in tensors}
        # Random bits, with the exponent set so that the absolute values are from 0.5 to 2.
        bits = {name: rng.integers(0, 2**16, size, np.uint16) & 0x80FF | 0x3F00 for name, size in tensors}
        save_file({name: x.view(ml_dtypes.bfloat16) for name, x in bits.items()}, folder / f"random-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(to_hf(config)))


def work(index: int, processes: int, devices: int, port: int, folder: Path, pipe: Connection) -> None:
    """Runs in a worker process: waits for the start of each phase, and sends its seconds."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index, cluster_detection_method="deactivate")
    mesh = sharding.make_mesh(fsdp=-1, tensor=devices)

    def timed(phase):
        pipe.recv()
        started = time.perf_counter()
        result = phase()
        pipe.send(time.perf_counter() - started)
        return result

    pipe.send({**environment.describe(), "mesh": dict(mesh.shape)})
    params, config = timed(lambda: huggingface.load(folder / "made", dtype="float32", mesh=mesh))
    pipe.send(sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards))
    timed(lambda: huggingface.save(folder / "exported", params, config, dtype="bfloat16", shard_bytes=SHARD))


def memory(pid: int) -> dict[str, int]:
    """Returns the bytes of a process: "anonymous" now, and "peak" resident since the last reset by `measure`."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kilobytes = {words[0]: int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssShmem:", "VmHWM:")}
    return {
        "anonymous": 1024 * (kilobytes["RssAnon:"] + kilobytes["RssShmem:"]), "peak": 1024 * kilobytes["VmHWM:"]
    }  # fmt: skip


def measure(pids: list[int], pipes: list[Connection]) -> tuple[list[dict[str, int]], list[float]]:
    """Runs a phase in all processes; returns their peaks of `memory`, and their seconds."""
    peaks = [{"anonymous": 0, "peak": 0} for _ in pids]
    for pid, pipe in zip(pids, pipes, strict=True):
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak
        pipe.send("go")
    while not all(pipe.poll(0.001) for pipe in pipes):
        for pid, peak in zip(pids, peaks, strict=True):
            peak |= {kind: max(peak[kind], size) for kind, size in memory(pid).items()}
    return peaks, [pipe.recv() for pipe in pipes]


def same(left: Path, right: Path) -> bool:
    """Returns whether two folders hold the same tensors, bit by bit."""
    with ExitStack() as stack:
        tensors = []
        for folder in (left, right):
            files = [stack.enter_context(safe_open(path, "np")) for path in sorted(folder.glob("*.safetensors"))]
            tensors.append({name: file for file in files for name in file.keys()})
        return tensors[0].keys() == tensors[1].keys() and all(
            tensors[0][name].get_tensor(name).tobytes() == tensors[1][name].get_tensor(name).tobytes()
            for name in tensors[0]
        )


def run(folder: Path, gigabytes: float, processes: int, devices: int) -> dict:
    """Runs the benchmark; returns environment and figures, with sizes in bytes."""
    config = shape(gigabytes)
    make(folder / "made", config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A worker reads these when it imports jax.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for i in range(processes):
        pipe, other = context.Pipe()
        pipes.append(pipe)
        workers.append(context.Process(target=work, args=(i, processes, devices, port, folder, other), daemon=True))
        workers[-1].start()
        other.close()  # so that recv fails when the worker dies
    pids = [worker.pid for worker in workers]
    described = [pipe.recv() for pipe in pipes][0]
    before = [memory(pid)["anonymous"] for pid in pids]
    imports = measure(pids, pipes)
    shards = [pipe.recv() for pipe in pipes]
    exports = measure(pids, pipes)
    for worker in workers:
        worker.join()
    sizes = [math.prod(slot.shape) for slot in param_mapping.layout(config).values()]
    largest = 2 * max(sizes)
    rows = [
        {
            "phase": phase, "process": i, "seconds": seconds[i], "shard": shards[i],
            "peak_anonymous": peaks[i]["anonymous"] - before[i], "peak_resident": peaks[i]["peak"],
            "within": peaks[i]["anonymous"] - before[i] <= shards[i] + largest,
        }
        for phase, (peaks, seconds) in (("import", imports), ("export", exports)) for i in range(processes)
    ]  # fmt: skip
    return {
        "environment": {"cpus": os.cpu_count(), **described}, "parameters": sum(sizes), "largest_tensor": largest,
        "checkpoint": sum(path.stat().st_size for path in (folder / "made").glob("*.safetensors")),
        "bit_exact": same(folder / "made", folder / "exported"), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Host memory of a sharded import and export.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint, in bfloat16")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("--folder", default=None, help="parent of the temporary folder of the checkpoints")
    parser.add_argument("--json", default="", help="file for the figures")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="weights-", dir=arguments.folder))
    try:
        result = run(folder, arguments.gigabytes, arguments.processes, arguments.devices)
    finally:
        shutil.rmtree(folder)
    columns = ["", "process", "shard", "largest tensor", "peak above before", "peak resident", "seconds", "within"]

    def mb(size: int) -> str:
        return f"{size / 1e6:.0f} MB"

    rows = [
        [row["phase"], row["process"], mb(row["shard"]), mb(result["largest_tensor"]), mb(row["peak_anonymous"]),
         mb(row["peak_resident"]), f"{row['seconds']:.1f}", row["within"]]
        for row in result["rows"]
    ]  # fmt: skip
    exact = "bit-exact" if result["bit_exact"] else "NOT bit-exact"
    tables.table(f"A checkpoint of {mb(result['checkpoint'])}, import then export {exact}", columns, rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
