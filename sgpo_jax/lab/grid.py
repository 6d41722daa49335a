"""The grid of training runs: which cells there are, and the config of each."""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import config_checks, data, methods


class Cell(NamedTuple):
    """One training run. The cell of method "sft" is the warm-up that the others of its world and seed begin with."""

    world: str
    method: str
    rate: float  # times the method's learning rate
    seed: int

    def __str__(self) -> str:
        return f"{self.world}/{self.method}@{self.rate:g}/seed{self.seed}"


Rates = dict[tuple[str, str], float]  # (world, method) -> rate


def cell_config(config: ConfigDict, cell: Cell) -> ConfigDict:
    """The lab's config in the cell's world, by its method, at its rate, with its seed."""
    config = config.copy_and_resolve_references()
    config.update(config.lab.changes[cell.world])
    config.seed = cell.seed
    config = methods.select(config, cell.method)
    config.rl.learning_rate *= cell.rate
    config.report_seconds = 0.0  # the lab has a page of its own
    return config.lock()


def check(config: ConfigDict) -> None:
    """Raises ValueError for a lab, or a cell of it, that cannot run, or has problems that cannot be read."""
    config_checks.check_lab(config)
    read = functools.cache(data.load)
    for world, method in pairs(config):
        try:
            changed = cell_config(config, Cell(world, method, 1.0, 0))
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"config.lab.changes[{world!r}]: {error.args[0]}") from error
        config_checks.check(changed)
        for source in (changed.data.train, changed.sft.train, *(each.source for each in changed.eval.sets.values())):
            if source:  # sft.train may be empty
                read(source)


def tuning_cells(config: ConfigDict) -> list[Cell]:
    """Every method that trains, at every rate, on the tuning seeds; none where there is nothing to choose from."""
    lab = config.lab
    trained = [pair for pair in pairs(config) if pair[1] != "sft"] if len(lab.rates) > 1 else []
    return [Cell(*pair, *rest) for pair, *rest in itertools.product(trained, lab.rates, lab.tuning_seeds)]


def grid_cells(config: ConfigDict, rates: Rates) -> list[Cell]:
    """Every method of each world with every seed."""
    return [Cell(*pair, rates.get(pair, 1.0), seed) for pair in pairs(config) for seed in config.lab.seeds]


def digest(config: ConfigDict) -> str:
    """Of the fields that a cell's result depends on."""
    fields = json.loads(configs.to_json(config))
    values = [value for name, value in sorted(fields.items()) if name not in ("lab", "report_seconds")]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def home_of(config: ConfigDict) -> str:
    return config.lab.worlds[0]


def pairs(config: ConfigDict) -> list[tuple[str, str]]:
    """(world, method): all methods in the first world, `lab.world_methods` in the others."""
    lab, home = config.lab, home_of(config)
    return [(w, m) for w in lab.worlds for m in (lab.methods if w == home else lab.world_methods)]


def with_warm_ups(cells: Sequence[Cell]) -> list[Cell]:
    warm_ups = [Cell(world, "sft", 1.0, seed) for world, seed in dict.fromkeys((c.world, c.seed) for c in cells)]
    return [*warm_ups, *(cell for cell in cells if cell.method != "sft")]


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(row["world"], row["method"], row["rate"], row["seed"])
