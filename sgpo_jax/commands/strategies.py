"""Extracts strategies from expert responses (Sec. 3.1, App. B, C, H); docs/strategies.md shows a run.

sgpo strategies --config=configs/strategies.py --workdir=DIR [--to=FILE] [--config.extract.FIELD=..]
sgpo strategies --config=configs/strategies.py --workdir=DIR --audit
sgpo strategies --config=configs/strategies.py --workdir=DIR --push=OWNER/NAME [--public]

The first command appends every reply and verdict to DIR/extraction.jsonl and writes the problems with strategies to
FILE, DIR/strategies.jsonl by default, which `data.load` reads. The second has another model rate a sample of the
strategies, in DIR/audit.jsonl. Both may be killed at any moment: the same command resumes and pays for nothing twice.
The third pushes the problems with strategies to the Hugging Face hub, as a data set with a card, once all are finished.
The exit status is 0 only if every problem has a verdict.
"""

import contextlib
import sys

from sgpo_jax import cli, config_checks
from sgpo_jax.commands import push
from sgpo_jax.report import data_card
from sgpo_jax.runtime import files, lock, mirror
from sgpo_jax.strategies.ratings import audit
from sgpo_jax.strategies.runs import run


def main(config, flag_values) -> None:
    """Runs the command."""
    config_checks.check_extract(config)
    workdir = cli.folder("workdir", flag_values.workdir)
    to = cli.file("to", flag_values.to) if flag_values.to else workdir / "strategies.jsonl"
    if flag_values.push or flag_values.public:
        push.check(flag_values.push)
        if flag_values.audit:
            raise ValueError("--push: must not be given with --audit; push after it: the card has its ratings")
    with lock.hold(workdir) if mirror.url_of(workdir) else contextlib.nullcontext():  # the journal has its own
        why = audit(config, workdir) if flag_values.audit else run(config, workdir, to)
    if why:
        sys.exit(f"sgpo_jax: {why}. The same command resumes")
    if flag_values.push:
        card = workdir / "data_card.md"
        files.write_text(card, data_card.data_card(workdir, to, config.extract.source, flag_values.push))
        again = f"The data set is whole in {to}; the same command pushes it and asks no model"
        push.push({"train.jsonl": to, "README.md": card}, flag_values.push, "dataset", flag_values.public, again)
