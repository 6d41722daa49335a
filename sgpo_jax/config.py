"""The configuration: every field with its unit and source, and which fields a resumed run may change.

A file in `configs/` starts from `base()`, changes what it needs and returns the result. The command line overrides
single fields: `--config.rl.batch=64`. Sections, equations and tables are those of arXiv 2606.24064.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

STAGES = ("sft", "rl", "eval")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
# Fields and sections that a resumed run may change: how long, how often and where it runs, and how it is evaluated.
MAY_CHANGE = (
    "stages", "grace", "max_skipped", "report_seconds", "trackers", "profile", "rl.steps", "rl.epochs", "rl.eval_every",
    "rl.decode_ways", "rl.draft", "rl.pool_tokens", "monitor", "eval", "checkpoint", "mesh", "extract", "lab",
)  # fmt: skip
FREE = ("eval.sets", "lab.changes", "lab.fast")  # sections whose names the user chooses


def base() -> ConfigDict:
    """Returns the paper's recipe without a model and data. It is locked: setting an unknown field is an error."""
    config = ConfigDict()
    config.seed = 0  # seed of every random number in the run
    config.stages = STAGES  # stages to run, in this order
    config.grace = 30.0  # seconds after SIGTERM in which a run finishes its step and saves
    config.max_skipped = 3  # consecutive non-finite updates that stop the run
    config.report_seconds = 60.0  # between two updates of report.html during a run; 0 writes it only at the end
    config.trackers = ("tensorboard",)  # who gets the metrics: any of "tensorboard", "wandb", "mlflow", "trackio"
    config.profile = ()  # (first, last): a trace of these steps of each stage goes to STAGE/profile; () is none

    config.model = ConfigDict()
    config.model.source = ""  # Hugging Face folder or hub id, a .gguf file, "smollm2", or "scratch"
    # "" is the model's own tokenizer. Else a source as above; "arithmetic"; or "words:SOURCE": every word of the
    # problems, strategies and solutions of SOURCE (written as in data.train), any other word being <unk>.
    config.model.tokenizer = ""
    config.model.layers = 2  # shape of a model from scratch; unused for other sources
    config.model.hidden = 96  # width of the hidden states; from scratch only
    config.model.heads = 4  # attention heads; from scratch only
    config.model.mlp = 256  # width of the MLP; from scratch only
    config.model.dtype = "bfloat16"  # type of activations and matrix products; parameters are always float32
    # The backward pass computes again: everything ("full"), all but "attention", all but products ("dots"), or "none".
    config.model.remat = "full"

    config.lora = ConfigDict()  # adapters, y = x W + s (x A) B, which alone are trained: arXiv 2106.09685; docs/lora.md
    config.lora.rank = 0  # columns of A and rows of B; 0 trains all parameters
    config.lora.alpha = 32.0  # s is alpha / rank
    config.lora.rslora = False  # s is alpha / sqrt(rank); arXiv 2312.03732
    config.lora.targets = ".*"  # regular expression of whole names: which of q, k, v, o, gate, up, down have adapters
    config.lora.base_dtype = "float32"  # of the frozen ones; or "bfloat16", "int8", "nf4" (docs/lora.md)
    config.lora.start = ""  # folder of peft with the adapters to begin with; "" draws A, and B is 0

    config.data = ConfigDict()
    config.data.train = ""  # problems with solutions and strategies: see data.load
    config.data.remove_duplicates = False  # leave out repeated problems; False only counts and lists them
    config.data.decontaminate = True  # leave out problems that share 13 words in a row with eval.sets; False only lists
    config.data.sft_share = 1 / 3  # share of the problems used for the warm-up; Sec. 4.1
    config.data.instruction = "default"  # last line of every prompt; "default" is prompts.INSTRUCTION
    config.data.system = ""  # text of the system's turn before a prompt; "": none, or what the chat template puts in
    config.data.max_prompt_tokens = 1024  # tokens; longer prompts are left out and counted

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.b1 = 0.9  # decay rate of the first moment
    config.optimizer.b2 = 0.999  # decay rate of the second moment
    config.optimizer.eps = 1e-8  # added to the root of the second moment
    config.optimizer.weight_decay = 0.01  # decoupled, times the learning rate
    config.optimizer.clip_norm = 1.0  # global gradient norm
    config.optimizer.mu_dtype = "float32"  # type of the first moment; "bfloat16" saves 2 bytes per parameter

    config.sft = ConfigDict()  # warm-up on expert responses; Sec. 4.1
    config.sft.train = ""  # separate rows for the warm-up; "" takes the sft_share of data.train
    config.sft.use_strategy = False  # put a row's strategy in its prompt where it has one (never in the paper)
    config.sft.batch = 64  # responses per step
    config.sft.epochs = 10  # passes over the rows of the warm-up; unused if sft.steps is set
    config.sft.steps = 0  # total steps; 0 uses epochs
    config.sft.learning_rate = 1e-5  # the highest, after the rise and before the decay
    config.sft.warmup_share = 0.1  # share of the steps with a rising learning rate
    config.sft.decay = "cosine"  # or "constant"; not given in the paper
    config.sft.max_response_tokens = 16384  # tokens; longer responses are left out and counted
    config.sft.validation_share = 0.1  # share of the rows held out; RL starts from the checkpoint with the lowest loss
    config.sft.validate_every = 0  # steps; 0 validates once per epoch
    config.sft.micro_batch = 64  # rows of packed responses whose activations are in memory at once, over all devices

    config.rl = ConfigDict()  # Algorithm 1
    config.rl.batch = 128  # problems per step (derived: the paper's curves end near step 440)
    config.rl.autonomous = 8  # G1, responses to the problem alone
    config.rl.guided = 4  # G2, responses to strategy and problem; 0 is GRPO
    config.rl.epochs = 10  # passes over the problems; unused if rl.steps is set
    config.rl.steps = 0  # total steps; 0 uses epochs
    config.rl.updates_per_batch = 1  # optimizer steps on each batch of rollouts
    config.rl.learning_rate = 1e-6  # the highest, after the rise and before the decay
    config.rl.warmup_share = 0.0  # share of the steps with a rising learning rate
    config.rl.decay = "constant"  # or "cosine"
    config.rl.temperature = 1.0  # of the sampling in training
    config.rl.top_p = 0.95  # keep the likeliest tokens up to this probability; 1 keeps all
    config.rl.top_k = 0  # 0 keeps the whole vocabulary
    config.rl.max_new_tokens = 16384  # tokens; a longer response is cut and gets reward 0
    config.rl.reward = ""  # "" is the verifier, else "module:function" with function(row, response) -> 0..1
    config.rl.slots = 0  # responses decoded at once, over all devices and both groups; 0 is all. No effect on responses
    config.rl.draft = 0  # most tokens of a response that are drafted for a pass; 0 is off. No effect on responses
    config.rl.pool_tokens = 0  # of one cache that slots share, over all devices; 0: each slot has a whole one
    config.rl.carry_over = 0.0  # problems that go on in the next step, off-policy: share of rl.batch; docs/models.md
    config.rl.carry_most = 2  # steps in which a problem goes on at most; for rl.carry_over
    config.rl.rollout_weights = ""  # type of kernels in sampling: "" is model.dtype; "int8" also needs rl.importance
    config.rl.rollout_cache = ""  # type of keys and values in sampling: as above; not on TPUs
    # Ways that split the weights in each stage of decoding, times mesh.tensor: ascending numbers from 1, one divisor of
    # mesh.data * mesh.fsdp * mesh.context, and that product. A stage has a quarter of the slots of the one before.
    config.rl.decode_ways = (1,)
    config.rl.clip_low = 0.2  # Eq. 1
    config.rl.clip_high = 0.28  # Eq. 1
    config.rl.delta = 1.0  # nats; tokens with a larger KL are masked; Eq. 5
    # What delta does to a token whose KL is above it: "mask" drops it; "scale" gives it the weight delta / KL; "none".
    config.rl.token_rule = "mask"
    config.rl.delta_quantile = 0.0  # above 0: delta is this quantile of the KLs of a batch's target tokens
    # Whose parameters the guided side has: "live" the student's, under stop-gradient, as published; "frozen" those that
    # RL began with; "ema" a moving average; "trust_region" logits between the frozen ones and the student's; "gated"
    # frozen, and taken from the student again when the reward has risen. docs/methods.md has the equations.
    config.rl.teacher = "live"
    config.rl.teacher_rate = 0.05  # part of the student in "ema", at each step, and in "trust_region"; SDPO
    config.rl.teacher_dtype = "float32"  # of a teacher's own parameters; "bfloat16" halves their memory
    config.rl.teacher_window = 10  # steps; a "gated" teacher is considered at the end of each
    config.rl.teacher_margin = 0.01  # reward by which a window must be above the one of the last refresh; "gated"
    config.rl.alpha0 = 0.5  # Eq. 6
    config.rl.gamma = 0.1  # Eq. 6
    config.rl.alpha_max = 0.8  # Eq. 6
    # The fields from here to sft_weight turn SGPO into other methods: methods.py has those that are compared.
    # Where the guided group comes from: "strategy" is the data's; with "self" the student writes the strategy from one
    # of its own correct responses; with "demonstration" the group is the expert's solution. For target "own" the hint
    # may also be the data's "solution", or a "sibling", another correct response to the problem.
    config.rl.guide = "strategy"
    config.rl.self_tries = 8  # responses to each problem before the first step; for guide "self"
    # "reachable": Eq. 4; "mean" over all correct guided responses, Eq. 2; "own": the student's autonomous responses,
    # as the guided side sees them; then no guided group is sampled.
    config.rl.target = "reachable"
    config.rl.distillation = "forward_kl"  # Eq. 3; or "reverse_kl", "jensen_shannon", "top_k_kl", "nll", "shaped"
    config.rl.beta = 0.5  # weight of the guided distribution in "jensen_shannon"; SDPO
    config.rl.kl_top_k = 100  # likeliest guided tokens; "top_k_kl" treats all others as one token; SDPO
    config.rl.advantage = "group"  # Eq. 1; or "centred" (Dr. GRPO), "mixed", "gated", "none"
    config.rl.weight = "adaptive"  # Eq. 6; or "fixed", "group_advantage" (Eq. 8), "mixed", "gated"
    # "sequence": mean over a response's tokens, then over responses; "tokens": mean over all tokens of a batch (DAPO);
    # "constant": sum over a response's tokens / max_new_tokens, mean over responses (Dr. GRPO).
    config.rl.normaliser = "sequence"
    config.rl.surrogate = "clipped"  # Eq. 1; or "sequence" (GSPO), "cispo" (CISPO)
    config.rl.entropy_bonus = 0.0  # coefficient of the mean entropy of the responses
    config.rl.importance = "none"  # weight trainer / sampler probability: of each "token", of the whole "sequence"
    config.rl.importance_cap = 2.0  # largest weight
    config.rl.importance_rule = "truncate"  # weights above the cap become the cap; or "mask": they become 0
    config.rl.overlong_buffer = 0  # tokens before max_new_tokens over which a penalty of length grows; 0 is none; DAPO
    config.rl.overlong_penalty = 1.0  # subtracted from the reward of a response at the limit; DAPO
    config.rl.resample = 0  # rounds that replace problems whose autonomous responses all have one reward; DAPO
    config.rl.mask_cut = False  # responses that are cut at max_new_tokens have advantage 0; DAPO
    config.rl.guided_grpo = 0.0  # coefficient of the policy loss of the guided responses, after their guided prompts
    config.rl.reference_kl = 0.0  # coefficient of KL(policy || policy that RL began with)
    config.rl.reference_kl_kind = "k3"  # estimate from the sampled tokens; or "full": over the vocabulary
    config.rl.reference_kl_on = "guided"  # responses to guided prompts; or "all"
    config.rl.shaping = 0.1  # gamma of LUFFY
    config.rl.gate = 0.0  # largest mean reward at which HPT trains on the demonstration
    config.rl.sft_weight = 1.0  # weight of the demonstration in HPT
    config.rl.micro_batch = 64  # rows of packed responses whose activations are in memory at once, over all devices
    config.rl.share_prompt = 1  # longest responses that a row of the update has room for after one copy of their prompt
    config.rl.eval_every = 0  # steps between evaluations during training; 0 is never

    config.monitor = ConfigDict()  # limits that show a collapse during RL, each for a mean over the last `window` steps
    config.monitor.window = 10  # steps
    config.monitor.least_entropy = 0.005  # nats per token
    config.monitor.least_length = 2.0  # tokens per response
    config.monitor.most_truncated = 0.9  # share of responses cut at max_new_tokens
    config.monitor.most_identical = 0.98  # share of problems whose responses are all identical
    config.monitor.most_clipped = 0.5  # share of the targets' tokens whose KL is above delta
    config.monitor.least_guidance = -0.3  # reward of the guided group minus that of the autonomous one
    config.monitor.most_forgotten = 0.5  # fall of the guided group's reward since the first window
    config.monitor.most_lost = 0.5  # fall of the share of problems with a correct autonomous response, pass@G1
    # At a collapse: "warn"; "stop" after a checkpoint; "rollback" to one from before the window, with other batches.
    config.monitor.action = "warn"
    config.monitor.most_rollbacks = 3  # rollbacks after which the next collapse stops the run

    config.eval = ConfigDict()
    config.eval.sets = ConfigDict()  # name -> ConfigDict(source=..., samples=k), k responses per problem for avg@k
    config.eval.limit = 0  # first problems of each set that are evaluated; 0 is all
    config.eval.guided = False  # also evaluate with the strategy in the prompt, on rows that have one
    config.eval.batch = 64  # problems per generation batch
    config.eval.temperature = 0.6  # 0 takes the likeliest token
    config.eval.top_p = 0.95  # keep the likeliest tokens up to this probability; 1 keeps all
    config.eval.top_k = 0  # 0 keeps the whole vocabulary
    config.eval.max_new_tokens = 32768  # tokens; a longer response is cut and gets reward 0
    config.eval.slots = 0  # responses decoded at once, over all devices; 0 is all. No effect on responses
    config.eval.draft = 0  # as in rl
    config.eval.decode_ways = (1,)  # as in rl

    config.extract = ConfigDict()  # strategies from expert responses, offline: Sec. 3.1, App. B, C
    config.extract.source = ""  # problems, with or without solutions: see data.load
    config.extract.problems = 0  # number of problems, from the first; 0 is all
    config.extract.strong = _language_model()  # writes the strategies and scores them
    config.extract.judge = _language_model()  # rates accepted strategies with --audit; App. H
    config.extract.expert_tries = 4  # responses requested for a problem without solution; 0 leaves such problems out
    config.extract.candidates = 5  # K, strategies requested per problem; App. B
    config.extract.choices = 1  # strategies per request; above 1 the server must support "n"
    config.extract.score_tries = 3  # requests for a score or rating until one can be parsed
    config.extract.temperature = 0.6  # not given in the paper; recommended by DeepSeek-R1's authors
    config.extract.top_p = 0.95  # of the strong model's sampling
    config.extract.max_expert_tokens = 16384  # tokens of a solution, including its thought
    config.extract.max_strategy_tokens = 8192  # tokens of a strategy, including its thought
    config.extract.max_score_tokens = 8192  # tokens of a score, including its thought
    config.extract.max_prompt_tokens = 4096  # tokens; for a local model only
    config.extract.concurrency = 16  # problems in progress at once; for a local model also its batch
    config.extract.timeout = 600.0  # seconds per request
    config.extract.retries = 6  # retries of a request after a rate limit, server error or timeout
    config.extract.backoff = 1.0  # seconds before the first retry; doubles each time
    config.extract.max_failures = 20  # consecutive problems with failed requests that stop the command
    config.extract.budget_tokens = 0  # prompt and reply tokens of all runs together; 0 is no limit
    config.extract.budget_cost = 0.0  # cost of all runs together, in the currency of the prices; 0 is no limit
    config.extract.audit_sample = 500  # accepted strategies to rate; App. H

    config.lab = ConfigDict()  # comparison of methods over seeds and worlds: sgpo lab
    config.lab.methods = ()  # names from methods.METHODS
    config.lab.seeds = (0, 1, 2, 3, 4)  # seeds of a method's training runs; each replaces `seed`
    config.lab.rates = (0.5, 1.0, 2.0)  # factors of a method's learning rate; the tuning seeds choose the best
    config.lab.tuning_seeds = (100,)  # seeds of the runs that tune the learning rate
    config.lab.changes = ConfigDict({"base": {}})  # name of a world -> changes of the config that define it
    config.lab.worlds = ("base",)  # names from `changes`; all methods run in the first
    config.lab.world_methods = ("grpo", "sgpo")  # methods that run in the other worlds
    config.lab.workers = 2  # processes with one core each; 0 runs everything in one process, on the whole mesh
    config.lab.fast = ConfigDict()  # changes of the config for --fast

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 20  # steps
    config.checkpoint.keep = 2  # latest checkpoints to keep, in addition to the best
    config.checkpoint.stop_on_error = True  # stop when saving fails (full disk); False warns and continues

    config.mesh = ConfigDict()  # sizes whose product is the number of devices; one may be -1
    config.mesh.data = 1  # copies of the parameters
    config.mesh.fsdp = -1  # ways to split the parameters and the rows of a batch
    config.mesh.context = 1  # ways to split parameters and rows too, but in training the tokens of each row
    config.mesh.tensor = 1  # ways to split heads, MLP and vocabulary
    return config.lock()


