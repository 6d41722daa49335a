"""Reads and writes the shape of a decoder as a Hugging Face config.json.

A field that asks for something the decoder does not compute is refused by name, so that no checkpoint runs as another
model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FAMILIES = {
    # architecture: (model_type, qkv_bias, qk_norm, head_dim of a file without one)
    "Qwen2ForCausalLM": ("qwen2", True, False, None),
    "Qwen3ForCausalLM": ("qwen3", False, True, 128),
    "LlamaForCausalLM": ("llama", False, False, None),
}

# rope_type: the keys of its rotary dictionary, in addition to those of every type.
_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
_ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

_MAX_SIZE = 2**24  # for every size, so that a damaged file is refused before memory is taken for it


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The constants of the "llama3" rule, which stretches the slow rotary frequencies.

    Wavelengths (in positions) above `original_max_positions / low_freq_factor` are multiplied by `factor`, those below
    `original_max_positions / high_freq_factor` are kept, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        for field in ("factor", "low_freq_factor", "high_freq_factor"):
            _positive_number(f"rope_scaling.{field}", getattr(self, field))
        _positive_int("rope_scaling.original_max_positions", self.original_max_positions)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be above "
                f"low_freq_factor, which is {self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shapes and switches of one decoder; hashable, so it can be a static argument of jit.

    Raises:
        ValueError: a field is impossible, or `qkv_bias` or `qk_norm` does not fit `architecture`.
    """

    architecture: str  # Qwen2ForCausalLM, Qwen3ForCausalLM or LlamaForCausalLM
    vocab_size: int  # V
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key and value heads; divides H
    head_dim: int  # even; need not be D / H
    mlp_size: int  # F
    rope_theta: float  # base of the rotary wavelengths
    rope_scaling: RopeScaling | None = None
    norm_eps: float
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tie_embeddings: bool
    max_positions: int  # longest sequence the model was made for, in tokens

    def __post_init__(self) -> None:
        if self.architecture not in _FAMILIES:
            raise ValueError(f"architecture is {self.architecture!r}; supported: {', '.join(_FAMILIES)}")
        for field in (
            *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "mlp_size", "max_positions"),
        ):
            _positive_int(field, getattr(self, field))
        for field in ("rope_theta", "norm_eps"):
            _positive_number(field, getattr(self, field))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, which is {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"tie_embeddings is {self.tie_embeddings!r}; allowed: True, False")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(f"rope_scaling is {self.rope_scaling!r}; allowed: RopeScaling, None")
        _, qkv_bias, qk_norm, _ = _FAMILIES[self.architecture]
        for field, expected in (("qkv_bias", qkv_bias), ("qk_norm", qk_norm)):
            if getattr(self, field) is not expected:
                raise ValueError(f"{field} is {getattr(self, field)!r}; {self.architecture} has {expected}")


def from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a config.json, in the style of transformers 4 or 5.

    If the file leaves out head_dim, num_key_value_heads, rope_theta, tie_word_embeddings or a switch, the field takes
    transformers' own default; such a switch is off. Every other field is required.

    Args:
        hf_config: the parsed config.json.

    Returns:
        The configuration of the decoder.

    Raises:
        ValueError: a required field is absent or impossible, or the file asks for something the decoder does not
            compute; the message names the field, its value and what is allowed.
    """
    architecture = _architecture(hf_config)
    _, qkv_bias, qk_norm, family_head_dim = _FAMILIES[architecture]
    _refuse_unsupported(hf_config, architecture)
    hidden_size = _required_int(hf_config, "hidden_size")
    num_heads = _required_int(hf_config, "num_attention_heads")
    head_dim = hf_config.get("head_dim", family_head_dim)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ValueError(
                f"head_dim is absent and hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
            )
        head_dim = hidden_size // num_heads
    rope_theta, rope_scaling = _rope(hf_config)
    num_kv_heads = hf_config.get("num_key_value_heads")
    return ModelConfig(
        architecture=architecture,
        vocab_size=_required_int(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=_required_int(hf_config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        mlp_size=_required_int(hf_config, "intermediate_size"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=_required(hf_config, "rms_norm_eps"),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tie_embeddings=hf_config.get("tie_word_embeddings", False),
        max_positions=_required_int(hf_config, "max_position_embeddings"),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a configuration; `from_hf(to_hf(config)) == config`.

    The rotary fields have the older style, which transformers 4 and 5 both read.
    """
    scaling = config.rope_scaling
    return {
        "architectures": [config.architecture],
        "model_type": _FAMILIES[config.architecture][0],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
    }


