"""Reads Hugging Face folders (config.json and safetensors) into parameter trees on a mesh, and writes them.

`param_mapping.NAMES` serves both directions. The whole checkpoint is checked before a tensor is read. `sharded_io`
moves the tensors in blocks, so that no host holds more than the parts of its own devices.
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
from sgpo_jax.models.sharded_io import StoredTensor
from sgpo_jax.runtime.distributed import is_first
from sgpo_jax.runtime.files import write_text

_IGNORED = "rotary_emb.inv_freq"  # a buffer that old versions of transformers saved

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# safetensors' names of the types that `load` reads.
_READABLE = {"F16": np.dtype(np.float16), "BF16": _DTYPES["bfloat16"], "F32": _DTYPES["float32"], "F64": np.dtype("f8")}


def load(
    folder: str | os.PathLike[str], config: ModelConfig | None = None, dtype: Any = None, mesh: Mesh | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """Reads a Hugging Face folder: config.json, and model.safetensors or the shards of its index.

    Args:
        folder: path of the folder.
        config: the model's shape, in place of config.json.
        dtype: float32 or bfloat16; None keeps the stored type.
        mesh: mesh over which `sharding.RULES` split the parameters; None is one device of this process.

    Returns:
        (params, config); the leaves of params are jax arrays. Each process reads the parts of its own devices.

    Raises:
        ValueError: a file is absent or damaged, the model is not supported, the mesh does not divide a parameter, or
            a tensor is missing, unknown, misshapen or of another dtype; the message names it. Pickles are never opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder is {str(folder)!r}, which is not a folder")
    if config is None:
        config = read_config(folder)
    with ExitStack() as stack:
        handles = {}
        for file, listed in weight_files(folder).items():
            handle = stack.enter_context(_open(folder / file))
            stored = set(handle.keys())
            if listed is not None and listed != stored:
                raise ValueError(f"{_INDEX} and {file} of {folder} disagree about tensor {_join(listed ^ stored)}")
            handles.update(dict.fromkeys(stored, handle))
        params = assemble(config, handles, lambda name: _stored_tensor(handles[name], name), dtype, mesh)
    return params, config


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Returns the shape of the model in a Hugging Face folder. Reads config.json and no weights."""
    return from_hf(read_json(Path(folder) / "config.json"))


def assemble(
    config: ModelConfig,
    names: Iterable[str],
    get_tensor: Callable[[str], StoredTensor],
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Returns the parameter tree of a checkpoint. No tensor is read before all of them are known to fit.

    Args:
        config: the model's shape.
        names: Hugging Face names of all tensors in the checkpoint.
        get_tensor: returns the floating-point tensor of a name.
        dtype: float32 or bfloat16; None keeps the type of the tensors, which must all have the same.
        mesh: see `load`.

    Raises:
        ValueError: a tensor is missing, unknown, misshapen or of another dtype; the message names it.
    """
    names = set(names)
    if config.num_layers * max(config.experts, 1) > len(names):  # a damaged number could be too large to list all
        raise ValueError(f"num_hidden_layers is {config.num_layers}; the checkpoint has {len(names)} tensors in all")
    layout = table.layout(config)
    unknown = {name for name in names - layout.keys() if not name.endswith(_IGNORED)}
    repeats_embedding = config.tie_embeddings and table.HEAD in unknown
    if repeats_embedding:
        unknown.remove(table.HEAD)
    missing = layout.keys() - names
    if missing or unknown:
        hint = ", as the config says tie_word_embeddings is false" if table.HEAD in missing else ""
        raise ValueError(
            f"the checkpoint does not fit a {config.architecture} of this config: "
            f"missing tensors: {_join(missing)}{hint}; unknown tensors: {_join(unknown)}"
        )

    if dtype is None:
        first = next(iter(layout))
        leaf_dtype = _checked_dtype(f"dtype of tensor {first}", get_tensor(first).dtype)
    else:
        leaf_dtype = _checked_dtype("dtype", dtype)
    tensors: dict[str, dict[table.Slot, StoredTensor]] = {}
    for name, place in layout.items():
        tensor = get_tensor(name)
        if tensor.shape != place.shape:
            raise ValueError(f"tensor {name} has shape {tensor.shape}; the config asks for {place.shape}")
        if dtype is None and tensor.dtype != leaf_dtype:
            raise ValueError(
                f"tensor {name} is {tensor.dtype} where others are {leaf_dtype}; give a dtype to convert all to"
            )
        for slot in place.slots:
            tensors.setdefault(slot.path, {})[slot] = tensor
    tree = table.shapes(config)
    shapes = flatten_dict(tree, sep="/")
    shardings = flatten_dict(sharding.tree_shardings(tree, mesh or _one_device()), sep="/")
    if repeats_embedding and not sharded_io.equal(get_tensor(table.HEAD), get_tensor(table.EMBEDDING)):
        raise ValueError(
            f"tensor {table.HEAD} differs from {table.EMBEDDING}, but the config says tie_word_embeddings is true"
        )
    leaves = {
        path: sharded_io.read(shapes[path].shape, leaf_dtype, shardings[path], parts) for path, parts in tensors.items()
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

    The files are written to a hidden folder beside the final one, which is renamed when it is whole. A folder under the
    final name is therefore never half a checkpoint. All processes call this function; it gathers the parameters a
    block at a time, and the first process writes them.

    Args:
        folder: path to create, which must be absent or an empty folder.
        params: parameter tree, of jax arrays placed by `sharding.RULES` or of other arrays, which go to one device.
        config: the model's shape.
        tokenizer: a transformers tokenizer, which is saved too and gives the special ids.
        stop_ids: tokens that end a response; by default the tokenizer's end-of-sequence token.
        dtype: float32 or bfloat16; None keeps the type of each leaf.
        shard_bytes: limit for the bytes of tensors in one file; a larger tensor gets a file to itself.

    Raises:
        ValueError: the folder has contents, an id lies outside the vocabulary, or a leaf is missing, unknown,
            misshapen, split between layers or neither float32 nor bfloat16.
        OSError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder).resolve()
    _run_on_first(partial(_check_new, folder))
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    leaves, layout = flatten_dict(params, sep="/"), table.layout(config)
    _check_leaves(leaves, config)
    dtypes = {
        path: _checked_dtype(f"dtype of {path}", leaf.dtype if dtype is None else dtype)
        for path, leaf in leaves.items()
    }
    ids = special_ids(tokenizer, stop_ids, config.vocab_size)
    num_bytes = {name: math.prod(place.shape) * _dtype(place, dtypes).itemsize for name, place in layout.items()}
    shards = _shards(num_bytes, shard_bytes)
    leaves = {path: _on_mesh(path, leaf) for path, leaf in leaves.items()}

    unfinished = folder.with_name(f".{folder.name}.partial")
    try:
        _run_on_first(partial(_make_anew, unfinished))
        for file, names in shards.items():
            # The order of safetensors' own writer: wider numbers first, so that all are aligned.
            names.sort(key=lambda name: (-_dtype(layout[name], dtypes).itemsize, name))
            places = {name: layout[name] for name in names}
            rows = sharded_io.blocks(leaves, places)
            _run_on_first(partial(sharded_io.write, unfinished / file, places, dtypes, rows), rows)
        documents = {"generation_config.json": ids}
        documents["config.json"] = {**to_hf(config), **ids, "torch_dtype": dtypes["embed/embedding"].name}
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            documents[_INDEX] = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}
        _run_on_first(partial(_finish, unfinished, folder, documents, tokenizer))
    except BaseException:
        if is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _dtype(place: table.Tensor, dtypes: dict[str, np.dtype]) -> np.dtype:
    return dtypes[place.slots[0].path]


