"""The paper's recipe for Qwen2.5-1.5B-Instruct: average of the four sets 23.2 before, 29.9 after.

    sgpo train --config=configs/qwen1p5b.py --workdir=DIR

It reads data/train.jsonl (id, problem, answer, solution, strategy) and data/{math500,amc23,olympiadbench,aime24}.jsonl
(id, problem, answer). To read other files: --config.data.train=... and --config.eval.sets.MATH500.source=...
`:h100x8` or `:h100x32` after the file's name makes it fit 8 or 32 H100 (docs/gpus.md). `:lora` trains adapters over a
base in nf4, on one card of 24 GB (docs/lora.md).
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import methods

# Fields with which the run fits, according to the plans in benchmarks/plans.
CARDS = {
    "h100x8": {"rl.slots": 512, "eval.slots": 256},
    "h100x32": {"rl.slots": 1536, "eval.slots": 1024},
    # Smaller batches, which one card can sample, and ten times the rates: adapters need larger ones.
    "lora": {
        "lora.rank": 64, "lora.alpha": 128.0, "lora.base_dtype": "nf4", "mesh.tensor": 1,
        "sft.batch": 16, "sft.micro_batch": 2, "sft.learning_rate": 1e-4,
        "rl.batch": 16, "rl.micro_batch": 2, "rl.slots": 20, "rl.learning_rate": 1e-5,
        "eval.batch": 16, "eval.slots": 10,
    },
}  # fmt: skip


def get_config(choice: str = "sgpo") -> ConfigDict:
    config = configs.paper("Qwen/Qwen2.5-1.5B-Instruct", tensor=2)
    config.eval.max_new_tokens = 32_768 - 1024  # the paper's 32,768 less a prompt: the model has 32,768 positions
    return methods.select(config, choice, CARDS)
