"""One GRPO update, AdamW included, against Tunix and TRL: time, memory, compile time; lengths equal or long-tailed.

    python benchmarks/update.py                                          # 4 responses, 64 + 128 tokens, SmolLM2's shape
    python benchmarks/update.py --problems=2 --longest=256 --median=32   # long-tailed
    python benchmarks/update.py --problems=8 --calls=0                   # only the compiler's memory

Every side runs with its own default for recomputing activations (ours and TRL do, Tunix does not); `--stored` adds
those that hold them, `--one-row` all three with one row at a time. Ours packs responses in rows and leaves out those
that are not filled, as many at a time as a micro-batch has. Peak memory is that of the process, seen from outside, the
loading of weights included.
"""

import statistics
import tempfile
from pathlib import Path

import common
import workload
from common import Side, pooled, ratio, spread

from sgpo_jax.runtime import tables

GIB = 2**30


def sides(stored: bool, one_row: bool) -> list[Side]:
    """Ours first."""
    chosen = [Side("sgpo_jax", "", {"remat": "full"}), Side("Tunix", "tunix", {"remat": False}),
              Side("TRL", "torch", {"remat": True})]  # fmt: skip
    one = [Side(f"{name} (1 row)", peer, {**settings, "micro_batch": 1}) for name, peer, settings in chosen]
    others = [Side("sgpo_jax (stored)", "", {"remat": "none"}), Side("TRL (stored)", "torch", {"remat": False})]
    return chosen + one * one_row + others * stored


def main() -> None:
    parser = common.arguments(
        "One GRPO update against Tunix and TRL.",
        shape=("smollm2", workload.SHAPE_HELP), problems=(1, "problems"), group=(4, "responses to each"),
        prompt=(64, "tokens of a prompt"), longest=(128, "tokens of the longest response"),
        median=(0, "median tokens of a response, long-tailed; 0: all are the longest"),
        micro_batch=(0, "rows whose activations are held at once; 0: all"), calls=(3, "measured updates of a worker"),
        rounds=(3, "workers of each side"), sides=("", "names, separated by commas; all by default"),
        cache=(str(common.CACHE), "folder of the peers' environments"),
    )  # fmt: skip
    parser.add_argument("--stored", action="store_true", help="also with all activations held")
    parser.add_argument("--one-row", action="store_true", help="also with one row at a time")
    flags = parser.parse_args()
    shape = workload.shape(flags.shape)
    chosen = [s for s in sides(flags.stored, flags.one_row) if not flags.sides or s.name in flags.sides.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        task = {**vars(flags), "work": "update", "model": str(Path(folder) / "model")}
        common.run(Side("weights"), {**task, "work": "weights"})
        if not flags.calls:
            chosen = [side for side in chosen if side.peer != "torch"]
        results = common.alternate([*chosen, Side("peak", "", {"work": "peak"})], task, flags.rounds, Path(flags.cache))

    lengths = workload.lengths(flags.problems * flags.group, flags.longest, flags.median, 2)
    tokens = lengths + flags.prompt
    useful = 3 * shape.forward_flops(tokens.sum(), lengths.sum(), (tokens * (tokens + 1) / 2).sum())
    peak = statistics.median(pooled(results["peak"], "flops"))
    rows, summary = [], {}
    ours = results[chosen[0].name]
    for side in chosen:
        found = results[side.name]
        seconds = pooled(found, "seconds")
        rows.append([
            side.name, spread(seconds), spread(pooled(found, "cpu")),
            spread([x / GIB for x in pooled(found, "peak_rss")]), spread([x / GIB for x in pooled(found, "temporary")]),
            spread(pooled(found, "compile_seconds")),
            f"{useful / statistics.median(seconds) / peak:.0%}" if seconds else "-",
        ])  # fmt: skip
        summary[side.name] = {
            "time_ratio": ratio(pooled(ours, "seconds"), seconds),
            "cpu_ratio": ratio(pooled(ours, "cpu"), pooled(found, "cpu")),
            "rss_ratio": ratio(pooled(ours, "peak_rss"), pooled(found, "peak_rss")),
            "temporary_ratio": ratio(pooled(ours, "temporary"), pooled(found, "temporary")),
            "compile_ratio": ratio(pooled(ours, "compile_seconds"), pooled(found, "compile_seconds")),
        }
    title = (
        f"Update of {len(lengths)} responses, {flags.prompt} + {lengths.min()} to {lengths.max()} tokens, "
        f"{flags.shape}; peak {peak / 1e9:.0f} GFLOP/s"
    )
    columns = ["side", "seconds", "CPU-s", "peak RSS, GiB", "temporary, GiB", "compile, s", "of peak"]
    tables.table(title, columns, rows)
    names = [*next(iter(summary.values()))]
    tables.table(
        f"{chosen[0].name} over each", ["side", *(name.replace("_", " ") for name in names)],
        [[side, *("-" if x is None else f"{x:.2f}" for x in values.values())] for side, values in summary.items()],
    )  # fmt: skip
    common.save(flags.json, __file__, flags=vars(flags), results=results, ratios=summary)


if __name__ == "__main__":
    main()