def _run_on_first(action: Callable[[], None], rest: Iterable[Any] = ()) -> None:
    """Runs `action` on the first process, then exhausts `rest` on all; an error is raised on all."""
    error: Exception | None = None
    if is_first():
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
        write_text(unfinished / name, json.dumps(content, indent=2) + "\n")
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


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Returns the safetensors files of a folder, each with the tensors that the index lists in it, if there is one.

    Raises:
        ValueError: there are none, or the index is broken.
    """
    if (folder / _WHOLE).exists():
        return {_WHOLE: None}
    if not (folder / _INDEX).exists():
        pickles = {path.name for path in folder.iterdir() if path.suffix in _PICKLES}
        hint = f"; pickles are never opened: {_join(pickles)}" if pickles else ""
        raise ValueError(f"{folder} has neither {_WHOLE} nor {_INDEX}{hint}")
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


def _stored_tensor(handle: Any, name: str) -> StoredTensor:
    tensor = handle.get_slice(name)
    if (code := tensor.get_dtype()) not in _READABLE:
        raise ValueError(f"tensor {name} is {code}; supported: {', '.join(_READABLE)}")
    return StoredTensor(tuple(tensor.get_shape()), _READABLE[code], lambda: tensor)


def _check_leaves(leaves: dict[str, Any], config: ModelConfig) -> None:
    shapes = {path: leaf.shape for path, leaf in flatten_dict(table.shapes(config), sep="/").items()}
    if leaves.keys() != shapes.keys():
        raise ValueError(
            f"params do not fit a {config.architecture} of this config: "
            f"missing: {_join(shapes.keys() - leaves.keys())}; unknown: {_join(leaves.keys() - shapes.keys())}"
        )
    for path, shape in shapes.items():
        if leaves[path].shape != shape:
            raise ValueError(f"params {path} has shape {leaves[path].shape}; the config asks for {shape}")


def _shards(num_bytes: dict[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Returns the tensor names of each file, in their order."""
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


def special_ids(tokenizer: Any, stop_ids: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """Returns the special ids for config.json and generation_config.json.

    An unknown id is null. For a missing one, transformers would take an id of the first Llama.

    Raises:
        ValueError: an id lies outside the vocabulary.
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
    """Reads the object in a JSON file.

    Raises:
        ValueError: the file has no JSON object; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _join(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return (", ".join(ordered[:3]) or "none") + more
