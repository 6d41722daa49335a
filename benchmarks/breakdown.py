"""Profiles an update and a rollout, and adds up the time of each part of the program.

    python benchmarks/breakdown.py
    python benchmarks/breakdown.py --shape=small --remat=none

XLA names each operation after the code that it comes from. Operations can run at the same time, and their times are
added. So the sum is the busy time of all threads, and only the shares of it are meaningful.
"""

import re
import tempfile
from collections import Counter
from pathlib import Path

import common
import workload
from common import Side

from sgpo_jax.runtime import tables

# (pattern, part): the first pattern that matches the name of an operation decides.
PARTS = {
    "update": [
        (r"rematted_computation", "layers, computed again"),
        (r"transpose\(jvp\(Decoder", "layers, backward"),
        (r"Decoder", "layers, forward"),
        (r"chunks", "head, with its gradient"),
        (r"", "sums of gradients, optimizer"),
    ],
    "generate": [
        (r"decode.*Decoder.*(bkgn|bkgs|kbgs|reduce_max|squeeze)", "decoding, attention and its cache"),
        (r"decode.*Decoder.*dot_general", "decoding, layers' matrices"),
        (r"decode.*Decoder.*dynamic_index_in_dim", "decoding, copies of layers' matrices"),
        (r"decode.*Decoder", "decoding, rest of the layers"),
        (r"decode", "decoding, head and sampling"),
        (r"", "prefill and refills"),
    ],
}


def main() -> None:
    parser = common.arguments(
        "Time of an update and of a rollout, by part of the program.",
        shape=("smollm2", workload.SHAPE_HELP), problems=(1, "problems of the update"), group=(4, "samples of each"),
        requests=(32, "responses of the rollout"), batch=(32, "responses decoded at once"),
        prompt=(64, "tokens of a prompt"), longest=(128, "tokens of a response"),
        micro_batch=(0, "rows whose activations are held at once; 0: all"),
        remat=("full", "what is recomputed"),
    )  # fmt: skip
    flags = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        task = {**vars(flags), "median": 0, "top_p": 1.0, "calls": 1, "seed": 0, "model": str(Path(folder) / "model")}
        common.run(Side("weights"), {**task, "work": "weights"})
        for work, parts in PARTS.items():
            result = common.run(Side(work), {**task, "work": "profile", "profiled": work})
            shares: Counter[str] = Counter()
            for name, seconds in result["operations"]:
                shares[next(part for pattern, part in parts if re.search(pattern, name))] += seconds
            total = shares.total()
            rows = [[part, f"{seconds:.3g}", f"{seconds / total:.0%}"] for part, seconds in shares.most_common()]
            title = f"{work}, {flags.shape}: {result['seconds'][0]:.3g} s, {result['cpu'][0]:.3g} CPU-s"
            tables.table(title, ["part", "seconds", "share"], rows)
            results[work] = result
    common.save(flags.json, __file__, flags=vars(flags), results=results)


if __name__ == "__main__":
    main()
