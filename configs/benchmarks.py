"""The paper's evaluation of any model: MATH500 and OlympiadBench avg@4, AMC23 and AIME24 avg@32.

    sgpo evaluate --config=configs/benchmarks.py --model=FOLDER --out=DIR
    sgpo evaluate --config=configs/benchmarks.py:FOLDER_OF_SETS --model=smollm2 --out=DIR --limit=20

The folder after the colon, by default data, holds math500.jsonl, amc23.jsonl, olympiadbench.jsonl and aime24.jsonl
(id, problem, answer). A set can come from another place: --config.eval.sets.MATH500.source=...
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs


def get_config(folder: str = "data") -> ConfigDict:
    config = configs.paper("", tensor=1)
    config.data.train = ""
    # The paper's 32,768 less a prompt: Qwen2.5 has 32,768 positions. A model with fewer needs a smaller number.
    config.eval.max_new_tokens = 32_768 - 1024
    for name, benchmark in config.eval.sets.items():
        benchmark.source = f"{folder}/{name.lower()}.jsonl"
    return config