def _language_model() -> ConfigDict:
    """Returns the fields of a model that extracts or rates strategies."""
    model = ConfigDict()
    model.engine = "endpoint"  # an OpenAI-compatible server; or "local": this package's engine, in process
    model.name = ""  # the model's name at the endpoint, or as model.source; "" takes $OPENAI_MODEL
    model.base_url = ""  # URL of the endpoint, such as "https://api.example.com/v1"; "" takes $OPENAI_BASE_URL
    model.key_variable = "OPENAI_API_KEY"  # environment variable that holds the key; "" for a server without keys
    model.limit_field = "max_tokens"  # some models require "max_completion_tokens"
    model.price_in = 0.0  # per million prompt tokens
    model.price_out = 0.0  # per million reply tokens
    return model


def paper(model: str, tensor: int) -> ConfigDict:
    """Returns `base()` for one of the paper's models, with the four benchmarks of Table 1 as local files.

    Args:
      model: Hugging Face hub id.
      tensor: ways to split heads, MLP and vocabulary.
    """
    config = base()
    config.model.source = model
    config.eval.slots = 512  # 64 problems with 32 long responses each do not fit on 256 chips of 16 GB
    config.data.train = "data/train.jsonl"
    config.mesh.tensor = tensor
    with config.unlocked():
        for name, samples in {"MATH500": 4, "AMC23": 32, "OlympiadBench": 4, "AIME24": 32}.items():
            config.eval.sets[name] = ConfigDict({"source": f"data/{name.lower()}.jsonl", "samples": samples})
    return config


