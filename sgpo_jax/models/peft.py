"""Reads and writes adapters as folders of peft: adapter_config.json and adapter_model.safetensors.

peft stores lora_A as `[r,D]` and lora_B as `[F,r]`, a pair for each kernel of each layer.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sgpo_jax.models import lora as adapters_of
from sgpo_jax.models import param_mapping as table
from sgpo_jax.models.config import ModelConfig
from sgpo_jax.models.huggingface import read_json
from sgpo_jax.models.lora import Adapters, Lora
from sgpo_jax.runtime import buckets
from sgpo_jax.runtime.files import replacing, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
# Fields of adapter_config.json that are read, or do not change what the adapters compute. Any other must be empty.
_READ = {"peft_type": "LORA", "bias": "none"}  # with the only value
_FREE = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "base_model_name_or_path", "revision",
    "task_type", "inference_mode", "lora_dropout", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size", "layers_pattern",
}  # fmt: skip
_KEEPS_BASE = (True, False, "gaussian", "orthogonal")  # init_lora_weights; the others change the base as well


def check(folder: str | Path, config: ModelConfig, lora: Lora) -> None:
    """Checks that a folder holds adapters of this shape for this model; reads no tensors.

    Raises:
      ValueError: a file is missing or damaged, the adapters have another shape, or compute something else than LoRA.
    """
    folder = _local(folder)
    fields = read_json(folder / CONFIG)
    others = {name: value for name, value in fields.items() if value and name not in _FREE and name not in _READ}
    if others.pop("init_lora_weights", True) not in _KEEPS_BASE:
        others["init_lora_weights"] = fields["init_lora_weights"]
    others |= {name: fields[name] for name, only in _READ.items() if fields.get(name, only) != only}
    if others:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(others.items()))
        raise ValueError(f"{folder / CONFIG}: {listed}: must be empty, or as peft sets it; it is not computed here")
    found = {"rank": fields.get("r"), "alpha": fields.get("lora_alpha"), "rslora": fields.get("use_rslora", False)}
    for name, value in found.items():
        if value != getattr(lora, name):
            raise ValueError(f"config.lora.{name}={getattr(lora, name)!r}: must be {value!r}, as in {folder / CONFIG}")
    refuse_fused(config)
    wanted = _layout(config, lora)
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read (pickles are never opened): {error}") from error
    wrong = sorted(name for name in wanted.keys() | stored.keys() if stored.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{folder / WEIGHTS}: {len(wrong)} tensors do not fit config.lora.targets={lora.targets!r} and the model; "
            f"the first, {name}, has shape {stored.get(name)}, not {wanted.get(name)} (None: no such tensor)"
        )


def _local(folder: str | Path) -> Path:
    if buckets.is_url(str(folder)):
        return buckets.fetch(str(folder), lambda name: name in (CONFIG, WEIGHTS))
    return Path(folder).expanduser()


def load(folder: str | Path, config: ModelConfig, lora: Lora) -> Adapters:
    """Reads the adapters of a folder as float32 arrays in host memory. Raises as `check`."""
    check(folder, config, lora)
    shapes = adapters_of.shapes(config, lora)
    with safe_open(_local(folder) / WEIGHTS, framework="np") as file:

        def read(path: Any, leaf: Any) -> np.ndarray:
            names = [_name(path[-2].key, path[-1].key, layer) for layer in range(config.num_layers)]
            return np.stack([file.get_tensor(name).T.astype(np.float32) for name in names])

        return jax.tree_util.tree_map_with_path(read, shapes)


def save(folder: str | Path, adapters: Adapters, lora: Lora, source: str) -> None:
    """Writes adapters in host memory to a folder that peft and `load` read; adapter_config.json comes last.

    Args:
      folder: to write to; it is created if missing.
      adapters: the tree.
      lora: their shape and scale.
      source: of the base, such as its hub id, from which peft can load it.
    """
    folder, tensors = Path(folder), {}
    for kernel, pair in adapters["layers"].items():
        for factor, stacked in pair.items():
            for layer, matrix in enumerate(np.asarray(stacked, np.float32)):
                tensors[_name(kernel, factor, layer)] = np.ascontiguousarray(matrix.T)
    with replacing(folder / WEIGHTS) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    modules = sorted(table.NAMES[f"layers/{kernel}/kernel"].split(".")[-2] for kernel in adapters["layers"])
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": source, "r": lora.rank,
        "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "target_modules": modules, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
    write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def refuse_fused(config: ModelConfig) -> None:
    """Raises ValueError where peft has one pair of factors for several of our kernels."""
    if config.family.fused:
        raise ValueError(
            f"a folder of peft for {config.architecture} has one adapter for query, key and value, and one for gate "
            "and up; here each has its own: export the merged model, without --adapters"
        )


def _name(kernel: str, factor: str, layer: int) -> str:
    """Returns peft's name of a factor of a kernel in one layer."""
    module = table.NAMES[f"layers/{kernel}/kernel"].format(layer).removesuffix(".weight")
    return f"base_model.model.{module}.{_FACTORS[factor]}.weight"


def _layout(config: ModelConfig, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of the adapters, by peft's name."""
    return {
        _name(kernel, factor, layer): leaf.shape[:0:-1]
        for kernel, pair in adapters_of.shapes(config, lora)["layers"].items()
        for factor, leaf in pair.items()
        for layer in range(config.num_layers)
    }
