"""Extraction of strategies for data/problems.jsonl (id, problem, answer; solution where there is one): App. B and C.

    export OPENAI_BASE_URL=https://api.example.com/v1 OPENAI_MODEL=NAME OPENAI_API_KEY=...
    sgpo strategies --config=configs/strategies.py --workdir=DIR --to=data/train.jsonl

Any OpenAI-compatible endpoint works. Begin with a trial: --config.extract.problems=20. With prices (per million tokens)
the progress line shows the cost, and a budget limits all runs together:
--config.extract.strong.price_in=0.55 --config.extract.strong.price_out=2.19 --config.extract.budget_cost=20.
To use this package's engine: --config.extract.strong.engine=local --config.extract.strong.name=FOLDER.
Afterwards, --audit lets another model, --config.extract.judge.name=OTHER, rate a sample of the accepted strategies.
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs


def get_config() -> ConfigDict:
    config = configs.base()
    config.extract.source = "data/problems.jsonl"
    return config
