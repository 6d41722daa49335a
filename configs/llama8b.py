"""The paper's recipe for the 8B Llama, here 3.1 (there is no 3.2-8B): average 20.4 before, 27.6 after.

    sgpo train --config=configs/llama8b.py --workdir=DIR

It reads data/train.jsonl (id, problem, answer, solution, strategy) and data/{math500,amc23,olympiadbench,aime24}.jsonl
(id, problem, answer). To read other files: --config.data.train=... and --config.eval.sets.MATH500.source=...
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import methods


def get_config(method: str = "sgpo") -> ConfigDict:
    return methods.select(configs.paper("meta-llama/Llama-3.1-8B-Instruct", tensor=4), method)
