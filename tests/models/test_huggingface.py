"""Reads and writes Hugging Face folders with numpy and safetensors alone; test_parity.py compares them with torch."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.small_models import CONFIGS, assert_same, random_params
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from sgpo_jax.models import apply, huggingface
from sgpo_jax.models.config import to_hf
from sgpo_jax.policy import tokenizer as tokenizers


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint with an untied head, which a test then damages."""
    huggingface.save(tmp_path / "model", random_params(CONFIGS["llama"]), CONFIGS["llama"])
    return tmp_path / "model"


def edit(folder, change):
    """Applies `change` to the dict of a checkpoint's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 3000], ids=["single", "sharded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_export_then_import_is_bit_exact(tmp_path, name, shard_bytes, dtype):
    params = random_params(CONFIGS[name], dtype)
    huggingface.save(tmp_path / "a", params, CONFIGS[name], shard_bytes=shard_bytes)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shard_bytes == 10**9)
    loaded, config = huggingface.load(tmp_path / "a")
    assert config == CONFIGS[name]
    assert_same(loaded, params)
    # And the other way round: import then export writes the same bytes.
    huggingface.save(tmp_path / "b", loaded, config, shard_bytes=shard_bytes)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_names_and_orientation_of_the_file(folder):
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    params, _ = huggingface.load(folder)
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.2.mlp.down_proj.weight"].shape == (12, 20)
    for layer in range(3):
        kernel = params["layers"]["k"]["kernel"][layer]
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        np.testing.assert_array_equal(tensors[name], kernel.T)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["kernel"].T)


def test_loaded_leaves_run_in_the_decoder(folder):
    params, config = huggingface.load(folder)
    tokens = np.arange(5)[None]
    hidden, _ = apply(params, config, tokens, tokens, tokens >= 0)
    assert hidden.shape == (1, 5, 12) and np.isfinite(hidden).all()


def test_dtype_is_converted_on_request_only(tmp_path, folder):
    exact, config = huggingface.load(folder)
    rounded, _ = huggingface.load(folder, dtype=ml_dtypes.bfloat16)
    assert_same(rounded, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), exact))
    huggingface.save(tmp_path / "half", exact, config, dtype="bfloat16")
    assert_same(huggingface.load(tmp_path / "half")[0], rounded)
    with pytest.raises(ValueError, match="dtype is float16"):
        huggingface.load(folder, dtype="float16")

    edit(folder, lambda tensors: tensors.update({k: v.astype("f2") for k, v in tensors.items()}))
    with pytest.raises(ValueError, match="model.embed_tokens.weight is float16"):
        huggingface.load(folder)
    assert flatten_dict(huggingface.load(folder, dtype="float32")[0])[("norm", "scale")].dtype == "f4"

    name = "model.norm.weight"
    edit(folder, lambda tensors: tensors.update({k: v.astype("f4") for k, v in tensors.items()}))
    edit(folder, lambda tensors: tensors.update({name: tensors[name].astype(ml_dtypes.bfloat16)}))
    with pytest.raises(ValueError, match=f"{name} is bfloat16 where others are float32"):
        huggingface.load(folder)
    tensors = load_file(folder / "model.safetensors")
    for other, code in ((np.int32, "I32"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")):
        save_file({**tensors, name: np.zeros(12, other)}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"{name} is {code}; supported: F16, BF16, F32, F64"):
            huggingface.load(folder, dtype="float32")


def test_given_config_replaces_the_file(folder):
    assert huggingface.read_config(folder) == CONFIGS["llama"]
    (folder / "config.json").unlink()
    _, config = huggingface.load(folder, CONFIGS["llama"])
    assert config == CONFIGS["llama"]
    with pytest.raises(ValueError, match="config.json cannot be read"):
        huggingface.load(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        *("model.layers.0.self_attn.o_proj.weight", "model.layers.2.input_layernorm.weight"),
    ],
)
def test_missing_or_misshapen_tensor_is_named(folder, name):
    def misshape(tensors):
        tensors[name] = np.concatenate([tensors[name]] * 2)

    edit(folder, misshape)
    with pytest.raises(ValueError, match=f"{name} has shape .* asks for"):
        huggingface.load(folder)
    edit(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"missing tensors: {name}"):
        huggingface.load(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"),
        *("score.weight", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_unknown_tensor_is_named(folder, name):
    edit(folder, lambda tensors: tensors.update({name: np.zeros(12, np.float32)}))
    with pytest.raises(ValueError, match=f"unknown tensors: {name}"):
        huggingface.load(folder)


def test_saved_rotary_buffers_are_ignored(folder):
    before, _ = huggingface.load(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    assert_same(huggingface.load(folder)[0], before)


def test_tied_checkpoint_may_repeat_its_embedding_as_the_head(tmp_path):
    params = random_params(CONFIGS["qwen3"])
    folder = tmp_path / "model"
    huggingface.save(folder, params, CONFIGS["qwen3"])
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    repeated = {"lm_head.weight": params["embed"]["embedding"]}
    edit(folder, lambda tensors: tensors.update(repeated))
    assert_same(huggingface.load(folder)[0], params)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": -repeated["lm_head.weight"]}))
    with pytest.raises(ValueError, match="lm_head.weight differs .* tie_word_embeddings is true"):
        huggingface.load(folder)
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lm_head.weight, .* tie_word_embeddings is false"):
        huggingface.load(folder)


def test_weights_that_are_absent_or_pickled(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index"):
        huggingface.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickles are never opened: pytorch_model.bin"):
        huggingface.load(folder)
    with pytest.raises(ValueError, match="not a folder"):
        huggingface.load(folder / "nowhere")


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_weights_name_the_file(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        huggingface.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_damaged_config_names_the_file(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        huggingface.load(folder)


@pytest.fixture
def sharded(tmp_path):
    params = random_params(CONFIGS["llama"])
    huggingface.save(tmp_path / "model", params, CONFIGS["llama"], shard_bytes=3000)
    return tmp_path / "model"


def weight_map(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_index_lists_every_tensor_and_no_shard_exceeds_the_limit(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(sharded / file)
        assert len(shard) == 1 or sum(x.nbytes for x in shard.values()) <= 3000
        assert all(index["weight_map"][name] == file for name in shard)
        tensors |= shard
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())


@pytest.mark.parametrize(
    "file",
    [
        *("../model.safetensors", "/etc/model.safetensors", "a/model.safetensors"),
        *("..\\model.safetensors", "weights.bin", "", 3, None),
    ],
)
def test_index_may_name_only_files_of_its_folder(sharded, file):
    name = "model.norm.weight"
    edit_json(sharded / "model.safetensors.index.json", weight_map={**weight_map(sharded), name: file})
    with pytest.raises(ValueError, match=f"puts {name} in .* must be the plain name"):
        huggingface.load(sharded)


def test_index_and_shards_must_agree(sharded):
    original = weight_map(sharded)
    name = "model.norm.weight"
    index = sharded / "model.safetensors.index.json"
    elsewhere = next(file for file in original.values() if file != original[name])
    for wrong in ({**original, name: elsewhere}, {k: v for k, v in original.items() if k != name}):
        edit_json(index, weight_map=wrong)
        with pytest.raises(ValueError, match=f"disagree about tensor {name}"):
            huggingface.load(sharded)
    for wrong in ({}, None, []):
        edit_json(index, weight_map=wrong)
        with pytest.raises(ValueError, match="has no weight_map"):
            huggingface.load(sharded)
    edit_json(index, weight_map=original)
    (sharded / original[name]).unlink()
    with pytest.raises(ValueError, match=f"{original[name]} cannot be read"):
        huggingface.load(sharded)


def test_wrong_params_are_refused_before_anything_is_written(tmp_path):
    config, folder = CONFIGS["qwen2"], tmp_path / "model"

    def refused(match, change, **arguments):
        params = random_params(config)
        change(params)
        with pytest.raises(ValueError, match=match):
            huggingface.save(folder, params, config, **arguments)
        assert list(tmp_path.iterdir()) == []

    def misshape(params):
        params["layers"]["o"]["kernel"] = params["layers"]["o"]["kernel"][:2]

    def retype(params):
        params["norm"]["scale"] = params["norm"]["scale"].astype(np.float16)

    refused("missing: layers/q/bias", lambda params: params["layers"]["q"].pop("bias"))
    refused("unknown: extra", lambda params: params.update(extra=np.zeros(3)))
    refused(r"layers/o/kernel has shape \(2, 24, 12\).*\(3, 24, 12\)", misshape)
    refused("dtype of norm/scale is float16", retype)
    refused("dtype of embed/embedding is int8", lambda params: None, dtype=np.int8)
    refused("shard_bytes is 0", lambda params: None, shard_bytes=0)
    refused("eos_token_id is 151; .* 0 to 150", lambda params: None, stop_ids=[3, 151])


def test_an_existing_export_is_never_overwritten(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="already exists"):
        huggingface.save(folder, random_params(CONFIGS["llama"], seed=1), CONFIGS["llama"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failed_export_leaves_nothing_under_the_final_name(tmp_path):
    class Broken:
        bos_token_id = eos_token_id = pad_token_id = None

        def save_pretrained(self, folder):
            assert (folder / "model.safetensors").exists() and not (tmp_path / "model").exists()
            raise OSError("disk full")

    config, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    with pytest.raises(OSError, match="disk full"):
        huggingface.save(tmp_path / "model", params, config, tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []
    # What a killed export left behind is no obstacle either.
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "model.safetensors").write_bytes(b"half")
    huggingface.save(tmp_path / "model", params, config)
    assert_same(huggingface.load(tmp_path / "model")[0], params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_config_and_special_ids_are_written(tmp_path):
    config = CONFIGS["llama"]
    params = random_params(config, ml_dtypes.bfloat16)
    huggingface.save(tmp_path / "bare", params, config)
    written = json.loads((tmp_path / "bare" / "config.json").read_text())
    absent = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert written == {**to_hf(config), **absent, "torch_dtype": "bfloat16"}

    tokenizer = tokenizers.load("arithmetic")
    huggingface.save(tmp_path / "full", params, config, tokenizer=tokenizer, stop_ids=[tokenizer.eos_token_id, 7])
    ids = {
        "bos_token_id": None,
        "eos_token_id": [tokenizer.eos_token_id, 7],
        "pad_token_id": tokenizer.pad_token_id,
    }
    for file in ("config.json", "generation_config.json"):
        assert ids.items() <= json.loads((tmp_path / "full" / file).read_text()).items()
    again = AutoTokenizer.from_pretrained(tmp_path / "full")
    assert tokenizers.encode_prompt(again, "3 + 4") == tokenizers.encode_prompt(tokenizer, "3 + 4")
    assert tokenizers.stop_ids(again, tmp_path / "full") == (tokenizer.eos_token_id, 7)
