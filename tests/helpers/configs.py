"""Loads the files of configs/."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def load(file: Path) -> ConfigDict:
    """Returns the config of a file, without an argument."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
