"""Compares sampling both groups of a step at once with sampling one after the other: time and slot-steps.

    python benchmarks/groups.py

The model has the small shape. Each of 16 problems gets 8 autonomous and 4 guided responses. Their lengths are
long-tailed, as in rollout.py.
"""

import tempfile
from pathlib import Path

import common
import workload
from common import Side, pooled, ratio, spread

from sgpo_jax.runtime import tables

SIDES = [Side("at once", settings={"at_once": True}), Side("one after the other", settings={"at_once": False})]


def main() -> None:
    parser = common.arguments(
        "Sampling two groups at once against one after the other.",
        shape=("small", workload.SHAPE_HELP), problems=(16, "problems"), autonomous=(8, "responses to a problem"),
        guided=(4, "responses to a problem with its strategy"), batch=(32, "responses decoded at once; 0: all"),
        prompt=(64, "tokens of a prompt"), strategy=(32, "extra tokens of a guided prompt"),
        longest=(256, "most tokens of a response"), median=(32, "median tokens of a response"),
        calls=(3, "measured rollouts of a worker"), rounds=(2, "workers of each side"),
    )  # fmt: skip
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = {**vars(flags), "work": "groups", "model": str(Path(folder) / "model")}
        common.run(Side("weights"), {**task, "work": "weights"})
        results = common.alternate(SIDES, task, flags.rounds, common.CACHE)

    at_once, apart = (results[side.name] for side in SIDES)
    rows = [
        [
            side.name, spread(pooled(results[side.name], "seconds")), spread(pooled(results[side.name], "cpu")),
            spread(pooled(results[side.name], "slot_steps"), ".0f"),
            spread([100 * x for x in pooled(results[side.name], "useful")], ".0f"),
        ]
        for side in SIDES
    ]  # fmt: skip
    ratios = {name: ratio(pooled(at_once, name), pooled(apart, name)) for name in ("seconds", "cpu", "slot_steps")}
    title = (
        f"{flags.problems} x {flags.autonomous} + {flags.guided} responses, {flags.batch or 'all'} decoded at once, "
        f"{flags.shape}; at once over one after the other: time {ratios['seconds']:.2f}, "
        f"CPU time {ratios['cpu']:.2f}, slot-steps {ratios['slot_steps']:.2f}"
    )
    tables.table(title, ["groups", "seconds", "CPU seconds", "slot-steps", "slots used, %"], rows)
    common.save(flags.json, __file__, flags=vars(flags), results=results, ratios=ratios)


if __name__ == "__main__":
    main()
