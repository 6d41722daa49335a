"""Compares rollouts with Tunix's vanilla sampler and Hugging Face generate: tokens per second, same weights.

    python benchmarks/rollout.py                              # 32 responses of 128 tokens, SmolLM2's shape
    python benchmarks/rollout.py --shape=small --requests=256 --batch=32 --longest=256 --median=32 --group=1

With --median, lengths are long-tailed: a random model draws one of many stop ids with about the same probability at
every token. Only tokens up to the stop count. Tunix and Hugging Face decode `batch` responses until the last of them
has ended. sgpo_jax decodes in `batch` slots, which it refills. Sampling is at temperature 1 from the whole
distribution, the fastest setting of all three. sgpo_jax also returns the log-probability of every token.
"""

import statistics
import tempfile
from pathlib import Path

import common
import workload
from common import Side, pooled, ratio, spread

from sgpo_jax.runtime import tables

GIB = 2**30
SIDES = [Side("sgpo_jax"), Side("Tunix", "tunix"), Side("HF generate", "torch")]


def main() -> None:
    parser = common.arguments(
        "Rollout tokens per second against Tunix and Hugging Face.",
        shape=("smollm2", workload.SHAPE_HELP), requests=(32, "responses"), batch=(32, "responses decoded at once"),
        group=(1, "responses to a prompt"), prompt=(64, "tokens of a prompt"),
        longest=(128, "most tokens of a response"),
        median=(0, "median tokens of a response, long-tailed; 0: all are the longest"), top_p=(1.0, "nucleus"),
        calls=(2, "measured rollouts of a worker"), rounds=(3, "workers of each side"),
        sides=("", "names, separated by commas; all by default"),
        cache=(str(common.CACHE), "folder of the peers' environments"),
    )  # fmt: skip
    flags = parser.parse_args()
    shape = workload.shape(flags.shape)
    chosen = [side for side in SIDES if not flags.sides or side.name in flags.sides.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        task = {**vars(flags), "work": "generate", "model": str(Path(folder) / "model")}
        common.run(Side("weights"), {**task, "work": "weights"})
        results = common.alternate([*chosen, Side("peak", "", {"work": "peak"})], task, flags.rounds, Path(flags.cache))

    peak = statistics.median(pooled(results["peak"], "flops"))
    bandwidth = statistics.median(pooled(results["peak"], "bandwidth"))
    speeds = {side.name: per_second(results[side.name], "seconds") for side in chosen}
    first = chosen[0].name
    rows, ratios = [], {}
    for side in chosen:
        side_results, speed = results[side.name], statistics.median(speeds[side.name])
        attended = flags.prompt + statistics.mean(pooled(side_results, "tokens")) / flags.requests / 2
        flops, bytes_read = shape.decode_cost(flags.batch, attended)
        ratios[side.name] = {
            "tokens_per_second": ratio(speeds[first], speeds[side.name]),
            "tokens_per_cpu_second": ratio(per_second(results[first], "cpu"), per_second(side_results, "cpu")),
            "of_peak": speed * flops / peak,
            "of_bandwidth": speed / flags.batch * bytes_read / bandwidth,
        }
        rows.append([
            side.name, spread(speeds[side.name], ".0f"), spread(per_second(side_results, "cpu"), ".0f"),
            f"{ratios[side.name]['tokens_per_second']:.2f}",
            spread([x / GIB for x in pooled(side_results, "peak_rss")]),
            spread(pooled(side_results, "median_length"), ".0f"),
            spread([100 * x for x in pooled(side_results, "useful")], ".0f"),
            f"{ratios[side.name]['of_peak']:.0%}", f"{ratios[side.name]['of_bandwidth']:.0%}",
        ])  # fmt: skip
    title = (
        f"Rollout of {flags.requests} responses, {flags.batch} at once, prompt {flags.prompt}, at most {flags.longest} "
        f"tokens, {flags.shape}; peak {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"
    )
    columns = [
        "side", "tokens/s", "tokens/CPU-s", f"{first} over it", "peak RSS, GiB", "median length", "slots used, %",
        "of peak", "of bandwidth",
    ]  # fmt: skip
    tables.table(title, columns, rows)
    common.save(flags.json, __file__, flags=vars(flags), results=results, ratios=ratios)


def per_second(results: list[dict], clock: str) -> list[float]:
    """Returns the useful tokens per second of wall ("seconds") or CPU ("cpu") time, for every call."""
    return [tokens / time for result in results for tokens, time in zip(result["tokens"], result[clock], strict=True)]


if __name__ == "__main__":
    main()
