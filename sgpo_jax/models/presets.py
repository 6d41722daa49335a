"""Lists the shapes of published models, so that a plan for one needs neither its weights nor a network."""

from typing import Any

from sgpo_jax.models.config import ModelConfig, from_hf

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def _qwen2(*sizes: int, vocab: int, tied: bool) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": vocab, "tie_word_embeddings": tied,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
    }  # fmt: skip


def _qwen3(*sizes: int, tied: bool) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": tied,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    }  # fmt: skip


def _llama3(*sizes: int, tied: bool, factor: float) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "tie_word_embeddings": tied,
        "rope_theta": 5e5, "rope_scaling": scaling, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    }  # fmt: skip


def _smollm2(*sizes: int, theta: float) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "tie_word_embeddings": True,
        "rope_theta": theta, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    }  # fmt: skip


def _mistral(*sizes: int, head_dim: int, vocab: int, theta: float, window: int | None, longest: int) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "architectures": ["MistralForCausalLM"], "head_dim": head_dim, "vocab_size": vocab, "sliding_window": window,
        "rope_theta": theta, "rms_norm_eps": 1e-5, "max_position_embeddings": longest,
    }  # fmt: skip


def _olmo(*sizes: int, vocab: int, longest: int, **more: Any) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "architectures": ["Olmo2ForCausalLM"], "vocab_size": vocab, "rope_theta": 5e5, "rms_norm_eps": 1e-6,
        "max_position_embeddings": longest,
    } | more  # fmt: skip


_OLMO3 = {
    "architectures": ["Olmo3ForCausalLM"], "sliding_window": 4096,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1,
    },
}  # fmt: skip


def _gemma3(*sizes: int, vocab: int, window: int, longest: int, scaling: dict | None = None) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "architectures": ["Gemma3ForCausalLM"], "head_dim": 256, "vocab_size": vocab, "sliding_window": window,
        "rope_theta": 1e6, "rope_scaling": scaling, "rms_norm_eps": 1e-6, "max_position_embeddings": longest,
    }  # fmt: skip


def _phi(*sizes: int, vocab: int, tied: bool, theta: float, longest: int, **more: Any) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "architectures": ["Phi3ForCausalLM"], "vocab_size": vocab, "tie_word_embeddings": tied, "rope_theta": theta,
        "rms_norm_eps": 1e-5, "max_position_embeddings": longest,
    } | more  # fmt: skip


# Hub id -> the fields of its config.json that the decoder reads; the sizes are in the order of _SIZES.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(896, 24, 14, 2, 4864, vocab=151936, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2(1536, 28, 12, 2, 8960, vocab=151936, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen2(2048, 36, 16, 2, 11008, vocab=151936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2(3584, 28, 28, 4, 18944, vocab=152064, tied=False),
    "Qwen/Qwen2.5-14B-Instruct": _qwen2(5120, 48, 40, 8, 13824, vocab=152064, tied=False),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288, tied=False),
    "Qwen/Qwen3-30B-A3B": _qwen3(2048, 48, 32, 4, 6144, tied=False)
    | {
        "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "moe_intermediate_size": 768,
    },
    "meta-llama/Llama-3.1-8B-Instruct": _llama3(4096, 32, 32, 8, 14336, tied=False, factor=8.0),
    "meta-llama/Llama-3.2-1B-Instruct": _llama3(2048, 16, 32, 8, 8192, tied=True, factor=32.0),
    "meta-llama/Llama-3.2-3B-Instruct": _llama3(3072, 28, 24, 8, 8192, tied=True, factor=32.0),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _smollm2(576, 30, 9, 3, 1536, theta=1e5),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _smollm2(960, 32, 15, 5, 2560, theta=1e5),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _smollm2(2048, 24, 32, 32, 8192, theta=1.3e5),
    "allenai/OLMo-2-0425-1B-Instruct": _olmo(2048, 16, 16, 16, 8192, vocab=100352, longest=4096),
    "allenai/OLMo-2-1124-7B-Instruct": _olmo(4096, 32, 32, 32, 11008, vocab=100352, longest=4096),
    "allenai/Olmo-3-7B-Instruct": _olmo(4096, 32, 32, 32, 11008, vocab=100278, longest=65536, **_OLMO3),
    "google/gemma-3-270m-it": _gemma3(640, 18, 4, 1, 2048, vocab=262144, window=512, longest=32768),
    "google/gemma-3-1b-it": _gemma3(1152, 26, 4, 1, 6912, vocab=262144, window=512, longest=32768),
    # Its text part.
    "google/gemma-3-4b-it": _gemma3(
        2560, 34, 8, 4, 10240, vocab=262208, window=1024, longest=131072,
        scaling={"rope_type": "linear", "factor": 8.0},
    ),
    # Without its rotary factors, on which no plan depends, and so with the positions that it has without them.
    "microsoft/Phi-4-mini-instruct": _phi(
        3072, 32, 24, 8, 8192, vocab=200064, tied=True, theta=1e4, longest=4096, partial_rotary_factor=0.75
    ),
    "microsoft/phi-4": _phi(5120, 40, 40, 10, 17920, vocab=100352, tied=False, theta=2.5e5, longest=16384),
    "mistralai/Mistral-7B-v0.1": _mistral(
        4096, 32, 32, 8, 14336, head_dim=128, vocab=32000, theta=1e4, window=4096, longest=32768
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": _mistral(
        4096, 32, 32, 8, 14336, head_dim=128, vocab=32768, theta=1e6, window=None, longest=32768
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": _mistral(
        5120, 40, 32, 8, 14336, head_dim=128, vocab=131072, theta=1e6, window=None, longest=1024000
    ),
}  # fmt: skip


def shape(source: str) -> ModelConfig | None:
    """Returns the shape of a model by its hub id, or "smollm2"; None if it is not in `KNOWN`."""
    source = "HuggingFaceTB/SmolLM2-135M-Instruct" if source == "smollm2" else source
    return from_hf(KNOWN[source]) if source in KNOWN else None