def scratch(
    tokenizer: str, heldout: str, samples: int, *, prompt_tokens: int, response_tokens: int, micro_batch: int
) -> ConfigDict:
    """Returns `base()` for a small model trained from scratch and evaluated on one set, both in minutes on a CPU.

    The training data, the number of steps and the learning rates remain to be set. `methods.select` and single fields
    change the rest.

    Args:
      tokenizer: as model.tokenizer.
      heldout: source of the evaluation set, which is named "heldout".
      samples: responses per problem of that set.
      prompt_tokens: longest prompt.
      response_tokens: longest response, in every stage.
      micro_batch: rows per micro-batch, in both training stages.
    """
    config = base()
    config.model.source, config.model.tokenizer = "scratch", tokenizer
    config.model.dtype = "float32"
    config.data.instruction = ""
    config.data.max_prompt_tokens = prompt_tokens
    config.optimizer.b2 = 0.95  # a few hundred steps are too short for 0.999
    config.sft.use_strategy = True  # else a model from scratch could not read a guided prompt
    config.sft.max_response_tokens = config.rl.max_new_tokens = config.eval.max_new_tokens = response_tokens
    config.sft.micro_batch = config.rl.micro_batch = micro_batch
    config.eval.guided = True
    config.eval.batch, config.eval.temperature = 128, 1.0
    with config.unlocked():
        config.eval.sets.heldout = ConfigDict({"source": heldout, "samples": samples})
    return config


