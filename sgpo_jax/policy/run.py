"""A run: what it does, where it writes, with which model, on which devices."""

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax.policy.policy import Policy


@dataclass(frozen=True)
class Run:
    """What every stage of a run needs; the parameters travel apart."""

    config: ConfigDict
    workdir: Path
    policy: Policy
    mesh: Mesh
