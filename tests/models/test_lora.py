"""Adapters: what they compute in every family, the merge and its rounding, places on a mesh, the fingerprint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import CONFIGS, random_adapters, random_params
from jax.sharding import PartitionSpec as P

from sgpo_jax import config as configs
from sgpo_jax import models, sharding
from sgpo_jax.models import lora
from sgpo_jax.models.lora import Lora

TOKENS = np.random.default_rng(0).integers(0, 151, (2, 9))


def small_base(config, dtype=np.float32):
    return jax.tree.map(lambda x: jnp.asarray(0.3 * x, dtype), random_params(config))


def hidden_states(params, config):
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    return models.apply(params, config, jnp.asarray(TOKENS), positions, jnp.ones(TOKENS.shape, bool))[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_attached_adapters_compute_what_the_merged_kernels_do(family):
    config, chosen = CONFIGS[family], Lora(5, 8.0, ".*", False)
    base, adapters = small_base(config), random_adapters(CONFIGS[family], chosen)
    attached = hidden_states(lora.attach(base, adapters, chosen.scale), config)
    np.testing.assert_allclose(attached, hidden_states(lora.merge(base, adapters, chosen.scale), config), atol=2e-5)
    assert np.abs(attached - hidden_states(base, config)).max() > 0.1
    # New adapters change nothing, to the bit.
    new = lora.init(jax.random.key(0), config, chosen)
    np.testing.assert_array_equal(
        hidden_states(lora.attach(base, new, chosen.scale), config), hidden_states(base, config)
    )


def test_the_merge_is_the_written_out_sum_rounded_once():
    config, chosen = CONFIGS["qwen2"], Lora(3, 7.0, "o|up", True)
    adapters = random_adapters(config, chosen)
    for dtype in (np.float32, jnp.bfloat16):
        base = small_base(config, dtype)
        merged = lora.merge(base, adapters, chosen.scale)
        for name, leaves in base["layers"].items():
            if name not in ("o", "up"):
                assert all(leaf is merged["layers"][name][key] for key, leaf in leaves.items())
                continue
            a, b = (np.asarray(adapters["layers"][name][key], np.float64) for key in ("lora_a", "lora_b"))
            exact = np.asarray(leaves["kernel"], np.float64) + 7 / 3**0.5 * np.einsum("ldr,lrf->ldf", a, b)
            found = merged["layers"][name]["kernel"]
            assert found.dtype == dtype
            if dtype == jnp.bfloat16:
                assert np.mean(np.asarray(found) == np.asarray(exact, np.float32).astype(dtype)) > 0.999, "once"
            # Half a unit in the last place of bfloat16 is at most 2**-8 of the number.
            error = np.abs(np.asarray(found, np.float64) - exact) / np.abs(exact).clip(0.1)
            assert error.max() <= (2**-8 if dtype == jnp.bfloat16 else 1e-5)


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    assert Lora(16, 32.0, ".*", False).scale == 2.0
    assert Lora(16, 32.0, ".*", True).scale == 8.0


def test_a_rule_names_kernels_and_one_that_names_none_is_refused():
    config = CONFIGS["qwen3"]
    assert list(lora.init(jax.random.key(0), config, Lora(2, 1.0, "[qv]|down", False))["layers"]) == ["down", "q", "v"]
    assert lora.kernels(config)["down"] == (3, 20, 12)
    for targets in ("query", "g"):  # the whole name counts, not its beginning
        with pytest.raises(ValueError, match=rf"config.lora.targets='{targets}'.*: down, gate, k, o, q, up, v"):
            lora.kernels(config, targets)


def test_factors_lie_on_a_mesh_as_their_kernel_does_with_the_rank_whole():
    assert sharding.spec_for("params/layers/gate/lora_a", (2, 8, 3)) == P(None, sharding.SHARDS, None)
    assert sharding.spec_for("params/layers/gate/lora_b", (2, 3, 8)) == P(None, None, "tensor")
    assert sharding.spec_for("mu/layers/o/lora_a", (2, 8, 3)) == P(None, "tensor", None)
    assert sharding.spec_for("mu/layers/o/lora_b", (2, 3, 8)) == P(None, None, sharding.SHARDS)


def test_the_fingerprint_tells_every_bit_and_place_but_no_mesh(tiny, tiny_params):
    first = lora.fingerprint(tiny_params)
    for sizes in ((1, 8, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(*sizes)
        placed = sharding.place(tiny_params, sharding.tree_shardings(tiny_params, mesh))
        assert lora.fingerprint(placed) == first
    kernel = tiny_params["layers"]["q"]["kernel"]
    swapped = kernel.at[0, 0, 0].set(kernel[0, 0, 1]).at[0, 0, 1].set(kernel[0, 0, 0])
    nearest = kernel.at[1, 2, 3].set(jnp.nextafter(kernel[1, 2, 3], jnp.inf))
    for changed in (swapped, nearest, kernel.astype(jnp.bfloat16)):
        layers = tiny_params["layers"] | {"q": {"kernel": changed}}
        assert lora.fingerprint(tiny_params | {"layers": layers}) != first


def test_a_config_gives_adapters_where_the_rank_is_above_0():
    config = configs.base()
    assert Lora.from_config(config.lora) is None
    config.lora.rank, config.lora.rslora = 4, True
    assert Lora.from_config(config.lora) == Lora(4, 32.0, ".*", True)
