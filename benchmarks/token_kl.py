"""Full-vocabulary KL of tokens, with its gradients, against the computation that holds all logits: memory and time.

    python benchmarks/token_kl.py
    python benchmarks/token_kl.py --positions=1024,2048,4096,8192 --vocab=49152 --rounds=5

The extra memory is what the process takes at its peak beyond what it held before the first call; seen from outside.
The gradient of the head, which both give back, is part of it.
"""

import itertools
from pathlib import Path

import common
from common import Side, pooled, ratio, spread

from sgpo_jax import metrics

CHUNKED, DENSE = Side("token_kl", "", {"dense": False}), Side("dense", "", {"dense": True})


def main() -> None:
    parser = common.arguments(
        "Token KL in chunks against the dense computation.",
        positions=("1024,2048,4096", "N, separated by commas"), vocab=("16384,49152", "V, separated by commas"),
        hidden=(576, "D"), calls=(3, "measured calls of a worker"), rounds=(3, "workers of each side"),
    )  # fmt: skip
    flags = parser.parse_args()
    cells, rows = [], []
    for vocab, positions in itertools.product(numbers(flags.vocab), numbers(flags.positions)):
        task = {"work": "kl", "positions": positions, "hidden": flags.hidden, "vocab": vocab, "calls": flags.calls}
        results = common.alternate([CHUNKED, DENSE], task, flags.rounds, Path())
        ours, dense = results[CHUNKED.name], results[DENSE.name]
        extra = [[result["peak_rss"] - result["resident_before"] for result in found] for found in (ours, dense)]
        seconds, cpu = ([pooled(found, field) for found in (ours, dense)] for field in ("seconds", "cpu"))
        error = abs(ours[0]["value"] - dense[0]["value"]) / abs(dense[0]["value"])
        ratios = {"memory": ratio(*extra), "time": ratio(*seconds), "cpu": ratio(*cpu), "error": error}
        cells.append({"positions": positions, "vocab": vocab, "ratios": ratios, "results": results})
        rows.append([
            f"{positions} x {vocab}", *(spread([x / 2**20 for x in each], ".0f") for each in extra),
            f"{ratios['memory']:.3f}", *map(spread, seconds), f"{ratios['time']:.2f}", f"{error:.0e}",
        ])  # fmt: skip
    columns = ["N x V", "extra, MiB", "dense", "ratio", "seconds", "dense", "ratio", "difference"]
    metrics.table(f"Mean token KL and its gradients, D = {flags.hidden}, float32", columns, rows)
    common.save(flags.json, __file__, flags=vars(flags), cells=cells)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
