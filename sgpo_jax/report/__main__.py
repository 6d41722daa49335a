"""One self-contained HTML page of a run or a lab: figures, tables, config, environment, generations with verdicts.

    python -m sgpo_jax.report --workdir=DIR [--to=FILE]

It only reads DIR, so it can be made while the run goes on. A run writes the same page itself, see docs/report.md.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from sgpo_jax import cli, lab
from sgpo_jax.report import page


def write(workdir: Path, to: Path) -> None:
    """Writes the page of the run or, where there is a results.jsonl, the lab in `workdir` to the file `to`.

    Raises:
      ValueError: there is neither, or a file is broken.
    """
    results = workdir / "results.jsonl"
    if results.is_file():
        lab.write_page(lab.Results(ConfigDict(page.read_config(workdir)), results), running=False, to=to)
    else:
        page.write_run(workdir, to=to)


def main(given) -> None:
    workdir = Path(given.workdir).expanduser()
    to = Path(given.to).expanduser() if given.to else workdir / "report.html"
    write(workdir, to)
    print(f"{to}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run or of a lab.")
    flags.DEFINE_string("to", None, "File to write; report.html in the folder by default.")
    cli.start(main, required=["workdir"])
