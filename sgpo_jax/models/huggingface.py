"""Hugging Face folders (config.json and safetensors) to parameter trees on a mesh and back.

`param_mapping.NAMES` serves both directions. All of a checkpoint is checked before its tensors are read, which
`sharded_io` does in blocks, so that no host ever holds more than the parts of its own devices.
"""

import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from sgpo_jax import sharding
from sgpo_jax.models import param_mapping as table
from sgpo_jax.models import sharded_io
from sgpo_jax.models.config import ModelConfig, from_hf, to_hf
from sgpo_jax.models.sharded_io import Stored

_RECOMPUTED = "rotary_emb.inv_freq"  # a buffer that old versions of transformers saved

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# In the words of safetensors.
_READABLE = {"F16": np.dtype(np.float16), "BF16": _DTYPES["bfloat16"], "F32": _DTYPES["float32"], "F64": np.dtype("f8")}


def load(
    folder: str | os.PathLike[str], config: ModelConfig | None = None, dtype: Any = None, mesh: Mesh | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """Reads a Hugging Face folder: config.json, and model.safetensors or the shards of its index.

    Args:
        folder: path of the folder.
        config: the model's shape, instead of the one in config.json.
        dtype: float32 or bfloat16; None keeps the stored one.
        mesh: where the parameters go, as `sharding.RULES` say; None is one device of this process.

    Returns:
        (params, config); the leaves of params are jax arrays. Each process reads the parts of its own devices.

    Raises:
        ValueError: a file is absent or damaged, the model is not supported or cannot be split as the mesh asks, or a
            tensor is missing, unknown, misshapen or of another dtype; the message names it. Pickles are never opened.
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
        params = assemble(config, handles, lambda name: _stored(handles[name], name), dtype, mesh)
    return params, config


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, from its config.json; the weights are not read."""
    return from_hf(read_json(Path(folder) / "config.json"))


def assemble(
    config: ModelConfig,
    names: Iterable[str],
    find: Callable[[str], Stored],
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Parameter tree of a checkpoint, whose tensors are read when all of them are known to fit.

    Args:
        config: the model's shape.
        names: every tensor of the checkpoint, by its Hugging Face name.
        find: gives the tensor of a name, which is floating point.
        dtype: float32 or bfloat16; None keeps that of the tensors, which must then agree.
        mesh: as of `load`.

    Raises:
        ValueError: naming the tensor that is missing, unknown, misshapen or of another dtype.
    """
    names = set(names)
    if config.num_layers > len(names):  # not listed one by one: the number may be any
        raise ValueError(f"num_hidden_layers is {config.num_layers}; the checkpoint has {len(names)} tensors in all")
    layout = table.layout(config)
    unknown = {name for name in names - layout.keys() if not name.endswith(_RECOMPUTED)}
    repeated = config.tie_embeddings and table.HEAD in unknown
    if repeated:
        unknown.remove(table.HEAD)
    missing = layout.keys() - names
    if missing or unknown:
        hint = ", as the config says tie_word_embeddings is false" if table.HEAD in missing else ""
        raise ValueError(
            f"the checkpoint does not fit a {config.architecture} of this config: "
            f"missing tensors: {_listed(missing)}{hint}; unknown tensors: {_listed(unknown)}"
        )

    if dtype is None:
        first = next(iter(layout))
        chosen = _checked_dtype(f"dtype of tensor {first}", find(first).dtype)
    else:
        chosen = _checked_dtype("dtype", dtype)
    tensors: dict[str, dict[table.Slot, Stored]] = {}
    for name, slot in layout.items():
        tensor = find(name)
        if tensor.shape != slot.shape:
            raise ValueError(
                f"tensor {name} has shape {tensor.shape}; the config asks for {slot.shape}"
            )
        if dtype is None and tensor.dtype != chosen:
            raise ValueError(
                f"tensor {name} is {tensor.dtype} where others are {chosen}; "
                "give a dtype to convert all to"
            )
        tensors.setdefault(slot.path, {})[slot] = tensor
    tree = table.shapes(config)
    shapes = flatten_dict(tree, sep="/")
    shardings = flatten_dict(sharding.tree_shardings(tree, mesh or _one_device()), sep="/")
    if repeated and not sharded_io.equal(find(table.HEAD), find(table.EMBEDDING)):
        raise ValueError(
            f"tensor {table.HEAD} differs from {table.EMBEDDING}, "
            "but the config says tie_word_embeddings is true"
        )
    leaves = {
        path: sharded_io.read(shapes[path].shape, chosen, shardings[path], parts) for path, parts in tensors.items()
    }
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
    under the final name is never half a checkpoint. Of several processes all call it, and the first one writes what
    is gathered from all, a block at a time.

    Args:
        folder: path to create; it must not exist, or be an empty folder.
        params: parameter tree, of jax arrays placed as `sharding.RULES` say, or of others, which go to one device.
        config: the model's shape.
        tokenizer: a transformers tokenizer to save along; it also gives the special ids.
        stop_ids: tokens that end a response; by default the tokenizer's end-of-sequence token.
        dtype: float32 or bfloat16; None keeps that of each leaf.
        shard_bytes: most bytes of tensors in one file, except that a tensor is never split.

    Raises:
        ValueError: the folder has contents, an id lies outside the vocabulary, or a leaf is
            missing, unknown, misshapen, split between layers or neither float32 nor bfloat16.
        OSError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder).resolve()
    _on_first(partial(_check_new, folder))
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    leaves, layout = flatten_dict(params, sep="/"), table.layout(config)
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
    leaves = {path: _on_mesh(path, leaf) for path, leaf in leaves.items()}

    unfinished = folder.with_name(f".{folder.name}.partial")
    try:
        _on_first(partial(_make_anew, unfinished))
        for file, names in shards.items():
            # The order of safetensors' own writer: wider numbers first, so that all are aligned.
            names.sort(key=lambda name: (-stored[layout[name].path].itemsize, name))
            slots = {name: layout[name] for name in names}
            rows = sharded_io.blocks(leaves, slots)
            _on_first(partial(sharded_io.write, unfinished / file, slots, stored, rows), rows)
        documents = {"generation_config.json": ids}
        documents["config.json"] = {**to_hf(config), **ids, "torch_dtype": stored["embed/embedding"].name}
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            documents[_INDEX] = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}
        _on_first(partial(_finish, unfinished, folder, documents, tokenizer))
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _on_first(action: Callable[[], None], rest: Iterable[Any] = ()) -> None:
    """Runs `action` on the first process, and what is left of `rest` on all; when it fails, it fails on all."""
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as caught:
            error = caught
    deque(rest, maxlen=0)
    failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
    if error is not None:
        raise error
    if failed:
        raise OSError("the first process cannot write the folder; its message says why")


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder is {str(folder)!r}, which already exists; give a new one")


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(unfinished: Path, folder: Path, documents: dict[str, dict[str, Any]], tokenizer: Any) -> None:
    for name, content in documents.items():
        (unfinished / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def _one_device() -> Mesh:
    return sharding.make_mesh(devices=jax.local_devices()[:1])


def _on_mesh(path: str, leaf: Any) -> jax.Array:
    if not isinstance(getattr(leaf, "sharding", None), NamedSharding):
        return jax.device_put(leaf, NamedSharding(_one_device(), P()))
    if path.startswith("layers/") and leaf.sharding.shard_shape(leaf.shape)[0] != leaf.shape[0]:
        raise ValueError(f"params {path} is placed as {leaf.sharding.spec}; the first axis, its layers, must be whole")
    return leaf


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


def _stored(handle: Any, name: str) -> Stored:
    tensor = handle.get_slice(name)
    if (code := tensor.get_dtype()) not in _READABLE:
        raise ValueError(f"tensor {name} is {code}; supported: {', '.join(_READABLE)}")
    return Stored(tuple(tensor.get_shape()), _READABLE[code], lambda: tensor)


def _check_leaves(leaves: dict[str, Any], config: ModelConfig) -> None:
    shapes = {path: leaf.shape for path, leaf in flatten_dict(table.shapes(config), sep="/").items()}
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


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return (", ".join(ordered[:3]) or "none") + more
