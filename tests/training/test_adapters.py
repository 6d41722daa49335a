"""Training with adapters: gradients, full rank against full training, the frozen teacher, meshes, and what is saved.

The runs have a base in nf4.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dense
from helpers.batches import CONFIG, assert_trees_close, make_batch, make_params
from helpers.configs import load
from helpers.paths import ROOT
from helpers.runs import TINY, parameters, rows
from helpers.small_models import random_adapters

from sgpo_jax import config as configs
from sgpo_jax import models, sharding
from sgpo_jax.commands import evaluate, export, train
from sgpo_jax.models import huggingface, lora, peft, quantised
from sgpo_jax.models.lora import Lora
from sgpo_jax.training import Forward, Objective, Teaching, Weighting, init_state, make_update, pack_batch, sft
from sgpo_jax.training.batch import specs
from sgpo_jax.training.optimizer import adamw, schedule

CHOSEN = Lora(3, 6.0, "q|o|up|down", False)


def rl_of(**changes):
    config = configs.base()
    config.rl.update({"delta": 1.7} | changes)
    return config.rl


def one_update(rl, params, base=None, reference=None, scale=CHOSEN.scale, rate=1.0):
    """(state, metrics) of an update with SGD; `params` and the teacher's `reference` are adapters if it has a base."""
    optimizer, teaching = optax.sgd(rate), Teaching.from_config(rl)
    update = make_update(Forward(CONFIG, scale=scale), optimizer, Objective.from_config(rl), teaching=teaching)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, teaching)
    if reference is not None:
        state = state.replace(teacher=state.teacher.replace(reference=jax.tree.map(jnp.copy, reference)))
    return update(state, pack_batch(make_batch(), Weighting.from_config(rl), micro_batch=2, chunk=8), base)


@pytest.mark.parametrize("teacher", ["frozen", pytest.param("live", marks=pytest.mark.slow)])
def test_an_update_has_the_gradient_of_dense_differentiation_through_the_sum(teacher):
    """The frozen teacher of a student that began with new adapters is the base; it has no copy of it."""
    rl, base, adapters = rl_of(teacher=teacher), make_params(), random_adapters(CONFIG, CHOSEN)
    new = lora.init(jax.random.key(0), CONFIG, CHOSEN) if teacher == "frozen" else None

    def dense_loss(adapters):
        kernels = {
            name: leaves | {"kernel": leaves["kernel"] + CHOSEN.scale * pair["lora_a"] @ pair["lora_b"]}
            for name, pair in adapters["layers"].items() for leaves in [base["layers"][name]]
        }  # fmt: skip
        params = base | {"layers": base["layers"] | kernels}
        return dense.loss(params, rl, params_before, make_batch(), base)

    params_before = lora.merge(base, adapters, CHOSEN.scale)
    value, gradient = jax.value_and_grad(dense_loss)(adapters)
    state, metrics = one_update(rl, adapters, base, new)
    np.testing.assert_allclose(metrics["loss"], value, atol=1e-5)
    assert_trees_close(jax.tree.map(jnp.subtract, adapters, state.params), gradient, 3e-5)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-4
    if new is not None:
        assert jax.tree.map(jnp.shape, state.teacher.reference) == jax.tree.map(jnp.shape, adapters)


def sft_batch():
    rng = np.random.default_rng(0)
    encoded = {id: tuple(rng.integers(0, 31, n).tolist() for n in (3, 5)) for id in "abcd"}
    return sft.encode_batch([{"id": id} for id in "abcd"], encoded, batch=4, micro_batch=2)


def sft_step(params, base, scale=CHOSEN.scale, rate=1.0):
    optimizer, update = sft_update(scale, rate)
    return update(init_state(jax.tree.map(jnp.copy, params), optimizer), sft_batch(), base)


@functools.cache
def sft_update(scale, rate):
    optimizer = optax.sgd(rate)
    return optimizer, sft.make_update(Forward(CONFIG, scale=scale), optimizer)


def test_the_warm_ups_gradient_agrees_with_finite_differences():
    base, adapters = make_params(), random_adapters(CONFIG, CHOSEN)
    gradient = jax.tree.map(jnp.subtract, adapters, sft_step(adapters, base)[0].params)
    norm, step = float(optax.tree.norm(gradient)), 0.02

    def loss(steps):
        moved = jax.tree.map(lambda x, g: x + steps * step * g / norm, adapters, gradient)
        return float(sft_step(moved, base)[1]["loss"])

    slope = (8 * (loss(1) - loss(-1)) - (loss(2) - loss(-2))) / (12 * step)
    np.testing.assert_allclose(slope, norm, rtol=1e-3)


