"""Independent float64 computations, and numeric gradients, to compare with."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis.extra.numpy import arrays

from sgpo_jax import losses

T, G, V = 6, 8, 5
INF, NAN = math.inf, math.nan


def floats(low, high):
    return st.floats(low, high, width=32, allow_subnormal=False)


LOGITS = arrays(np.float32, (T, V), elements=floats(-6, 6))


def numeric_gradient(function, x, step=1e-6):
    """Central differences of a float64 function of an array."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[index] += step
        behind[index] -= step
        gradient[index] = (function(ahead) - function(behind)) / (2 * step)
    return gradient


def log_softmax(logits):
    """Log-probabilities in float64."""
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


P, Q = np.log([0.5, 0.5]), np.log([0.9, 0.1])
# Not the defaults, and different weights for the two sides of the mixture; k leaves a tail of two or more tokens.
BETA, K = 0.3, 3


def oracle(name, log_t, log_s, beta=BETA, k=K):
    """Computes the divergence `[N]` of float64 log-probabilities `[N,V]` from its definition."""
    t, s = np.exp(log_t), np.exp(log_s)
    if name == "forward_kl":
        return (t * (log_t - log_s)).sum(-1)
    if name == "reverse_kl":
        return (s * (log_s - log_t)).sum(-1)
    if name == "jensen_shannon":
        log_m = np.logaddexp(math.log(1 - beta) + log_s, math.log(beta) + log_t)
        return (1 - beta) * (s * (log_s - log_m)).sum(-1) + beta * (t * (log_t - log_m)).sum(-1)
    top = log_t >= np.sort(log_t)[:, -min(k, log_t.shape[1]), None]
    top_kl = np.where(top, t * (log_t - log_s), 0).sum(-1)
    t_tail, s_tail = (np.where(top, 0, x).sum(-1) for x in (t, s))
    rest = t_tail > 0
    return top_kl + np.where(rest, t_tail * np.log(np.where(rest, t_tail, 1) / np.where(rest, s_tail, 1)), 0)


def wide_softmax(logits):
    """`log_softmax` of logits of any size."""
    logits = np.asarray(logits, np.float64)
    return log_softmax(logits - logits.max(-1, keepdims=True))


def dense(name, log_t, log_s):
    """Computes the divergence with JAX's own operations, which JAX can differentiate."""
    if name == "forward_kl":
        return losses.kl_divergence(log_t, log_s)
    if name == "reverse_kl":
        return losses.kl_divergence(log_s, log_t)
    if name == "jensen_shannon":
        log_m = jnp.logaddexp(math.log(1 - BETA) + log_s, math.log(BETA) + log_t)
        kl_s, kl_t = (losses.kl_divergence(x, log_m) for x in (log_s, log_t))
        return (1 - BETA) * kl_s + BETA * kl_t
    top_t, places = jax.lax.top_k(log_t, K)
    sides = top_t, jnp.take_along_axis(log_s, places, axis=-1)
    rest = (jnp.log(-jnp.expm1(jax.nn.logsumexp(x, axis=-1, keepdims=True))) for x in sides)
    return losses.kl_divergence(*(jnp.concatenate(pair, -1) for pair in zip(sides, rest, strict=True)))
