"""Loads the files of configs/, and makes the config of an extraction."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import config_checks


def load(file: Path) -> ConfigDict:
    """Returns the config of a file, without an argument."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def extraction(folder: Path, url: str, **fields) -> ConfigDict:
    """Returns the checked config of an extraction of `folder`/problems.jsonl by a model at `url`.

    `fields` are those of `config.extract`, by dotted names.
    """
    config = configs.base()
    chosen = {
        "source": str(folder / "problems.jsonl"), "strong.name": "big", "strong.base_url": url,
        "strong.price_in": 1.0, "strong.price_out": 2.0, "backoff": 0.01, "timeout": 5.0, "concurrency": 3,
    }  # fmt: skip
    config.extract.update_from_flattened_dict(chosen | fields)
    config_checks.check_extract(config)
    return config
