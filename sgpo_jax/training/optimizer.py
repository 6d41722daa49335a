"""The optimizer: AdamW behind global-norm clipping, with linear warm-up and cosine decay or a constant rate."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")  # the parameters that are decayed


def schedule(
    peak: float, total_steps: int, *, warmup_share: float = 0.0, decay: Literal["constant", "cosine"] = "constant"
) -> optax.Schedule:
    """Returns the learning rate as a function of the updates taken so far.

    A skipped update does not count: warm-up and decay wait for the next one. A cosine after k skipped updates therefore
    ends k updates before its 0.

    Args:
      peak: rate after warm-up.
      total_steps: optimizer steps of the stage.
      warmup_share: share of the steps over which the rate rises linearly from 0.
      decay: "constant" after warm-up, or "cosine" to 0 at the last step.

    Raises:
      ValueError: the decay is unknown.
    """
    if decay not in ("constant", "cosine"):
        raise ValueError(f"decay={decay!r}: must be 'constant' or 'cosine'")
    warmup = round(warmup_share * total_steps)
    rest = max(total_steps - warmup, 1)
    after = optax.constant_schedule(peak) if decay == "constant" else optax.cosine_decay_schedule(peak, rest)
    if warmup == 0:
        return after
    # Start above 0: with a rate of 0 the first update would change nothing.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def updates_taken(opt_state: optax.OptState) -> int:
    """Returns the number of updates that the optimizer of `adamw` has taken; skipped ones do not count."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    (state,) = (node for node in nodes if isinstance(node, optax.ScaleByScheduleState))
    return int(state.count)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Returns AdamW on gradients clipped to a global norm; norms and biases are not decayed.

    The first moment may be kept in bfloat16 (`mu_dtype`). The second moment stays in float32: at b2 = 0.999 a step
    changes it by less than the precision of bfloat16, so it would never change.
    """

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)

    return optax.chain(
        _clip(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype, mask=decayed),
    )


def _clip(norm: float) -> optax.GradientTransformation:
    """Returns `optax.clip_by_global_norm` as a single multiplication, which needs no copy of the gradients."""

    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, norm / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
