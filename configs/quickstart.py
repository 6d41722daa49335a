"""A language model trained from scratch and improved by SGPO in a few minutes on two CPU cores.

    sgpo train --config=configs/quickstart.py --workdir=/tmp/quickstart

The problems are those of the embedded world (sgpo_jax/data/generators/arithmetic.py): 64 types of three-step digit
arithmetic, whose methods a problem does not show. The warm-up makes a base model that can calculate and follow a
strategy, but only weakly prefers the right methods. SGPO then teaches it to solve the problems without strategies.
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import methods


def get_config(method: str = "sgpo") -> ConfigDict:
    config = configs.scratch(
        "arithmetic", "arithmetic:eval,count=512", 4, prompt_tokens=64, response_tokens=28, micro_batch=16
    )
    config.model.layers = 2
    config.model.hidden = 96
    config.model.heads = 4
    config.model.mlp = 256
    config.model.remat = "full"  # on a CPU, recomputing is faster than storing

    config.data.train = "arithmetic:train,count=4096"

    config.sft.train = "arithmetic:pretraining,count=20000,preference=0.65"
    config.sft.batch = 128
    config.sft.steps = 320
    config.sft.learning_rate = 3e-3
    config.sft.validation_share = 0.01
    config.sft.validate_every = 80

    config.rl.batch = 32
    config.rl.steps = 50
    config.rl.learning_rate = 2e-4

    config.checkpoint.every = 25
    return methods.select(config, method)
