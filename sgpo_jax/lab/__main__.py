"""The laboratory: methods against each other over seeds and worlds, with a verdict for each of the paper's claims.

    python -m sgpo_jax.lab --config=configs/lab.py --workdir=DIR [--fast]

First the learning rate of each method is tuned in each world, all with the same budget and on seeds of their own; then
every method is trained in the first world with every seed, and some of them in the other worlds. A finished training
run is a row of DIR/results.jsonl and is not run again; tables, verdicts and figures are made of these rows and of the
metrics beside them. docs/lab.md has what came out.
"""


from absl import flags

from sgpo_jax import cli
from sgpo_jax.lab.compare import run
from sgpo_jax.lab.grid import check
from sgpo_jax.runtime import lock


def main(config, given) -> None:
    if given.fast:
        config.update(config.lab.fast)
    check(config)
    workdir = cli.folder("workdir", given.workdir)
    with lock.hold(workdir):
        run(config, workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the results; goes on with what is there.")
    flags.DEFINE_bool("fast", False, "The small lab: the changes of config.lab.fast.")
    cli.start(main, required=["config", "workdir"])
