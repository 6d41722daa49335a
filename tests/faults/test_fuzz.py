"""Anything at all in a config, a JSONL file or a model's config.json is taken, or refused with a ValueError."""

import json
import runpy
import string
import tempfile
from pathlib import Path

import pytest
from helpers.paths import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from sgpo_jax import config_checks, data
from sgpo_jax.data.rows import OPTIONAL, REQUIRED
from sgpo_jax.models.config import ModelConfig, from_hf


def config_of_all() -> ConfigDict:
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.lab.methods = ("sgpo", "grpo")
    config.extract.source = "problems"
    return config


def fields(config, prefix=""):
    """Yields the dotted names of all fields and sections."""
    for name in config:
        yield prefix + name
        if isinstance(config[name], ConfigDict):
            yield from fields(config[name], f"{prefix}{name}.")


FIELDS = list(fields(config_of_all()))
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 5) | st.floats()
    | st.sampled_from([0.0, 0.5, 1.0, float("inf"), 2**31, 2**64, "", "scratch", "arithmetic", "smollm2", "sgpo", "rl"])
    | st.text(max_size=20) | st.text("./~;?=\0a", max_size=8)
)  # fmt: skip
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.lists(SCALARS, max_size=3).map(tuple)


@settings(max_examples=400)
@given(st.sampled_from(FIELDS), VALUES)
@example("data.train", "~\0")
@example("rl.batch", None)
@example("stages", (None,))
def test_any_value_of_any_field_passes_or_is_named(field, value):
    config = config_of_all()
    *path, last = field.split(".")
    node = config
    for name in path:
        node = node[name]
    with config.unlocked(), config.ignore_type():
        node[last] = value
    for check in (config_checks.check, config_checks.check_extract, config_checks.check_lab):
        try:
            check(config)
        except ValueError as error:
            message = str(error)
            # A value may be impossible together with another one, which is named instead: both are of the config.
            named = message.split("=", 1)[0].split(":", 1)[0].removeprefix("config.")
            assert named in FIELDS, message
            assert named == field or named.startswith(f"{field}.") or related(field, named), message


def related(field: str, named: str) -> bool:
    """Returns whether a rule joins two fields, so that a change of one may make the other invalid."""
    together = [
        {"model.source", "model.tokenizer", "model.hidden", "model.heads", "data.instruction"},
        {"data.train", "sft.train", "data.sft_share"},
        {"rl.guide", "rl.guided", "rl.distillation", "rl.advantage", "rl.weight"},
        {"eval.temperature", "eval.sets.heldout.samples", "eval.sets.heldout", "eval.sets"},
        {"mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor"},
        {"extract.temperature", "extract.candidates"},
        {"extract.budget_cost", "extract.strong.price_in", "extract.strong.price_out"},
        {"lab.seeds", "lab.tuning_seeds", "lab.rates"},
        {"lab.worlds", "lab.changes", "lab.changes.base"},
    ]
    return any({field, named} <= names for names in together)


ROW = {"id": "a", "problem": "p", "answer": "1", "solution": None, "strategy": "s", "level": 3}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)  # fmt: skip
# Rows with odd fields, broken rows, and noise that looks a little like JSON.
LINES = (
    st.dictionaries(st.sampled_from([*ROW, "other"]), JSON, max_size=4).map(lambda odd: json.dumps(ROW | odd).encode())
    | st.builds(lambda cut: json.dumps(ROW).encode()[:cut], st.integers(0, 80))
    | st.binary(max_size=60)
    | st.text(string.digits + '{}[]",:.eE+-\\u \ud800ntfN', max_size=40).map(lambda s: s.encode("utf-8", "replace"))
)


@pytest.fixture(scope="module")
def file():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "rows.jsonl"


@settings(max_examples=400)
@given(st.lists(LINES, min_size=1, max_size=3))
@example([b'{"id": "a", "problem": "p", "answer": 1e99999999999999999999}'])
@example([json.dumps(ROW | {"problem": "\ud800"}).encode()])
def test_any_bytes_are_rows_or_an_error_that_names_file_and_line(file, lines):
    file.write_bytes(b"\n".join(lines))
    try:
        rows = data.load(str(file))
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{file}:") or "there are no rows" in message or "no row has" in message, message
        message.encode()
        return
    assert len({row["id"] for row in rows}) == len(rows) >= 1
    for row in rows:
        assert {"id", "problem", "answer"} <= set(row) <= {*REQUIRED, *OPTIONAL, "extra"}
        json.dumps(row.pop("extra", {}), allow_nan=False)
        assert all(isinstance(value, str) and value.strip() and value.encode() for value in row.values())


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "head_dim": 8,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_theta": 1e4, "rope_scaling": None, "rope_parameters": None, "attention_bias": False, "layer_types": None,
    "quantization_config": None, "mlp_bias": False, "partial_rotary_factor": 1.0, "use_sliding_window": False,
}  # fmt: skip
ROPE = st.dictionaries(
    st.sampled_from(["rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
                     "original_max_position_embeddings", "partial_rotary_factor"]),
    JSON | st.sampled_from(["llama3", "default", 2.0]), max_size=8,
)  # fmt: skip


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from([*LLAMA]), JSON | ROPE | st.integers(-1, 2**70), max_size=3))
@example({"architectures": [[]]})
@example({"layer_types": 5})
def test_any_config_of_a_model_is_one_or_a_value_error(changes):
    try:
        assert isinstance(from_hf(LLAMA | changes), ModelConfig)
    except ValueError as error:
        assert str(error)
