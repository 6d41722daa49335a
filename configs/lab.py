"""The paper's comparisons on the embedded world, on two CPU cores.

    sgpo lab --config=configs/lab.py --workdir=/tmp/lab [--fast]

All methods are tuned alike and run with five seeds. Some also run in other worlds. Worlds differ in how competent the
base model is (`preference`, `known`), how many methods compete at a stage, how long the chains are, how often a
strategy is wrong (`noise`), how solutions are worded, and how many RL steps there are.
"""

from ml_collections import ConfigDict

from sgpo_jax import config as configs

STEPS = 450  # steps of the warm-up


def world(
    preference: float = 0.65,
    competing: int = 2,
    stages: int = 3,
    noise: float = 0.0,
    writing: float = 0.0,
    steps: int = 30,
    known: float = 0.0,
    wording: str = "plain",
) -> dict:
    """Returns the changes of the config that define a world.

    Args:
      preference: probability that the base model chooses the right method at a stage.
      competing, stages, noise: as in `arithmetic.problems`.
      writing: share of the warm-up's rows that teach to write strategies; the number of other rows stays the same.
      steps: RL steps. After 30 steps methods still differ in a world with a good base; later all solve most problems.
      known: share of the problem types that the base model knows already.
      wording: of the solutions; a name in `data.generators.wording.WORDINGS`.
    """
    size = f"competing={competing},stages={stages}"
    if known or wording != "plain":
        return _worded(preference, size, noise, steps, known, wording)
    sft = {"train": f"arithmetic:pretraining,count={round(12000 / (1 - writing))},preference={preference},{size}"}
    if writing:
        sft = {"train": f"{sft['train']},writing={writing}", "steps": round(STEPS / (1 - writing))}
    return {
        "sft": sft,
        "data": {"train": f"arithmetic:train,count=1024,noise={noise},{size}"},
        "rl": {"steps": steps},
        "eval": {"sets": {"heldout": {"source": f"arithmetic:eval,count=256,{size}"}}},
    }


def corrected(carry_over: float) -> dict:
    """Returns the changes for four-methods with importance weights, and fewer slots than responses."""
    changes = world(competing=4, preference=0.4, steps=120)
    changes["rl"] |= {"importance": "token", "draft": 4, "slots": 64, "carry_over": carry_over}
    return changes


def _worded(preference: float, size: str, noise: float, steps: int, known: float, wording: str) -> dict:
    """Returns the changes for a world with words of its own: its vocabulary is that of its rows."""
    size, longest = f"{size},wording={wording}", 40
    base = f"arithmetic:pretraining,count=12000,preference={preference},known={known},{size}"
    problems = f"arithmetic:train,count=1024,noise={noise},{size}"
    return {
        "model": {"tokenizer": f"words:{base};{problems}"},
        "sft": {"train": base, "max_response_tokens": longest},
        "data": {"train": problems},
        "rl": {"steps": steps, "max_new_tokens": longest},
        "eval": {"sets": {"heldout": {"source": f"arithmetic:eval,count=256,{size}"}}, "max_new_tokens": longest},
    }


def get_config() -> ConfigDict:
    # Micro-batches of 16 fit into a core's caches and are three times as fast as those of 64.
    config = configs.scratch("arithmetic", "", 4, prompt_tokens=64, response_tokens=28, micro_batch=16)
    config.model.layers = 2
    config.model.hidden = 64
    config.model.heads = 4
    config.model.mlp = 192

    config.sft.batch = 128
    config.sft.steps = STEPS
    config.sft.learning_rate = 4e-3
    config.sft.validation_share = 0.02
    config.sft.validate_every = 150

    config.rl.batch = 16
    config.rl.learning_rate = 2e-4
    config.rl.kl_top_k = 4  # of a vocabulary of 126

    config.checkpoint.every = 1000  # a run takes a minute, so only its end is saved

    config.update(world())
    config.lab.rates = (0.5, 1.0, 2.0, 4.0)
    config.lab.world_methods = ("grpo", "sgpo", "no_kl_clip", "direct_sft")
    # The methods of all worlds come first: a figure's first colours are the strong ones.
    others = (
        "luffy", "hpt", "no_grpo", "no_proximal", "no_target_selection", "fixed_weight", "group_advantage_weight",
        "reverse_kl", "jensen_shannon", "top_k_kl",
    )  # fmt: skip
    config.lab.methods = ("sft", *config.lab.world_methods, *others)
    with config.unlocked():
        config.lab.changes = ConfigDict(
            {
                "base": {},
                "weak-base": world(preference=0.5, steps=120),
                "four-methods": world(competing=4, preference=0.4, steps=120),
                "rare-success": world(competing=4, preference=0.3, steps=120),
                "noisy-strategies": world(noise=0.3),
                "two-stages": world(stages=2),
                # Only a student that was taught to write strategies can learn from its own.
                "self-written": world(writing=0.2),
                # Four methods, in each with another part of a method that has something to do.
                "spread-decisions": world(competing=4, preference=0.4, steps=120, wording="spread"),
                "several-ways": world(competing=4, preference=0.4, steps=120, wording="ways"),
                "mentions": world(competing=4, preference=0.4, steps=120, wording="mention"),
                "foreign-expert": world(competing=4, preference=0.4, steps=120, wording="foreign"),
                "half-known": world(competing=4, preference=0.3, steps=120, known=0.5, noise=0.3),
                # four-methods, with steps that wait for their longest responses, and with steps that do not.
                "waits": corrected(carry_over=0.0),
                "goes-on": corrected(carry_over=1.0),
            }
        )
        config.lab.fast = ConfigDict(
            {
                "lab": {
                    # The rate is not tuned with --fast. For these methods it is close to the best one.
                    "methods": ("sft", "grpo", "luffy", "sgpo", "direct_sft"),
                    "world_methods": ("grpo", "sgpo", "direct_sft"),
                    "seeds": (0, 1),
                    "rates": (2.0,),
                    "worlds": ("base", "four-methods"),
                },
            }
        )
    # docs/lab.md has the commands for the others.
    config.lab.worlds = ("base", "weak-base", "four-methods", "rare-success", "noisy-strategies", "two-stages")
    return config
