"""The grid of training runs: its cells, and the config of each cell."""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import config_checks, data, methods

# Fields that are newer than the stored results. At their defaults they are left out of a digest, which stays the same.
_NEWER = (
    "data.system", "eval.limit", "eval.decode_ways", "rl.decode_ways", "eval.draft", "rl.draft", "rl.carry_over",
    "rl.carry_most", "rl.token_rule", "rl.delta_quantile", "rl.teacher", "rl.teacher_rate", "rl.teacher_dtype",
    "rl.teacher_window", "rl.teacher_margin", "rl.surrogate", "rl.importance", "rl.importance_cap",
    "rl.importance_rule", "rl.overlong_buffer", "rl.overlong_penalty", "rl.mask_cut", "rl.resample", "rl.guided_grpo",
    "rl.reference_kl", "rl.reference_kl_kind", "rl.reference_kl_on", "rl.rollout_weights", "rl.rollout_cache",
    "rl.pool_tokens", "rl.share_prompt", "monitor.least_guidance", "monitor.most_forgotten", "monitor.most_lost",
    "mesh.context",
)  # fmt: skip


class Cell(NamedTuple):
    """One training run of the lab. A cell of the method "sft" is the warm-up that other cells begin with."""

    world: str
    method: str
    rate: float  # factor of the method's learning rate
    seed: int

    def __str__(self) -> str:
        return f"{self.world}/{self.method}@{self.rate:g}/seed{self.seed}"

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Returns the cell that a row of results.jsonl belongs to."""
        return cls(row["world"], row["method"], row["rate"], row["seed"])

    @property
    def warm_up(self) -> "Cell":
        """The warm-up that the cell begins with, that of its world and seed."""
        return Cell(self.world, "sft", 1.0, self.seed)


Rates = dict[tuple[str, str], float]  # (world, method) -> rate


def pairs(config: ConfigDict) -> list[tuple[str, str]]:
    """Returns (world, method): all methods in the home world, `lab.world_methods` in the others."""
    lab, home = config.lab, home_world(config)
    return [(world, method) for world in lab.worlds for method in (lab.methods if world == home else lab.world_methods)]


def home_world(config: ConfigDict) -> str:
    """Returns the world in which all methods are compared."""
    return config.lab.worlds[0]


def tuning_cells(config: ConfigDict) -> list[Cell]:
    """Returns every method that trains, at every rate, with the tuning seeds; none where there is only one rate."""
    lab = config.lab
    trained = [pair for pair in pairs(config) if pair[1] != "sft"] if len(lab.rates) > 1 else []
    return [Cell(*pair, *rest) for pair, *rest in itertools.product(trained, lab.rates, lab.tuning_seeds)]


def grid_cells(config: ConfigDict, rates: Rates) -> list[Cell]:
    """Returns every method of each world with every seed, at its rate in `rates`, or else at rate 1."""
    return [Cell(*pair, rates.get(pair, 1.0), seed) for pair in pairs(config) for seed in config.lab.seeds]


def with_warm_ups(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the warm-ups of the cells, each once, and then the cells that are not warm-ups."""
    warm_ups = dict.fromkeys(cell.warm_up for cell in cells)
    return [*warm_ups, *(cell for cell in cells if cell.method != "sft")]


def cell_config(config: ConfigDict, cell: Cell) -> ConfigDict:
    """Returns the lab's config with the world, method, rate and seed of a cell."""
    config = config.copy_and_resolve_references()
    config.update(config.lab.changes[cell.world])
    config.seed = cell.seed
    config = methods.select(config, cell.method)
    config.rl.learning_rate *= cell.rate
    config.report_seconds = 0.0  # the lab has a page of its own
    return config.lock()


def digest(config: ConfigDict) -> str:
    """Returns a hash of the fields that the result of a cell depends on, by which a row names its config."""
    fields, defaults = configs.to_dict(config), configs.to_dict(configs.base())
    for section, name in (field.split(".") for field in _NEWER):
        if fields[section][name] == defaults[section][name]:
            del fields[section][name]
    if fields["lora"] == defaults["lora"]:  # a section that is newer than the stored results
        del fields["lora"]
    without_effect = ("lab", "report_seconds", "trackers", "profile")
    values = [value for name, value in sorted(fields.items()) if name not in without_effect]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def check(config: ConfigDict) -> None:
    """Checks the config of the lab and of every cell, and that the problems of every world can be read.

    Raises:
        ValueError: the lab or one of its cells cannot run.
    """
    config_checks.check_lab(config)
    load = functools.cache(data.load)
    for world, method in pairs(config):
        try:
            changed = cell_config(config, Cell(world, method, 1.0, 0))
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"config.lab.changes[{world!r}]: {error.args[0]}") from error
        config_checks.check(changed)
        eval_sources = (eval_set.source for eval_set in changed.eval.sets.values())
        for source in (changed.data.train, changed.sft.train, *eval_sources):
            if source:  # sft.train may be empty
                load(source)
