"""Runs the commands that several processes can share, one after the other."""

from pathlib import Path

from sgpo_jax import cli
from sgpo_jax.cli.processes import join
from sgpo_jax.commands import analyze, evaluate, export


def main(config, flag_values):
    join(config, flag_values)
    workdir = Path(flag_values.workdir)
    evaluate.run(config, str(workdir), str(workdir / "out"), "", 0)
    export.run(config, workdir, "rl", workdir / "model", "float32")
    analyze.run(config, workdir, 3)


flags = (cli.Flag("workdir", "", required=True),)
cli.start("others", cli.Command("", "__main__:main", flags, processes=True))
