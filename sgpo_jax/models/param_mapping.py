"""Maps names in a Hugging Face checkpoint to paths in the parameter tree, for import and export."""

from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from sgpo_jax.models.config import ModelConfig
from sgpo_jax.models.decoder import init

# Path in the parameter tree: name in the checkpoint, with the layer number for {}. A kernel is [in, out] in the tree
# and [out, in] in the checkpoint; every other tensor has the same shape in both.
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
# Where a family has norms after attention and MLP, transformers gives the second name to another norm.
_POST_NORMS = {
    "layers/attn_post_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
EMBEDDING, HEAD = NAMES["embed/embedding"], NAMES["head/kernel"]


class Slot(NamedTuple):
    """The place of a checkpoint's tensor in the parameter tree."""

    path: str
    layer: int | None  # position along the leading axis of the leaf; None: the tensor is the whole leaf
    shape: tuple[int, ...]  # in the checkpoint

    @property
    def transposed(self) -> bool:
        """Returns whether the checkpoint stores the transposed matrix."""
        return self.path.endswith("/kernel")


def shapes(config: ModelConfig) -> dict[str, Any]:
    """Returns the parameter tree with a jax.ShapeDtypeStruct for every leaf."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


def layout(config: ModelConfig) -> dict[str, Slot]:
    """Returns the place of every tensor of a checkpoint, by its name."""
    slots, names = {}, NAMES | (_POST_NORMS if config.family.post_norm else {})
    for path, leaf in flatten_dict(shapes(config), sep="/").items():
        stacked = path.startswith("layers/")
        for layer in range(config.num_layers) if stacked else [None]:
            slot = Slot(path, layer, leaf.shape[1:] if stacked else leaf.shape)
            shape = slot.shape[::-1] if slot.transposed else slot.shape
            slots[names[path].format(layer)] = slot._replace(shape=shape)
    return slots
