"""The paper's recipe for Qwen2.5-7B-Instruct: average of the four sets 42.2 before, 52.1 after, on 32 GPUs in 17 h.

    sgpo train --config=configs/qwen7b.py --workdir=DIR

It reads data/train.jsonl (id, problem, answer, solution, strategy) and data/{math500,amc23,olympiadbench,aime24}.jsonl
(id, problem, answer). To read other files: --config.data.train=... and --config.eval.sets.MATH500.source=...
`:h100x8` or `:h100x32` after the file's name makes it fit 8 or 32 H100 (docs/gpus.md). `:lora` trains adapters, on one
H100, or with --config.mesh.tensor=4 --config.rl.slots=24 on v5e:2x4 or v6e:2x2 (docs/lora.md).
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import methods

# Fields with which the run fits, according to the plans in benchmarks/plans.
CARDS = {
    "h100x8": {"sft.micro_batch": 16, "rl.micro_batch": 16, "rl.slots": 256, "eval.slots": 128},
    "h100x32": {"rl.slots": 1024, "eval.slots": 512, "rl.decode_ways": (2,), "eval.decode_ways": (2,)},
    # Smaller batches, which one card can sample, and ten times the rates: adapters need larger ones.
    "lora": {
        "lora.rank": 64, "lora.alpha": 128.0, "lora.base_dtype": "bfloat16", "mesh.tensor": 1,
        "sft.batch": 16, "sft.micro_batch": 2, "sft.learning_rate": 1e-4,
        "rl.batch": 16, "rl.micro_batch": 2, "rl.slots": 20, "rl.learning_rate": 1e-5,
        "eval.batch": 16, "eval.slots": 12,
    },
}  # fmt: skip


def get_config(choice: str = "sgpo") -> ConfigDict:
    config = configs.paper("Qwen/Qwen2.5-7B-Instruct", tensor=4)
    config.eval.max_new_tokens = 32_768 - 1024  # the paper's 32,768 less a prompt: the model has 32,768 positions
    return methods.select(config, choice, CARDS)
