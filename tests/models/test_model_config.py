"""Reading and writing config.json, and what is refused."""

import dataclasses
import math

import pytest

from sgpo_jax.models import LinearScaling, RopeScaling, YarnScaling
from sgpo_jax.models.config import ModelConfig, from_hf, to_hf

# What the published files say, in the style of transformers 4.
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# The same in the style of transformers 5, for another family.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
OLMO3 = {
    "architectures": ["Olmo3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
BY_TYPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 2e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
}
PHI4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def test_qwen2_in_the_older_style():
    assert from_hf(QWEN2) == ModelConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=151936,
        hidden_size=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        mlp_size=8960,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=True,
        max_positions=32768,
    )


def test_qwen3_in_the_newer_style():
    config = from_hf(QWEN3)
    assert (config.qkv_bias, config.qk_norm, config.rope_theta) == (False, True, 1e6)
    assert config.head_dim == 128 != config.hidden_size // config.num_heads


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {
            "rope_theta": 5e5,
            "rope_scaling": {**without(LLAMA3_ROPE, "rope_type"), "type": "llama3"},
        },
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
        {
            "rope_theta": 1.0,
            "rope_scaling": None,
            "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5},
        },
    ],
)
def test_llama3_rope_in_every_style(rope):
    config = from_hf({**without(LLAMA, "rope_scaling", "rope_theta"), **rope})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    assert (config.qkv_bias, config.qk_norm, config.tie_embeddings) == (False, False, False)


def test_absent_fields_take_the_value_that_transformers_gives_them():
    optional = ("rope_scaling", "rope_theta", "tie_word_embeddings", "num_key_value_heads")
    config = from_hf(without(LLAMA, *optional, "architectures", "attention_bias", "hidden_act"))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.rope_theta, config.rope_scaling) == (1e4, None)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (32, 128, False)
    wide = {**QWEN3, "hidden_size": 4096, "num_attention_heads": 16}
    assert from_hf(without(wide, "head_dim")).head_dim == 128
    assert from_hf({**wide, "head_dim": None}).head_dim == 256


