"""The paper's recipe for the 8B Llama, here 3.1 (there is no 3.2-8B): average 20.4 before, 27.6 after.

    sgpo train --config=configs/llama8b.py --workdir=DIR

It reads data/train.jsonl (id, problem, answer, solution, strategy) and data/{math500,amc23,olympiadbench,aime24}.jsonl
(id, problem, answer). To read other files: --config.data.train=... and --config.eval.sets.MATH500.source=...
`:h100x8` or `:h100x32` after the file's name makes it fit 8 or 32 H100 (docs/gpus.md).
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import methods

# Fields with which the run fits, according to the plans in benchmarks/plans.
CARDS = {
    "h100x8": {"mesh.tensor": 8, "sft.micro_batch": 16, "rl.micro_batch": 16, "rl.slots": 128, "eval.slots": 64},
    "h100x32": {"rl.slots": 512, "eval.slots": 256},
}


def get_config(choice: str = "sgpo") -> ConfigDict:
    return methods.select(configs.paper("meta-llama/Llama-3.1-8B-Instruct", tensor=4), choice, CARDS)
