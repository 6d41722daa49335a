"""Compares the decoder with transformers' own models: the same folder gives the same float32 logits.

Every parameter of the small models is random. With transformers' own initial values, norms of one and biases of zero,
no test could see that one is left out.
"""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers import golden_logits
from helpers.golden_logits import CASES, torch_logits, torch_model
from helpers.paths import SHARED

from sgpo_jax.models import apply, gguf, head, huggingface, init_cache, positions_of

GSM8K = SHARED / "gsm8k_test.jsonl"

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")

TOLERANCE = 1e-4  # largest absolute difference of two logits


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, parameters, config); the last two are loaded from the folder that transformers wrote."""
    model = torch_model(request.param, vocab_size=131)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, *huggingface.load(folder)


@partial(jax.jit, static_argnames=("config", "dtype"))
def run(params, config, tokens, positions, mask, dtype):
    hidden, _ = apply(params, config, tokens, positions, mask, dtype=dtype)
    return hidden @ head(params, config)


def ours(params, config, tokens, positions, mask=None, dtype=jnp.float32):
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    return np.asarray(run(params, config, tokens, positions.astype(np.int32), mask, dtype))


def random_tokens(*shape):
    return np.random.default_rng(0).integers(0, 131, shape)


def rows_of_positions(batch, length, first=0):
    return np.broadcast_to(np.arange(first, first + length), (batch, length))


def assert_close(left, right):
    assert np.abs(right).max() > 1, "logits too small for an absolute tolerance to mean anything"
    assert np.abs(left - right).max() <= TOLERANCE


@pytest.mark.parametrize("first", [0, 30_000])
def test_logits_near_and_far(pair, first):
    """Rows of 100 tokens, more than the 32 positions that the llama3 cases call original."""
    model, params, config = pair
    tokens, positions = random_tokens(2, 100), rows_of_positions(2, 100, first)
    # In float64, so that roundings of transformers' own sums, which differ with the processor, do not count as ours.
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # the other ones multiply no float64
    assert_close(ours(params, config, tokens, positions), torch_logits(exact, tokens, positions))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, side):
    """Compares the real tokens of padded rows with transformers under its mask, and with rows that are not padded."""
    model, params, config = pair
    lengths = np.array([17, 5, 1, 12])
    slots = np.arange(17)[::-1] if side == "left" else np.arange(17)
    mask = slots < lengths[:, None]
    tokens = np.where(mask, random_tokens(4, 17), 0)
    positions = np.asarray(positions_of(jnp.asarray(mask)))
    got = ours(params, config, tokens, positions, mask)
    assert_close(got[mask], torch_logits(model, tokens, positions, mask)[mask])
    for row, length in enumerate(lengths):
        alone = torch_logits(model, tokens[row][mask[row]][None], rows_of_positions(1, length))
        assert_close(got[row][mask[row]], alone[0])


def test_cached_decoding(pair):
    """Compares prefill of several lengths, then decoding token by token, with each whole sequence alone."""
    model, params, config = pair
    lengths, new = np.array([9, 4, 7]), 6
    tokens, slots = random_tokens(3, 9 + new), np.arange(9)
    step = jax.jit(lambda cache, *row: apply(params, config, *row, cache))
    inside = slots < lengths[:, None]
    hidden, cache = step(init_cache(config, 3, 9 + new), tokens[:, :9], rows_of_positions(3, 9), inside)
    pieces = [np.asarray(hidden @ head(params, config))]
    for i in range(new):
        at = lengths[:, None] + i
        hidden, cache = step(cache, np.take_along_axis(tokens, at, axis=1), at, np.ones((3, 1), bool))
        pieces.append(np.asarray(hidden @ head(params, config)))
    np.testing.assert_array_equal(cache["length"], lengths + new)
    for row, length in enumerate(lengths):
        got = np.concatenate([pieces[0][row, :length], *(piece[row] for piece in pieces[1:])])
        alone = torch_logits(model, tokens[row, : length + new][None], rows_of_positions(1, length + new))
        assert_close(got, alone[0])


@pytest.mark.parametrize("case", CASES)
def test_golden_logits_are_those_of_transformers(case):
    np.testing.assert_allclose(golden_logits.stored(case), golden_logits.compute(case), rtol=0, atol=1e-5)


def test_export_loads_in_transformers_bit_for_bit(pair, tmp_path):
    model, params, config = pair
    huggingface.save(tmp_path / "model", params, config, shard_bytes=20_000)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert type(again) is type(model) and again.dtype == torch.float32
    original, copy = model.state_dict(), again.state_dict()
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[name], copy[name]) for name in original)
    # The config is the same too, so the logits are equal.
    tokens, positions = random_tokens(1, 40), rows_of_positions(1, 40)
    np.testing.assert_array_equal(torch_logits(again, tokens, positions), torch_logits(model, tokens, positions))
    assert again.config.eos_token_id is None and again.config.bos_token_id is None


def test_bfloat16_checkpoint_keeps_its_bits(tmp_path):
    model = torch_model("qwen3", vocab_size=131).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    params, config = huggingface.load(tmp_path / "theirs")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    huggingface.save(tmp_path / "ours", params, config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    copy = again.state_dict()
    assert all(torch.equal(value, copy[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The real weights, read from GGUF and exported to a folder, and three conversations of GSM8K."""
    pytest.importorskip("gguf", reason="needs the extra 'smollm2'")
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not there")
    try:
        path = gguf.smollm2_path()
    except ImportError as error:
        pytest.skip(str(error))
    params, config = gguf.load(path)
    tokenizer = gguf.tokenizer(path)
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    huggingface.save(folder, params, config, tokenizer=tokenizer, stop_ids=gguf.stop_ids(path))
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:3]]
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": row["problem"]},
                {"role": "assistant", "content": row["solution"]},
            ],
            tokenize=False,
        )
        for row in rows
    ]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="np")
    mask = batch["attention_mask"] == 1
    positions = np.asarray(positions_of(jnp.asarray(mask)))
    yield folder, params, config, texts, batch["input_ids"], positions, mask
    shutil.rmtree(folder)  # half a gigabyte


