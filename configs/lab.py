"""The paper's comparisons on the embedded world, on two CPU cores.

    python -m sgpo_jax.lab --config=configs/lab.py --workdir=/tmp/lab [--fast]

All methods, tuned alike, with five seeds; then some of them in other worlds: how competent the base is (`preference`),
how many methods compete at a stage, how long the chains are, how often a strategy is wrong (`noise`), and how long RL
goes on.
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax.methods import METHODS

STEPS = 450  # of the warm-up


def world(
    preference: float = 0.65,
    competing: int = 2,
    stages: int = 3,
    noise: float = 0.0,
    writing: float = 0.0,
    steps: int = 30,
) -> dict:
    """Changes of the config that make a world.

    Args:
      preference: the base's chance of the right method at a stage.
      competing, stages, noise: as in `arithmetic.problems`.
      writing: share of the warm-up's rows that teach to write strategies, beside as many others as without.
      steps: of RL. In 30 methods still differ where the base is good: later all of them solve most of it.
    """
    size = f"competing={competing},stages={stages}"
    sft = {"train": f"arithmetic:pretraining,count={round(12000 / (1 - writing))},preference={preference},{size}"}
    if writing:
        sft = {"train": f"{sft['train']},writing={writing}", "steps": round(STEPS / (1 - writing))}
    return {
        "sft": sft,
        "data": {"train": f"arithmetic:train,count=1024,noise={noise},{size}"},
        "rl": {"steps": steps},
        "eval": {"sets": {"heldout": {"source": f"arithmetic:eval,count=256,{size}"}}},
    }


def get_config() -> ConfigDict:
    config = configs.base()
    config.model.source = "scratch"
    config.model.tokenizer = "arithmetic"
    config.model.layers = 2
    config.model.hidden = 64
    config.model.heads = 4
    config.model.mlp = 192
    config.model.dtype = "float32"

    config.data.instruction = ""
    config.data.max_prompt_tokens = 64

    config.optimizer.b2 = 0.95  # a few hundred steps are too short for 0.999

    config.sft.use_strategy = True
    config.sft.batch = 128
    config.sft.micro_batch = 16  # three times as fast as 64: what a core holds in its caches
    config.sft.steps = STEPS
    config.sft.learning_rate = 4e-3
    config.sft.max_response_tokens = 28
    config.sft.validation_share = 0.02
    config.sft.validate_every = 150

    config.rl.batch = 16
    config.rl.micro_batch = 16
    config.rl.learning_rate = 2e-4
    config.rl.max_new_tokens = 28
    config.rl.kl_top_k = 4  # of the 126 of this world

    config.eval.guided = True
    config.eval.batch = 128
    config.eval.temperature = 1.0
    config.eval.max_new_tokens = 28
    config.checkpoint.every = 1000  # a run takes a minute: it is kept when it ends

    with config.unlocked():
        config.eval.sets.heldout = ConfigDict({"source": "", "samples": 4})
    config.update(world())
    config.lab.rates = (0.5, 1.0, 2.0, 4.0)
    config.lab.world_methods = ("grpo", "sgpo", "no_kl_clip", "direct_sft")
    # Those of all worlds first: the first colours of a figure are the strong ones.
    of_one_world = (name for name in METHODS if name not in ("self_strategies", "sft", *config.lab.world_methods))
    config.lab.methods = ("sft", *config.lab.world_methods, *of_one_world)
    with config.unlocked():
        config.lab.changes = ConfigDict(
            {
                "base": {},
                "weak-base": world(preference=0.5, steps=120),
                "four-methods": world(competing=4, preference=0.4, steps=120),
                "rare-success": world(competing=4, preference=0.3, steps=120),
                "noisy-strategies": world(noise=0.3),
                "two-stages": world(stages=2),
                "self-written": world(writing=0.2),
            }
        )
        config.lab.fast = ConfigDict(
            {
                "lab": {
                    # Those for which the one rate, which is not tuned here, is not far from their best.
                    "methods": ("sft", "grpo", "luffy", "sgpo", "direct_sft"),
                    "world_methods": ("grpo", "sgpo", "direct_sft"),
                    "seeds": (0, 1),
                    "rates": (2.0,),
                    "worlds": ("base", "four-methods"),
                },
            }
        )
    # Only a student that was taught to write strategies can learn from its own: docs/lab.md has the command.
    config.lab.worlds = tuple(name for name in config.lab.changes if name != "self-written")
    return config
