"""Compares the decoder with stored logits of transformers, so that torch is not needed; test_parity.py checks the file.

The parameters are loaded by their names in a checkpoint, so the table of names is tested too.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from helpers import golden_logits

from sgpo_jax.models import ModelConfig, apply, head, huggingface, init_cache, param_mapping
from sgpo_jax.models.config import from_hf
from sgpo_jax.models.sharded_io import StoredTensor

TOLERANCE = 5e-5  # largest absolute difference of two logits, whose standard deviation is about 2
CONFIGS = {case: from_hf(golden_logits.hf_config(case)) for case in golden_logits.CASES}
# Every family, and several group sizes.
DECODED = (
    *("qwen2", "qwen2-tied-multi-query", "qwen3", "llama3", "smollm2", "qwen2-yarn", "mistral-window"),
    *("olmo2", "olmo3", "qwen3-moe", "phi3-longrope", "gemma3"),
)
(NEAR, _), (FAR, FIRST) = golden_logits.SEQUENCES


def load(config):
    """Returns the parameters of a checkpoint with the tensors of `random_tensor`."""
    layout = param_mapping.layout(config)

    def get_tensor(name):
        shape = layout[name].shape
        return StoredTensor(shape, np.dtype(np.float32), partial(golden_logits.random_tensor, name, shape))

    return huggingface.assemble(config, layout, get_tensor)


def logits(params, config, tokens, positions, mask, cache=None):
    hidden, cache = apply(params, config, tokens, positions, mask, cache)
    return hidden @ head(params, config), cache


@partial(jax.jit, static_argnames="config")
def forward(params, config, tokens, positions, segments):
    return logits(params, config, tokens, positions, segments)[0]


@partial(jax.jit, static_argnames="config")
def prefill_and_decode(params, config, prompts, steps):
    """Returns the logits of prompts `[B,P,V]`, those of a token of each row at every step, and the cache's lengths."""
    filled, cache = logits(params, config, *prompts, init_cache(config, len(prompts[0]), len(NEAR)))

    def decode(cache, step):
        out, cache = logits(params, config, *(x[:, None] for x in step), cache)
        return cache, out[:, 0]

    cache, decoded = jax.lax.scan(decode, cache, steps)
    return filled, decoded, cache["length"]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """(parameters, config, logits of transformers for the tokens of both sequences)."""
    config = CONFIGS[request.param]
    return load(config), config, golden_logits.stored(request.param)


def test_logits_of_padded_and_packed_rows(model):
    """A row with padding on the left and in the middle of two packed sequences, and one with each of them alone."""
    params, config, expected = model
    length, near, far = 23, slice(3, 3 + len(NEAR)), slice(17, 17 + len(FAR))
    tokens, positions, segments = np.zeros((3, 3, length), np.int32)
    rows = ((0, near, NEAR, 0, 1), (0, far, FAR, FIRST, 2), (1, near, NEAR, 0, 1), (2, far, FAR, FIRST, 1))
    for row, slots, sequence, first, segment in rows:
        tokens[row, slots] = sequence
        positions[row, slots] = first + np.arange(len(sequence))
        segments[row, slots] = segment
    got = np.asarray(forward(params, config, tokens, positions, segments))
    assert np.abs(got[0, segments[0] > 0] - expected).max() <= TOLERANCE, "packed"
    alone = np.concatenate([got[1, near], got[2, far]])
    assert np.abs(alone - expected).max() <= TOLERANCE, "alone"


@pytest.mark.parametrize("model", DECODED, indirect=True)
def test_logits_of_prefill_and_decode(model):
    """Prompts of 6 and 2 tokens in one batch, then token by token; the shorter sequence ends before the other."""
    params, config, expected = model
    prompts, lengths = np.array([6, 2]), np.array([len(NEAR), len(FAR)])
    slots = np.arange(len(NEAR))
    tokens = np.stack([NEAR, np.pad(FAR, (0, len(NEAR) - len(FAR)))])
    positions = np.array([[0], [FIRST]]) + slots
    inside = (slots < prompts[:, None])[:, :6]
    at = prompts + np.arange(5)[:, None]  # [steps,B]
    filled, decoded, total = prefill_and_decode(
        params, config, (tokens[:, :6] * inside, positions[:, :6] * inside, inside),
        (tokens[[0, 1], at], positions[[0, 1], at], at < lengths),
    )  # fmt: skip
    pieces = [
        piece
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        for piece in (filled[row, :prompt], decoded[: length - prompt, row])
    ]
    assert np.abs(np.concatenate(pieces) - expected).max() <= TOLERANCE
    np.testing.assert_array_equal(total, lengths)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_every_field_of_a_config_takes_several_values(field):
    if field not in ("vocab_size", "num_layers", "max_positions"):
        assert len({getattr(config, field) for config in CONFIGS.values()}) > 1
