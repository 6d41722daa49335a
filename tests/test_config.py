"""Every file of configs/ passes the check; impossible values are refused, in Python and on the command line."""

import inspect
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest
from helpers.configs import load
from helpers.paths import ROOT
from ml_collections import ConfigDict

from sgpo_jax import config as configs
from sgpo_jax import config_checks, losses, sharding
from sgpo_jax.cli import COMMANDS as COMMANDS_OF
from sgpo_jax.cli import start

# configs/strategies.py belongs to another command.
FILES = [file for file in sorted((ROOT / "configs").glob("*.py")) if file.stem != "strategies"]


@pytest.fixture
def config() -> ConfigDict:
    """A valid configuration of all three stages."""
    return load(ROOT / "configs" / "quickstart.py").lock()


def assign(config, field, value):
    *path, last = field.split(".")
    for name in path:
        config = config[name]
    config[last] = value


def fields(config, prefix=""):
    """(dotted name, value) of every field."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def refused(config, field, value, allowed):
    """Asserts that the check names the field, its value and what is allowed."""
    with pytest.raises(ValueError) as error:
        config_checks.check(config)
    message = str(error.value)
    assert message.startswith(f"config.{field}={value!r}: must"), message
    assert allowed in message, message


# ---- the files of configs/


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_passes(file, monkeypatch):
    # The files are those of whoever runs it.
    monkeypatch.setattr(config_checks, "_check_files", lambda *arguments: None)
    config = load(file)
    if file.stem == "benchmarks":  # on any model
        config.stages, config.model.source = ("eval",), "any"
    config_checks.check(config)
    with pytest.raises(AttributeError, match="batch"):
        config.rl.bacth = 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_says_how_to_run_it(file):
    text = file.read_text()
    commands = [f"sgpo {command} --config=configs/{file.name} --" for command in ("train", "evaluate", "lab")]
    assert any(command in text for command in commands)


def test_base_is_the_recipe_of_the_paper():
    config = configs.base()
    assert (config.rl.autonomous, config.rl.guided, config.rl.epochs, config.rl.learning_rate) == (8, 4, 10, 1e-6)
    assert (config.rl.temperature, config.rl.top_p, config.rl.max_new_tokens) == (1.0, 0.95, 16384)
    assert (config.rl.delta, config.rl.batch, config.rl.updates_per_batch) == (1.0, 128, 1)
    assert (config.sft.batch, config.sft.epochs, config.sft.learning_rate) == (64, 10, 1e-5)
    assert (config.sft.warmup_share, config.sft.validation_share) == (0.1, 0.1)
    assert config.sft.max_response_tokens == 16384
    assert (config.eval.temperature, config.eval.top_p, config.eval.max_new_tokens) == (0.6, 0.95, 32768)


@pytest.mark.parametrize(
    "function", [losses.clipped_surrogate, losses.adaptive_weight, losses.shaped_likelihood, losses.hpt_gate]
)
def test_base_agrees_with_the_defaults_of_the_losses(function):
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert defaults == {name: configs.base().rl[name] for name in defaults}


@pytest.mark.parametrize("name", ["qwen7b", "qwen1p5b", "llama8b"])
def test_the_configs_of_the_paper_keep_its_recipe(name):
    config, base = load(ROOT / "configs" / f"{name}.py"), configs.base()
    for section in ("sft", "rl"):
        changed = {field for field in base[section] if config[section][field] != base[section][field]}
        assert changed <= {"micro_batch"}, section
    samples = {benchmark: chosen.samples for benchmark, chosen in config.eval.sets.items()}
    assert samples == {"MATH500": 4, "AMC23": 32, "OlympiadBench": 4, "AIME24": 32}


def test_a_model_from_scratch_lacks_only_its_training_data():
    heldout = "arithmetic:eval,count=8"
    config = configs.scratch("arithmetic", heldout, 2, prompt_tokens=64, response_tokens=9, micro_batch=4)
    config.data.train = "arithmetic:train,count=64"
    config_checks.check(config)
    assert config.is_locked and config.eval.sets.heldout.to_dict() == {"source": heldout, "samples": 2}
    assert {config.sft.max_response_tokens, config.rl.max_new_tokens, config.eval.max_new_tokens} == {9}
    assert {config.sft.micro_batch, config.rl.micro_batch} == {4} and config.data.max_prompt_tokens == 64


# ---- the base


def test_misspelt_fields_and_wrong_types_are_refused_at_once():
    config = configs.base()
    with pytest.raises(AttributeError, match='Did you mean "batch" instead of "bacth"'):
        config.rl.bacth = 3
    with pytest.raises(TypeError):
        config.rl.batch = "3"
    with pytest.raises(TypeError):
        config.eval.guided = "no"


# ---- wrong values

NUMBERS = [
    (name, value)
    for name, value in fields(load(ROOT / "configs" / "quickstart.py"))
    if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith(("extract.", "lab."))
]
WRONG = [(name, -2) for name, _ in NUMBERS]
WRONG += [(name, wrong) for name, value in NUMBERS if isinstance(value, float) for wrong in (math.nan, -math.inf)]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_no_number_may_be_anything(config, field, value):
    assign(config, field, value)
    refused(config, field, float(value) if isinstance(dict(NUMBERS)[field], float) else value, "must be ")


CATALOGUE = [
    ("seed", 2**32, "between 0 and 2**32 - 1"),
    ("stages", (), "('sft', 'rl', 'eval'), in that order"),
    ("stages", ("rl", "sft"), "('sft', 'rl', 'eval'), in that order"),
    ("stages", ("rl", "rl"), "('sft', 'rl', 'eval'), in that order"),
    ("stages", ("train",), "('sft', 'rl', 'eval'), in that order"),
    ("max_skipped", 0, "at least 1"),
    ("monitor.action", "restart", "'warn' or 'stop' or 'rollback'"),
    ("monitor.most_rollbacks", 0, "at least 1"),
    ("model.source", "", "'scratch'"),
    ("model.tokenizer", "", "set when model.source is 'scratch'"),
    ("model.tokenizer", "words:", "words:SOURCE, with a source of problems"),
    ("model.dtype", "float16", "'float32' or 'bfloat16'"),
    ("lora.rank", -1, "at least 0"),
    ("lora.alpha", 0.0, "a finite number above 0"),
    ("lora.targets", "q|(", "a regular expression"),
    ("lora.base_dtype", "int4", "'float32' or 'bfloat16' or 'int8' or 'nf4'"),
    ("lora.start", "org/adapter", "'' where lora.rank is 0"),
    ("model.layers", 0, "at least 1"),
    ("model.heads", 0, "at least 1"),
    ("model.hidden", 100, "a multiple of 2 * model.heads = 8"),
    ("data.train", "", "a source of problems"),
    ("data.max_prompt_tokens", 0, "at least 1"),
    ("data.sft_share", 1.5, "between 0.0 and 1.0"),
    ("optimizer.b1", 1.0, "at least 0 and below 1"),
    ("optimizer.b2", 1.0, "at least 0 and below 1"),
    ("optimizer.eps", 0.0, "a finite number above 0"),
    ("optimizer.clip_norm", 0.0, "a finite number above 0"),
    ("optimizer.weight_decay", 1.5, "between 0.0 and 1.0"),
    ("sft.batch", 0, "at least 1"),
    ("sft.decay", "linear", "'constant' or 'cosine'"),
    ("sft.learning_rate", 0.0, "a finite number above 0"),
    ("sft.learning_rate", math.inf, "a finite number above 0"),
    ("sft.micro_batch", 0, "at least 1"),
    ("sft.validation_share", 0.0, "between 0 and 1, both excluded"),
    ("sft.validation_share", 1.0, "between 0 and 1, both excluded"),
    ("sft.warmup_share", 1.1, "between 0.0 and 1.0"),
    ("rl.batch", 0, "at least 1"),
    ("rl.autonomous", 1, "at least 2"),
    ("rl.guided", -1, "at least 0"),
    ("rl.guide", "", "'strategy' or 'self' or 'demonstration'"),
    ("rl.self_tries", 0, "at least 1"),
    ("rl.guide", "demonstration", None),
    ("rl.target", "", "'reachable' or 'mean' or 'own'"),
    ("rl.target", "own", None),
    ("rl.token_rule", "", "'mask' or 'scale' or 'none'"),
    ("rl.delta_quantile", 1.1, "between 0.0 and 1.0"),
    ("rl.teacher", "", "'live' or 'frozen' or 'ema' or 'trust_region' or 'gated'"),
    ("rl.teacher_rate", 0.0, "above 0 and at most 1"),
    ("rl.teacher_dtype", "float16", "'float32' or 'bfloat16'"),
    ("rl.teacher_window", 0, "at least 1"),
    ("rl.teacher_margin", -0.1, "between 0.0 and 1.0"),
    ("rl.surrogate", "", "'clipped' or 'sequence' or 'cispo'"),
    ("rl.importance", "", "'none' or 'token' or 'sequence'"),
    ("rl.importance_rule", "", "'truncate' or 'mask'"),
    ("rl.importance_cap", 0.0, "a finite number above 0"),
    ("rl.rollout_weights", "nf4", "'' or 'int8'"),
    ("rl.rollout_weights", "int8", "'' with rl.importance='none'"),
    ("rl.rollout_cache", "bfloat16", "'' or 'int8'"),
    ("rl.rollout_cache", "int8", "'' with rl.importance='none'"),
    ("rl.overlong_buffer", 10_000, "between 0 and rl.max_new_tokens = "),
    ("rl.overlong_penalty", -1.0, "between 0.0 and inf"),
    ("rl.resample", -1, "at least 0"),
    ("rl.guided_grpo", -1.0, "a finite number, at least 0"),
    ("rl.reference_kl", math.inf, "a finite number, at least 0"),
    ("rl.reference_kl_kind", "", "'k3' or 'full'"),
    ("rl.reference_kl_on", "", "'guided' or 'all'"),
    ("monitor.least_guidance", -1.1, "between -1.0 and 1.0"),
    ("monitor.most_forgotten", 1.1, "between 0.0 and 1.0"),
    ("rl.distillation", "kl", "'forward_kl' or 'reverse_kl' or 'jensen_shannon' or 'top_k_kl' or 'nll' or 'shaped'"),
    ("rl.beta", 0.0, "between 0 and 1, both excluded"),
    ("rl.beta", 1.0, "between 0 and 1, both excluded"),
    ("rl.kl_top_k", 0, "at least 1"),
    ("rl.advantage", "", "'group' or 'centred' or 'mixed' or 'gated' or 'none'"),
    ("rl.advantage", "gated", "another value unless rl.guide is 'demonstration'"),
    ("rl.weight", "", "'adaptive' or 'fixed' or 'group_advantage' or 'mixed' or 'gated'"),
    ("rl.weight", "mixed", "another value unless rl.guide is 'demonstration'"),
    ("rl.normaliser", "", "'sequence' or 'tokens' or 'constant'"),
    ("rl.shaping", 0.0, "a finite number above 0"),
    ("rl.gate", 1.1, "between 0.0 and 1.0"),
    ("rl.sft_weight", -1.0, "between 0.0 and inf"),
    ("rl.entropy_bonus", -1.0, "between 0.0 and inf"),
    ("rl.updates_per_batch", 0, "at least 1"),
    ("rl.max_new_tokens", 0, "at least 1"),
    ("rl.temperature", 0.0, "a finite number above 0"),
    ("rl.top_p", 0.0, "above 0 and at most 1"),
    ("rl.top_p", 1.01, "above 0 and at most 1"),
    ("rl.top_k", -1, "at least 0"),
    ("rl.clip_low", 1.1, "between 0.0 and 1.0"),
    ("rl.delta", 0.0, "above 0"),
    ("rl.gamma", 0.0, "a finite number above 0"),
    ("rl.alpha0", math.inf, "a finite number, at least 0"),
    ("rl.decay", "", "'constant' or 'cosine'"),
    ("rl.learning_rate", math.inf, "a finite number above 0"),
    ("rl.micro_batch", 0, "at least 1"),
    ("rl.slots", -1, "at least 0"),
    ("eval.slots", -1, "at least 0"),
    ("rl.draft", -1, "at least 0"),
    ("rl.pool_tokens", -1, "at least 0"),
    ("eval.draft", -1, "at least 0"),
    ("rl.carry_over", -0.1, "between 0.0 and 1.0"),
    ("rl.carry_over", 1.1, "between 0.0 and 1.0"),
    ("rl.carry_over", math.nan, "between 0.0 and 1.0"),
    ("rl.carry_over", 1e-9, "0, or a problem of rl.batch = "),
    ("rl.carry_most", 0, "at least 1"),
    ("eval.top_p", 0.0, "above 0 and at most 1"),
    ("eval.batch", 0, "at least 1"),
    ("eval.temperature", 0.0, None),
    ("eval.sets.heldout.samples", 0, "a whole number from 1"),
    ("eval.sets.heldout.source", "", "a source"),
    ("checkpoint.every", 0, "at least 1"),
    ("checkpoint.keep", 0, "at least 1"),
    ("mesh.data", 0, "-1 or at least 1"),
    ("mesh.tensor", -2, "-1 or at least 1"),
    ("mesh.context", 0, "-1 or at least 1"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), CATALOGUE)
def test_impossible_values_are_refused(config, field, value, allowed):
    assign(config, field, value)
    if field == "eval.temperature":
        # Greedy: a second sample would be a copy of the first.
        refused(config, "eval.sets.heldout.samples", 4, "1 when eval.temperature is 0")
    elif (field, value) == ("rl.guide", "demonstration"):
        refused(config, "rl.guided", 4, "1 when rl.guide is 'demonstration'")
        config.rl.guided = 1
        refused(config, "rl.distillation", "forward_kl", "'nll' or 'shaped' when rl.guide is 'demonstration'")
    elif (field, value) == ("rl.target", "own"):
        refused(config, "rl.guided", 4, "0 when rl.target is 'own'")
        config.rl.guided = 0
        refused(config, "rl.weight", "adaptive", "'fixed' when rl.target is 'own'")
    else:
        refused(config, field, value, allowed)


CARRIED = {"rl.carry_over": 0.5, "rl.draft": 4, "rl.importance": "token"}


@pytest.mark.parametrize(
    ("changes", "field", "value", "allowed"),
    [
        ({"stages": ("sft",), "data.train": "", "sft.train": ""}, "sft.train", "", "set when data.train is empty"),
        ({"sft.train": "", "data.sft_share": 0.0}, "data.sft_share", 0.0, "above 0 when sft.train is empty"),
        ({"rl.guided": 0, "rl.teacher": "frozen"}, "rl.teacher", "frozen", "'live' without guided responses"),
        ({"rl.distillation": "nll", "rl.teacher": "ema"}, "rl.teacher", "ema", "or a KL to distil"),
        ({"rl.teacher": "ema", "rl.teacher_dtype": "bfloat16"}, "rl.teacher_dtype", "bfloat16", "rl.teacher is 'ema'"),
        ({"rl.guided": 0, "rl.guided_grpo": 1.0}, "rl.guided_grpo", 1.0, "0 where no guided responses are sampled"),
        ({"rl.guided": 0, "rl.reference_kl": 1.0}, "rl.reference_kl", 1.0, "0 where no guided responses are sampled"),
        ({"sft.train": "", "data.sft_share": 1.0}, "data.sft_share", 1.0, "below 1: RL needs problems too"),
        ({"rl.carry_over": 0.5, "rl.importance": "token"}, "rl.draft", 0, "above 0 with rl.carry_over"),
        ({"rl.carry_over": 0.5, "rl.draft": 4}, "rl.importance", "none", "'token' or 'sequence' with rl.carry_over"),
        (CARRIED | {"rl.resample": 1}, "rl.resample", 1, "0 with rl.carry_over"),
        (CARRIED | {"monitor.action": "rollback"}, "monitor.action", "rollback", "'warn' or 'stop' with rl.carry_over"),
    ],
)
def test_impossible_combinations_are_refused(config, changes, field, value, allowed):
    for name, change in changes.items():
        assign(config, name, change)
    refused(config, field, value, allowed)


@pytest.mark.parametrize(
    ("chosen", "allowed"),
    [
        ("data.jsonl", "ConfigDict(source=..., samples=...)"),
        (3, "ConfigDict(source=..., samples=...)"),
        (ConfigDict({"source": "hub"}), "ConfigDict(source=..., samples=...)"),
        (ConfigDict({"source": "hub", "samples": 1, "greedy": True}), "ConfigDict(source=..., samples=...)"),
        (ConfigDict({"source": "hub", "samples": "4"}), "a whole number from 1"),
        (ConfigDict({"source": "hub", "samples": 2.5}), "a whole number from 1"),
        (ConfigDict({"source": 5, "samples": 1}), "a source"),
    ],
)
def test_malformed_evaluation_sets_are_refused(config, chosen, allowed):
    with config.unlocked():
        config.eval.sets.other = chosen
    with pytest.raises(ValueError, match=re.escape(allowed)) as error:
        config_checks.check(config)
    assert str(error.value).startswith("config.eval.sets.other")
    assert "\n" not in str(error.value)
    config.stages, config.rl.eval_every = ("rl",), 0  # reads the sets for contamination
    with pytest.raises(ValueError, match=re.escape(allowed)):
        config_checks.check(config)


def test_evaluation_needs_a_set(config):
    with config.unlocked():
        del config.eval.sets["heldout"]
    for stages, every in ((("eval",), 0), (("sft", "rl"), 5)):
        config.stages, config.rl.eval_every = stages, every
        with pytest.raises(ValueError, match=r"^config\.eval\.sets=\{\}: must be at least one name"):
            config_checks.check(config)
    config.rl.eval_every = 0
    config_checks.check(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"rl.delta": math.inf, "rl.clip_high": math.inf, "rl.alpha_max": math.inf},
        {"rl.alpha0": 0.0, "rl.clip_low": 0.0, "rl.clip_high": 0.0, "rl.top_p": 1.0},
        {"eval.temperature": 0.0, "eval.sets.heldout.samples": 1},
        {"rl.micro_batch": 10_000, "sft.micro_batch": 100, "rl.slots": 1, "eval.slots": 10_000},
        {"mesh.data": -1, "mesh.fsdp": 1},
        {"optimizer.b1": 0.0, "seed": 2**32 - 1},
        {"sft.train": "", "data.sft_share": 0.5},
        {"sft.decay": "constant", "rl.decay": "cosine"},
        # Fields of a stage that does not run are not checked.
        {"stages": ("eval",), "rl.batch": 0, "sft.batch": 0, "data.train": ""},
        {"stages": ["rl"], "sft.learning_rate": 0.0, "eval.batch": 0},
    ],
)
def test_unusual_but_possible_values_pass(config, changes):
    for field, value in changes.items():
        assign(config, field, value)
    config_checks.check(config)


# ---- files and meshes


SOURCES = ["model.source", "model.tokenizer", "data.train", "sft.train", "eval.sets.heldout.source"]
MISSING = ["none.jsonl", "./none", "../none", "/none/at/all", "~/none", "none.parquet", "none.gguf"]


def test_words_of_a_source_are_for_a_model_from_scratch(config, tmp_path):
    file = tmp_path / "train.jsonl"
    file.touch()
    config.model.tokenizer = f"words:{file}?problem=question;arithmetic:train,count=64"
    config_checks.check(config)
    config.model.source = str(tmp_path)
    refused(config, "model.tokenizer", config.model.tokenizer, "'' or another tokenizer for a trained model.source")
    config.model.source = "scratch"
    config.model.tokenizer = f"words:{file};{tmp_path}/none.jsonl"
    with pytest.raises(ValueError, match=re.escape(f"there is no such file or folder as '{tmp_path}/none.jsonl'")):
        config_checks.check(config)


@pytest.mark.parametrize("field", SOURCES)
@pytest.mark.parametrize("path", MISSING)
def test_local_files_must_exist(config, field, path):
    assign(config, field, path)
    with pytest.raises(ValueError, match=re.escape(f"config.{field}={path!r}: there is no such file or folder")):
        config_checks.check(config)


def test_existing_files_and_names_elsewhere_pass(config, tmp_path):
    file = tmp_path / "train.jsonl"
    file.touch()
    config.model.source, config.model.tokenizer = str(tmp_path), ""
    config.data.train = str(file)
    config.sft.train = "someone/some-data"
    config_checks.check(config)
    config.data.train = f"{file}?problem=question,answer=final.0; {tmp_path}?files=*.jsonl"
    config_checks.check(config)
    config.data.train = f"{file};{tmp_path}/none.jsonl?problem=question"
    with pytest.raises(ValueError, match=re.escape(f"there is no such file or folder as '{tmp_path}/none.jsonl'")):
        config_checks.check(config)


@pytest.mark.parametrize(
    ("field", "value", "stages", "every"),
    [
        ("sft.batch", 126, ("sft", "rl", "eval"), 0),
        ("sft.micro_batch", 126, ("sft",), 0),
        ("rl.batch", 30, ("rl",), 0),
        ("rl.micro_batch", 30, ("rl",), 0),
        ("eval.batch", 30, ("eval",), 0),
        ("eval.batch", 30, ("rl",), 5),
        ("rl.slots", 30, ("rl",), 0),
        ("eval.slots", 30, ("eval",), 0),
    ],
)
def test_batches_must_divide_over_the_mesh(config, field, value, stages, every):
    config.stages, config.rl.eval_every = stages, every
    config_checks.check_mesh(config, mesh_of(4))
    assign(config, field, value)
    with pytest.raises(ValueError, match=rf"config\.{field}={value}: must be a multiple of .* = 4"):
        config_checks.check_mesh(config, mesh_of(4))
    config_checks.check_mesh(config, mesh_of(1))
    # A stage that does not run may have any batch.
    config.stages = tuple(stage for stage in configs.STAGES if not field.startswith(stage))
    config.rl.eval_every = 0
    config_checks.check_mesh(config, mesh_of(4))


def test_problems_that_go_on_must_divide_over_the_mesh(config):
    config.rl.batch = 32
    for share, ways in ((0.25, 8), (0.5, 8), (0.26, 8), (0.125, 4)):
        config.rl.carry_over = share
        config_checks.check_mesh(config, mesh_of(ways))
    refused = r"config\.rl\.carry_over=0\.125: must be, times rl\.batch = 32, a multiple of .*context = 8$"
    with pytest.raises(ValueError, match=refused):
        config_checks.check_mesh(config, mesh_of(2, 4))


def mesh_of(fsdp, context=1):
    return sharding.make_mesh(1, fsdp, 1, jax.devices()[: fsdp * context], context=context)


@pytest.mark.parametrize(
    "field", ["sft.batch", "sft.micro_batch", "rl.batch", "rl.micro_batch", "rl.slots", "eval.batch", "eval.slots"]
)
def test_packed_rows_divide_without_the_context_axis_and_sampled_ones_with_it(config, field):
    packed = field.endswith("micro_batch") or field == "sft.batch"
    axes, ways = (r"mesh\.data \* mesh\.fsdp", 2) if packed else (r"mesh\.data \* mesh\.fsdp \* mesh\.context", 4)
    assign(config, field, 8 + ways)
    config_checks.check_mesh(config, mesh_of(2, 2))
    assign(config, field, 8 + ways // 2)
    with pytest.raises(ValueError, match=rf"config\.{field}={8 + ways // 2}: must be a multiple of {axes} = {ways}$"):
        config_checks.check_mesh(config, mesh_of(2, 2))


@pytest.mark.parametrize("ways", [(1,), (2,), (8,), (1, 4), (2, 8), (1, 2, 8)])
@pytest.mark.parametrize("section", ["rl", "eval"])
def test_ways_of_decoding_are_divisors_of_the_rows(config, section, ways):
    config[section].decode_ways = ways
    config_checks.check_mesh(config, mesh_of(8))
    config_checks.check_mesh(config, mesh_of(2, 4))


@pytest.mark.parametrize("ways", [(), (0,), (-2,), (3,), (16,), (4, 1), (2, 2), (2, 4), (1, 2, 4, 8), (2.0,)])
def test_other_ways_of_decoding_are_refused(config, ways):
    config.eval.decode_ways = ways
    with pytest.raises(ValueError, match=r"config\.eval\.decode_ways=\(.*\): must ascend.*context = 8 between, and 8"):
        config_checks.check_mesh(config, mesh_of(8))


# ---- the command line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.rl.bacth=3", r"--config\.rl\.bacth=3: config\.rl has no field 'bacth' \(did you mean batch\?\)"),
        ("--config.rll.batch=3", r"config has no field 'rll' .did you mean rl\?.; allowed: .*\brl\b"),
        ("--config.rl.batch.size=3", r"config\.rl\.batch has no field 'size'; .*a value"),
        ("--config.eval.sets.other.samples=3", r"config\.eval\.sets has no field 'other'; allowed: one of heldout"),
        ("-config.bacth", r"-config\.bacth: config has no field 'bacth'"),
    ],
)
def test_unknown_fields_are_named(config, argument, message):
    before = ["main.py", "--config=configs/quickstart.py", "--workdir=x", "--config.rl.batch=3", "--configs.rl.bacth=1"]
    assert configs.unknown_field(config, before) is None
    assert re.search(message, configs.unknown_field(config, [*before, argument, "--config.later=1"]))


COMMANDS = {
    "misspelt field": ("--config.rl.bacth=3", ["config.rl", "'bacth'", "batch"]),
    "wrong type": ("--config.rl.batch=many", ["--config.rl.batch=many", "int"]),
    "unknown stage": ("--config.stages=('train',)", ["config.stages=('train',)", "('sft', 'rl', 'eval')"]),
    "missing reward function": (
        "--config.rl.reward=no_such_module:f",
        ["config.rl.reward='no_such_module:f'", "No module named 'no_such_module'"],
    ),
    "unknown method": ("--config=configs/quickstart.py:grop", ["config:grop: must be one of", "luffy"]),
    "unexpected argument": ("more", ["more: is not a flag"]),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """name -> (exit code, stdout, stderr, workdir), all from forks of one process that has imported everything."""
    folder = tmp_path_factory.mktemp("commands")
    workdirs = {name: folder / name.replace(" ", "_") for name in COMMANDS}
    calls = [
        ["sgpo_jax.main", [f"--config={ROOT / 'configs/quickstart.py'}", f"--workdir={workdirs[name]}", argument]]
        for name, (argument, _) in COMMANDS.items()
    ]
    (folder / "calls.json").write_text(json.dumps(calls))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/fork_commands.py"), str(folder / "calls.json")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (*one, workdirs[name]) for name, one in zip(COMMANDS, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_line_is_answered_in_a_line(answers, name):
    code, output, errors, workdir = answers[name]
    assert code not in (0, None)
    assert "Traceback" not in output + errors
    lines = (output + errors).strip().splitlines()
    (line,) = [line for line in lines if all(part in line for part in COMMANDS[name][1])]
    assert len(lines) <= 3, lines
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        (None, "", "there is no such file"),
        ("def get_config():\n    return 1 +\n", "", r"SyntaxError: invalid syntax \(mine.py, line 2\)"),
        ("def get_config():\n    config = {}\n    return config.rl\n", "", "line 3: AttributeError: 'dict' .*'rl'"),
        ("def get_configs():\n    return {}\n", "", "KeyError: 'get_config'"),
        ("def get_config():\n    return {}\n", ":grpo", "TypeError: .* takes 0 .* but 1 was given"),
        ("def get_config(m):\n    raise ValueError(f'no {m}')\n", ":x", "no x"),
    ],
)
def test_a_wrong_config_file_is_answered_in_a_line(tmp_path, monkeypatch, text, argument, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit, match=f"^sgpo_jax: --config=mine.py{argument}: (line [0-9]+: )?{message}$"):
        start("train", COMMANDS_OF["train"], [f"--config=mine.py{argument}", "--workdir=x"])


# ---- the extraction of strategies

EXTRACT = [
    (f"extract.{name}", value)
    for name, value in fields(configs.base().extract)
    if isinstance(value, int | float) and not isinstance(value, bool)
]
WRONG_EXTRACT = [(name, type(value)(-2)) for name, value in EXTRACT]
WRONG_EXTRACT += [(name, bad) for name, value in EXTRACT if isinstance(value, float) for bad in (math.nan, math.inf)]


def test_the_config_of_the_extraction_passes(monkeypatch):
    file = ROOT / "configs" / "strategies.py"
    monkeypatch.setattr(config_checks, "_check_files", lambda *arguments: None)
    config_checks.check_extract(load(file))
    assert "sgpo strategies --config=configs/strategies.py --workdir=" in file.read_text()
    assert load(file).extract.candidates == 5 and load(file).extract.audit_sample == 500, "App. B and H"


@pytest.mark.parametrize(("field", "value"), WRONG_EXTRACT)
def test_no_number_of_the_extraction_may_be_anything(field, value):
    config = configs.base()
    config.extract.source = "problems"
    config_checks.check_extract(config)
    assign(config, field, value)
    with pytest.raises(ValueError, match=f"^config.{field}={value!r}: must be "):
        config_checks.check_extract(config)


def test_the_extraction_needs_a_source_that_exists():
    config = configs.base()
    with pytest.raises(ValueError, match=r"^config.extract.source='': must be a source of problems"):
        config_checks.check_extract(config)
    config.extract.source = "nowhere/problems.jsonl"
    with pytest.raises(ValueError, match="^config.extract.source='nowhere/problems.jsonl': there is no such file"):
        config_checks.check_extract(config)


def test_a_training_run_may_change_the_extraction(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(config))
    config.extract.candidates = 3
    config.extract.strong.name = "other"
    configs.check_resume(config, path)
