"""A language model trained from scratch and improved by SGPO in a few minutes on two CPU cores.

    python -m sgpo_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart

The embedded world (sgpo_jax/data/generators/arithmetic.py): 64 types of three-step digit arithmetic whose methods a problem
does not show. The warm-up makes a base model that can calculate and follow a strategy, but only weakly prefers the
right methods; SGPO then makes it solve the problems without strategies.
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import methods


def get_config(method: str = "sgpo") -> ConfigDict:
    config = configs.base()
    config.model.source = "scratch"
    config.model.tokenizer = "arithmetic"
    config.model.layers = 2
    config.model.hidden = 96
    config.model.heads = 4
    config.model.mlp = 256
    config.model.dtype = "float32"
    config.model.remat = "full"  # recomputing is faster than storing here

    config.data.train = "arithmetic:train,count=4096"
    config.data.instruction = ""
    config.data.max_prompt_tokens = 64

    config.optimizer.b2 = 0.95  # a few hundred steps are too short for 0.999

    config.sft.train = "arithmetic:pretraining,count=20000,preference=0.65"
    config.sft.use_strategy = True
    config.sft.batch = 128
    config.sft.steps = 320
    config.sft.learning_rate = 3e-3
    config.sft.max_response_tokens = 28
    config.sft.validation_share = 0.01
    config.sft.validate_every = 80
    config.sft.micro_batch = 16

    config.rl.batch = 32
    config.rl.steps = 50
    config.rl.learning_rate = 2e-4
    config.rl.max_new_tokens = 28
    config.rl.micro_batch = 16

    with config.unlocked():
        config.eval.sets.heldout = ConfigDict({"source": "arithmetic:eval,count=512", "samples": 4})
    config.eval.guided = True
    config.eval.batch = 128
    config.eval.temperature = 1.0
    config.eval.top_p = 0.95
    config.eval.max_new_tokens = 28

    config.checkpoint.every = 25
    return methods.select(config, method)
