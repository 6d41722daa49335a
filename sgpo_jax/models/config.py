"""Reads and writes the shape of a decoder as a Hugging Face config.json.

A field that asks for something the decoder does not compute is refused by name, so that no checkpoint runs as another
model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgpo_jax.models import rotary
from sgpo_jax.models.checks import positive_int, positive_number, required, required_int
from sgpo_jax.models.families import FAMILIES, Family
from sgpo_jax.models.rotary import LongRope, Scaling, YarnScaling

_LAYER_TYPES = ("full_attention", "sliding_attention")  # of a layer that does not slide, and of one that does


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shapes and switches of one decoder; hashable, so it can be a static argument of jit.

    Raises:
        ValueError: a field is impossible, or does not fit `architecture`.
    """

    architecture: str  # a key of FAMILIES
    vocab_size: int  # V
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key and value heads; divides H
    head_dim: int  # even; need not be D / H
    mlp_size: int  # F, of an expert where there are experts
    rope_theta: float  # base of the rotary wavelengths
    rope_scaling: Scaling | None = None
    norm_eps: float
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3, OLMo, Gemma 3
    tie_embeddings: bool
    max_positions: int  # longest sequence the model was made for, in tokens
    experts: int = 0  # E; 0 is one MLP without a router
    experts_per_token: int = 0  # the router chooses so many, with the largest probabilities
    normalize_experts: bool = False  # these probabilities are divided by their sum
    partial_rotary: float = 1.0  # share of the features of a head that are rotated
    window: int | None = None  # tokens that a token of a sliding layer sees, itself and those before it
    sliding: tuple[bool, ...] = ()  # of each layer, whether it slides; empty without a window
    query_scalar: float | None = None  # scores are divided by its root; None: by that of head_dim
    sliding_rope_theta: float | None = None  # base of the layers that slide, which have no scaling; None: as the others

    def __post_init__(self) -> None:
        if self.architecture not in FAMILIES:
            raise ValueError(f"architecture is {self.architecture!r}; supported: {', '.join(FAMILIES)}")
        for field in (
            *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "mlp_size", "max_positions"),
        ):
            positive_int(field, getattr(self, field))
        for field in ("rope_theta", "norm_eps"):
            positive_number(field, getattr(self, field))
        for field in ("sliding_rope_theta", "query_scalar"):
            value = getattr(self, field)
            if getattr(self.family, field) is not None:
                positive_number(field, value)
            elif value is not None:
                raise ValueError(f"{field} is {value!r}; {self.architecture} has None")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, which is {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")
        positive_number("partial_rotary", self.partial_rotary)
        if self.partial_rotary > 1 or self.rotary_size % 2 or not self.rotary_size:
            raise ValueError(
                f"partial_rotary is {self.partial_rotary}; it must be at most 1, and rotate an even number of the "
                f"{self.head_dim} features of a head"
            )
        if isinstance(self.rope_scaling, LongRope):
            for factors in (self.rope_scaling.short_factor, self.rope_scaling.long_factor):
                if len(factors) != self.rotary_size // 2:
                    half = self.rotary_size // 2
                    raise ValueError(f"rope_scaling has {len(factors)} factors in a list; it needs {half}")
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"tie_embeddings is {self.tie_embeddings!r}; allowed: True, False")
        if not isinstance(self.rope_scaling, Scaling | None):
            raise ValueError(f"rope_scaling is {self.rope_scaling!r}; allowed: a rule of models.rotary, None")
        for field in ("qkv_bias", "qk_norm"):
            expected = getattr(self.family, field)
            if getattr(self, field) is not expected:
                raise ValueError(f"{field} is {getattr(self, field)!r}; {self.architecture} has {expected}")
        if self.family.experts:
            positive_int("experts", self.experts)
            positive_int("experts_per_token", self.experts_per_token)
        wrong = self.experts_per_token > self.experts if self.family.experts else self.experts or self.experts_per_token
        if wrong or not isinstance(self.normalize_experts, bool):
            raise ValueError(
                f"experts is {self.experts}, experts_per_token is {self.experts_per_token}, normalize_experts is "
                f"{self.normalize_experts!r}; {self.architecture} needs "
                + (
                    "at most as many of a token as there are, and True or False"
                    if self.family.experts
                    else "0, 0, False"
                )
            )
        if self.window is not None:
            positive_int("window", self.window)
        layers = self.num_layers if self.window is not None else 0
        if len(self.sliding) != layers:
            raise ValueError(f"sliding has {len(self.sliding)} layers; with window={self.window} it must have {layers}")

    @property
    def family(self) -> Family:
        """Returns what all models of the architecture have in common."""
        return FAMILIES[self.architecture]

    @property
    def rotary_size(self) -> int:
        """Returns how many features of a head are rotated, the first ones."""
        return int(self.head_dim * self.partial_rotary)

    @property
    def reach(self) -> int:
        """Returns the longest sequence in tokens: `max_positions`, or what a rule makes of them."""
        scaling = self.rope_scaling
        if isinstance(scaling, LongRope):
            return min(self.max_positions, scaling.original_max_positions)
        stretched = scaling.factor * scaling.original_max_positions if isinstance(scaling, YarnScaling) else 0
        return max(self.max_positions, int(stretched))


