"""The policy of a config: the model's shape, its tokenizer and its initial parameters; and the run it belongs to."""

import fnmatch
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgpo_jax import data, models, sharding
from sgpo_jax.models import gguf, huggingface
from sgpo_jax.models.lora import Lora
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.prompts import user_turn
from sgpo_jax.rollout import LanguageModel
from sgpo_jax.runtime import buckets
from sgpo_jax.runtime.trackers import Trackers

WORDS = "words:"  # prefix of a tokenizer's name: its tokens are the words of a source of problems
_NAMES = ("scratch", "smollm2")  # of models, also where folders have them
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


class Policy(NamedTuple):
    """A model with its tokenizer and prompt settings; its parameters are a separate argument of every function."""

    config: models.ModelConfig
    tokenizer: Any
    stop_ids: tuple[int, ...]  # token ids that end a response; the first one closes expert responses
    pad_id: int
    dtype: Any  # of activations, matrix products and the cache
    instruction: str  # closing line of every prompt
    system: str = ""  # the system's turn before every prompt; "" for none
    lora: Lora | None = None  # the adapters that training changes; None: it changes all parameters

    @property
    def language_model(self) -> LanguageModel:
        """The properties of the policy that generation needs."""
        return LanguageModel(self.config, self.stop_ids, self.pad_id, self.dtype)


@dataclass(frozen=True)
class Run:
    """The parts of a run that every stage needs; the parameters are passed separately."""

    config: ConfigDict
    workdir: Path
    policy: Policy
    mesh: Mesh
    trackers: Trackers = field(default_factory=Trackers)
    base: Callable[[], Any] | None = None  # returns the frozen parameters under the adapters; None without adapters


def load(
    source: str, tokenizer: str, *, layers: int, hidden: int, heads: int, mlp: int, dtype: Any, instruction: str
) -> tuple[Policy, Callable[..., Any]]:
    """Reads a model's shape and tokenizer; its weights are read when the returned function is called.

    Args:
      source: "scratch", "smollm2", a .gguf file or a Hugging Face folder, also in a bucket, or a hub id.
      tokenizer: a name that `tokenizer.load` reads; or "words:" and a source of problems, see `data.load`, for a
        tokenizer of the words in the prompts and solutions of its rows; "" takes the model's tokenizer.
      layers, hidden, heads, mlp: shape of a model from scratch.
      dtype: type of the activations.
      instruction: closing line of every prompt.

    Returns:
      (policy, `initial(key, mesh, dtype=float32) -> params`), on the mesh; only a model from scratch uses the key.

    Raises:
      ValueError: the model or the tokenizer cannot be read, or one of its special ids is outside the vocabulary.
    """
    folder: Path | None = None
    listed: tuple[int, ...] = ()  # stop tokens that a GGUF file names
    if source == "smollm2":
        source = gguf.smollm2_path()
    elif source != "scratch":
        local = buckets.fetch(source, _is_wanted) if buckets.is_url(source) else Path(os.path.expanduser(source))
        if source.endswith(".gguf"):
            source = str(local)
        else:
            if os.path.isfile(local):
                raise ValueError(f"model {source!r} is a file; allowed: a folder (an archive unpacked), a .gguf file")
            folder = local if os.path.isdir(local) else _download(source)
            config = huggingface.read_config(folder)  # before transformers reads it: these errors explain more
    if tokenizer.startswith(WORDS):
        tok = tokenizers.words(_texts(tokenizer.removeprefix(WORDS), instruction))
    else:
        tok = tokenizers.load(tokenizer or str(folder or source))
    if source == "scratch":
        config = scratch_config(len(tok), layers=layers, hidden=hidden, heads=heads, mlp=mlp)

        def initial(key, mesh, dtype=jnp.float32):
            return place(jax.tree.map(lambda x: x.astype(dtype), models.init(key, config)), mesh)
    elif folder is None:
        config, listed = gguf.read_config(source), gguf.stop_ids(source)

        def initial(key, mesh, dtype=jnp.float32):
            return _finite(source, gguf.load(source, dtype, mesh)[0])
    else:

        def initial(key, mesh, dtype=jnp.float32):
            return _finite(source, huggingface.load(folder, config, dtype, mesh)[0])

    if len(tok) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tok)} tokens, the model's vocabulary {config.vocab_size}")
    stops = tuple(dict.fromkeys(tokenizers.stop_ids(tok, folder) + listed))
    try:
        huggingface.special_ids(tok, stops, config.vocab_size)  # else the export would refuse them, after the training
    except ValueError as error:
        raise ValueError(
            f"model {source!r}: {error} (from generation_config.json, config.json, the GGUF file or the tokenizer)"
        ) from error
    return Policy(config, tok, stops, tokenizers.pad_id(tok), dtype, instruction), initial


def check_weights(source: str) -> None:
    """Checks that a model's folder on a disk has weights, before the rows of a run are read. None of them is read.

    Args:
      source: as in `load`; what is no such folder passes.

    Raises:
      ValueError: there are none, or their index is broken.
    """
    folder = Path(os.path.expanduser(source))
    if source not in _NAMES and folder.is_dir():
        huggingface.weight_files(folder)


def with_system(policy: Policy, text: str) -> Policy:
    """Returns the policy with a system's turn before every prompt; "" changes nothing.

    Raises:
      ValueError: the chat template has no such turn.
    """
    if not text:
        return policy
    try:
        prompt = tokenizers.encode_turn(policy.tokenizer, "problem", text)
        shown = policy.tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except Exception as error:  # a template is a program by the model's authors
        raise ValueError(f"config.data.system={text!r}: the model's chat template refuses it ({error})") from error
    if "".join(text.split()) not in "".join(shown.split()):
        raise ValueError(f"config.data.system={text!r}: the model's chat template leaves it out; must be ''")
    return policy._replace(system=text)


def _finite(source: str, params: Any) -> Any:
    """Returns the parameters of a model after checking that all of them are finite."""
    is_finite = jax.jit(partial(jax.tree.map, lambda x: jnp.isfinite(x).all()))(params)
    wrong = [jax.tree_util.keystr(path, simple=True, separator="/")
             for path, finite in jax.tree_util.tree_leaves_with_path(is_finite) if not finite]  # fmt: skip
    if wrong:
        raise ValueError(f"model {source!r}: NaN or infinity in {len(wrong)} of its parameters: {', '.join(wrong[:4])}")
    return params


def _texts(source: str, instruction: str) -> Iterator[str]:
    """Yields the guided prompt and the solution of every row; a row without strategy has its problem in that place."""
    try:
        rows = data.load(source)
    except (ValueError, ImportError) as error:
        raise ValueError(f"tokenizer {WORDS + source!r}: {error}") from error
    for row in rows:
        yield user_turn(row["problem"], row.get("strategy", row["problem"]), instruction)
        yield row.get("solution", "")


def scratch_config(vocab_size: int, *, layers: int, hidden: int, heads: int, mlp: int) -> models.ModelConfig:
    """Returns the shape of a small decoder that is trained from random parameters."""
    return models.ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        mlp_size=mlp,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=True,
        max_positions=4096,
    )


def place(params: Any, mesh: Mesh) -> Any:
    """Places parameters from host memory on the mesh, by `sharding.RULES`."""
    return sharding.place(params, sharding.tree_shardings(params, mesh))


def _is_wanted(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in _WANTED)


def _download(source: str) -> Path:
    """Downloads a hub model, without code or pickles, and returns its local folder."""
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {source!r} is neither a local folder nor a Hugging Face model that can be downloaded ({error}); "
            "also allowed: 'scratch', 'smollm2', a .gguf file"
        ) from error
