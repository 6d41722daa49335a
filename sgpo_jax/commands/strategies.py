"""Extracts strategies from expert responses (Sec. 3.1, App. B, C, H); docs/strategies.md shows a run.

sgpo strategies --config=configs/strategies.py --workdir=DIR [--to=FILE] [--config.extract.FIELD=..]
sgpo strategies --config=configs/strategies.py --workdir=DIR --audit

The first command appends every reply and verdict to DIR/extraction.jsonl and writes the problems with strategies to
FILE, DIR/strategies.jsonl by default, which `data.load` reads. The second has another model rate a sample of the
strategies, in DIR/audit.jsonl. Both may be killed at any moment: the same command resumes and pays for nothing twice.
The exit status is 0 only if every problem has a verdict.
"""

import sys
from pathlib import Path

from sgpo_jax import cli, config_checks
from sgpo_jax.strategies.ratings import audit
from sgpo_jax.strategies.runs import run


def main(config, flag_values) -> None:
    """Runs the command."""
    config_checks.check_extract(config)
    workdir = cli.folder("workdir", flag_values.workdir)
    to = Path(flag_values.to).expanduser() if flag_values.to else workdir / "strategies.jsonl"
    cli.folder("to", str(to.parent))
    if why := audit(config, workdir) if flag_values.audit else run(config, workdir, to):
        sys.exit(f"sgpo_jax: {why}. The same command resumes")