def from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a config.json, in the style of transformers 4 or 5.

    If the file leaves out head_dim, num_key_value_heads, rope_theta, tie_word_embeddings, sliding_window or a switch,
    the field takes transformers' own default; such a switch is off. Every other field is required.

    Args:
        hf_config: the parsed config.json.

    Returns:
        The configuration of the decoder.

    Raises:
        ValueError: a required field is absent or impossible, or the file asks for something the decoder does not
            compute; the message names the field, its value and what is allowed.
    """
    architecture = _architecture(hf_config)
    family = FAMILIES[architecture]
    _refuse_unsupported(hf_config, family)
    hidden_size = required_int(hf_config, "hidden_size")
    num_heads = required_int(hf_config, "num_attention_heads")
    num_layers = required_int(hf_config, "num_hidden_layers")
    head_dim = hf_config.get("head_dim", family.head_dim)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ValueError(
                f"head_dim is absent and hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
            )
        head_dim = hidden_size // num_heads
    max_positions = required_int(hf_config, "max_position_embeddings")
    rope_theta, rope_scaling, partial_rotary = _rope(hf_config, family, max_positions)
    num_kv_heads = hf_config.get("num_key_value_heads", family.kv_heads)
    window, sliding = _windows(hf_config, family, num_layers)
    return ModelConfig(
        architecture=architecture,
        vocab_size=required_int(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        **_mlp(hf_config, family),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=required(hf_config, "rms_norm_eps"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tie_embeddings=hf_config.get("tie_word_embeddings", family.tie_embeddings),
        max_positions=max_positions,
        partial_rotary=partial_rotary,
        window=window,
        sliding=sliding,
        sliding_rope_theta=_sliding_rope_theta(hf_config, family, max_positions),
        query_scalar=family.query_scalar and hf_config.get("query_pre_attn_scalar", family.query_scalar),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a configuration; `from_hf(to_hf(config)) == config`.

    The rotary fields have the older style, which transformers 4 and 5 both read. Where two bases are needed, they have
    the newer one too.
    """
    fields: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        _activation_field(config.family): config.family.activation,
        "attention_bias": config.qkv_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": rotary.write(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
    }
    family = config.family
    if family.windowed:
        fields["sliding_window"] = config.window or (family.period and family.window)
    if family.period:
        sliding = config.sliding or (False,) * config.num_layers
        fields["layer_types"] = [_LAYER_TYPES[slides] for slides in sliding]
    if config.sliding_rope_theta is not None:
        whole = {"rope_type": "default", **(fields["rope_scaling"] or {}), "rope_theta": config.rope_theta}
        local = {"rope_type": "default", "rope_theta": config.sliding_rope_theta}
        fields["rope_parameters"] = dict(zip(_LAYER_TYPES, (whole, local), strict=True))
        fields["rope_local_base_freq"] = config.sliding_rope_theta
    if family.experts:
        fields |= {
            "moe_intermediate_size": config.mlp_size,
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.normalize_experts,
        }
    if family.partial_rotary:
        fields["partial_rotary_factor"] = config.partial_rotary
    if isinstance(config.rope_scaling, LongRope):
        fields["original_max_position_embeddings"] = config.rope_scaling.original_max_positions
    if config.query_scalar is not None:
        fields["query_pre_attn_scalar"] = config.query_scalar
    return fields


