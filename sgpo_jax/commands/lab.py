"""Compares methods over seeds and worlds, with a verdict on each of the paper's claims.

    sgpo lab --config=configs/lab.py --workdir=DIR [--fast]

First the learning rate of each method is tuned in each world, with the same budget for all and on separate seeds. Then
every method is trained in the first world with every seed, and some methods in the other worlds. A finished training
run is a row of DIR/results.jsonl and does not run again. Tables, verdicts and figures are made from these rows and from
the metrics of the runs. docs/lab.md has the results.
"""

from typing import Any

from ml_collections import ConfigDict

from sgpo_jax import cli
from sgpo_jax.lab.compare import run
from sgpo_jax.lab.grid import check
from sgpo_jax.runtime import lock, trackers


def main(config: ConfigDict, given: Any) -> None:
    """Runs the lab, or what is left of it, in the folder of --workdir."""
    if given.fast:
        config.update(config.lab.fast)
    check(config)
    trackers.check(config.trackers)
    workdir = cli.folder("workdir", given.workdir, whole=True)
    with lock.hold(workdir):
        run(config, workdir)
