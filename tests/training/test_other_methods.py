"""The methods beyond the paper: the update against the equation written out densely, in one or two steps on a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dense
from helpers.batches import CONFIG, G1, B, T, assert_trees_close, make_batch, make_params

from sgpo_jax import config as configs
from sgpo_jax.methods import select
from sgpo_jax.training import Contexts, Forward, Objective, Teaching, Weighting, init_state, make_update, pack_batch

RATE = 0.1
UNGUIDED = {"guided": 0}
# Knobs in combination, and every method that tests/test_methods.py does not have.
COMBINED = [
    {
        "guided_grpo": 0.5, "reference_kl": 0.03, "reference_kl_on": "all", "surrogate": "sequence",
        "teacher": "frozen", "token_rule": "scale", "delta_quantile": 0.5, "importance": "sequence",
        "importance_cap": 1.1, "updates_per_batch": 2,
    },
    {"reference_kl": 0.3, "reference_kl_kind": "full", "importance": "sequence", "importance_rule": "mask"},
    UNGUIDED | {"mask_cut": True, "overlong_buffer": 3, "overlong_penalty": 0.5, "normaliser": "tokens"},
    UNGUIDED | {"reference_kl": 0.3, "reference_kl_kind": "full", "reference_kl_on": "all", "updates_per_batch": 2},
    {"normaliser": "tokens", "delta": float("inf")},
    {"normaliser": "constant", "advantage": "centred", "guided_grpo": 1.0},
]  # fmt: skip
# The other methods beyond the paper are single knobs, which are among those of `COMBINED` and of test_teacher.
NAMED = ["sdpo", "opsd", "sdft", "gspo", "cispo", "truncated_is"]
OFF_POLICY = ("gspo", "cispo", "dapo", "truncated_is", "anchored")  # these are told from others in a second step


def settings(changes):
    config = configs.base()
    config.rl.update({"delta": 1.7, "max_new_tokens": T, "teacher_rate": 0.3})
    if isinstance(changes, str):
        name, changes = changes, {"updates_per_batch": 2} if changes in OFF_POLICY else {}
        select(config, name)
        changes |= {"overlong_buffer": 4} if name == "dapo" else {}
    config.rl.update(changes)
    return config.rl


def rollouts(rl):
    """A batch as the method has it. The last response of every problem is cut."""
    batch = make_batch(seed=1)
    cut = np.zeros((B, G1), bool)
    cut[:, -1] = True
    logp = 0.3 * (batch.autonomous.logp + 3) - 3.4  # near the trainer's, so that a cap acts on some weights
    batch = batch._replace(autonomous=batch.autonomous._replace(cut=cut, logp=logp))
    if rl.target == "own":
        # A hint for each response, and none for those of problem 1 and for the first of all.
        hints = np.random.default_rng(0).integers(0, 31, (B * G1, 9))
        plain = [tokens for tokens in batch.prompts.tokens for _ in range(G1)]
        tokens = [plain[r] if r == 0 or r // G1 == 1 else hints[r, r % 3 :] for r in range(B * G1)]
        return batch._replace(guided=None, guided_prompts=Contexts(tokens, 9))
    return batch if rl.guided else batch._replace(guided=None, guided_prompts=None)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [*COMBINED, *NAMED], ids=str)
def test_the_update_is_the_gradient_of_the_written_out_equation(changes):
    rl = settings(changes)
    params, batch = make_params(), rollouts(rl)
    # Not far from the student: k3 grows exponentially with the distance.
    other = jax.tree.map(lambda x, y: 0.95 * x + 0.05 * y, params, make_params(seed=5))
    if rl.teacher_dtype == "bfloat16":
        other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), other)
    optimizer, teaching = optax.sgd(RATE), Teaching.from_config(rl)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, teaching)
    if state.teacher is not None:
        names = [name for name in ("reference", "moving") if getattr(state.teacher, name)]
        held = {name: jax.tree.map(jnp.copy, other) for name in names}
        state = state.replace(teacher=state.teacher.replace(**held))
    packed = pack_batch(batch, Weighting.from_config(rl), rl.distillation, micro_batch=2, chunk=8)
    update = make_update(Forward(CONFIG), optimizer, Objective.from_config(rl), teaching=teaching)
    state, metrics = update(state, packed)

    expected, values = params, []
    for _ in range(rl.updates_per_batch):
        value, gradient = jax.value_and_grad(dense.loss)(expected, rl, params, batch, other)
        expected = jax.tree.map(lambda x, d: x - RATE * d, expected, gradient)
        values.append(float(value))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected, params)
    assert max(jax.tree.leaves(moved)) > 1e-3, "there must be something to compare"
    assert_trees_close(state.params, expected, 5e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(values), atol=2e-5)
