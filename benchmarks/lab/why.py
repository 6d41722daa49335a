"""Draws what happens in the hard worlds under each teacher and token rule, step by step.

    python benchmarks/lab/why.py --lab=DIR          # reads the runs of a lab into why.jsonl, beside this file
    python benchmarks/lab/why.py docs/lab_why.png   # draws why.jsonl

One seed, rate 2. The lab that has the runs:

    python -m sgpo_jax.lab --config=configs/lab.py --workdir=DIR \\
        --config.lab.rates="(2.0,)" --config.lab.seeds="(1,)" \\
        --config.lab.worlds="('four-methods','weak-base','rare-success')" \\
        --config.lab.methods="('sft','sgpo','frozen_teacher','scaled_kl','anchored','anchored_guided')" \\
        --config.lab.world_methods="('sgpo','frozen_teacher','scaled_kl','anchored','anchored_guided')"
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sgpo_jax.report import figures
from sgpo_jax.runtime import files

STORED = Path(__file__).parent / "why.jsonl"
WORLDS = ("four-methods", "weak-base", "rare-success")
METHODS = {
    "sgpo": "live teacher, clip: SGPO", "frozen_teacher": "frozen teacher, clip", "scaled_kl": "live teacher, scaled",
    "anchored": "frozen, scaled: anchored", "anchored_guided": "the same, guided side held",
}  # fmt: skip
METRICS = {
    "reward_auto": "reward, unguided", "reward_guided": "reward, guided", "token_kl": "token KL of targets, nats",
    "kl_clip_share": "tokens above the clip",
}  # fmt: skip
WINDOW = 9  # steps of a running mean


def collect(lab: Path) -> list[dict[str, Any]]:
    """Returns a row for each world and method, with the values of every metric at all steps."""
    rows = []
    for world in WORLDS:
        for method in METHODS:
            steps = files.read_jsonl(lab / world / f"{method}@2" / "seed1" / "rl.jsonl")
            values = {metric: [float(f"{step[metric]:.4g}") for step in steps] for metric in METRICS}
            rows.append({"world": world, "method": method, **values})
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Returns a figure with a row of panels for each metric and a column for each world."""
    figure = Figure(figsize=(10.5, 10.0), layout="constrained")
    panels = figure.subplots(len(METRICS), len(WORLDS), sharex=True, sharey="row")
    for line, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for axes, world in zip(line, WORLDS, strict=True):
            for place, (method, name) in enumerate(METHODS.items()):
                (values,) = (row[metric] for row in rows if (row["world"], row["method"]) == (world, method))
                means = np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
                axes.plot(np.arange(len(means)) + (WINDOW + 1) / 2, means, color=figures.colour(place), label=name)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.9")
            if metric != "token_kl":
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        line[0].set_ylim(bottom=0)  # after all of the row is drawn, for which it is one axis
        line[0].set_ylabel(label)
    for axes, world in zip(panels[0], WORLDS, strict=True):
        axes.set_title(world, loc="left", fontsize="medium", fontweight="bold")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Curves of each teacher and token rule in the hard worlds.")
    parser.add_argument("figure", nargs="?", help="file to draw")
    parser.add_argument("--lab", type=Path, help="folder of a lab whose runs are read into why.jsonl")
    flags = parser.parse_args()
    if not flags.lab and not flags.figure:
        parser.error("nothing to do: give --lab=DIR, a file to draw, or both")
    if flags.lab:
        files.write_text(STORED, files.jsonl(collect(flags.lab)))
    if flags.figure:
        draw(files.read_jsonl(STORED)).savefig(flags.figure, dpi=110)


if __name__ == "__main__":
    main()