def test_windows():
    config = from_hf(MISTRAL)
    assert (config.window, config.sliding) == (4096, (True,) * 32)
    newer = from_hf({**MISTRAL, "sliding_window": None})
    assert (newer.window, newer.sliding) == (None, ())
    # transformers' own default, also of the heads, where the file is silent.
    silent = from_hf(without(MISTRAL, "sliding_window", "num_key_value_heads"))
    assert silent == config
    assert from_hf({**MISTRAL, "num_key_value_heads": None}).num_kv_heads == 32
    for change in ({"window": None}, {"sliding": (True,)}, {"window": -1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(config, **change)


def test_rotary_rules_beyond_llama3():
    yarn = from_hf({**QWEN2, "rope_scaling": QWEN_YARN})
    assert yarn.rope_scaling == YarnScaling(
        factor=4.0, original_max_positions=32768, attention_factor=0.1 * math.log(4) + 1
    )
    # Qwen2.5's files keep max_position_embeddings, which the rule stretches.
    assert (yarn.max_positions, yarn.reach, from_hf(QWEN2).reach) == (32768, 131072, 32768)
    scaled = from_hf({**QWEN2, "rope_scaling": {**QWEN_YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}).rope_scaling
    assert scaled.attention_factor == (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    given = {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    assert dataclasses.asdict(from_hf({**QWEN2, "rope_scaling": {**QWEN_YARN, **given}}).rope_scaling) == {
        "factor": 4.0, "original_max_positions": 32768, **given,
    }  # fmt: skip
    linear = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}
    assert from_hf(linear).rope_scaling == LinearScaling(factor=2)
    for config in (yarn, from_hf(linear)):
        assert from_hf(to_hf(config)) == config


def test_layers_of_which_some_slide():
    olmo, gemma = from_hf(OLMO3), from_hf(GEMMA3)
    assert (olmo.window, olmo.sliding) == (4096, (True, True, True, False) * 8)
    assert (gemma.window, gemma.sliding) == (512, (True,) * 5 + (False,) + (*((True,) * 5 + (False,)) * 3, True, True))
    assert (olmo.rope_theta, olmo.sliding_rope_theta, olmo.rope_scaling.factor) == (5e5, 5e5, 8.0)
    assert (gemma.rope_theta, gemma.sliding_rope_theta, gemma.rope_scaling) == (1e6, 1e4, None)
    # What transformers takes where the file is silent.
    assert from_hf(without(OLMO3, "layer_types", "sliding_window", "rope_theta")) == olmo
    silent = ("sliding_window_pattern", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "head_dim")
    assert from_hf(without(GEMMA3, *silent)) == gemma and gemma.tie_embeddings
    # Layers of which none slides have no window; in the file they keep one, which transformers asks for.
    whole = from_hf({**OLMO3, "layer_types": ["full_attention"] * 32})
    assert (whole.window, whole.sliding, to_hf(whole)["sliding_window"]) == (None, (), 4096)
    for change in ({"sliding_rope_theta": None}, {"query_scalar": 0}, {"sliding": (True,)}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(gemma, **change)
    with pytest.raises(ValueError, match="query_scalar is 256; Olmo3ForCausalLM has None"):
        dataclasses.replace(olmo, query_scalar=256)


@pytest.mark.parametrize("base", [OLMO3, GEMMA3], ids=["olmo3", "gemma3"])
def test_two_bases_in_the_newer_style(base):
    config = from_hf({**without(base, "rope_scaling"), "rope_theta": 7.0, "rope_parameters": BY_TYPE})
    assert (config.rope_theta, config.sliding_rope_theta, config.rope_scaling) == (2e6, 3e4, None)
    assert from_hf(to_hf(config)) == config
    linear = {**BY_TYPE, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    assert from_hf({**without(base, "rope_scaling"), "rope_parameters": linear}).rope_scaling.factor == 8.0


def test_longrope_runs_sequences_of_the_original_length():
    config = from_hf(PHI4_MINI)
    assert (config.head_dim, config.rotary_size, config.max_positions, config.reach) == (128, 96, 131072, 4096)
    assert config.rope_scaling.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    # As transformers 5 writes it; without the rule nothing is shorter.
    rope = {**PHI4_MINI["rope_scaling"], "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    newer = {**without(PHI4_MINI, "rope_scaling", "rope_theta", "partial_rotary_factor"), "rope_parameters": rope}
    assert from_hf(newer) == config
    plain = from_hf(without(PHI4_MINI, "rope_scaling"))
    assert (plain.rope_scaling, plain.reach) == (None, 131072)
    with pytest.raises(ValueError, match="partial_rotary is 0.01"):
        dataclasses.replace(plain, partial_rotary=0.01)


def test_experts():
    config = from_hf(QWEN3_MOE)
    assert (config.experts, config.experts_per_token, config.mlp_size) == (128, 8, 768) and config.normalize_experts
    newer = {**without(QWEN3_MOE, "num_experts", "norm_topk_prob"), "num_local_experts": 128}
    assert from_hf(newer) == dataclasses.replace(config, normalize_experts=False)
    for change in ({"experts": 0}, {"experts_per_token": 129}, {"normalize_experts": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is {next(iter(change.values()))}"):
            dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match="experts is 4, .* Qwen2ForCausalLM needs 0, 0, False"):
        dataclasses.replace(from_hf(QWEN2), experts=4)


@pytest.mark.parametrize(
    "hf_config",
    [QWEN2, QWEN3, LLAMA, MISTRAL, OLMO3, {**OLMO3, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2",
     "layer_types": None}, GEMMA3, PHI4_MINI, QWEN3_MOE],
    ids=["qwen2", "qwen3", "llama", "mistral", "olmo3", "olmo2", "gemma3", "phi4", "moe"],
)  # fmt: skip
def test_written_and_read_again(hf_config):
    config = from_hf(hf_config)
    written = to_hf(config)
    assert from_hf(written) == config
    assert written["model_type"] == hf_config["model_type"]
    assert hash(config) == hash(from_hf(hf_config))


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (LLAMA, {"architectures": ["GemmaForCausalLM"]}, ["architectures", "GemmaForCausalLM"]),
        (QWEN2, {"architectures": ["Qwen2ForSequenceClassification"]}, ["Classification"]),
        (LLAMA, {"architectures": None, "model_type": "gemma"}, ["model_type", "gemma"]),
        (LLAMA, {"model_type": "mistral"}, ["model_type", "mistral", "llama"]),
        (LLAMA, {"rope_scaling": {**LLAMA3_ROPE, "rope_type": "yarn"}}, ["rope_type", "yarn"]),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic"]),
        (LLAMA, {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["rope_type", "longrope"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.0}}, ["rope_scaling.factor", "0.0"]),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, ["beta_fast", "32", "linear"]),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["original_max_position_embeddings"]),
        (QWEN2, {"rope_scaling": {**QWEN_YARN, "attention_factor": -1.0}}, ["attention_factor", "-1.0"]),
        (QWEN2, {"rope_scaling": {**QWEN_YARN, "beta_fast": 0.5}}, ["beta_fast", "0.5", "beta_slow"]),
        (QWEN2, {"rope_scaling": {**QWEN_YARN, "truncate": "no"}}, ["truncate", "'no'"]),
        (QWEN2, {"rope_scaling": {**QWEN_YARN, "mscale": "1", "mscale_all_dim": 1.0}}, ["mscale", "'1'"]),
        (QWEN2, {"rope_scaling": {**QWEN_YARN, "long_factor": [1.0]}}, ["long_factor", "yarn"]),
        (QWEN2, {"rope_scaling": QWEN_YARN, "original_max_position_embeddings": 4096}, ["4096", "32768"]),
        (QWEN3_MOE, {"mlp_only_layers": [0, 3]}, ["mlp_only_layers", "[0, 3]"]),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, ["decoder_sparse_step", "2"]),
        (QWEN3_MOE, {"num_local_experts": 64}, ["num_local_experts", "64"]),
        (QWEN3_MOE, {"num_experts": None}, ["num_experts"]),
        (QWEN3_MOE, {"num_experts_per_tok": 129}, ["experts_per_token", "129"]),
        (QWEN3_MOE, {"norm_topk_prob": "yes"}, ["normalize_experts", "'yes'"]),
        (PHI4_MINI, {"partial_rotary_factor": 1.5}, ["partial_rotary", "1.5"]),
        (PHI4_MINI, {"rope_scaling": {**PHI4_MINI["rope_scaling"], "short_factor": [1.0] * 47}}, ["47", "48"]),
        (PHI4_MINI, {"rope_scaling": {**PHI4_MINI["rope_scaling"], "long_factor": 2.0}}, ["long_factor", "2.0"]),
        (PHI4_MINI, {"rope_scaling": {**PHI4_MINI["rope_scaling"], "long_factor": [0] * 48}}, ["long_factor", "0"]),
        (PHI4_MINI, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope_type", "yarn", "longrope"]),
        (PHI4_MINI, {"original_max_position_embeddings": None}, ["original_max_position_embeddings"]),
        (OLMO3, {"layer_types": ["sliding_attention"] * 31}, ["layer_types", "31", "32"]),
        (OLMO3, {"layer_types": ["chunked_attention"] * 32}, ["layer_types", "chunked_attention"]),
        (OLMO3, {"sliding_window": None}, ["sliding_window", "None"]),
        (OLMO3, {"rope_theta": 1e4}, ["rope_theta", "10000.0", "sliding_attention"]),
        (OLMO3, {"rope_parameters": {"rope_theta": 1e4}}, ["rope_parameters.rope_theta", "10000.0"]),
        (OLMO3, {"rope_parameters": {"full_attention": 1e4}}, ["rope_parameters.full_attention", "10000.0"]),
        (OLMO3, {"rope_scaling": {**OLMO3["rope_scaling"], "truncate": False}}, ["truncate", "False"]),
        (
            GEMMA3,
            {"rope_parameters": {**BY_TYPE, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            ["rope_parameters.sliding_attention", "linear"],
        ),
        (GEMMA3, {"hidden_activation": "silu"}, ["hidden_activation", "silu", "gelu_pytorch_tanh"]),
        (GEMMA3, {"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0"]),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50.0"]),
        (GEMMA3, {"use_bidirectional_attention": True}, ["use_bidirectional_attention", "True"]),
        (GEMMA3, {"attention_bias": True}, ["attention_bias", "True"]),
        (GEMMA3, {"query_pre_attn_scalar": 0}, ["query_scalar", "0"]),
        (GEMMA3, {"sliding_window_pattern": -6}, ["sliding_window_pattern", "-6"]),
        (GEMMA3, {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}, ["ConditionalGen"]),
        (MISTRAL, {"sliding_window": 0}, ["sliding_window", "0"]),
        (MISTRAL, {"sliding_window": "4096"}, ["sliding_window", "'4096'"]),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, ["layer_types", "full_attention", "sliding_attention"]),
        (LLAMA, {"rope_scaling": without(LLAMA3_ROPE, "factor")}, ["rope_scaling", "factor"]),
        (LLAMA, {"rope_scaling": {**LLAMA3_ROPE, "factor": -1}}, ["rope_scaling.factor", "-1"]),
        (LLAMA, {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, ["high_freq_factor"]),
        (
            QWEN3,
            {"rope_parameters": {"rope_type": "dynamic"}},
            ["rope_parameters.rope_type", "dynamic"],
        ),
        (
            QWEN3,
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            ["partial_rotary_factor", "0.5"],
        ),
        (LLAMA, {"partial_rotary_factor": 0.25}, ["partial_rotary_factor", "0.25"]),
        (LLAMA, {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        (LLAMA, {"attention_bias": True}, ["attention_bias", "True"]),
        (QWEN3, {"attention_bias": True}, ["attention_bias", "True"]),
        (LLAMA, {"mlp_bias": True}, ["mlp_bias", "True"]),
        (QWEN2, {"use_sliding_window": True}, ["use_sliding_window"]),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        (LLAMA, {"num_key_value_heads": 5}, ["num_kv_heads", "5", "32"]),
        (LLAMA, {"num_attention_heads": 24}, ["head_dim", "4096", "24"]),
        (LLAMA, {"head_dim": 33}, ["head_dim", "33"]),
        (LLAMA, {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        (LLAMA, {"hidden_size": "4096"}, ["hidden_size", "'4096'"]),
        (LLAMA, {"vocab_size": True}, ["vocab_size", "True"]),
        (LLAMA, {"rms_norm_eps": 0.0}, ["norm_eps", "0.0"]),
        (LLAMA, {"rope_theta": float("nan")}, ["rope_theta", "nan"]),
        (LLAMA, {"tie_word_embeddings": None}, ["tie_embeddings", "None"]),
    ],
)
def test_unsupported_or_impossible_is_refused_by_name(base, change, words):
    with pytest.raises(ValueError) as error:
        from_hf({**base, **change})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "field",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "rms_norm_eps", "max_position_embeddings"),
    ],
)
def test_missing_field_is_named(field):
    with pytest.raises(ValueError, match=f"no {field}"):
        from_hf(without(QWEN2, field))


def test_switches_must_fit_the_architecture():
    for change in ({"qkv_bias": False}, {"qk_norm": True}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(from_hf(QWEN2), **change)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}


@pytest.mark.parametrize("base", [QWEN2, QWEN3, LLAMA], ids=["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"rope_parameters": {"full_attention": YARN}}, "full_attention"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, "full_attention"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "rope_theta": 1e6}}, "sliding_attention"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor is 4.0"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2}}, "rope_scaling.factor is 2"),
        ({"rope_scaling": {"mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "rope_scaling.type is 'mrope'"),
        ({"rope_scaling": {"type": ["llama3"]}}, "rope_type is \\['llama3'\\]"),
        ({"rope_scaling": {"rope_type": None}}, "rope_type is None"),
        ({"rope_scaling": {"original_max_position_embeddings": 4096}}, "original_max_position_embeddings is 4096"),
        ({"rope_scaling": {"attention_factor": 0.0}}, "attention_factor is 0.0"),
        ({"rope_scaling": {"truncate": False}}, "truncate is False"),
        ({"rope_scaling": {**LLAMA3_ROPE, "attention_factor": 2.0}}, "attention_factor is 2.0"),
        ({"rope_scaling": {**LLAMA3_ROPE, "long_factor": [1.0]}}, "long_factor is"),
        ({"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 4096}, "is 4096; .*8192"),
        ({"rope_scaling": without(LLAMA3_ROPE, "original_max_position_embeddings")}, "original_max_position_emb"),
    ],
)  # fmt: skip
def test_a_rotary_dictionary_is_understood_or_refused_by_name(base, rope, key):
    with pytest.raises(ValueError, match=key):
        from_hf({**without(base, "rope_scaling", "rope_parameters"), **rope})


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({}, 1e4),
        ({"rope_scaling": None, "rope_theta": 5e5}, 5e5),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 1e6}}, 1e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e4}, 1e6),
        ({"rope_scaling": {"type": "default", "rope_type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"type": "default", "partial_rotary_factor": 1.0}, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": None, "beta_fast": None}}, 1e6),
    ],
)
@pytest.mark.parametrize("base", [QWEN2, QWEN3, LLAMA], ids=["qwen2", "qwen3", "llama"])
def test_plain_rotary_embeddings_in_every_style(base, rope, theta):
    config = from_hf({**without(base, "rope_scaling", "rope_parameters", "rope_theta"), **rope})
    assert (config.rope_theta, config.rope_scaling) == (theta, None)
