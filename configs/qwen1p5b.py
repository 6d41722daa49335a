"""The paper's recipe for Qwen2.5-1.5B-Instruct: average of the four sets 23.2 before, 29.9 after.

    sgpo train --config=configs/qwen1p5b.py --workdir=DIR

It reads data/train.jsonl (id, problem, answer, solution, strategy) and data/{math500,amc23,olympiadbench,aime24}.jsonl
(id, problem, answer). To read other files: --config.data.train=... and --config.eval.sets.MATH500.source=...
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import methods


def get_config(method: str = "sgpo") -> ConfigDict:
    config = configs.paper("Qwen/Qwen2.5-1.5B-Instruct", tensor=2)
    config.eval.max_new_tokens = 32_768 - 1024  # the paper's 32,768 less a prompt: the model has 32,768 positions
    return methods.select(config, method)
