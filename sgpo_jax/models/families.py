"""Lists the architectures: what all models of one have in common, and what its config.json may leave out."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """The switches of an architecture, and transformers' defaults for its config.json."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False  # query and key are normalised before they are rotated
    head_dim: int | None = None  # of a file without one; None: hidden_size / num_attention_heads
    kv_heads: int | None = None  # of a file without them; None: num_attention_heads
    whole_qk_norm: bool = False  # over all heads together, not over each
    norm_offset: bool = False  # norms multiply by 1 + scale
    pre_norm: bool = True  # of what attention and the MLP read
    post_norm: bool = False  # of what they add to the residual stream
    activation: str = "silu"  # of the gate; transformers' name
    scaled_embedding: bool = False  # by the root of hidden_size; that of the head is not
    query_scalar: int | None = None  # query_pre_attn_scalar of a file without one; None: that is head_dim
    tie_embeddings: bool = False  # of a file that does not say
    rope_theta: float = 10000.0  # of a file without one
    sliding_rope_theta: float | None = None  # layers that slide have their own, this one in a file without one
    windowed: bool = False  # layers see no further back than sliding_window
    window: int | None = None  # of a file without one
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")  # that transformers computes
    partial_rotary: bool = False  # partial_rotary_factor is read
    experts: bool = False  # instead of one MLP
    fused: bool = False  # a file has query, key and value in one tensor, and gate and up in another
    period: int | None = None  # every such layer does not slide, in a file without layer_types; None: all slide


FAMILIES: dict[str, Family] = {
    "Qwen2ForCausalLM": Family(model_type="qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family(model_type="qwen3", qk_norm=True, head_dim=128),
    "LlamaForCausalLM": Family(model_type="llama"),
    "MistralForCausalLM": Family(model_type="mistral", kv_heads=8, windowed=True, window=4096),
    "Olmo2ForCausalLM": Family(model_type="olmo2", pre_norm=False, post_norm=True, qk_norm=True, whole_qk_norm=True),
    "Olmo3ForCausalLM": Family(
        model_type="olmo3",
        pre_norm=False,
        post_norm=True,
        qk_norm=True,
        whole_qk_norm=True,
        rope_theta=500000.0,
        sliding_rope_theta=500000.0,
        windowed=True,
        window=4096,
        period=4,
    ),
    "Qwen3MoeForCausalLM": Family(model_type="qwen3_moe", qk_norm=True, kv_heads=4, experts=True),
    "Phi3ForCausalLM": Family(
        model_type="phi3", windowed=True, partial_rotary=True, fused=True, rope_types=("default", "longrope")
    ),
    "Gemma3ForCausalLM": Family(
        model_type="gemma3_text",
        head_dim=256,
        kv_heads=4,
        qk_norm=True,
        norm_offset=True,
        post_norm=True,
        activation="gelu_pytorch_tanh",
        scaled_embedding=True,
        query_scalar=256,
        tie_embeddings=True,
        rope_theta=1e6,
        sliding_rope_theta=1e4,
        windowed=True,
        window=4096,
        period=6,
    ),
}
