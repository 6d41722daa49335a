"""Measures how the cost of a rollout and an update grows with responses, batch, vocabulary or samples per problem.

    python benchmarks/scaling.py                      # one size at a time, from a base of the small shape
    python benchmarks/scaling.py --sizes="longest=128,256,512;vocab=8192,32768" --rounds=5

The exponent compares a row with the row before it. It is 1 where the cost grows in proportion to the size.
"""

import math
import statistics
import tempfile
from pathlib import Path

import common
import workload
from common import Side, pooled, spread

from sgpo_jax.runtime import tables

SIZES = "longest=64,128,256,512;problems=2,4,8,16;vocab=4096,8192,16384,32768;group=2,4,8,16"


def main() -> None:
    parser = common.arguments(
        "Cost of a rollout and an update against each size.",
        shape=("small", workload.SHAPE_HELP), problems=(4, "problems"), group=(4, "samples of each"),
        prompt=(64, "tokens of a prompt"), longest=(128, "tokens of a response"),
        micro_batch=(16, "rows whose activations are held at once"), remat=("full", "what is recomputed"),
        sizes=(SIZES, "values of longest, problems, vocab and group"),
        calls=(3, "measured calls of a worker"), rounds=(2, "workers of each"),
    )  # fmt: skip
    flags = parser.parse_args()
    cells, rows = [], []
    for size in flags.sizes.split(";"):
        name, values = size.split("=")
        before = None
        for value in map(int, values.split(",")):
            cell = measure({**vars(flags), name: value}) | {"size": name, "value": value}
            growth = ["-", "-"]
            if before:
                times = zip(cell["seconds"], before["seconds"], strict=True)
                growth = [f"{math.log(now / was) / math.log(value / before['value']):.2f}" for now, was in times]
            rows.append([
                f"{name} {value}", cell["rollout"], growth[0], cell["update"], growth[1], cell["memory"],
                cell["temporary"],
            ])  # fmt: skip
            cells.append(cell)
            before = cell
    columns = ["size", "rollout, s", "exponent", "update, s", "exponent", "peak RSS, GiB", "temporary, GiB"]
    base = f"{flags.problems} x {flags.group} samples of {flags.prompt} + {flags.longest} tokens, {flags.shape}"
    tables.table(f"One size at a time; otherwise {base}", columns, rows)
    common.save(flags.json, __file__, flags=vars(flags), cells=cells)


def measure(task: dict) -> dict:
    """Measures a rollout and an update of the same samples; returns medians, memory and the results of the workers."""
    shape = workload.shape(task["shape"])._replace(**({"vocab": task["vocab"]} if "vocab" in task else {}))
    requests = task["problems"] * task["group"]
    task |= {"shape": "x".join(map(str, shape)), "median": 0, "top_p": 1.0, "requests": requests, "batch": requests}
    with tempfile.TemporaryDirectory() as folder:
        task["model"] = str(Path(folder) / "model")
        common.run(Side("weights"), {**task, "work": "weights"})
        works = [Side("rollout", "", {"work": "generate"}), Side("update", "", {"work": "update"})]
        results = common.alternate(works, task, task["rounds"], Path())
    seconds = [pooled(results[side.name], "seconds") for side in works]
    gib = {field: [x / 2**30 for x in pooled(results["update"], field)] for field in ("peak_rss", "temporary")}
    return {
        "seconds": list(map(statistics.median, seconds)), "rollout": spread(seconds[0]), "update": spread(seconds[1]),
        "memory": spread(gib["peak_rss"]), "temporary": spread(gib["temporary"]), "results": results,
    }  # fmt: skip


if __name__ == "__main__":
    main()
