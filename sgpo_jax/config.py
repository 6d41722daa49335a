"""The configuration: every field with its unit and source, and what a resumed run may change of it.

A file in `configs/` takes `base()`, changes what it needs and returns it; the command line overrides single fields with
`--config.rl.batch=64`. Sections and equations are those of arXiv 2606.24064.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

STAGES = ("sft", "rl", "eval")
# What a resumed run may have changed: how far, how often and where it runs, and how it is evaluated.
MAY_CHANGE = (
    "stages", "grace", "max_skipped", "report_seconds", "rl.steps", "rl.epochs", "rl.eval_every", "monitor", "eval",
    "checkpoint", "mesh", "extract", "lab",
)  # fmt: skip


def base() -> ConfigDict:
    """The paper's recipe, with empty model and data; locked, so that a field that is not here is an error."""
    config = ConfigDict()
    config.seed = 0  # every random number of the run derives from it
    config.stages = STAGES  # stages to run, in this order
    config.grace = 30.0  # seconds after SIGTERM in which a run ends its step and saves
    config.max_skipped = 3  # non-finite updates in a row that stop the run
    config.report_seconds = 60.0  # between two versions of report.html during a run; 0 writes it at the end alone

    config.model = ConfigDict()
    config.model.source = ""  # Hugging Face folder or hub id, a .gguf file, "smollm2", or "scratch"
    # The same choices; "arithmetic"; or "words:SOURCE", every word of the problems, strategies and solutions of a
    # source as in data.train, others being <unk>. "" takes the model's own.
    config.model.tokenizer = ""
    config.model.layers = 2  # shape of a model from scratch; ignored otherwise
    config.model.hidden = 96
    config.model.heads = 4
    config.model.mlp = 256
    config.model.dtype = "bfloat16"  # of activations and matrix products; parameters are always float32
    # What a layer computes again in the backward pass: "full" everything, "attention" all but attention, "dots" all but
    # products with weights, "none" nothing.
    config.model.remat = "full"

    config.data = ConfigDict()
    config.data.train = ""  # problems with solutions and strategies: see data.load
    # Problems that are there twice, and those that share 13 words in a row with a problem of eval.sets, are counted and
    # named in any case. Several responses to one problem may be meant; training on what is evaluated never is.
    config.data.remove_duplicates = False
    config.data.decontaminate = True
    config.data.sft_share = 1 / 3  # share of the problems kept for the warm-up; Sec. 4.1
    config.data.instruction = "default"  # closing line of every prompt; "default" is prompts.INSTRUCTION
    config.data.max_prompt_tokens = 1024  # tokens; longer prompts are left out, and counted

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0  # global gradient norm
    config.optimizer.mu_dtype = "float32"  # of the first moment; "bfloat16" saves 2 bytes a parameter

    config.sft = ConfigDict()  # warm-up on expert responses; Sec. 4.1
    config.sft.train = ""  # its own rows; "" takes the sft_share of data.train
    config.sft.use_strategy = False  # show rows that have a strategy with it (the paper never does)
    config.sft.batch = 64  # responses per step
    config.sft.epochs = 10
    config.sft.steps = 0  # steps in all; 0 takes epochs
    config.sft.learning_rate = 1e-5
    config.sft.warmup_share = 0.1  # share of the steps
    config.sft.decay = "cosine"  # or "constant"; the paper does not say
    config.sft.max_response_tokens = 16384  # tokens; longer responses are left out, and counted
    config.sft.validation_share = 0.1  # share of the rows held out; the lowest loss on them starts RL
    config.sft.validate_every = 0  # steps; 0 is once an epoch
    config.sft.micro_batch = 64  # rows of packed responses whose activations are held at once, over all devices

    config.rl = ConfigDict()  # Algorithm 1
    config.rl.batch = 128  # problems per step (derived: the paper's curves end near step 440)
    config.rl.autonomous = 8  # G1, responses to the problem alone
    config.rl.guided = 4  # G2, responses to strategy and problem; 0 is GRPO
    config.rl.epochs = 10
    config.rl.steps = 0  # steps in all; 0 takes epochs
    config.rl.updates_per_batch = 1  # optimizer steps on each batch of rollouts
    config.rl.learning_rate = 1e-6
    config.rl.warmup_share = 0.0
    config.rl.decay = "constant"
    config.rl.temperature = 1.0
    config.rl.top_p = 0.95
    config.rl.top_k = 0  # 0 keeps the whole vocabulary
    config.rl.max_new_tokens = 16384  # tokens; a longer response is cut and scores 0
    config.rl.reward = ""  # "" is the verifier, else "module:function" with function(row, response) -> 0..1
    config.rl.slots = 0  # responses decoded at once, over all devices, of both groups; 0 is all. Changes no response
    config.rl.clip_low = 0.2  # Eq. 1
    config.rl.clip_high = 0.28  # Eq. 1
    config.rl.delta = 1.0  # nats; tokens with a larger KL are masked; Eq. 5
    config.rl.alpha0 = 0.5  # Eq. 6
    config.rl.gamma = 0.1  # Eq. 6
    config.rl.alpha_max = 0.8  # Eq. 6
    # What makes another method of it; methods.py has those that are compared. See batch.py and train_step.py.
    # "strategy": the data's; "self": the student writes it, from a correct response of its own; "demonstration": the
    # guided group is the expert's solution.
    config.rl.guide = "strategy"
    config.rl.self_tries = 8  # responses to each problem, before the first step, when guide is "self"
    config.rl.target = "reachable"  # Eq. 4; or "mean" over all correct guided responses; Eq. 2
    config.rl.distillation = "forward_kl"  # Eq. 3; or "reverse_kl", "jensen_shannon", "top_k_kl", "nll", "shaped"
    config.rl.beta = 0.5  # weight of the guided distribution in "jensen_shannon"; SDPO
    config.rl.kl_top_k = 100  # tokens that "top_k_kl" tells apart, the likeliest of the guided distribution; SDPO
    config.rl.advantage = "group"  # Eq. 1; or "mixed", "gated", "none"
    config.rl.weight = "adaptive"  # Eq. 6; or "fixed", "group_advantage" (Eq. 8), "mixed", "gated"
    config.rl.normaliser = "sequence"  # mean over a response's tokens; or "constant": their sum / max_new_tokens
    config.rl.entropy_bonus = 0.0  # coefficient of the mean entropy of responses
    config.rl.shaping = 0.1  # LUFFY's gamma
    config.rl.gate = 0.0  # HPT: mean reward up to which the demonstration takes over
    config.rl.sft_weight = 1.0  # HPT's weight of the demonstration
    config.rl.micro_batch = 64  # rows of packed responses whose activations are held at once, over all devices
    config.rl.eval_every = 0  # steps between evaluations during training; 0 is never

    config.monitor = ConfigDict()  # signs of a collapse during RL, each a mean over the last `window` steps
    config.monitor.window = 10  # steps
    config.monitor.least_entropy = 0.005  # nats per token
    config.monitor.least_length = 2.0  # tokens of a response
    config.monitor.most_truncated = 0.9  # share of responses cut at the limit
    config.monitor.most_identical = 0.98  # share of problems whose responses are all the same
    config.monitor.most_clipped = 0.5  # share of the targets' tokens whose KL is clipped
    config.monitor.action = "warn"  # or "stop", after a checkpoint; or "rollback": on from before it, on other batches
    config.monitor.most_rollbacks = 3  # after so many the next sign stops the run

    config.eval = ConfigDict()
    config.eval.sets = ConfigDict()  # name -> ConfigDict(source=..., samples=k), k responses per problem for avg@k
    config.eval.guided = False  # also with the strategies, for rows that have one
    config.eval.batch = 64  # problems generated for at once
    config.eval.temperature = 0.6
    config.eval.top_p = 0.95
    config.eval.top_k = 0
    config.eval.max_new_tokens = 32768  # tokens
    config.eval.slots = 0  # as in rl

    config.extract = ConfigDict()  # strategies from expert responses, offline: Sec. 3.1, App. B, C
    config.extract.source = ""  # problems, with or without solutions: see data.load
    config.extract.problems = 0  # the first so many; 0 takes all
    config.extract.strong = _language_model()  # writes the strategies and scores them
    config.extract.judge = _language_model()  # rates what was kept, with --audit; App. H
    config.extract.expert_tries = 4  # responses asked for where there is no solution; 0 leaves such problems out
    config.extract.candidates = 5  # K, strategies asked for; App. B
    config.extract.choices = 1  # strategies asked for in one request; for more, the server must know "n"
    config.extract.score_tries = 3  # scorings (or ratings) asked for until one can be read
    config.extract.temperature = 0.6  # the paper does not say; what DeepSeek-R1's authors advise
    config.extract.top_p = 0.95
    config.extract.max_expert_tokens = 16384  # tokens of a solution, thought included
    config.extract.max_strategy_tokens = 8192  # tokens of a strategy, thought included
    config.extract.max_score_tokens = 8192  # tokens of a scoring, thought included
    config.extract.max_prompt_tokens = 4096  # tokens; for a local model only
    config.extract.concurrency = 16  # problems worked on at once; for a local model also its batch
    config.extract.timeout = 600.0  # seconds for one request
    config.extract.retries = 6  # of one request, after rate limits, server errors and timeouts
    config.extract.backoff = 1.0  # seconds before the first retry; doubles
    config.extract.max_failures = 20  # problems in a row left open by failing requests, which stop the command
    config.extract.budget_tokens = 0  # prompt and reply tokens of all runs together; 0 is no limit
    config.extract.budget_cost = 0.0  # the same in the currency of the prices
    config.extract.audit_sample = 500  # kept strategies that are rated; App. H

    config.lab = ConfigDict()  # methods against each other: lab.py
    config.lab.methods = ()  # names of methods.METHODS
    config.lab.seeds = (0, 1, 2, 3, 4)  # of a method's training runs; each takes the place of `seed`
    config.lab.rates = (0.5, 1.0, 2.0)  # times a method's learning rate; the best on the tuning seeds is taken
    config.lab.tuning_seeds = (100,)
    config.lab.changes = ConfigDict({"base": {}})  # name of a world -> changes of the config that make it
    config.lab.worlds = ("base",)  # names; all methods are run in the first
    config.lab.world_methods = ("grpo", "sgpo")  # in the other worlds
    config.lab.workers = 2  # processes with a core each; 0 runs in one process, on the whole mesh
    config.lab.fast = ConfigDict()  # changes of the config with --fast

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 20  # steps
    config.checkpoint.keep = 2  # latest ones; the best is kept besides
    config.checkpoint.stop_on_error = True  # when one cannot be saved (full disk); else the run says so and goes on

    config.mesh = ConfigDict()  # sizes multiply to the number of devices; one may be -1
    config.mesh.data = 1  # copies of the parameters
    config.mesh.fsdp = -1  # ways the parameters, and the rows of a batch, are split
    config.mesh.tensor = 1  # ways heads, MLP and vocabulary are split
    return config.lock()


