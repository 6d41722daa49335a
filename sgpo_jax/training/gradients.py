"""Gradients summed over micro-batches in place, and the optimizer step that skips what is not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sgpo_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def accumulate(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Metrics]],
    params: Any,
    count: jax.Array,
    micro_batches: Any,
    gradient: Any = None,
) -> tuple[Any, Metrics]:
    """Differentiates the sum of `loss_fn(params, micro) -> (loss, metrics)` over the first `count` micro-batches.

    The sum is added to `gradient`, a tree like `params`, or to zeros: layer by layer and in place, so that there is
    never a second copy.

    Returns:
      (gradient, metrics): each metric is summed, or, when its name ends in "_max", the largest.
    """
    sums = jax.tree.map(jax.new_ref, jax.tree.map(jnp.zeros_like, params) if gradient is None else gradient)

    def add(k, measured):
        loss, backward, metrics = jax.vjp(lambda params: loss_fn(params, _at(micro_batches, k)), params, has_aux=True)
        backward.with_refs(sums)(jnp.ones_like(loss))
        return {
            name: (jnp.maximum if name.endswith("_max") else jnp.add)(measured[name], value)
            for name, value in metrics.items()
        }

    metrics = jax.eval_shape(loss_fn, params, _at(micro_batches, 0))[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), metrics)
    metrics = jax.lax.fori_loop(0, count, add, zeros)
    return jax.tree.map(jax.freeze, sums), metrics


def in_micro_batches(fn: Callable[[Any], jax.Array], count: jax.Array, micro_batches: Any) -> jax.Array:
    """Computes `fn(micro)` of the first `count` micro-batches, without gradient: `[K,...]`, 0 in the others."""
    one = jax.eval_shape(fn, _at(micro_batches, 0))
    total = jax.tree.leaves(micro_batches)[0].shape[0]
    out = jnp.zeros((total, *one.shape), one.dtype)
    return jax.lax.fori_loop(0, count, lambda k, out: out.at[k].set(fn(_at(micro_batches, k))), out)


def _at(micro_batches: Any, k: Any) -> Any:
    return jax.tree.map(lambda x: x[k], micro_batches)


def apply_gradients(
    state: TrainState, gradient: Any, optimizer: optax.GradientTransformation, measured: Any
) -> tuple[TrainState, jax.Array]:
    """Takes one optimizer step, or none when the gradient, the state or `measured` is not finite.

    Args:
      state, gradient, optimizer: what is changed, and how.
      measured: scalars that tell whether the batch is sound: the loss, the mismatch of the sampler's
        log-probabilities.

    Returns:
      (state, gradient norm before clipping).
    """
    grad_norm = optax.tree.norm(gradient)
    # Checks the update's inputs; checking the update itself would keep a second copy alive.
    floats = [x for x in jax.tree.leaves((state.params, state.opt_state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.isfinite(jnp.stack(jax.tree.leaves((grad_norm, optax.tree.norm(floats), measured)))).all()

    def step(i, state):
        # Ties the gradient to the loop, else XLA would move what needs the gradient alone out of it, and keep it.
        tied, _ = jax.lax.optimization_barrier((gradient, i))
        updates, opt_state = optimizer.update(tied, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    # A loop of one step or none works in place; a choice between old and new values would keep both.
    with jax.named_scope("optimizer"):
        state = jax.lax.fori_loop(0, finite.astype(jnp.int32), step, state)
    return state.replace(skipped=jnp.where(finite, 0, state.skipped + 1)), grad_norm
