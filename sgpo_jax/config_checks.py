"""Checks configs before any device work. A ValueError names the field, its value and what is allowed."""

import os
import re
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax.config import FREE, STAGES, TRACKERS, base
from sgpo_jax.divergences import DIVERGENCES
from sgpo_jax.methods import METHODS
from sgpo_jax.sharding import BATCH, ROWS, axis_ways

_TYPES: dict[type, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "text"),
    tuple: (tuple | list, "a tuple"),
    ConfigDict: (ConfigDict, "a section with fields"),
}
_MOST = 2**31 - 1  # of counts and sizes, which become 32-bit numbers on a device


def check(config: ConfigDict) -> None:
    """Checks the config of a run, using neither a device nor the network.

    Raises:
      ValueError: a value is not allowed, or not in combination with another; the message names the field, its value and
        what is allowed.
    """
    _check_types(config, base())
    need, whole, within, positive, choice = _rules(config)
    stages = list(config.stages)
    ordered = [stage for stage in STAGES if stage in stages]
    need("stages", stages == ordered and bool(stages), f"one or more of {STAGES}, in that order")
    need("seed", 0 <= config.seed < 2**32, "between 0 and 2**32 - 1")
    positive("grace")
    whole(1, "max_skipped", "checkpoint.every", "checkpoint.keep")
    steps = config.profile
    ordered_steps = len(steps) == 2 and all(type(step) is int for step in steps) and 1 <= steps[0] <= steps[-1]
    need("profile", len(steps) == 0 or ordered_steps, "() or (first, last), steps counted from 1")
    names = list(config.trackers)
    known = all(name in TRACKERS for name in names) and len({*names}) == len(names)
    need("trackers", known, f"names from {TRACKERS}, each at most once")
    need("report_seconds", 0 <= config.report_seconds < float("inf"), "a finite number, at least 0")

    need("model.source", bool(config.model.source), "a folder, hub id, .gguf file, 'smollm2' or 'scratch'")
    if config.model.source == "scratch":
        need("model.tokenizer", bool(config.model.tokenizer), "set when model.source is 'scratch'")
        whole(1, "model.layers", "model.hidden", "model.heads", "model.mlp")
        multiple = 2 * config.model.heads
        need("model.hidden", config.model.hidden % multiple == 0, f"a multiple of 2 * model.heads = {multiple}")
    elif config.model.tokenizer.startswith("words:"):
        need("model.tokenizer", False, "'' or another tokenizer for a trained model.source")
    need("model.tokenizer", config.model.tokenizer.strip() != "words:", "words:SOURCE, with a source of problems")
    choice("model.dtype", "float32", "bfloat16")
    choice("model.remat", "full", "attention", "dots", "none")
    choice("optimizer.mu_dtype", "float32", "bfloat16")
    _check_lora(config, need, whole, positive, choice)
    if config.model.tokenizer == "arithmetic":
        need("data.instruction", config.data.instruction == "", "'': the embedded world's vocabulary has no other text")
    if config.model.tokenizer == "arithmetic" or config.model.tokenizer.startswith("words:"):
        need("data.system", config.data.system == "", "'': the vocabulary of this tokenizer has no system's turn")

    whole(1, "data.max_prompt_tokens")
    within(0.0, 1.0, "data.sft_share")
    for field in ("optimizer.b1", "optimizer.b2"):
        need(field, 0 <= _get(config, field) < 1, "at least 0 and below 1")
    within(0.0, 1.0, "optimizer.weight_decay")
    positive("optimizer.eps", "optimizer.clip_norm")

    for stage in ("sft", "rl"):
        if stage not in stages:
            continue
        whole(1, f"{stage}.batch", f"{stage}.micro_batch", f"{stage}.epochs")
        whole(0, f"{stage}.steps")
        positive(f"{stage}.learning_rate")
        within(0.0, 1.0, f"{stage}.warmup_share")
        choice(f"{stage}.decay", "constant", "cosine")
    if "sft" in stages:
        separate = bool(config.sft.train)
        need("sft.train", separate or bool(config.data.train), "set when data.train is empty")
        need("data.sft_share", separate or config.data.sft_share > 0, "above 0 when sft.train is empty")
        whole(1, "sft.max_response_tokens")
        whole(0, "sft.validate_every")
        share = config.sft.validation_share
        need("sft.validation_share", 0 < share < 1, "between 0 and 1, both excluded")
    if "rl" in stages:
        need("data.train", bool(config.data.train), "a source of problems: see data.load")
        whole(1, "monitor.window")
        whole(0, "monitor.least_entropy", "monitor.least_length")
        shares = ("truncated", "identical", "clipped", "forgotten", "lost")
        within(0.0, 1.0, *(f"monitor.most_{name}" for name in shares))
        within(-1.0, 1.0, "monitor.least_guidance")
        choice("monitor.action", "warn", "stop", "rollback")
        whole(1, "monitor.most_rollbacks")
        # When a collapse shows, a checkpoint from before the window must still exist; `later` may have followed it.
        later = -(-config.monitor.window // config.checkpoint.every)
        if config.rl.eval_every % config.checkpoint.every:
            later += -(-config.monitor.window // config.rl.eval_every)
        enough = config.monitor.action != "rollback" or config.checkpoint.keep > later
        need("checkpoint.keep", enough, f"at least {later + 1} when monitor.action is 'rollback'")
        need("data.sft_share", config.data.sft_share < 1 or bool(config.sft.train), "below 1: RL needs problems too")
        whole(1, "rl.updates_per_batch", "rl.max_new_tokens", "rl.share_prompt", "rl.self_tries", "rl.carry_most")
        whole(0, "rl.guided")
        _check_method(need, within, positive, choice, config.rl)
        # The advantage of a group of one is always 0.
        whole(2, "rl.autonomous")
        whole(0, "rl.top_k", "rl.slots", "rl.draft", "rl.pool_tokens", "rl.eval_every")
        positive("rl.temperature", "rl.gamma")
        need("rl.alpha0", 0 <= config.rl.alpha0 < float("inf"), "a finite number, at least 0")
        within(0.0, 1.0, "rl.carry_over")
        rl, off = config.rl, not config.rl.carry_over  # whether a step waits for all responses
        need("rl.carry_over", off or round(rl.carry_over * rl.batch) > 0, f"0, or a problem of rl.batch = {rl.batch}")
        need("rl.draft", off or rl.draft > 0, "above 0 with rl.carry_over, which feeds known tokens as drafts")
        need("rl.importance", off or rl.importance != "none", "'token' or 'sequence' with rl.carry_over: is off-policy")
        need("rl.resample", off or not rl.resample, "0 with rl.carry_over")
        stays = config.monitor.action != "rollback"
        need("monitor.action", off or stays, "'warn' or 'stop' with rl.carry_over: a collapsed policy's responses stay")
        within(0.0, 1.0, "rl.clip_low")
        need("rl.delta", config.rl.delta > 0, "above 0 (float('inf') masks no token)")
        within(0.0, float("inf"), "rl.clip_high", "rl.alpha_max")
    for stage in ("rl", "eval"):
        need(f"{stage}.top_p", 0 < _get(config, f"{stage}.top_p") <= 1, "above 0 and at most 1")
    for name, chosen in config.eval.sets.items():  # training reads them too, to decontaminate
        field = f"eval.sets.{name}"
        if not re.fullmatch(r"\w[\w-]*", name):  # it becomes a part of file names
            raise ValueError(f"config.{field}: must have a name of letters, digits, '_' and '-'")
        complete = isinstance(chosen, ConfigDict) and set(chosen) == {"source", "samples"}
        need(field, complete, "ConfigDict(source=..., samples=...)")
        # A ConfigDict checks the types of the fields of `base`, but not of these.
        need(f"{field}.source", isinstance(chosen.source, str) and bool(chosen.source), "a source: see data.load")
        need(f"{field}.samples", type(chosen.samples) is int and 1 <= chosen.samples <= _MOST, "a whole number from 1")
    if "eval" in stages or config.rl.eval_every:
        need("eval.sets", len(config.eval.sets) > 0, "at least one name -> ConfigDict(source=..., samples=...)")
        whole(1, "eval.batch", "eval.max_new_tokens")
        whole(0, "eval.top_k", "eval.slots", "eval.draft", "eval.limit")
        within(0.0, float("inf"), "eval.temperature")
        greedy = config.eval.temperature == 0
        for name, chosen in config.eval.sets.items():
            need(f"eval.sets.{name}.samples", not greedy or chosen.samples == 1, "1 when eval.temperature is 0")
    sizes = dict(config.mesh)
    for axis, size in sizes.items():
        need(f"mesh.{axis}", size == -1 or size >= 1, "-1 or at least 1")
        others = [f"mesh.{other}" for other in sizes if other != axis and sizes[other] == -1]
        need(f"mesh.{axis}", size != -1 or not others, f"at least 1 when {' and '.join(others)} is -1")
    sets = [f"eval.sets.{name}.source" for name in config.eval.sets]
    _check_files(config, "model.source", "model.tokenizer", "lora.start", "data.train", "sft.train", *sets)


def _check_lora(config: ConfigDict, need: Callable, whole: Callable, positive: Callable, choice: Callable) -> None:
    """Checks the fields of the adapters; that the rule names kernels is checked where the model is known."""
    whole(0, "lora.rank")
    positive("lora.alpha")
    choice("lora.base_dtype", "float32", "bfloat16", "int8", "nf4")
    try:
        re.compile(config.lora.targets)
    except re.error as error:
        need("lora.targets", False, f"a regular expression ({error})")
    need("lora.start", bool(config.lora.rank) or not config.lora.start, "'' where lora.rank is 0")


def _check_method(need: Callable, within: Callable, positive: Callable, choice: Callable, rl: ConfigDict) -> None:
    """Checks the fields that define a method."""
    own = rl.target == "own"
    choice("rl.target", "reachable", "mean", "own")
    choice("rl.guide", "strategy", *(("solution", "sibling") if own else ("self", "demonstration")))
    choice("rl.distillation", *DIVERGENCES, "nll", "shaped")
    need("rl.beta", 0 < rl.beta < 1, "between 0 and 1, both excluded")
    need("rl.kl_top_k", rl.kl_top_k >= 1, "at least 1")
    choice("rl.token_rule", "mask", "scale", "none")
    within(0.0, 1.0, "rl.delta_quantile")
    choice("rl.advantage", "group", "centred", "mixed", "gated", "none")
    choice("rl.weight", "adaptive", "fixed", "group_advantage", "mixed", "gated")
    choice("rl.normaliser", "sequence", "tokens", "constant")
    choice("rl.surrogate", "clipped", "sequence", "cispo")
    choice("rl.importance", "none", "token", "sequence")
    choice("rl.importance_rule", "truncate", "mask")
    for name in ("rollout_weights", "rollout_cache"):
        choice(f"rl.{name}", "", "int8")
        weighed = rl.importance != "none" or not rl[name]
        need(f"rl.{name}", weighed, "'' with rl.importance='none': the sampler's rounding would go uncorrected")
    positive("rl.importance_cap")
    need("rl.resample", rl.resample >= 0, "at least 0")
    fits = 0 <= rl.overlong_buffer <= rl.max_new_tokens
    need("rl.overlong_buffer", fits, f"between 0 and rl.max_new_tokens = {rl.max_new_tokens}")
    positive("rl.shaping")
    within(0.0, 1.0, "rl.gate")
    within(0.0, float("inf"), "rl.sft_weight", "rl.entropy_bonus", "rl.overlong_penalty")
    demonstration = rl.guide == "demonstration"
    for name in ("guided_grpo", "reference_kl"):
        need(f"rl.{name}", 0 <= rl[name] < float("inf"), "a finite number, at least 0")
        used = rl[name] == 0 or (name == "reference_kl" and rl.reference_kl_on == "all")
        need(f"rl.{name}", used or (rl.guided > 0 and not demonstration), "0 where no guided responses are sampled")
    choice("rl.reference_kl_kind", "k3", "full")
    choice("rl.reference_kl_on", "guided", "all")
    need("rl.guided", not demonstration or rl.guided == 1, "1 when rl.guide is 'demonstration'")
    likelihood = rl.distillation not in DIVERGENCES
    need("rl.distillation", not demonstration or likelihood, "'nll' or 'shaped' when rl.guide is 'demonstration'")
    _check_teacher(need, within, choice, rl)
    for name in ("advantage", "weight"):
        allowed = demonstration or rl[name] not in ("mixed", "gated")
        need(f"rl.{name}", allowed, "another value unless rl.guide is 'demonstration'")


def _check_teacher(need: Callable, within: Callable, choice: Callable, rl: ConfigDict) -> None:
    """Checks the fields of the teacher, and that there is something to teach."""
    choice("rl.teacher", "live", "frozen", "ema", "trust_region", "gated")
    choice("rl.teacher_dtype", "float32", "bfloat16")
    need("rl.teacher_rate", 0 < rl.teacher_rate <= 1, "above 0 and at most 1")
    need("rl.teacher_window", rl.teacher_window >= 1, "at least 1")
    within(0.0, 1.0, "rl.teacher_margin")
    live, kl, own = rl.teacher == "live", rl.distillation in DIVERGENCES, rl.target == "own"
    need("rl.guided", not own or rl.guided == 0, "0 when rl.target is 'own'")
    need("rl.weight", not own or rl.weight == "fixed", "'fixed' when rl.target is 'own'")
    need("rl.distillation", not own or kl, f"one of {', '.join(map(repr, DIVERGENCES))} when rl.target is 'own'")
    need("rl.teacher", live or (kl and (own or rl.guided > 0)), "'live' without guided responses or a KL to distil")
    coarse = rl.teacher == "ema" and rl.teacher_dtype == "bfloat16"  # a step is less than the precision of bfloat16
    need("rl.teacher_dtype", not coarse, "'float32' when rl.teacher is 'ema'")


def check_extract(config: ConfigDict) -> None:
    """Checks the fields that the extraction of strategies uses: the section extract and the seed.

    Raises:
      ValueError: as in `check`.
    """
    _check_types(config, base())
    need, whole, within, positive, choice = _rules(config)
    need("seed", 0 <= config.seed < 2**32, "between 0 and 2**32 - 1")
    need("extract.source", bool(config.extract.source), "a source of problems: see data.load")
    whole(0, *(f"extract.{name}" for name in ("problems", "expert_tries", "retries")))
    need("extract.budget_tokens", config.extract.budget_tokens >= 0, "at least 0")
    counts = ("candidates", "choices", "score_tries", "concurrency", "max_failures", "audit_sample")
    whole(1, *(f"extract.{name}" for name in counts))
    whole(1, *(f"extract.max_{name}_tokens" for name in ("expert", "strategy", "score", "prompt")))
    within(0.0, 2.0, "extract.temperature")
    need("extract.top_p", 0 < config.extract.top_p <= 1, "above 0 and at most 1")
    greedy = config.extract.temperature == 0 and config.extract.candidates > 1
    need("extract.temperature", not greedy, "above 0 when extract.candidates is above 1")
    positive("extract.timeout", "extract.backoff")
    strong = config.extract.strong
    free = strong.price_in + strong.price_out == 0
    need("extract.budget_cost", not free or config.extract.budget_cost == 0, "0 where extract.strong has no prices")
    prices = [f"extract.{model}.price_{side}" for model in ("strong", "judge") for side in ("in", "out")]
    for field in ("extract.budget_cost", *prices):
        need(field, 0 <= _get(config, field) < float("inf"), "a finite number, at least 0")
    for model in ("strong", "judge"):
        choice(f"extract.{model}.engine", "endpoint", "local")
        choice(f"extract.{model}.limit_field", "max_tokens", "max_completion_tokens")
        # `need` would show the value, which may be the key itself.
        if not re.fullmatch("[A-Z_][A-Z0-9_]*|", config.extract[model].key_variable):
            raise ValueError(
                f"config.extract.{model}.key_variable: must be the name of an environment variable in capitals, or ''; "
                "put the key itself into that variable"
            )
    _check_files(config, "extract.source")


def check_lab(config: ConfigDict) -> None:
    """Checks the fields that only the lab uses.

    Raises:
      ValueError: as in `check`.
    """
    _check_types(config, base())
    need, whole, _, _, _ = _rules(config)
    for field in ("lab.methods", "lab.world_methods"):
        names = _get(config, field)
        need(field, bool(names) and all(name in [*METHODS] for name in names), f"one or more of {', '.join(METHODS)}")
    for field in ("lab.seeds", "lab.tuning_seeds"):
        seeds = _get(config, field)
        whole_numbers = all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        need(field, whole_numbers and len(set(seeds)) == len(seeds) > 0, "different seeds from 0 to 2**32 - 1")
    common = set(config.lab.seeds) & set(config.lab.tuning_seeds)
    tuning = len(config.lab.rates) != 1
    need("lab.tuning_seeds", not common or not tuning, f"different from lab.seeds, which also has {common}")
    rates = config.lab.rates
    numbers = all(type(rate) in (int, float) and 0 < rate < float("inf") for rate in rates)
    need("lab.rates", numbers and len(set(rates)) == len(rates) > 0, "different numbers above 0")
    whole(0, "lab.workers")
    worlds = config.lab.worlds
    known = [*config.lab.changes]
    need("lab.worlds", bool(worlds) and all(world in known for world in worlds), f"one or more of {known}")
    need("eval.sets", len(config.eval.sets) > 0, "one or more sets on which the lab compares methods")


def check_mesh(config: ConfigDict, mesh: Mesh) -> None:
    """Checks that every batch can be split over the devices.

    Args:
      config: the config of a run.
      mesh: of the run.

    Raises:
      ValueError: a size is not a multiple of the ways in which the mesh splits it.
    """
    ways = axis_ways(mesh, BATCH)
    fields: dict[str, tuple[str, ...]] = {}
    if "sft" in config.stages:
        fields |= {"sft.batch": ROWS, "sft.micro_batch": ROWS}
    if "rl" in config.stages:
        fields |= {"rl.batch": BATCH, "rl.micro_batch": ROWS, "rl.slots": BATCH, "rl.carry_over": BATCH}
    if "eval" in config.stages or config.rl.eval_every:
        fields |= {"eval.batch": BATCH, "eval.slots": BATCH}
    for section in ("rl", "eval"):
        counts = tuple(_get(config, f"{section}.decode_ways"))
        inner = [count for count in counts if count not in (1, ways)]
        ascending = bool(counts) and all(isinstance(n, int) for n in counts) and list(counts) == sorted(set(counts))
        if not ascending or counts[0] < 1 or len(inner) > 1 or any(ways % count for count in counts):
            raise ValueError(
                f"config.{section}.decode_ways={counts}: must ascend, from 1, one divisor of {_product(BATCH)} = "
                f"{ways} between, and {ways}"
            )
    if config.rl.share_prompt > 1 and (ways := axis_ways(mesh, ("context",))) > 1:
        raise ValueError(f"config.rl.share_prompt={config.rl.share_prompt}: must be 1 with mesh.context = {ways}")
    for field, axes in fields.items():
        value, of = _get(config, field), config.rl.batch if field == "rl.carry_over" else 1  # it is a share of rl.batch
        if round(value * of) % (divisor := axis_ways(mesh, axes)):
            times = "" if of == 1 else f", times rl.batch = {of},"
            raise ValueError(f"config.{field}={value}: must be{times} a multiple of {_product(axes)} = {divisor}")


def _product(axes: tuple[str, ...]) -> str:
    return " * ".join(f"mesh.{axis}" for axis in axes)


def _rules(config: ConfigDict) -> tuple[Callable, Callable, Callable, Callable, Callable]:
    """Returns (need, whole, within, positive, choice): rules that raise ValueError for a field that breaks them."""

    def need(field: str, ok: bool, allowed: str) -> None:
        if not ok:
            value = _get(config, field)
            value = value.to_dict() if isinstance(value, ConfigDict) else value
            raise ValueError(f"config.{field}={value!r}: must be {allowed}")

    def whole(least: int, *fields: str) -> None:
        for field in fields:
            need(field, _get(config, field) >= least, f"at least {least}")
            need(field, _get(config, field) <= _MOST, f"at most {_MOST}")

    def within(low: float, high: float, *fields: str) -> None:
        for field in fields:
            need(field, low <= _get(config, field) <= high, f"between {low} and {high}")

    def positive(*fields: str) -> None:
        for field in fields:
            need(field, 0 < _get(config, field) < float("inf"), "a finite number above 0")

    def choice(field: str, *allowed: str) -> None:
        need(field, _get(config, field) in allowed, " or ".join(map(repr, allowed)))

    return need, whole, within, positive, choice


def _check_types(config: ConfigDict, expected: ConfigDict, section: str = "config") -> None:
    """Checks names and types of all fields.

    A ConfigDict checks types too, but it accepts None for any type and a bool for a number, and it can be unlocked.
    """
    if unknown := set(config) - set(expected):
        raise ValueError(f"{section}.{min(unknown)}: is not a field; allowed: {', '.join(expected)}")
    for name, default in expected.items():
        field = f"{section}.{name}"
        if name not in config:
            raise ValueError(f"{field}: is missing; allowed: {default!r}, for example")
        value = config[name]
        types, allowed = _TYPES[type(default)]
        if not isinstance(value, types) or isinstance(value, bool) > isinstance(default, bool):
            raise ValueError(f"{field}={value!r}: must be {allowed}")
        if isinstance(value, ConfigDict) and field.removeprefix("config.") not in FREE:
            _check_types(value, default, field)


def _get(config: ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def _check_files(config: ConfigDict, *fields: str) -> None:
    """Checks that sources which are clearly local paths exist."""
    for field in fields:
        value = _get(config, field)
        # A data field may join several sources, each with options; see data.load.
        joined = value.removeprefix("words:").split(";")
        for part in [value] if field.startswith("model.") and not value.startswith("words:") else joined:
            name = part.partition("?")[0].strip()
            if "://" in name and not name.startswith(("gs://", "s3://", "hf://")):
                raise ValueError(f"config.{field}={value!r}: must be a path, or begin with gs://, s3:// or hf://")
            local = "://" not in name and (
                name.startswith((".", "/", "~")) or name.endswith((".jsonl", ".parquet", ".gguf"))
            )
            # os.path, because pathlib raises on names that are too long and on unknown home folders.
            if local and ("\0" in name or not os.path.exists(os.path.expanduser(name))):
                raise ValueError(f"config.{field}={value!r}: there is no such file or folder as {name!r}")
