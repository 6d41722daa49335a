"""Strategies from expert responses (Sec. 3.1, App. B, C, H); docs/strategies.md shows a run.

python -m sgpo_jax.strategies --config=configs/strategies.py --workdir=DIR [--to=FILE] [--config.extract.FIELD=..]
python -m sgpo_jax.strategies --config=configs/strategies.py --workdir=DIR --audit

The first writes every reply and verdict to DIR/extraction.jsonl as it comes, and what was kept to FILE, by default
DIR/strategies.jsonl, which `data.load` reads. The second has another model rate a sample of it, in DIR/audit.jsonl.
Kill either at any moment; the same command goes on and pays for nothing twice.
"""

import sys
from pathlib import Path

from absl import flags

from sgpo_jax import cli, config_checks
from sgpo_jax.strategies.runs import audit, run


def main(config, given) -> None:
    config_checks.check_extract(config)
    workdir = cli.folder("workdir", given.workdir)
    to = Path(given.to).expanduser() if given.to else workdir / "strategies.jsonl"
    cli.folder("to", str(to.parent))
    if why := audit(config, workdir) if given.audit else run(config, workdir, to):
        sys.exit(f"sgpo_jax: stopped early: {why}. The same command goes on")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the journal; goes on with what is there.")
    flags.DEFINE_string("to", "", "JSONL file for the problems with strategies; WORKDIR/strategies.jsonl by default.")
    flags.DEFINE_bool("audit", False, "Rate a sample of the kept strategies instead.")
    cli.start(main, required=["config", "workdir"])