def _language_model() -> ConfigDict:
    """A model that strategies are extracted with."""
    model = ConfigDict()
    model.engine = "endpoint"  # OpenAI-compatible; or "local": in process, on our own engine
    model.name = ""  # the model's name at the endpoint, or as model.source; "" takes $OPENAI_MODEL
    model.base_url = ""  # of the endpoint, as in "https://api.example.com/v1"; "" takes $OPENAI_BASE_URL
    model.key_variable = "OPENAI_API_KEY"  # environment variable that holds the key; "" for a server without keys
    model.limit_field = "max_tokens"  # some models want "max_completion_tokens"
    model.price_in = 0.0  # per million prompt tokens
    model.price_out = 0.0  # per million reply tokens
    return model


def paper(model: str, tensor: int) -> ConfigDict:
    """`base()` for one of the paper's models, with the four benchmarks of Table 1 as local files.

    Args:
      model: Hugging Face hub id.
      tensor: ways to split heads, MLP and vocabulary.
    """
    config = base()
    config.model.source = model
    config.eval.slots = 512  # 32 long responses to each of 64 problems at once would not fit 256 chips of 16 GB
    config.data.train = "data/train.jsonl"
    config.mesh.tensor = tensor
    with config.unlocked():
        for name, samples in {"MATH500": 4, "AMC23": 32, "OlympiadBench": 4, "AIME24": 32}.items():
            config.eval.sets[name] = ConfigDict({"source": f"data/{name.lower()}.jsonl", "samples": samples})
    return config