def _activation_field(family: Family) -> str:
    return "hidden_activation" if family.model_type.startswith("gemma") else "hidden_act"


def _architecture(hf: Mapping[str, Any]) -> str:
    """Returns the supported class that the file names, or the class of its model_type if it names none."""
    model_type = hf.get("model_type")
    names = hf.get("architectures")
    if not names:
        names = [name for name, family in FAMILIES.items() if family.model_type == model_type]
        if not names:
            raise ValueError(
                f"architectures is absent and model_type is {model_type!r}; "
                f"supported architectures: {', '.join(FAMILIES)}"
            )
    if not isinstance(names, list) or len(names) != 1 or names[0] not in [*FAMILIES]:
        raise ValueError(f"architectures is {names!r}; supported: one of {', '.join(FAMILIES)}")
    expected = FAMILIES[names[0]].model_type
    if model_type not in (None, expected):
        raise ValueError(f"model_type is {model_type!r}; {names[0]} has {expected!r}")
    return names[0]


def _refuse_unsupported(hf: Mapping[str, Any], family: Family) -> None:
    supported = {
        _activation_field(family): family.activation,
        "mlp_bias": False,
        "use_sliding_window": False,
        "quantization_config": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }
    if not family.partial_rotary:
        supported["partial_rotary_factor"] = 1.0
    # Qwen2 has its three biases whatever this field says. The other families would add a fourth, of o_proj.
    if not family.qkv_bias:
        supported["attention_bias"] = False
    for field, allowed in supported.items():
        if hf.get(field, allowed) not in (allowed, None):
            raise ValueError(f"{field} is {hf[field]!r}; supported: {allowed!r}")


def _mlp(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the fields of the MLP, or of the experts."""
    if not family.experts:
        return {"mlp_size": required_int(hf, "intermediate_size")}
    for field, allowed in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if hf.get(field, allowed) not in (allowed, None):
            raise ValueError(f"{field} is {hf[field]!r}; supported: {allowed!r}, experts in every layer")
    counts = {name: hf[name] for name in ("num_experts", "num_local_experts") if hf.get(name) is not None}
    if len({*map(str, counts.values())}) > 1:
        raise ValueError(f"num_local_experts is {counts['num_local_experts']!r}; num_experts beside it differs")
    return {
        "mlp_size": required_int(hf, "moe_intermediate_size"),
        "experts": required_int(hf, next(iter(counts), "num_experts")),
        "experts_per_token": required_int(hf, "num_experts_per_tok"),
        "normalize_experts": hf.get("norm_topk_prob", False),
    }


def _windows(hf: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Returns the window, and which layers slide."""
    window = hf.get("sliding_window", family.window) if family.windowed else None
    layer_types = hf.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"layer_types is {layer_types!r}; it must be a list")
    allowed = _LAYER_TYPES if family.period else (_LAYER_TYPES[window is not None],)
    for layer_type in layer_types:
        if layer_type not in [*allowed]:
            raise ValueError(f"layer_types has {layer_type!r}; supported: {', '.join(map(repr, allowed))}")
    sliding = (window is not None,) * num_layers
    if family.period:
        period = hf.get("sliding_window_pattern") or family.period
        positive_int("sliding_window_pattern", period)
        sliding = tuple(bool((layer + 1) % period) for layer in range(num_layers))
        if layer_types:
            sliding = tuple(layer_type == _LAYER_TYPES[True] for layer_type in layer_types)
        if len(sliding) != num_layers:
            raise ValueError(f"layer_types has {len(sliding)} layers; num_hidden_layers is {num_layers}")
    if not any(sliding):
        return None, ()
    positive_int("sliding_window", window)
    return window, sliding


