"""Small models of every supported family, and the logits that transformers computes for them.

`python tests/helpers/golden_logits.py` computes the logits anew and writes them to tests/models/golden_logits.npz. It
needs torch, in the release of the extra 'parity'. Everything else works without torch.
"""

import copy
import math
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[1] / "models" / "golden_logits.npz"
VOCABULARY = 13

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def _fields(model_type, hidden_size, heads, kv_heads, head_dim=None, tied=False, **more):
    fields = dict(
        model_type=model_type,
        hidden_size=hidden_size,
        intermediate_size=hidden_size + 23,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden_size // heads,
        tie_word_embeddings=tied,
        max_position_embeddings=40_000,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
    )
    return fields | more


# Fields of config.json without the vocabulary's size. Sizes are odd where they may be. An epsilon of 1e-2 shows in the
# logits; the products of "smollm2" are longer than those that the decoder sums in one chain.
CASES = {
    "qwen2": _fields("qwen2", 64, 4, 2, rope_theta=1e6),
    "qwen2-tied-multi-query": _fields("qwen2", 42, 7, 1, tied=True, rms_norm_eps=1e-2),
    "qwen2-wide-heads": _fields("qwen2", 40, 2, 2, head_dim=34),
    "qwen3": _fields("qwen3", 40, 6, 2, head_dim=16, tied=True, rope_theta=1e6),
    "qwen3-untied-narrow-heads": _fields("qwen3", 96, 5, 5, head_dim=6, rms_norm_eps=1e-2),
    "qwen3-llama3-rope": _fields("qwen3", 32, 4, 1, head_dim=24, tied=True, rope_scaling=LLAMA3_ROPE),
    "llama": _fields("llama", 48, 4, 4),
    "llama-head-dim": _fields("llama", 36, 6, 3, head_dim=20, rms_norm_eps=1e-2),
    "llama3": _fields("llama", 64, 8, 2, rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
    "llama3-tied": _fields("llama", 64, 2, 1, head_dim=64, tied=True, rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
    "smollm2": _fields("llama", 72, 9, 3, tied=True, rope_theta=1e5, rms_norm_eps=1e-5, intermediate_size=541),
    "qwen2-yarn": _fields("qwen2", 60, 6, 2, head_dim=26, rope_theta=1e6, rope_scaling=YARN_ROPE),
    "llama-linear-rope": _fields("llama", 36, 3, 1, rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "mistral": _fields("mistral", 40, 4, 2, head_dim=22, rope_theta=1e6, sliding_window=None),
    "olmo2": _fields("olmo2", 48, 6, 2, rope_theta=5e5),
    "olmo2-tied-narrow-heads": _fields("olmo2", 35, 5, 5, head_dim=6, tied=True, rms_norm_eps=1e-2),
    "olmo3": _fields(
        "olmo3", 44, 4, 2, head_dim=18, rope_theta=5e5, rope_scaling=YARN_ROPE, sliding_window=3, num_hidden_layers=5,
    ),
    "olmo3-two-bases": _fields(
        "olmo3", 36, 3, 3, rope_theta=1e4, sliding_window=4, layer_types=["full_attention", *["sliding_attention"] * 2],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "gemma3": _fields(
        "gemma3_text", 40, 4, 1, head_dim=14, tied=True, num_hidden_layers=7, rope_theta=5e5, sliding_window=3,
        query_pre_attn_scalar=20,
    ),
    "gemma3-linear-rope": _fields(
        "gemma3_text", 36, 3, 3, rope_theta=5e5, rope_local_base_freq=2e3, sliding_window=4, query_pre_attn_scalar=12,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window_pattern=2, rms_norm_eps=1e-2,
    ),
    "phi3": _fields("phi3", 48, 6, 2, sliding_window=None, pad_token_id=0),
    "phi3-longrope": _fields(
        "phi3", 40, 4, 4, tied=True, sliding_window=5, partial_rotary_factor=0.6, max_position_embeddings=131072,
        original_max_position_embeddings=32768, pad_token_id=0,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.25, 2.5], "long_factor": [2.0, 4.0, 8.0]},
    ),
    # torch multiplies experts only in sizes of 16 bytes.
    "qwen3-moe": _fields(
        "qwen3_moe", 40, 4, 2, head_dim=16, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=28,
        norm_topk_prob=True,
    ),
    "qwen3-moe-tied": _fields(
        "qwen3_moe", 36, 3, 1, tied=True, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=20,
        rope_theta=1e6,
    ),
    "mistral-window": _fields("mistral", 42, 6, 3, head_dim=10, tied=True, sliding_window=4),
}  # fmt: skip

# Token ids, and the position of the first of them: the second sequence stands far beyond the positions that the llama3
# cases call original.
SEQUENCES = (
    (np.array([3, 11, 0, 7, 7, 1, 12, 4, 9, 2, 10]), 0),
    (np.array([5, 12, 8, 8, 0]), 30_000),
)


def hf_config(case, vocab_size=VOCABULARY):
    """Returns the contents of a case's config.json."""
    return {**copy.deepcopy(CASES[case]), "vocab_size": vocab_size}  # transformers writes into what it is given


def random_tensor(name, shape):
    """Returns the float32 tensor of a checkpoint that belongs to a name: neither biases nor norms are trivial.

    The numbers come from the raw output of PCG64, which numpy keeps the same in all releases.
    """
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    noise = math.sqrt(3) * ((bits >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)  # uniform, of variance 1
    if "norm" in name:
        noise = 1 + 0.5 * noise
    elif not name.endswith("bias"):
        noise *= 2 * shape[-1] ** -0.5
    return noise.astype(np.float32)


def _parameter(name, shape):
    """Returns a parameter of transformers' model; a checkpoint has a tensor for each of its experts."""
    if ".experts." not in name:
        return random_tensor(name, shape)
    outer, joined = name.rsplit(".", 1)
    count, rows, columns = shape
    parts = ("gate_proj", "up_proj") if joined == "gate_up_proj" else (joined,)
    size = rows // len(parts), columns
    return np.stack(
        [np.concatenate([random_tensor(f"{outer}.{i}.{part}.weight", size) for part in parts]) for i in range(count)]
    )


def torch_model(case, vocab_size=VOCABULARY):
    """Returns transformers' own model of a case, with the parameters of `random_tensor`."""
    import torch
    import transformers

    fields = hf_config(case, vocab_size)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_parameter(name, tuple(parameter.shape))))
    return model.eval()


def torch_logits(model, tokens, positions, mask=None):
    """Returns the logits `[B,T,V]` of a model of transformers."""
    import torch

    with torch.no_grad():
        return model(
            torch.as_tensor(np.array(tokens)),
            position_ids=torch.as_tensor(np.array(positions)),
            attention_mask=None if mask is None else torch.as_tensor(np.array(mask)).long(),
        ).logits.numpy()


def compute(case):
    """Computes the logits of the sequences, one after another, `[T,V]`, with transformers.

    The products are in float64: in float32 their sums depend on the processor, which moves logits by up to 2e-5.
    """
    model = torch_model(case).double()
    model.set_experts_implementation("eager")  # the other ones multiply no float64
    logits = [torch_logits(model, tokens[None], first + np.arange(len(tokens))[None])[0] for tokens, first in SEQUENCES]
    return np.concatenate(logits).astype(np.float32)


def stored(case):
    """Reads what `compute` gave when the file was written."""
    with np.load(FILE) as arrays:
        return arrays[case]


def main():
    """Computes and stores the logits of all cases."""
    np.savez(FILE, **{case: compute(case) for case in CASES})
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
