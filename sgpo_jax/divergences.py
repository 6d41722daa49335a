"""How far the unguided next-token distribution S is from the guided one T, and the gradient of its logits.

Every divergence takes float32 log-probabilities of T and of S `[...,V]`, normalised and finite, and gives its value
`[...]`, nats, and the derivative by the logits of S `[...,V]`, worked out by hand; T is a constant. Where the
vocabulary is split over devices, `axis` is the mesh axis, and V a device's part. s, t and m are the probabilities of a
token. Equations are those of arXiv 2606.24064, but for SDPO (arXiv 2601.20802), from which docs/methods.md says
where these differ.
"""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp

from sgpo_jax.losses import kl_divergence

Divergence = Callable[[jax.Array, jax.Array, str | None], tuple[jax.Array, jax.Array]]

# name -> (beta, k) -> what is computed of the two sides
DIVERGENCES: dict[str, Callable[[float, int], Divergence]] = {
    "forward_kl": lambda beta, k: forward_kl,
    "reverse_kl": lambda beta, k: reverse_kl,
    "jensen_shannon": lambda beta, k: partial(jensen_shannon, beta=beta),
    "top_k_kl": lambda beta, k: partial(top_k_kl, k=k),
}


def select(name: str, beta: float = 0.5, k: int = 100) -> Divergence:
    """The divergence of that name.

    Args:
      name: one of `DIVERGENCES`.
      beta: see `jensen_shannon`; of no account to the others.
      k: see `top_k_kl`; of no account to the others.

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
    """KL(T || S), with the gradient s - t. Eq. 2, 3."""
    return _summed(kl_divergence(log_t, log_s), axis), jnp.exp(log_s) - jnp.exp(log_t)


def reverse_kl(log_t: jax.Array, log_s: jax.Array, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    """KL(S || T), with the gradient s (log s/t - KL(S || T)). Table 6."""
    kl = _summed(kl_divergence(log_s, log_t), axis)
    return kl, jnp.exp(log_s) * (log_s - log_t - kl[..., None])


def jensen_shannon(
    log_t: jax.Array, log_s: jax.Array, axis: str | None = None, beta: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """(1 - beta) KL(S || M) + beta KL(T || M), M = (1 - beta) S + beta T: between 0 and ln 2. SDPO.

    The gradient is (1 - beta) s (log s/m - KL(S || M)). For beta towards 0 the divergence is beta KL(T || S), towards 1
    it is (1 - beta) KL(S || T).
    """
    chex.assert_equal_shape([log_t, log_s])
    apart = log_t - log_s
    # log of m over the larger of s and t, at most 0: nothing overflows, nothing cancels, and it is 0 where s = t.
    below = jnp.log1p(jnp.where(apart > 0, 1 - beta, beta) * jnp.expm1(-jnp.abs(apart)))
    log_s_over_m, log_t_over_m = (-below - jnp.maximum(x, 0.0) for x in (apart, -apart))
    s = jnp.exp(log_s)
    of_s = _summed(jnp.sum(s * log_s_over_m, axis=-1), axis)
    of_t = _summed(jnp.sum(jnp.exp(log_t) * log_t_over_m, axis=-1), axis)
    return (1 - beta) * of_s + beta * of_t, (1 - beta) * s * (log_s_over_m - of_s[..., None])


def top_k_kl(
    log_t: jax.Array, log_s: jax.Array, axis: str | None = None, k: int = 100
) -> tuple[jax.Array, jax.Array]:
    """KL(T || S) in which all but the k likeliest tokens of T are one outcome, the tail: a lower bound. SDPO.

    Value and gradient are those of the KL from T~, which has t on those k and in the tail s T(tail) / S(tail).
    Tokens that tie with the k-th are taken too; for k of V and more it is the forward KL.
    """
    chex.assert_equal_shape([log_t, log_s])
    likeliest, _ = jax.lax.top_k(log_t, min(k, log_t.shape[-1]))
    if axis:
        of_all = jax.lax.all_gather(likeliest, axis, axis=likeliest.ndim - 1, tiled=True)
        likeliest, _ = jax.lax.top_k(of_all, min(k, of_all.shape[-1]))
    # The least of the k, not the last: on CPU XLA takes a slice of them out of all, sorted, in many times the time.
    tail = log_t < likeliest.min(axis=-1, keepdims=True)
    # As logarithms: both masses may be 0 in float32, and 1 - sum of the k would be noise long before.
    rise = _log_mass(log_t, tail, axis) - _log_mass(log_s, tail, axis)
    return forward_kl(jnp.where(tail, log_s + rise, log_t), log_s, axis)


def _log_mass(log_p: jax.Array, where: jax.Array, axis: str | None) -> jax.Array:
    """`[...,1]` logarithm of the probability of the outcomes in `where` `[...,V]`; -inf where there are none."""
    mass = jax.nn.logsumexp(log_p, axis=-1, keepdims=True, where=where)
    if not axis:
        return mass
    return jax.nn.logsumexp(jax.lax.all_gather(mass, axis, axis=mass.ndim - 1, tiled=True), axis=-1, keepdims=True)


def _summed(x: jax.Array, axis: str | None) -> jax.Array:
    """Sum over the devices that share the vocabulary."""
    return jax.lax.psum(x, axis) if axis else x
