"""Folders of peft: ours round trip and are refused where they do not fit; peft's own compute the same logits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.golden_logits import torch_logits, torch_model
from helpers.small_models import CONFIGS, random_adapters
from safetensors.numpy import load_file, save_file

from sgpo_jax import models
from sgpo_jax.models import huggingface, lora, peft
from sgpo_jax.models.lora import Lora

CHOSEN = Lora(3, 6.0, "q|o|down", True)


@pytest.fixture
def folder(tmp_path):
    """A folder with adapters of the small Qwen2, and these adapters."""
    adapters = random_adapters(CONFIGS["qwen2"], CHOSEN)
    peft.save(tmp_path, adapters, CHOSEN, "org/base")
    return tmp_path, adapters


def test_a_folder_round_trips_to_the_bit(folder):
    path, adapters = folder
    loaded = peft.load(path, CONFIGS["qwen2"], CHOSEN)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    stored, (count, rows, columns) = load_file(path / peft.WEIGHTS), lora.kernels(CONFIGS["qwen2"])["down"]
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert stored[name.format("A")].shape == (3, rows) and stored[name.format("B")].shape == (columns, 3)
    np.testing.assert_array_equal(stored[name.format("A")], adapters["layers"]["down"]["lora_a"][1].T)
    assert len(stored) == 3 * count * 2


def test_a_family_whose_kernels_peft_joins_is_refused(folder):
    with pytest.raises(ValueError, match="Phi3ForCausalLM has one adapter for query, key and value"):
        peft.check(folder[0], CONFIGS["phi3"], CHOSEN)
    for family in CONFIGS.keys() - {"phi3"}:
        peft.refuse_fused(CONFIGS[family])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 4, r"config.lora.rank=3: must be 4, as in"),
        ("lora_alpha", 7, r"config.lora.alpha=6.0: must be 7"),
        ("use_rslora", False, r"config.lora.rslora=True: must be False"),
        ("use_dora", True, r"use_dora=True: must be empty"),
        ("rank_pattern", {"q_proj": 2}, r"rank_pattern=\{'q_proj': 2\}"),
        ("init_lora_weights", "pissa", r"init_lora_weights='pissa'"),
        ("bias", "all", r"bias='all'"),
        ("peft_type", "LOHA", r"peft_type='LOHA'"),
        ("something_new", [1], r"something_new=\[1\]"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused(folder, field, value, message):
    path, _ = folder
    content = json.loads((path / peft.CONFIG).read_text()) | {field: value}
    (path / peft.CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        peft.check(path, CONFIGS["qwen2"], CHOSEN)


def test_tensors_that_do_not_fit_are_refused_by_name(folder):
    path, _ = folder
    for targets, name in (("q|o", "layers.0.mlp.down_proj"), ("q|o|down|k", "layers.0.self_attn.k_proj")):
        with pytest.raises(ValueError, match=rf"6 tensors do not fit config.lora.targets=.*the first, .*{name}.lora_A"):
            peft.load(path, CONFIGS["qwen2"], Lora(3, 6.0, targets, True))
    wider = dataclasses.replace(CONFIGS["qwen2"], mlp_size=22)
    with pytest.raises(ValueError, match=r"down_proj.lora_A.weight, has shape \(3, 20\), not \(3, 22\)"):
        peft.load(path, wider, CHOSEN)
    stored = load_file(path / peft.WEIGHTS)
    save_file(stored | {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 12))}, path / peft.WEIGHTS)
    with pytest.raises(ValueError, match=r"1 tensors do not fit .*base_model.model.lm_head.lora_A.weight"):
        peft.load(path, CONFIGS["qwen2"], CHOSEN)
    (path / peft.WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pickles are never opened"):
        peft.load(path, CONFIGS["qwen2"], CHOSEN)


def logits(params, config, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = models.apply(params, config, jnp.asarray(tokens), positions, jnp.ones(tokens.shape, bool))
    return np.asarray(hidden @ models.head(params, config))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2-wide-heads", "qwen3", "smollm2"])
def test_peft_computes_the_same_logits_from_our_folder_and_we_from_its(case, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    theirs = pytest.importorskip("peft", reason="needs the extra 'parity'")
    torch_model(case, vocab_size=131).save_pretrained(tmp_path / "base")
    base, config = huggingface.load(tmp_path / "base")
    tokens = np.random.default_rng(1).integers(0, 131, (2, 11))
    positions = np.broadcast_to(np.arange(11), tokens.shape)

    def compare(adapters, chosen, model):
        expected = torch_logits(model, tokens, positions)
        assert np.abs(expected - logits(base, config, tokens)).max() > 0.1
        for params in (lora.attach(base, adapters, chosen.scale), lora.merge(base, adapters, chosen.scale)):
            np.testing.assert_allclose(logits(params, config, tokens), expected, atol=1e-4, rtol=1e-5)

    adapters = random_adapters(config, CHOSEN)
    peft.save(tmp_path / "ours", adapters, CHOSEN, str(tmp_path / "base"))
    compare(adapters, CHOSEN, theirs.PeftModel.from_pretrained(torch_model(case, vocab_size=131), tmp_path / "ours"))

    settings = theirs.LoraConfig(
        r=5, lora_alpha=4, target_modules=["k_proj", "v_proj", "gate_proj", "up_proj"], task_type="CAUSAL_LM",
        lora_dropout=0.1, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = theirs.get_peft_model(torch_model(case, vocab_size=131), settings).eval()
    model.save_pretrained(tmp_path / "theirs")
    chosen = Lora(5, 4.0, "k|v|gate|up", False)
    compare(jax.tree.map(jnp.asarray, peft.load(tmp_path / "theirs", config, chosen)), chosen, model)