def _rope(hf: Mapping[str, Any], family: Family, max_positions: int) -> tuple[float, Scaling | None, float]:
    """Returns base, scaling and rotated share of the layers that do not slide.

    They come from rope_parameters (transformers 5) or from rope_theta and rope_scaling, which has precedence.
    """
    field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = _mapping(hf, field)
    if family.sliding_rope_theta is not None:
        whole = _mapping(_rope_by_layer_type(hf), _LAYER_TYPES[False], "rope_parameters.")
        rope = {**whole, **_mapping(hf, "rope_scaling")}
        if rope.get("truncate") not in (None, True):  # transformers reads this key from one level above
            raise ValueError(f"{field}.truncate is {rope['truncate']!r}; {family.model_type} supports: True")
    theta = rope.get("rope_theta", hf.get("rope_theta", family.rope_theta))
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    if partial != 1.0 and not family.partial_rotary:
        raise ValueError(f"{field}.partial_rotary_factor is {partial!r}; supported: 1.0")
    if "longrope" in family.rope_types and hf.get("original_max_position_embeddings"):
        rope = {"original_max_position_embeddings": hf["original_max_position_embeddings"], **rope}
        if rope.get("rope_type", rope.get("type", "default")) == "default":  # the family's files have it in any case
            del rope["original_max_position_embeddings"]
    scaling = rotary.read(rope, field, family.rope_types, max_positions)
    original = getattr(scaling, "original_max_positions", None)
    if original and hf.get("original_max_position_embeddings") not in (None, original):  # transformers would take it
        raise ValueError(
            f"original_max_position_embeddings is {hf['original_max_position_embeddings']!r}; "
            f"supported: that of {field}, {original!r}"
        )
    return theta, scaling, partial


def _sliding_rope_theta(hf: Mapping[str, Any], family: Family, max_positions: int) -> float | None:
    """Returns the base of the layers that slide, where the family has one for them."""
    if family.sliding_rope_theta is None:
        return None
    field = f"rope_parameters.{_LAYER_TYPES[True]}"
    rope = _mapping(_rope_by_layer_type(hf), _LAYER_TYPES[True], "rope_parameters.")
    if (
        rotary.read(rope, field, family.rope_types, max_positions) is not None
        or rope.get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise ValueError(f"{field} is {dict(rope)!r}; supported: rope_type 'default', and rope_theta")
    if "rope_theta" in rope:
        return rope["rope_theta"]
    if family.model_type != "olmo3":
        return hf.get("rope_local_base_freq", family.sliding_rope_theta)
    # transformers 4 takes the base of the other layers in OLMo 3, and transformers 5 its default.
    if hf.get("rope_theta", family.rope_theta) != family.sliding_rope_theta:
        raise ValueError(f"rope_theta is {hf['rope_theta']!r}; without {field} supported: {family.sliding_rope_theta}")
    return family.sliding_rope_theta


def _rope_by_layer_type(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns rope_parameters, which has a rotary dictionary for each type of layers."""
    rope = _mapping(hf, "rope_parameters")
    for key in rope.keys() - {*_LAYER_TYPES}:
        raise ValueError(f"rope_parameters.{key} is {rope[key]!r}; supported: {', '.join(_LAYER_TYPES)}")
    return rope


def _mapping(values: Mapping[str, Any], field: str, parent: str = "") -> Mapping[str, Any]:
    value = values.get(field) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{parent}{field} is {value!r}; it must be an object")
    return value
