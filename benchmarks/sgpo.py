"""Compares an SGPO update with a GRPO update of as many samples: 8 autonomous and 4 guided with 12 autonomous.

    python benchmarks/sgpo.py
    python benchmarks/sgpo.py --shape=small --problems=4

Every response has the same length. Rewards alternate, so that half of the guided responses are candidates and every
problem has a target. The strategy makes the guided prompt longer.
"""

import tempfile
from pathlib import Path

import common
import workload
from common import Side, pooled, ratio, spread

from sgpo_jax.runtime import tables

UNITS = (1, 1, 2**30, 2**30, 1)  # of the columns of the table

def main() -> None:
    parser = common.arguments(
        "An SGPO update against a GRPO update on as many samples.",
        shape=("smollm2", workload.SHAPE_HELP), problems=(1, "problems"), group=(12, "samples of each"),
        guided=(4, "guided ones of them, in SGPO"), prompt=(64, "tokens of a prompt"),
        strategy=(64, "tokens of a strategy"), longest=(128, "tokens of a response"),
        micro_batch=(4, "rows whose activations are held at once"),
        remat=("full", "what is recomputed"), calls=(3, "measured updates of a worker"), rounds=(3, "workers of each"),
    )  # fmt: skip
    flags = parser.parse_args()
    sgpo, grpo = Side("SGPO", "", {"guided": flags.guided}), Side("GRPO", "", {"guided": 0})
    with tempfile.TemporaryDirectory() as folder:
        task = {**vars(flags), "work": "update", "median": 0, "model": str(Path(folder) / "model")}
        common.run(Side("weights"), {**task, "work": "weights"})
        results = common.alternate([sgpo, grpo], task, flags.rounds, Path())
    fields = ("seconds", "cpu", "peak_rss", "temporary", "compile_seconds")
    ratios = {field: ratio(pooled(results["SGPO"], field), pooled(results["GRPO"], field)) for field in fields}
    rows = [
        [name, *(spread([x / unit for x in pooled(side, field)]) for field, unit in zip(fields, UNITS, strict=True))]
        for name, side in results.items()
    ]
    rows.append(["ratio", *(f"{value:.2f}" for value in ratios.values())])
    columns = ["method", "seconds", "CPU-s", "peak RSS, GiB", "temporary, GiB", "compile, s"]
    size = f"{flags.problems} x {flags.group} samples of {flags.prompt} + {flags.longest} tokens, {flags.shape}"
    tables.table(f"Update of {size}", columns, rows)
    common.save(flags.json, __file__, flags=vars(flags), results=results, ratios=ratios)


if __name__ == "__main__":
    main()
