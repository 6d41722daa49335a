"""One page that compares several runs: accuracies, curves in the same panels, what differs in the configs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_jax import config as configs
from sgpo_jax.report import figures, page, titles


def write(runs: Sequence[Path], to: Path) -> Path:
    """Writes the page that compares runs, and returns its path.

    Args:
      runs: folders of two or more runs.
      to: file to write.

    Raises:
      ValueError: a folder is not that of a run, or one of its files is broken.
    """
    names = _names(runs)
    read = {name: page.read_config(run) for name, run in zip(names, runs, strict=True)}
    results = {name: page.read_results(run) for name, run in zip(names, runs, strict=True)}
    rl = {name: page.read_rows(run / "rl.jsonl") for name, run in zip(names, runs, strict=True)}
    trained = {name: [rows] for name, rows in rl.items() if rows}
    flat = {name: configs.flat(config) for name, config in read.items()}
    fields = sorted({field for config in flat.values() for field in config})
    differing = [(field, *(config.get(field, "") for config in flat.values())) for field in fields]
    lines = [
        [name, *line]
        for name, result in results.items()
        for _, _, table in page.evaluation_table(result)
        for line in table
    ]
    order = {key: i for i, key in enumerate(dict.fromkeys(tuple(line[1:4]) for line in lines))}
    lines.sort(key=lambda line: order[tuple(line[1:4])])  # the runs of a set stand below each other
    columns = ["run", *page.EVALUATION_COLUMNS]
    return page.render(
        to.parent, to, "", False, kind="comparison", name="", title=f"{len(runs)} runs compared", commit="",
        facts=[f"{name}: {titles.title_of(config)}" for name, config in read.items()],
        cards=[card for name, result in results.items() for card in _cards(name, result)], notes=[],
        charts={name: figures.svg(figure, name) for name, figure in figures.overlay_panels(trained).items()},
        legend=[(name, figures.colour(place)) for place, name in enumerate(trained)], wide=[],
        tables=[("Evaluation, with 95 % bootstrap intervals over problems", columns, lines)] if lines else [],
        config=next(iter(read.values())), sides=names, fields=[],
        changed=[line for line in differing if any(value != line[1] for value in line[2:])],
        samples=[], analysis=[], starts=[],
        downloads=page.downloads({f"{name}-rl.jsonl": rows for name, rows in rl.items()}, results),
    )  # fmt: skip


def _names(runs: Sequence[Path]) -> list[str]:
    """Returns a name for each run: the last parts of its path, as many as tell the runs apart."""
    paths = [run.absolute().parts for run in runs]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{runs[0]}: is given twice; allowed: different runs")


def _cards(name: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**card, "label": f"{name}: {card['label']}"} for card in page.accuracy_cards(results)]