def test_smollm2_on_real_text_in_float64(smollm2):
    """The formulas agree on the real weights, apart from the parts that both sides compute in float32."""
    folder, params, config, _, tokens, positions, mask = smollm2
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    inputs = tokens[0][mask[0]][None], positions[0][mask[0]][None]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        got = ours(params, config, *inputs, dtype=jnp.float64)
    assert got.dtype == np.float64
    assert_close(got, torch_logits(model, *inputs))


def test_smollm2_on_real_text_in_float32(smollm2):
    """Residuals of 25,000 shrink to logits of 47: the order of a machine's sums decides if float32 keeps to 1e-4.

    In either case the decoder must be as close to float64 as transformers is.
    """
    folder, params, config, texts, tokens, positions, mask = smollm2
    exact, model = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    inputs = [(row[real][None], place[real][None]) for row, place, real in zip(tokens, positions, mask, strict=True)]
    exact = np.concatenate([torch_logits(exact, *row)[0] for row in inputs])
    got = ours(params, config, tokens, positions, mask)[mask]
    expected = torch_logits(model, tokens, positions, mask)[mask]

    def distance(logits):
        return np.median(np.abs(logits - exact).max(axis=-1))

    assert distance(got) <= 1.25 * distance(expected) and distance(got) < TOLERANCE
    apart = np.abs(got - expected).max(axis=-1)
    assert np.quantile(apart, 0.99) <= TOLERANCE and apart.max() <= 2 * TOLERANCE

    again = transformers.AutoTokenizer.from_pretrained(folder)
    for text, row, real in zip(texts, tokens, mask, strict=True):
        assert again(text)["input_ids"] == row[real].tolist()
    assert model.generation_config.eos_token_id == [2, 0]


def test_smollm2_finds_real_text_likely(smollm2):
    """Compares a problem's text with the same tokens shuffled, in nats per token."""
    folder, params, config, *_ = smollm2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = json.loads(GSM8K.read_text(encoding="utf-8").splitlines()[0])["problem"]
    tokens = np.array(tokenizer(text)["input_ids"])

    def loss(row):
        logits = ours(params, config, row[None], rows_of_positions(1, len(row)))[0, :-1]
        return -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), row[1:, None], 1).mean()

    assert loss(tokens) < 3.5
    assert loss(np.random.default_rng(0).permutation(tokens)) > 7


def test_smollm2_tokenizer_against_the_one_transformers_makes(smollm2):
    texts = smollm2[3] + ["don't  stop", "x = 3.1416\n\n\ty", "naïve café — 北京 🙂", "a<|im_end|>b"]
    path = Path(gguf.smollm2_path())
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = gguf.tokenizer(path)
    assert tokenizer(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert tokenizer.chat_template == theirs.chat_template
