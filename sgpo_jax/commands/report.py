"""One self-contained HTML page of a run or a lab: figures, tables, config, environment, generations with verdicts.

    sgpo report --workdir=DIR [--to=FILE]

It only reads DIR, so it can be used while the run is running. A run also writes this page itself; see docs/report.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from sgpo_jax import lab
from sgpo_jax.report import page


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


def main(flag_values) -> None:
    """Runs the command."""
    workdir = Path(flag_values.workdir).expanduser()
    to = Path(flag_values.to).expanduser() if flag_values.to else workdir / "report.html"
    write(workdir, to)
    print(f"{to}", flush=True)
