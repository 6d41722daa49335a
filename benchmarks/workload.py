"""What is measured: shapes of models, prompts, lengths and responses, the same for every side; and its arithmetic.

It needs numpy only, since the peers' environments have no sgpo_jax.
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
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Those of all layers' matrices, each used once by every token."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocab

    def hf_config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": self.vocab,
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "intermediate_size": self.mlp,
            "hidden_act": "silu", "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        }  # fmt: skip

    def forward_flops(self, tokens: int, scored: int, attended: float) -> float:
        """Of `tokens` tokens, of which `scored` pass the head, attending to `attended` tokens in all."""
        per_pair = 4 * self.layers * self.heads * self.head_dim
        return 2.0 * (tokens * self.layer_parameters + scored * self.head_parameters) + per_pair * attended

    def decode_cost(self, batch: int, attended: float) -> tuple[float, float]:
        """(FLOP for a token, bytes that a step of `batch` tokens reads): float32, `attended` tokens in the cache."""
        cache = 2 * self.layers * self.kv_heads * self.head_dim * attended
        weights = self.layer_parameters + self.head_parameters
        return self.forward_flops(1, 1, attended), 4.0 * (weights + batch * cache)


SHAPES = {
    "small": Shape(layers=4, hidden=256, heads=4, kv_heads=2, mlp=1024, vocab=8192),
    "smollm2": Shape(layers=30, hidden=576, heads=9, kv_heads=3, mlp=1536, vocab=49152),
}
SHAPE_HELP = "small, smollm2, or LAYERSxHIDDENxHEADSxKV_HEADSxMLPxVOCABULARY, such as 4x256x4x2x1024x8192"


def shape(text: str) -> Shape:
    """One of SHAPES by name, or one of your own."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split("x")
    if len(sizes) != len(Shape._fields) or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"--shape={text!r}: allowed: {SHAPE_HELP}")
    return Shape(*map(int, sizes))


def prompts(model: Shape, count: int, length: int, reserved: int, seed: int) -> np.ndarray:
    """`[count,length]` random tokens, none of the first `reserved` ids, nor the last one, which is for padding."""
    return np.random.default_rng(seed).integers(reserved, model.vocab - 1, (count, length), dtype=np.int32)


def stop_ids(model: Shape, median: int) -> list[int]:
    """Ids that a model with random weights, which knows no token from another, draws first after `median` tokens."""
    return list(range(round(stop_probability(median) * model.vocab))) if median else []


def stop_probability(median: int) -> float:
    return 1 - 0.5 ** (1 / median)


def lengths(count: int, longest: int, median: int, seed: int) -> np.ndarray:
    """`[count]` lengths of responses: all `longest`, or, given a median, of a policy that may stop at every token.

    These are the quantiles of a geometric distribution in random order; one response is cut at `longest`.
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
    rewards: np.ndarray  # [B,G], in every group of two or more not all the same


def responses(model: Shape, task: dict[str, Any]) -> Responses:
    """What one update is given; the task has problems, group, prompt, longest, median."""
    problems, group = task["problems"], task["group"]
    rewards = np.broadcast_to(np.arange(group) % 2, (problems, group))
    return Responses(
        prompts(model, problems, task["prompt"], 0, 0),
        prompts(model, problems * group, task["longest"], 0, 1).reshape(problems, group, -1),
        lengths(problems * group, task["longest"], task["median"], 2).reshape(problems, group),
        rewards.astype(np.float32),
    )
