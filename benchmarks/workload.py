"""The workload of the benchmarks, the same for every side: model shapes, prompts, lengths, responses, and their FLOPs.

It needs only numpy, since the environments of the peers have no sgpo_jax.
"""

from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """A decoder of the Llama family with tied embeddings."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of the matrices of all layers, each used once by every token."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head."""
        return self.hidden * self.vocab

    def hf_config(self) -> dict[str, Any]:
        """Returns the content of its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": self.vocab,
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "intermediate_size": self.mlp,
            "hidden_act": "silu", "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        }  # fmt: skip

    def forward_flops(self, tokens: int, scored: int, attended: float) -> float:
        """Returns the FLOPs of a forward pass.

        Args:
            tokens: all tokens.
            scored: those of them that pass the output head.
            attended: pairs of a token and a token that it attends to.
        """
        per_pair = 4 * self.layers * self.heads * self.head_dim
        return 2.0 * (tokens * self.layer_parameters + scored * self.head_parameters) + per_pair * attended

    def decode_cost(self, batch: int, attended: float) -> tuple[float, float]:
        """Returns (FLOPs of a token, bytes that a step of `batch` tokens reads) in float32.

        Args:
            batch: tokens decoded in a step.
            attended: tokens in the cache of each.
        """
        cache = 2 * self.layers * self.kv_heads * self.head_dim * attended
        weights = self.layer_parameters + self.head_parameters
        return self.forward_flops(1, 1, attended), 4.0 * (weights + batch * cache)


SHAPES = {
    "small": Shape(layers=4, hidden=256, heads=4, kv_heads=2, mlp=1024, vocab=8192),
    "smollm2": Shape(layers=30, hidden=576, heads=9, kv_heads=3, mlp=1536, vocab=49152),
    "qwen1p5b": Shape(layers=28, hidden=1536, heads=12, kv_heads=2, mlp=8960, vocab=151936),  # without its biases
}
SHAPE_HELP = "small, smollm2, qwen1p5b, or LAYERSxHIDDENxHEADSxKV_HEADSxMLPxVOCABULARY, such as 4x256x4x2x1024x8192"


def shape(text: str) -> Shape:
    """Returns the shape of a --shape flag: a name in SHAPES, or the sizes.

    Raises:
        ValueError: it is neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split("x")
    if len(sizes) != len(Shape._fields) or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"--shape={text!r}: allowed: {SHAPE_HELP}")
    return Shape(*map(int, sizes))


def prompts(model: Shape, count: int, length: int, reserved: int, seed: int) -> np.ndarray:
    """Returns `[count,length]` random tokens. The first `reserved` ids and the last, the padding, are left out."""
    return np.random.default_rng(seed).integers(reserved, model.vocab - 1, (count, length), dtype=np.int32)


def stop_ids(model: Shape, median: int) -> list[int]:
    """Returns stop ids, as many as give responses of a random model this median length. It draws all tokens alike."""
    return list(range(round(stop_probability(median) * model.vocab))) if median else []


def stop_probability(median: int) -> float:
    """Returns the probability to stop at a token that gives this median length."""
    return 1 - 0.5 ** (1 / median)


def lengths(count: int, longest: int, median: int, seed: int) -> np.ndarray:
    """Returns `[count]` lengths of responses: all `longest`, or long-tailed with this median.

    Long-tailed lengths are the quantiles of a geometric distribution in random order. One response is cut at `longest`.
    """
    if not median:
        return np.full(count, longest)
    stay = 1 - (np.arange(count) + 0.5) / count
    drawn = np.ceil(np.log(stay) / np.log(1 - stop_probability(median))).astype(int)
    drawn[-1] = longest
    return np.random.default_rng(seed).permutation(np.clip(drawn, 1, longest))


class Responses(NamedTuple):
    """B problems with G responses each."""

    prompts: np.ndarray  # [B,P]
    tokens: np.ndarray  # [B,G,T]
    lengths: np.ndarray  # [B,G]
    rewards: np.ndarray  # [B,G], 0 and 1 in turn


def responses(model: Shape, task: dict[str, Any]) -> Responses:
    """Returns the responses of one update. The task has problems, group, prompt, longest and median."""
    problems, group = task["problems"], task["group"]
    rewards = np.broadcast_to(np.arange(group) % 2, (problems, group))
    return Responses(
        prompts(model, problems, task["prompt"], 0, 0),
        prompts(model, problems * group, task["longest"], 0, 1).reshape(problems, group, -1),
        lengths(problems * group, task["longest"], task["median"], 2).reshape(problems, group),
        rewards.astype(np.float32),
    )