def test_full_rank_takes_the_step_of_full_training():
    """With A A' = c^2 and B = 0, a step of B at rate e changes s A B as one of W at the rate e s^2 c^2 changes W."""
    base, scale, c, rate = make_params(), 1.5, 0.8, 0.1
    adapters = {"layers": {}}
    for i, (name, (count, size, columns)) in enumerate(lora.kernels(CONFIG).items()):
        turned = jnp.linalg.qr(jax.random.normal(jax.random.key(i), (count, size, size)))[0]
        adapters["layers"][name] = {"lora_a": c * turned, "lora_b": jnp.zeros((count, size, columns))}
    ours, _ = sft_step(adapters, base, scale, rate)
    full, _ = sft_step(base, None, rate=rate * scale**2 * c**2)
    merged = lora.merge(base, ours.params, scale)
    for name, leaves in full.params["layers"].items():
        if "kernel" in leaves:
            before, after = base["layers"][name]["kernel"], leaves["kernel"]
            assert float(jnp.abs(after - before).max()) > 1e-4
            np.testing.assert_allclose(merged["layers"][name]["kernel"], after, atol=2e-6)


def trained(mesh, config, steps=2, kind=""):
    """(losses, adapters on the host, sampled weights) of updates with AdamW on a mesh, over a base of this kind."""
    chosen, teaching = Lora(4, 8.0, ".*", True), Teaching.from_config(rl_of(teacher="frozen"))
    tx = adamw(schedule(1e-2, 3), b1=0.9, b2=0.99, eps=1e-4, weight_decay=0.01, clip_norm=1.0)
    base = make_params(config=config)
    state, losses = init_state(random_adapters(config, chosen), tx, teaching), []
    with jax.set_mesh(mesh):
        shardings = sharding.tree_shardings(state, mesh)
        state, base = (sharding.place(x, sharding.tree_shardings(x, mesh)) for x in (state, base))
        base = quantised.quantise(base, kind, mesh) if kind else base
        forward = Forward(config, scale=chosen.scale)
        update = make_update(forward, tx, Objective(delta=1.7), teaching=teaching, shardings=shardings)
        for step in range(steps):
            packed = pack_batch(
                make_batch(step), Weighting(), micro_batch=8, chunk=16, context=mesh.shape["context"]
            )
            state, metrics = update(state, sharding.put(packed, specs(packed), mesh), base)
            losses.append(float(metrics["loss"]))
        merged = lora.merge(base, state.params, chosen.scale)
    kernel = merged["layers"]["down"]["kernel"]
    assert kernel.sharding.is_equivalent_to(base["layers"]["down"]["kernel"].sharding, 3)
    assert state.params["layers"]["down"]["lora_a"].sharding.is_equivalent_to(
        shardings.params["layers"]["down"]["lora_a"], 3
    )
    return losses, jax.device_get(state.params), jax.device_get(merged)


@pytest.fixture(scope="module")
def single_device(tiny):
    return functools.cache(lambda kind: trained(sharding.make_mesh(devices=jax.devices()[:1]), tiny, kind=kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "context", "kind"),
    [((1, 4, 2), 1, ""), ((1, 1, 8), 1, ""), ((2, 2, 2), 1, "nf4"), ((1, 2, 2), 2, "nf4")], ids=str,
)  # fmt: skip
def test_every_mesh_trains_adapters_like_one_device(shape, context, kind, single_device, tiny):
    if kind:
        pytest.importorskip("qwix", reason="the quantised extra is not installed")
    losses, adapters, merged = trained(sharding.make_mesh(*shape, context=context), tiny, kind=kind)
    expected = single_device(kind)
    np.testing.assert_allclose(losses, expected[0], atol=1e-4)
    assert_trees_close(adapters, expected[1], 1e-4)
    # A number of bfloat16 may be the next one.
    assert_trees_close(merged, expected[2], 2e-3 if kind else 1e-4)