def check_resume(config: ConfigDict, path: Path, only: Sequence[str] = ("",)) -> None:
    """Checks that a run resumes with the config it began with, except for the fields of MAY_CHANGE.

    Args:
      config: the config of this run.
      path: the file that `to_json` was written to when the run began. If it is absent, there is nothing to check.
      only: prefixes of the fields to compare.

    Raises:
      ValueError: a field differs, or the file is not a config.
    """
    if not path.is_file():
        return
    try:
        # A run that is older than a field had its default.
        before = flat(to_dict(base())) | flat(json.loads(path.read_text(encoding="utf-8")))
        now = flat(to_dict(config))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: is not the config of an earlier run ({error}); choose another --workdir") from error
    for field in sorted(before.keys() | now.keys()):
        may_change = any(field == name or field.startswith(name + ".") for name in MAY_CHANGE)
        if not may_change and field.startswith(tuple(only)) and before.get(field) != now.get(field):
            raise ValueError(
                f"config.{field}={now.get(field)!r}: the run in {path.parent} has {before.get(field)!r}; "
                "resume with the same value, or choose another --workdir"
            )


def to_json(config: ConfigDict) -> str:
    """Returns a config as the text of config.json."""
    return config.to_json_best_effort(indent=2) + "\n"


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns a config as plain data, as in config.json: tuples become lists."""
    return json.loads(to_json(config))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {dotted name: value} of a config as `to_dict` returns it."""
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields


