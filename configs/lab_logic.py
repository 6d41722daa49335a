"""GRPO and SGPO on logic puzzles from reasoning-gym, with a model from scratch that knows only the puzzles' words.

    sgpo lab --config=configs/lab_logic.py --workdir=/tmp/lab_logic

The puzzles are knights and knaves with two islanders, where one guess in four is right. Half of the warm-up's rows
show the strategy, so that the base model can read both prompts. The warm-up stops while many answers are still wrong.
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs

PUZZLES = "reasoning_gym:knights_knaves,n_people=2"


def get_config() -> ConfigDict:
    config = configs.scratch(
        f"words:{PUZZLES},count=2000", f"{PUZZLES},count=256,split=eval", 2,
        prompt_tokens=144, response_tokens=96, micro_batch=8,
    )  # fmt: skip
    config.model.layers = 3
    config.model.hidden = 64
    config.model.heads = 2
    config.model.mlp = 160
    config.model.remat = "none"

    config.data.train = f"{PUZZLES},count=1024,seed=1"
    config.data.decontaminate = False  # all puzzles share their wording; a hash of the text separates the splits

    config.sft.train = f"{PUZZLES},count=12000,seed=2,guided_share=0.5"
    config.sft.batch = 32
    config.sft.steps = 450
    config.sft.learning_rate = 3e-3
    config.sft.validation_share = 0.02
    config.sft.validate_every = 150

    config.rl.batch = 16
    config.rl.steps = 30
    config.rl.learning_rate = 1e-4

    config.checkpoint.every = 1000  # a run takes minutes, so only its end is saved

    config.lab.methods = ("sft", "grpo", "sgpo")
    config.lab.rates = (0.5, 1.0, 2.0, 4.0)
    config.lab.tuning_seeds = (100, 101, 102)  # a single seed chose too high a rate, once for each method
    return config
