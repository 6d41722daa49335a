"""Compares a GRPO update, AdamW included, with Tunix and TRL: time, memory, compile time.

    python benchmarks/update.py                                          # 4 responses, 64 + 128 tokens, SmolLM2's shape
    python benchmarks/update.py --problems=2 --longest=256 --median=32   # long-tailed
    python benchmarks/update.py --problems=8 --calls=0                   # only the compiler's memory
    python benchmarks/update.py --adapters=16 --sides="sgpo_jax,sgpo_jax (adapters)"
    python benchmarks/update.py --share=8 --sides="sgpo_jax,sgpo_jax (shared prompts)" --group=8 --prompt=512

Every side has its own default for activations: sgpo_jax and TRL recompute them, Tunix holds them. `--stored` adds
sgpo_jax and TRL with all activations held, `--one-row` all three with one row at a time. sgpo_jax packs responses into
rows, and leaves out whole micro-batches of rows that stay empty. Peak memory is that of the process, including the
loading of weights.
"""

import statistics
import tempfile
from pathlib import Path

import common
import workload
from common import Side, pooled, ratio, spread

from sgpo_jax.runtime import tables

GIB = 2**30


def sides(stored: bool, one_row: bool, rank: int, share: int) -> list[Side]:
    """Returns the compared sides, sgpo_jax first."""
    chosen = [Side("sgpo_jax", "", {"remat": "full"}), Side("Tunix", "tunix", {"remat": False}),
              Side("TRL", "torch", {"remat": True})]  # fmt: skip
    one = [Side(f"{name} (1 row)", peer, {**settings, "micro_batch": 1}) for name, peer, settings in chosen]
    others = [Side("sgpo_jax (stored)", "", {"remat": "none"}), Side("TRL (stored)", "torch", {"remat": False})]
    adapters = [Side("sgpo_jax (adapters)", "", {"remat": "full", "rank": rank})]
    shared = [Side("sgpo_jax (shared prompts)", "", {"remat": "full", "share": share})]
    return chosen + one * one_row + others * stored + adapters * bool(rank) + shared * (share > 1)


def main() -> None:
    parser = common.arguments(
        "One GRPO update against Tunix and TRL.",
        shape=("smollm2", workload.SHAPE_HELP), problems=(1, "problems"), group=(4, "responses to each"),
        prompt=(64, "tokens of a prompt"), longest=(128, "tokens of the longest response"),
        median=(0, "median tokens of a response, long-tailed; 0: all are the longest"),
        micro_batch=(0, "rows whose activations are held at once; 0: all"), calls=(3, "measured updates of a worker"),
        rounds=(3, "workers of each side"), sides=("", "names, separated by commas; all by default"),
        adapters=(0, "rank of a side that trains adapters; 0 leaves it out"),
        share=(1, "longest responses after one copy of their prompt, in a side of its own; 1 leaves it out"),
        cache=(str(common.CACHE), "folder of the peers' environments"),
    )  # fmt: skip
    parser.add_argument("--stored", action="store_true", help="add sgpo_jax and TRL with all activations held")
    parser.add_argument("--one-row", action="store_true", help="add all sides with one row at a time")
    flags = parser.parse_args()
    shape = workload.shape(flags.shape)
    named = flags.sides.split(",") if flags.sides else None
    every = sides(flags.stored, flags.one_row, flags.adapters, flags.share)
    chosen = [side for side in every if named is None or side.name in named]
    with tempfile.TemporaryDirectory() as folder:
        task = {**vars(flags), "work": "update", "share": 1, "model": str(Path(folder) / "model")}
        common.run(Side("weights"), {**task, "work": "weights"})
        if not flags.calls:
            chosen = [side for side in chosen if side.peer != "torch"]
        results = common.alternate([*chosen, Side("peak", "", {"work": "peak"})], task, flags.rounds, Path(flags.cache))

    lengths = workload.lengths(flags.problems * flags.group, flags.longest, flags.median, 2)
    tokens = lengths + flags.prompt
    useful = 3 * shape.forward_flops(tokens.sum(), lengths.sum(), (tokens * (tokens + 1) / 2).sum())
    peak = statistics.median(pooled(results["peak"], "flops"))
    rows, summary = [], {}
    first = results[chosen[0].name]
    for side in chosen:
        side_results = results[side.name]
        seconds = pooled(side_results, "seconds")
        rows.append([
            side.name, spread(seconds), spread(pooled(side_results, "cpu")),
            spread([x / GIB for x in pooled(side_results, "peak_rss")]),
            spread([x / GIB for x in pooled(side_results, "temporary")]),
            spread(pooled(side_results, "compile_seconds")),
            f"{useful / statistics.median(seconds) / peak:.0%}" if seconds else "-",
        ])  # fmt: skip
        summary[side.name] = {
            "time_ratio": ratio(pooled(first, "seconds"), seconds),
            "cpu_ratio": ratio(pooled(first, "cpu"), pooled(side_results, "cpu")),
            "rss_ratio": ratio(pooled(first, "peak_rss"), pooled(side_results, "peak_rss")),
            "temporary_ratio": ratio(pooled(first, "temporary"), pooled(side_results, "temporary")),
            "compile_ratio": ratio(pooled(first, "compile_seconds"), pooled(side_results, "compile_seconds")),
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
