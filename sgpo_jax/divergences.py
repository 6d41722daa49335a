"""Divergences between the guided next-token distribution T and the unguided one S, with the gradient of S's logits.

Every divergence takes float32 log-probabilities of T and S `[...,V]`, normalised and finite. It returns its value
`[...]`, nats, and the gradient of the logits of S `[...,V]`, derived by hand; T is a constant. Where the vocabulary is
split over devices, `axis` is the mesh axis and V is a device's part. s, t and m are the probabilities of a token under
S, T and M. Equation numbers refer to arXiv 2606.24064. Two divergences follow SDPO (arXiv 2601.20802); docs/methods.md
lists the differences from it.
"""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp

from sgpo_jax.losses import kl_divergence

Divergence = Callable[[jax.Array, jax.Array, str | None], tuple[jax.Array, jax.Array]]

# name -> function of (beta, k) that returns the divergence
DIVERGENCES: dict[str, Callable[[float, int], Divergence]] = {
    "forward_kl": lambda beta, k: forward_kl,
    "reverse_kl": lambda beta, k: reverse_kl,
    "jensen_shannon": lambda beta, k: partial(jensen_shannon, beta=beta),
    "top_k_kl": lambda beta, k: partial(top_k_kl, k=k),
}


def select(name: str, beta: float = 0.5, k: int = 100) -> Divergence:
    """Returns a divergence by its name.

    Args:
      name: one of `DIVERGENCES`.
      beta: weight of T in the mixture of `jensen_shannon`; the others ignore it.
      k: number of tokens that `top_k_kl` compares one by one; the others ignore it.

    Raises:
      ValueError: there is no such divergence, or beta or k is out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence={name!r}: must be one of {', '.join(map(repr, DIVERGENCES))}")
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta}: must be above 0 and below 1")
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    return DIVERGENCES[name](beta, k)


def forward_kl(log_t: jax.Array, log_s: jax.Array, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Computes KL(T || S); its gradient is s - t. Eq. 2, 3."""
    return _sum_over_devices(kl_divergence(log_t, log_s), axis), jnp.exp(log_s) - jnp.exp(log_t)


def reverse_kl(log_t: jax.Array, log_s: jax.Array, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Computes KL(S || T); its gradient is s (log s/t - KL(S || T)). Table 6."""
    kl = _sum_over_devices(kl_divergence(log_s, log_t), axis)
    return kl, jnp.exp(log_s) * (log_s - log_t - kl[..., None])


def jensen_shannon(
    log_t: jax.Array, log_s: jax.Array, axis: str | None = None, beta: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """Computes (1 - beta) KL(S || M) + beta KL(T || M), M = (1 - beta) S + beta T: between 0 and ln 2. SDPO.

    The gradient is (1 - beta) s (log s/m - KL(S || M)). As beta goes to 0, the divergence approaches beta KL(T || S);
    as beta goes to 1, it approaches (1 - beta) KL(S || T).
    """
    chex.assert_equal_shape([log_t, log_s])
    log_ratio = log_t - log_s
    # log(m / max(s, t)), at most 0: nothing overflows, nothing cancels, and it is 0 where s = t.
    log_m_over_max = jnp.log1p(jnp.where(log_ratio > 0, 1 - beta, beta) * jnp.expm1(-jnp.abs(log_ratio)))
    log_s_over_m, log_t_over_m = (-log_m_over_max - jnp.maximum(x, 0.0) for x in (log_ratio, -log_ratio))
    s = jnp.exp(log_s)
    kl_s = _sum_over_devices(jnp.sum(s * log_s_over_m, axis=-1), axis)
    kl_t = _sum_over_devices(jnp.sum(jnp.exp(log_t) * log_t_over_m, axis=-1), axis)
    return (1 - beta) * kl_s + beta * kl_t, (1 - beta) * s * (log_s_over_m - kl_s[..., None])


def top_k_kl(
    log_t: jax.Array, log_s: jax.Array, axis: str | None = None, k: int = 100
) -> tuple[jax.Array, jax.Array]:
    """Computes KL(T || S) with all but T's k likeliest tokens merged into one outcome, the tail. SDPO.

    This is a lower bound of the forward KL, and equal to it for k of V or more. Value and gradient are those of
    KL(T~ || S), where T~ is t on the k tokens and s T(tail) / S(tail) in the tail. Tokens that tie with the k-th
    likeliest one are not merged either.
    """
    chex.assert_equal_shape([log_t, log_s])
    likeliest, _ = jax.lax.top_k(log_t, min(k, log_t.shape[-1]))
    if axis:
        candidates = jax.lax.all_gather(likeliest, axis, axis=likeliest.ndim - 1, tiled=True)
        likeliest, _ = jax.lax.top_k(candidates, min(k, candidates.shape[-1]))
    # The minimum of the k, not the last: for a slice of the result, XLA on CPU sorts the whole vocabulary instead.
    tail = log_t < likeliest.min(axis=-1, keepdims=True)
    # In logarithms: both masses may be 0 in float32, and 1 - the sum of the k loses all precision long before that.
    log_mass_ratio = _log_mass(log_t, tail, axis) - _log_mass(log_s, tail, axis)
    return forward_kl(jnp.where(tail, log_s + log_mass_ratio, log_t), log_s, axis)


def _log_mass(log_p: jax.Array, where: jax.Array, axis: str | None) -> jax.Array:
    """Returns `[...,1]`, the log-probability of all outcomes in `where` `[...,V]` together; -inf if there are none."""
    mass = jax.nn.logsumexp(log_p, axis=-1, keepdims=True, where=where)
    if not axis:
        return mass
    return jax.nn.logsumexp(jax.lax.all_gather(mass, axis, axis=mass.ndim - 1, tiled=True), axis=-1, keepdims=True)


def _sum_over_devices(x: jax.Array, axis: str | None) -> jax.Array:
    """Sums over the devices that share the vocabulary."""
    return jax.lax.psum(x, axis) if axis else x
