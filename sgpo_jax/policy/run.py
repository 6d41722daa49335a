"""A run: its config, its folder, its model, its devices."""

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax.policy.policy import Policy


@dataclass(frozen=True)
class Run:
    """The parts of a run that every stage needs; the parameters are passed separately."""

    config: ConfigDict
    workdir: Path
    policy: Policy
    mesh: Mesh
