"""Writes one self-contained HTML page: of a run, of a lab, or of several runs that are compared.

    sgpo report --workdir=DIR [--to=FILE]
    sgpo report RUN RUN ... [--to=FILE]

It only reads the folders, so it can be used while a run is running. A run also writes its page itself; see
docs/report.md.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sgpo_jax import cli, lab
from sgpo_jax.report import comparison, page
from sgpo_jax.runtime import mirror


def write(workdir: Path, to: Path) -> None:
    """Writes the page of the lab in `workdir`, if it has a results.jsonl, or else of the run there.

    Args:
      workdir: folder of the lab or run.
      to: file to write.

    Raises:
      ValueError: there is no lab or run in `workdir`, or one of its files is broken.
    """
    results = workdir / "results.jsonl"
    if results.is_file():
        lab.write_page(lab.Results(ConfigDict(page.read_config(workdir)), results), running=False, to=to)
    else:
        page.write_run(workdir, to=to)


def main(given: Any) -> None:
    """Writes the page that the flags ask for, and prints its path."""
    runs = [cli.existing_folder("workdir", run) for run in (*filter(None, [given.workdir]), *given.runs)]
    if not runs:
        raise ValueError("--workdir: must name the folder of a run or a lab; or give two or more runs to compare")
    name = "report.html" if len(runs) == 1 else "compared.html"
    to = cli.file("to", given.to) if given.to else runs[0] / name
    if len(runs) == 1:
        write(runs[0], to)
    else:
        comparison.write(runs, to)
    print(mirror.shown(f"{to}"), flush=True)