def settings(**changes):
    config = load(ROOT / "configs" / "quickstart.py")
    config.update_from_flattened_dict(TINY | {
        "lora.rank": 2, "lora.base_dtype": "nf4", "sft.steps": 2, "sft.validate_every": 1, "rl.steps": 2,
        "rl.eval_every": 2, "eval.guided": False, "rl.teacher": "frozen", "checkpoint.every": 1,
        "rl.reward": "helpers.reward_functions:even", "rl.learning_rate": 1e-2, "report_seconds": 0.0,
    } | {name.replace("__", "."): value for name, value in changes.items()})  # fmt: skip
    return config


def on_one_device(command, *arguments, **changes):
    """Calls a command with the settings, and with a mesh of one of the eight devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda **_: mesh)
        return command(settings(**changes), *arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of both stages that was not stopped."""
    pytest.importorskip("qwix", reason="the quantised extra is not installed")
    folder = tmp_path_factory.mktemp("whole")
    on_one_device(train.run, folder)
    return folder


@pytest.mark.slow
def test_a_run_saves_adapters_alone_and_resumes_bit_for_bit(whole, tmp_path, monkeypatch):
    saved = parameters(whole, "sft", 2)
    names = {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(saved["params"])}
    kernels = ("q", "k", "v", "o", "gate", "up", "down")
    assert names == {f"layers/{kernel}/lora_{factor}" for kernel in kernels for factor in "ab"}
    size = sum(leaf.size for leaf in jax.tree.leaves(saved["params"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(saved)) < 3 * size + 10, "two moments, and no base"
    for changes in ({"stages": ("sft", "rl"), "rl__steps": 1, "rl__eval_every": 0}, {}):
        on_one_device(train.run, tmp_path, **changes)
    for stage in ("sft", "rl"):
        assert rows(whole, stage) == rows(tmp_path, stage)
        pair = [parameters(folder, stage, 2) for folder in (whole, tmp_path)]
        assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
        jax.tree.map(np.testing.assert_array_equal, *pair)
    assert any(row["logp_mismatch_max"] > 1e-6 for row in rows(whole, "rl")), "the merged base is rounded to bfloat16"
    # The weights of the base are not in the run, so a run that goes on must have the same ones.
    content = json.loads((tmp_path / "rl/checkpoints/2/run/metadata").read_text())
    monkeypatch.setattr(lora, "fingerprint", lambda params: "0123456789abcdef")
    with pytest.raises(ValueError, match=f"fingerprint '{content['base']}'; that of config.model.source is '0123456"):
        on_one_device(train.run, tmp_path, rl__steps=3)


@pytest.mark.slow
def test_exports_are_the_merged_weights_and_the_adapters_with_which_a_run_can_begin(whole, tmp_path):
    on_one_device(export.run, whole, "rl", tmp_path / "merged", "bfloat16")
    on_one_device(export.run, whole, "rl", tmp_path / "adapters", "float32", True)
    merged, config = huggingface.load(tmp_path / "merged")
    chosen = Lora.from_config(settings().lora)
    adapters = peft.load(tmp_path / "adapters", config, chosen)
    saved = parameters(whole, "rl", 2)["params"]  # the only one that was evaluated
    jax.tree.map(np.testing.assert_array_equal, adapters, saved)
    assert "| adapters | r = 2, trained over the base in nf4 |" in (tmp_path / "adapters/README.md").read_text()
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models.init(jax.random.key(0), config))
    base = quantised.quantise(base, "nf4", sharding.make_mesh(devices=jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, merged, lora.merge(base, saved, chosen.scale))

    measured = on_one_device(evaluate.run, str(whole), str(tmp_path / "measured"), "", 0)
    assert measured["unguided"] == json.loads((whole / "eval/after_unguided.json").read_text())["results"]
    assert measured["unguided"] != json.loads((whole / "eval/before_unguided.json").read_text())["results"]

    changes = {"stages": ("rl",), "rl__eval_every": 0, "lora__start": str(tmp_path / "adapters"), "rl__steps": 1}
    on_one_device(train.run, tmp_path / "next", **changes)
    reference = parameters(tmp_path / "next", "rl", 1)["teacher"]["reference"]
    jax.tree.map(np.testing.assert_array_equal, reference, saved)
    with pytest.raises(ValueError, match=r"config.lora.rank=3: must be 2, as in"):
        on_one_device(train.run, tmp_path / "other", **changes, lora__rank=3)
    with pytest.raises(ValueError, match=r"--adapters: workdir=.* has a run without adapters"):
        on_one_device(export.run, tmp_path / "none", "rl", tmp_path / "x", "float32", True, lora__rank=0)
