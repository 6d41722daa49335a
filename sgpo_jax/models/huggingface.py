"""Hugging Face folders (config.json and safetensors) to parameter trees and back.

One table of names serves both directions. Tensors pass through host memory one at a time; `load`
leaves the result there, as numpy arrays, for the caller to place on devices.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sgpo_jax.models.config import ModelConfig, from_hf, to_hf
from sgpo_jax.models.decoder import init

# Path in the parameter tree: name in the checkpoint, with the layer number for {}. A kernel is
# stored as [in, out] here and as [out, in] there; everything else is stored alike.
NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_EMBEDDING, _HEAD = NAMES["embed/embedding"], NAMES["head/kernel"]
_RECOMPUTED = "rotary_emb.inv_freq"  # a buffer that old versions of transformers saved

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_READABLE = ("F16", "BF16", "F32", "F64")  # in the words of safetensors


class _Slot(NamedTuple):
    """Where a tensor of the checkpoint lives in the parameter tree."""

    path: str
    index: Any  # layer number along the leading axis of the leaf, or ... for the whole leaf
    shape: tuple[int, ...]  # as stored in the checkpoint

    def flip(self, array: np.ndarray) -> np.ndarray:
        """From the checkpoint's orientation to the tree's, or back."""
        return array.T if self.path.endswith("/kernel") else array


def load(
    folder: str | os.PathLike[str], config: ModelConfig | None = None, dtype: Any = None
) -> tuple[dict[str, Any], ModelConfig]:
    """Reads a Hugging Face folder: config.json, and model.safetensors or the shards of its index.

    Args:
        folder: path of the folder.
        config: the model's shape, instead of the one in config.json.
        dtype: float32 or bfloat16; None keeps the stored one.

    Returns:
        (params, config); the leaves of params are numpy arrays in host memory.

    Raises:
        ValueError: a file is absent or damaged, the model is not supported, or a tensor is missing,
            unknown, misshapen or of another dtype; the message names it. Pickles are never opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder is {str(folder)!r}, which is not a folder")
    if config is None:
        config = read_config(folder)
    with ExitStack() as stack:
        handles = {}
        for file, promised in _weight_files(folder).items():
            handle = stack.enter_context(_open(folder / file))
            stored = set(handle.keys())
            if promised is not None and promised != stored:
                raise ValueError(
                    f"{_INDEX} and {file} of {folder} disagree about tensor "
                    f"{_listed(promised ^ stored)}"
                )
            handles.update(dict.fromkeys(stored, handle))
        params = assemble(config, handles, lambda name: _read(handles[name], name), dtype)
    return params, config


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, from its config.json; the weights are not read."""
    return from_hf(read_json(Path(folder) / "config.json"))


def assemble(
    config: ModelConfig, names: Iterable[str], read: Callable[[str], np.ndarray], dtype: Any = None
) -> dict[str, Any]:
    """Parameter tree of a checkpoint whose tensors are read by name, one at a time.

    Args:
        config: the model's shape.
        names: every tensor of the checkpoint, by its Hugging Face name.
        read: gives the tensor of a name, floating point, as the checkpoint stores it.
        dtype: float32 or bfloat16; None keeps that of the tensors, which must then agree.

    Raises:
        ValueError: naming the tensor that is missing, unknown, misshapen or of another dtype.
    """
    names = set(names)
    if config.num_layers > len(names):  # not listed one by one: the number may be any
        raise ValueError(f"num_hidden_layers is {config.num_layers}; the checkpoint has {len(names)} tensors in all")
    shapes, layout = _shapes(config), _layout(config)
    unknown = {name for name in names - layout.keys() if not name.endswith(_RECOMPUTED)}
    if config.tie_embeddings and _HEAD in unknown:
        if _EMBEDDING in names and not np.array_equal(read(_HEAD), read(_EMBEDDING)):
            raise ValueError(
                f"tensor {_HEAD} differs from {_EMBEDDING}, "
                "but the config says tie_word_embeddings is true"
            )
        unknown.remove(_HEAD)
    missing = layout.keys() - names
    if missing or unknown:
        hint = ", as the config says tie_word_embeddings is false" if _HEAD in missing else ""
        raise ValueError(
            f"the checkpoint does not fit a {config.architecture} of this config: "
            f"missing tensors: {_listed(missing)}{hint}; unknown tensors: {_listed(unknown)}"
        )

    leaves: dict[str, np.ndarray] = {}
    chosen = None if dtype is None else _checked_dtype("dtype", dtype)
    for name, slot in layout.items():
        tensor = read(name)
        if tensor.shape != slot.shape:
            raise ValueError(
                f"tensor {name} has shape {tensor.shape}; the config asks for {slot.shape}"
            )
        if chosen is None:
            chosen = _checked_dtype(f"dtype of tensor {name}", tensor.dtype)
        if dtype is None and tensor.dtype != chosen:
            raise ValueError(
                f"tensor {name} is {tensor.dtype} where others are {chosen}; "
                "give a dtype to convert all to"
            )
        if slot.path not in leaves:
            leaves[slot.path] = np.empty(shapes[slot.path], chosen)
        leaves[slot.path][slot.index] = slot.flip(tensor)
    return unflatten_dict(leaves, sep="/")


def save(
    folder: str | os.PathLike[str],
    params: dict[str, Any],
    config: ModelConfig,
    *,
    tokenizer: Any = None,
    stop_ids: Sequence[int] = (),
    dtype: Any = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `load` and transformers' Auto classes read.

    It is written under a hidden name beside its final place and renamed when whole, so a folder
    under the final name is never half a checkpoint. On several hosts, gather the parameters and
    call it on one.

    Args:
        folder: path to create; it must not exist, or be an empty folder.
        params: parameter tree, of jax or numpy arrays.
        config: the model's shape.
        tokenizer: a transformers tokenizer to save along; it also gives the special ids.
        stop_ids: tokens that end a response; by default the tokenizer's end-of-sequence token.
        dtype: float32 or bfloat16; None keeps that of each leaf.
        shard_bytes: most bytes of tensors in one file, except that a tensor is never split.

    Raises:
        ValueError: the folder has contents, an id lies outside the vocabulary, or a leaf is
            missing, unknown, misshapen or neither float32 nor bfloat16.
        OSError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder is {str(folder)!r}, which already exists; give a new one")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    leaves, layout = flatten_dict(params, sep="/"), _layout(config)
    _check_leaves(leaves, config)
    stored = {
        path: _checked_dtype(f"dtype of {path}", leaf.dtype if dtype is None else dtype)
        for path, leaf in leaves.items()
    }
    ids = _special_ids(tokenizer, stop_ids, config.vocab_size)
    num_bytes = {
        name: math.prod(slot.shape) * stored[slot.path].itemsize for name, slot in layout.items()
    }
    shards = _shards(num_bytes, shard_bytes)

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file, names in shards.items():
            tensors = {}
            for name in names:
                slot = layout[name]
                tensor = slot.flip(np.asarray(leaves[slot.path][slot.index]))
                tensors[name] = np.ascontiguousarray(tensor, stored[slot.path])
            try:
                save_file(tensors, partial / file, metadata={"format": "pt"})
            except SafetensorError as error:  # such as a full disk
                raise OSError(f"{partial / file} cannot be written: {error}") from error
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            metadata = {"total_size": sum(num_bytes.values())}
            _write_json(partial / _INDEX, {"metadata": metadata, "weight_map": weight_map})
        torch_dtype = stored["embed/embedding"].name
        _write_json(partial / "config.json", {**to_hf(config), **ids, "torch_dtype": torch_dtype})
        _write_json(partial / "generation_config.json", ids)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every leaf of the parameter tree, by path."""
    tree = jax.eval_shape(lambda: init(jax.random.key(0), config))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _layout(config: ModelConfig) -> dict[str, _Slot]:
    """Every tensor of a checkpoint, by name."""
    layout = {}
    for path, shape in _shapes(config).items():
        stacked = path.startswith("layers/")
        shape = shape[1:] if stacked else shape
        shape = shape[::-1] if path.endswith("/kernel") else shape
        for index in range(config.num_layers) if stacked else [...]:
            layout[NAMES[path].format(index)] = _Slot(path, index, shape)
    return layout


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The safetensors files of a folder and, where there is an index, the tensors it puts there."""
    if (folder / _WHOLE).exists():
        return {_WHOLE: None}
    if not (folder / _INDEX).exists():
        pickles = {path.name for path in folder.iterdir() if path.suffix in _PICKLES}
        found = f"; pickles are never opened: {_listed(pickles)}" if pickles else ""
        raise ValueError(f"{folder} has neither {_WHOLE} nor {_INDEX}{found}")
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / _INDEX} has no weight_map from tensors to files")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(
                f"weight_map in {folder / _INDEX} puts {name} in {file!r}; "
                "it must be the plain name of a safetensors file in the same folder"
            )
        files[file] = (files.get(file) or set()) | {name}
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _read(handle: Any, name: str) -> np.ndarray:
    stored = handle.get_slice(name).get_dtype()
    if stored not in _READABLE:
        raise ValueError(f"tensor {name} is {stored}; supported: {', '.join(_READABLE)}")
    return handle.get_tensor(name)


def _check_leaves(leaves: dict[str, Any], config: ModelConfig) -> None:
    shapes = _shapes(config)
    if leaves.keys() != shapes.keys():
        raise ValueError(
            f"params do not fit a {config.architecture} of this config: "
            f"missing: {_listed(shapes.keys() - leaves.keys())}; "
            f"unknown: {_listed(leaves.keys() - shapes.keys())}"
        )
    for path, shape in shapes.items():
        if leaves[path].shape != shape:
            raise ValueError(
                f"params {path} has shape {leaves[path].shape}; the config asks for {shape}"
            )


def _shards(num_bytes: dict[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Tensor names by file, filled in their order."""
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in num_bytes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {_WHOLE: groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": group for i, group in enumerate(groups, 1)}


def _special_ids(tokenizer: Any, stop_ids: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """The ids for config.json and generation_config.json.

    An unknown one is null there: where it is left out, transformers takes those of the first Llama.
    """
    fields = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {field: getattr(tokenizer, field, None) for field in fields}
    if stop_ids:
        ids["eos_token_id"] = [int(token) for token in stop_ids]
    for field, value in ids.items():
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= token < vocab_size:
                raise ValueError(f"{field} is {token}; vocab_size allows 0 to {vocab_size - 1}")
    return ids


def _checked_dtype(field: str, dtype: Any) -> np.dtype:
    name = np.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"{field} is {name}; dtype must be one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError names a file that has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return (", ".join(ordered[:3]) or "none") + more
