"""Loads the files of configs/, and makes configs for extractions and plans."""

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


def small_run(**changes) -> ConfigDict:
    """Returns the paper's config with batches of 8, prompts of 8 tokens and responses of 16, for plans."""
    config = configs.paper("", tensor=1)
    config.data.max_prompt_tokens = 8
    config.sft.batch = config.rl.batch = config.eval.batch = 8
    config.sft.max_response_tokens = config.rl.max_new_tokens = config.eval.max_new_tokens = 16
    config.update_from_flattened_dict(changes)
    return config
