"""A model's folder is checked for weights before anything long, and only a folder that `load` would read."""

import pytest

from sgpo_jax import policy


def test_a_folder_without_weights_is_refused_and_other_models_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("scratch", "smollm2", "mine"):
        (tmp_path / name).mkdir()
    for source in ("scratch", "smollm2", "Org/model", "model.gguf", "gs://bucket/model"):
        policy.check_weights(source)
    with pytest.raises(ValueError, match="mine has neither model.safetensors nor"):
        policy.check_weights("mine")
    (tmp_path / "mine/model.safetensors").touch()
    policy.check_weights("mine")