def from_json(path: Path) -> ConfigDict:
    """Reads the config of a run from its config.json; fields that the run did not have yet are at their defaults.

    Raises:
      ValueError: the file is not such a config.
    """
    config = base()
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        with config.unlocked():
            _fill(config, fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as the config of a run: {error}; give --config=FILE") from error
    return config.lock()


def _fill(config: ConfigDict, fields: dict[str, Any], section: str = "") -> None:
    """Sets fields to values from JSON; only the sections of FREE take new names."""
    for name, value in fields.items():
        field = f"{section}.{name}".removeprefix(".")
        if name not in config and not section.startswith(FREE):
            raise ValueError(f"config.{field}: is not a field{nearest(name, config)}")
        if isinstance(value, dict):
            if name not in config:
                config[name] = ConfigDict()
            _fill(config[name], value, field)
        else:
            config[name] = tuple(value) if isinstance(value, list) else value


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns a question about the one of the names that is most like a wrong one, or ""."""
    found = difflib.get_close_matches(name, [*names], n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def unknown_field(config: ConfigDict, arguments: Sequence[str]) -> str | None:
    """Returns a message about the first argument `--config.FIELD=value` whose field does not exist, or None."""
    for argument in arguments:
        name, *path = argument.lstrip("-").partition("=")[0].split(".")
        if name != "config":
            continue
        node = config
        for depth, part in enumerate(path):
            if not isinstance(node, ConfigDict) or part not in node:
                allowed = f"one of {', '.join(node)}" if isinstance(node, ConfigDict) else "nothing, it is a value"
                close = nearest(part, node) if isinstance(node, ConfigDict) else ""
                return f"{argument}: {'.'.join([name, *path[:depth]])} has no field {part!r}{close}; allowed: {allowed}"
            node = node[part]
    return None
