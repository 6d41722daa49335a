"""Maps names in a Hugging Face checkpoint to paths in the parameter tree, for import and export."""

from itertools import accumulate
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from sgpo_jax.models.config import ModelConfig
from sgpo_jax.models.decoder import init

# Path in the parameter tree: name in the checkpoint, with the number of the layer for {}, and then of the expert. A
# kernel is [in, out] in the tree and [out, in] in the checkpoint; every other tensor has the same shape in both.
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
    "layers/router/weight": "model.layers.{}.mlp.gate.weight",
    "layers/experts_gate/kernel": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers/experts_up/kernel": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "layers/experts_down/kernel": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
# Where a family has norms after attention and MLP, transformers gives the second name to another norm.
_POST_NORMS = {
    "layers/attn_post_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
# Where a file has several of our kernels in one tensor, one below the other in this order.
_FUSED = {
    **dict.fromkeys(
        ("layers/q/kernel", "layers/k/kernel", "layers/v/kernel"), "model.layers.{}.self_attn.qkv_proj.weight"
    ),
    **dict.fromkeys(("layers/gate/kernel", "layers/up/kernel"), "model.layers.{}.mlp.gate_up_proj.weight"),
}
EMBEDDING, HEAD = NAMES["embed/embedding"], NAMES["head/kernel"]


class Slot(NamedTuple):
    """The place of a checkpoint's tensor, or of some of its rows, in the parameter tree."""

    path: str
    at: tuple[int, ...]  # along the leading axes of the leaf; empty: the rows are the whole leaf
    shape: tuple[int, ...]  # in the checkpoint
    first: int = 0  # row of the tensor

    @property
    def transposed(self) -> bool:
        """Returns whether the checkpoint stores the transposed matrix."""
        return self.path.endswith("/kernel")


class Tensor(NamedTuple):
    """A tensor of a checkpoint, and where its rows belong."""

    shape: tuple[int, ...]
    slots: tuple[Slot, ...]  # from its first row to its last


def shapes(config: ModelConfig) -> dict[str, Any]:
    """Returns the parameter tree with a jax.ShapeDtypeStruct for every leaf."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


def names(config: ModelConfig) -> dict[str, str]:
    """Returns NAMES as the family has them: path -> name in the checkpoint."""
    family = config.family
    return NAMES | (_POST_NORMS if family.post_norm else {}) | (_FUSED if family.fused else {})


def layout(config: ModelConfig) -> dict[str, Tensor]:
    """Returns the place of every tensor of a checkpoint, by its name."""
    slots: dict[str, list[Slot]] = {}
    table = names(config)
    for path, leaf in flatten_dict(shapes(config), sep="/").items():
        axes = table[path].count("{}")  # layers, experts
        for at in np.ndindex(leaf.shape[:axes]):
            slot = Slot(path, at, leaf.shape[axes:])
            shape = slot.shape[::-1] if slot.transposed else slot.shape
            slots.setdefault(table[path].format(*at), []).append(slot._replace(shape=shape))
    order = [*table]
    return {name: _joined(sorted(parts, key=lambda part: order.index(part.path))) for name, parts in slots.items()}


def _joined(parts: list[Slot]) -> Tensor:
    ends = [*accumulate(part.shape[0] for part in parts)]
    slots = tuple(part._replace(first=end - part.shape[0]) for part, end in zip(parts, ends, strict=True))
    return Tensor((ends[-1], *parts[0].shape[1:]), slots)