def check_resume(config: ConfigDict, path: Path, only: Sequence[str] = ("",)) -> None:
    """Raises ValueError when a field that shapes results differs from what an earlier run wrote to `path`.

    Args:
      config: of this run.
      path: of the earlier run's config, as `to_json` wrote it; where there is none, all is well.
      only: what the fields that matter begin with.
    """
    if not path.is_file():
        return
    try:
        before, now = flat(json.loads(path.read_text(encoding="utf-8"))), flat(to_dict(config))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: is not the config of an earlier run ({error}); choose another --workdir") from error
    for field in sorted(before.keys() | now.keys()):
        free = any(field == name or field.startswith(name + ".") for name in MAY_CHANGE)
        if not free and field.startswith(tuple(only)) and before.get(field) != now.get(field):
            raise ValueError(
                f"config.{field}={now.get(field)!r}: the run in {path.parent} has {before.get(field)!r}; "
                "go on with the same value, or choose another --workdir"
            )


def to_json(config: ConfigDict) -> str:
    """Returns a config as the text of config.json."""
    return config.to_json_best_effort(indent=2) + "\n"


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns a config as plain data, as config.json has it: tuples are lists."""
    return json.loads(to_json(config))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, of a config as JSON has it."""
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields


def unknown_field(config: ConfigDict, arguments: Sequence[str]) -> str | None:
    """What is wrong with the first `--config.FIELD=value` among the arguments whose field does not exist, or None."""
    for argument in arguments:
        name, *path = argument.lstrip("-").partition("=")[0].split(".")
        if name != "config":
            continue
        node = config
        for depth, part in enumerate(path):
            if not isinstance(node, ConfigDict) or part not in node:
                where = ".".join([name, *path[:depth]])
                allowed = f"one of {', '.join(node)}" if isinstance(node, ConfigDict) else "nothing, it is a value"
                return f"{argument}: {where} has no field {part!r}; allowed: {allowed}"
            node = node[part]
    return None
