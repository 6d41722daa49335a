"""Compares the token KL in chunks, with gradients, with the computation that holds all logits: memory and time.

    python benchmarks/token_kl.py
    python benchmarks/token_kl.py --positions=1024,2048,4096,8192 --vocab=49152 --chunk=512,128 --rounds=5
    python benchmarks/token_kl.py --divergence=forward_kl,jensen_shannon,top_k_kl --k=100

`kl_loss` is what the update calls, a loss that is a sum over tokens. `token_kl` differentiates any loss of the token
KL, and computes the logits twice for it. The extra memory is the peak of the process minus what it held before the
first call. It includes the gradient of the head, which every side returns. Each divergence has its own dense
computation: that of `top_k_kl` takes the k tokens, and SDPO's tail, out of all logits.
"""

import itertools
from pathlib import Path

import common
from common import Side, pooled, ratio, spread

from sgpo_jax.runtime import tables

DENSE = Side("dense", "", {"how": "dense", "chunk": 0})


def main() -> None:
    parser = common.arguments(
        "Token KL in chunks against the dense computation.",
        positions=("1024,2048,4096", "N, separated by commas"), vocab=("16384,49152", "V, separated by commas"),
        hidden=(576, "D"), chunk=("512,128", "positions of a chunk, which divide N, separated by commas"),
        divergence=("forward_kl", "divergences, separated by commas"), k=(100, "tokens of top_k_kl"),
        calls=(3, "measured calls of a worker"), rounds=(3, "workers of each side"),
    )  # fmt: skip
    flags = parser.parse_args()
    for positions, chunk in itertools.product(numbers(flags.positions), numbers(flags.chunk)):
        if positions % chunk:
            parser.error(f"--chunk={chunk}: must divide every one of --positions={flags.positions}")
    chunked = [
        Side(f"{how}, {chunk}", "", {"how": how, "chunk": chunk})
        for how, chunk in itertools.product(("kl_loss", "token_kl"), numbers(flags.chunk))
    ]
    cells, rows = [], []
    sizes = itertools.product(numbers(flags.vocab), numbers(flags.positions), flags.divergence.split(","))
    for vocab, positions, divergence in sizes:
        task = {
            "work": "kl", "positions": positions, "hidden": flags.hidden, "vocab": vocab, "calls": flags.calls,
            "divergence": divergence, "k": flags.k,
        }  # fmt: skip
        results = common.alternate([*chunked, DENSE], task, flags.rounds, Path())
        dense = results[DENSE.name]
        for name, chunks in results.items():
            extra = [[result["peak_rss"] - result["resident_before"] for result in side] for side in (chunks, dense)]
            seconds, cpu = ([pooled(side, field) for side in (chunks, dense)] for field in ("seconds", "cpu"))
            error = abs(chunks[0]["value"] - dense[0]["value"]) / abs(dense[0]["value"])
            ratios = {"memory": ratio(*extra), "time": ratio(*seconds), "cpu": ratio(*cpu), "error": error}
            cells.append({
                "positions": positions, "vocab": vocab, "divergence": divergence, "side": name, "ratios": ratios,
                "results": chunks,
            })  # fmt: skip
            rows.append([
                f"{positions} x {vocab}", divergence, name, spread([x / 2**20 for x in extra[0]], ".0f"),
                f"{ratios['memory']:.3f}", spread(seconds[0]), f"{ratios['time']:.2f}", f"{error:.0e}",
            ])  # fmt: skip
    columns = ["N x V", "divergence", "side, chunk", "extra, MiB", "ratio", "seconds", "ratio", "difference"]
    tables.table(f"Mean over tokens and its gradients, D = {flags.hidden}, float32", columns, rows)
    common.save(flags.json, __file__, flags=vars(flags), cells=cells)


def numbers(text: str) -> list[int]:
    """Returns the numbers of a list such as 1024,2048."""
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
