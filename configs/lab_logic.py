"""GRPO and SGPO on puzzles of logic from reasoning-gym, with a model from scratch that knows their words only.

    python -m sgpo_jax.lab --config=configs/lab_logic.py --workdir=/tmp/lab_logic

Knights and knaves of two islanders: a guess is right in 1 of 4. Half of the warm-up's rows show the strategy, so
that the base can read both prompts; the warm-up ends while it still gets many of them wrong.
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs

PUZZLES = "reasoning_gym:knights_knaves,n_people=2"


def get_config() -> ConfigDict:
    config = configs.base()
    config.model.source = "scratch"
    config.model.tokenizer = f"words:{PUZZLES},count=2000"
    config.model.layers = 3
    config.model.hidden = 64
    config.model.heads = 2
    config.model.mlp = 160
    config.model.dtype = "float32"
    config.model.remat = "none"

    config.data.train = f"{PUZZLES},count=1024,seed=1"
    config.data.instruction = ""
    config.data.max_prompt_tokens = 144
    config.data.decontaminate = False  # all puzzles share their wording; a hash of the text keeps the splits apart

    config.optimizer.b2 = 0.95  # a few hundred steps are too short for 0.999

    config.sft.train = f"{PUZZLES},count=12000,seed=2,guided_share=0.5"
    config.sft.use_strategy = True
    config.sft.batch = 32
    config.sft.micro_batch = 8
    config.sft.steps = 450
    config.sft.learning_rate = 3e-3
    config.sft.max_response_tokens = 96
    config.sft.validation_share = 0.02
    config.sft.validate_every = 150

    config.rl.batch = 16
    config.rl.steps = 30
    config.rl.learning_rate = 1e-4
    config.rl.max_new_tokens = 96
    config.rl.micro_batch = 8

    config.eval.guided = True
    config.eval.batch = 128
    config.eval.temperature = 1.0
    config.eval.max_new_tokens = 96
    config.checkpoint.every = 1000  # a run takes minutes: it is kept when it ends

    with config.unlocked():
        config.eval.sets.heldout = ConfigDict({"source": f"{PUZZLES},count=256,split=eval", "samples": 2})
    config.lab.methods = ("sft", "grpo", "sgpo")
    config.lab.rates = (0.5, 1.0, 2.0, 4.0)
    config.lab.tuning_seeds = (100, 101, 102)  # one has chosen rates that were too high, once for either method
    return config