def _architecture(hf: Mapping[str, Any]) -> str:
    """Returns the supported class that the file names, or the class of its model_type if it names none."""
    model_type = hf.get("model_type")
    names = hf.get("architectures")
    if not names:
        names = [name for name, family in _FAMILIES.items() if family[0] == model_type]
        if not names:
            raise ValueError(
                f"architectures is absent and model_type is {model_type!r}; "
                f"supported architectures: {', '.join(_FAMILIES)}"
            )
    if not isinstance(names, list) or len(names) != 1 or names[0] not in [*_FAMILIES]:
        raise ValueError(f"architectures is {names!r}; supported: one of {', '.join(_FAMILIES)}")
    expected = _FAMILIES[names[0]][0]
    if model_type not in (None, expected):
        raise ValueError(f"model_type is {model_type!r}; {names[0]} has {expected!r}")
    return names[0]


def _refuse_unsupported(hf: Mapping[str, Any], architecture: str) -> None:
    supported = {
        "hidden_act": "silu",
        "mlp_bias": False,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    # Qwen2 has its three biases whatever this field says. The other families would add a fourth, of o_proj.
    if architecture != "Qwen2ForCausalLM":
        supported["attention_bias"] = False
    for field, allowed in supported.items():
        if hf.get(field, allowed) not in (allowed, None):
            raise ValueError(f"{field} is {hf[field]!r}; supported: {allowed!r}")
    layer_types = hf.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"layer_types is {layer_types!r}; it must be a list")
    for layer_type in layer_types:
        if layer_type != "full_attention":
            raise ValueError(f"layer_types has {layer_type!r}; supported: 'full_attention'")


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling, from rope_parameters (transformers 5) or from rope_theta and rope_scaling.

    A key that this rule does not use is refused: most such keys ask for another embedding.
    """
    field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"  # transformers gives it precedence too
    rope = hf.get(field) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{field} is {rope!r}; it must be an object")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(f"{field}.partial_rotary_factor is {partial!r}; supported: 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in [*_ROPE_KEYS]:
        raise ValueError(f"{field}.rope_type is {kind!r}; supported: {', '.join(map(repr, _ROPE_KEYS))}")
    if rope.get("type", kind) != kind:
        raise ValueError(f"{field}.type is {rope['type']!r}; rope_type beside it is {kind!r}")
    for key in sorted(rope.keys() - _ROPE_KEYS[kind] - _ROPE_COMMON):
        if rope[key] is not None:
            allowed = ", ".join(sorted(_ROPE_KEYS[kind] | _ROPE_COMMON))
            raise ValueError(f"{field}.{key} is {rope[key]!r}; supported with rope_type {kind!r}: {allowed}")
    if kind == "default":
        return theta, None
    original = _required(rope, "original_max_position_embeddings", field)
    if hf.get("original_max_position_embeddings") not in (None, original):  # transformers would take this one
        raise ValueError(
            f"original_max_position_embeddings is {hf['original_max_position_embeddings']!r}; "
            f"supported: that of {field}, {original!r}"
        )
    return theta, RopeScaling(
        factor=_required(rope, "factor", field),
        low_freq_factor=_required(rope, "low_freq_factor", field),
        high_freq_factor=_required(rope, "high_freq_factor", field),
        original_max_positions=original,
    )


def _required(values: Mapping[str, Any], name: str, parent: str = "config.json") -> Any:
    if values.get(name) is None:
        raise ValueError(f"{parent} has no {name}, which is required")
    return values[name]


def _required_int(values: Mapping[str, Any], name: str) -> int:
    value = _required(values, name)
    _positive_int(name, value)
    return value


def _positive_int(field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"{field} is {value!r}; it must be an integer of at least 1, and at most {_MAX_SIZE}")


def _positive_number(field: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise ValueError(f"{field} is {value!r}; it must be a number above 0")
