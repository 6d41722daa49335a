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
    windowed: bool = False  # layers see no further back than sliding_window
    window: int | None = None  # of a file without one


FAMILIES: dict[str, Family] = {
    "Qwen2ForCausalLM": Family(model_type="qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family(model_type="qwen3", qk_norm=True, head_dim=128),
    "LlamaForCausalLM": Family(model_type="llama"),
    "MistralForCausalLM": Family(model_type="mistral", kv_heads=8, windowed=True, window=4096),
}
