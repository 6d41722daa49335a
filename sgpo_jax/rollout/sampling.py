"""Sampling of one token from logits: temperature, top-k, top-p, and a draw that needs one uniform number per row.

Axis key: R rows, V vocabulary.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sgpo_jax.sharding import platform

_BLOCK = 128  # vocabulary entries per block of the two-level inverse CDF
_BISECTIONS = 32
AT_ONCE = 2  # of them in a pass over the vocabulary, where memory is slower than arithmetic; 4 save nothing more


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling."""

    max_new_tokens: int  # T, tokens; a response without a stop token by then is cut
    temperature: float = 1.0  # 0 always takes the most likely token
    top_p: float = 1.0  # keep the smallest set of most likely tokens whose total probability reaches this; 1 keeps all
    top_k: int = 0  # keep this many most likely tokens; 0 keeps all
    slots: int = 0  # responses decoded at once, over all devices; 0 means all; does not change any response
    # For each stage of decoding, of which each has a quarter of the slots of the one before: the ways that split the
    # weights, times the tensor axis; the last one counts for the later stages too.
    decode_ways: tuple[int, ...] = (1,)
    draft: int = 0  # most tokens of a slot that a pass verifies beside the one that is due; changes no response
    weights: str = ""  # "int8": the kernels of the layers in 8 bits, see `quantised.by_column`; "" is the model's type
    cache: str = ""  # "int8": keys and values in 8 bits, see `cache_codes`; "" is the model's type
    # Tokens of a pool, over all devices, that the slots share in pages; 0: each slot has room for the longest response.
    pool: int = 0
    page: int = 128  # tokens of a page of the pool
    often: bool = False  # the program runs many times, so on a CPU it may take longer to compile and then be faster
    # Is called on the host at every decoding step with `[W,R]` arrays, for W shards of R slots: the index of the slot's
    # response in its shard (their number for an idle slot), the tokens that it had, and its new one. In any order.
    watch: Callable[[Any, Any, Any], None] | None = None

    @classmethod
    def from_config(cls, fields: ConfigDict) -> "Sampling":
        """Reads the settings from the section `rl` or `eval` of a config; `eval` has no types and no pool."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "slots", "draft")
        chosen = {name: fields[name] for name in names}
        types = {name: fields.get(f"rollout_{name}", "") for name in ("weights", "cache")}
        pool = fields.get("pool_tokens", 0)
        return cls(**chosen, decode_ways=tuple(fields.decode_ways), pool=pool, often=True, **types)


def sample(logits: jax.Array, uniform: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Samples a token from the filtered distribution and returns its probability under the unfiltered one.

    The order is the usual one: temperature, then top-k, then top-p over the tokens that top-k keeps.

    Args:
      logits: `[R,V]` logits.
      uniform: `[R]` uniform random numbers in [0, 1).
      sampling: the temperature and the filters. A filter keeps all tokens that tie at its border.

    Returns:
      (token `[R]` int32, its log-probability `[R]` float32 at temperature 1 without any filter, nats).
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    if sampling.temperature == 0:
        token = jnp.argmax(log_probs, axis=-1)
    else:
        probs = filtered(log_probs / sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        token = inverse_cdf(probs, uniform)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]


def filtered(logits: jax.Array, *, top_p: float, top_k: int) -> jax.Array:
    """Turns logits `[R,V]` into unnormalised probabilities `[R,V]`: 1 for the most likely token, 0 for dropped ones."""
    gap = logits - jnp.max(logits, axis=-1, keepdims=True)
    if 0 < top_k < gap.shape[-1]:
        smallest = jax.lax.top_k(gap, top_k)[0][:, -1:]
        gap = jnp.where(gap >= _below(smallest), gap, -jnp.inf)
    probs = jnp.exp(gap)
    if top_p >= 1:
        return probs
    # Bisect for the smallest kept logit, which avoids sorting the vocabulary. `low` always keeps enough mass.
    needed = top_p * jnp.sum(probs, axis=-1, keepdims=True)
    at_once = 1 if platform() == "cpu" else AT_ONCE

    def halve(_, bounds):
        # All bounds that the next halvings can come to. One pass over the vocabulary decides between them.
        edges = list(bounds)
        for _ in range(at_once):
            middles = [0.5 * (low + high) for low, high in itertools.pairwise(edges)]
            edges = [edge for pair in itertools.zip_longest(edges, middles) for edge in pair][:-1]
        masses = [jnp.sum(jnp.where(gap >= edge, probs, 0.0), axis=-1, keepdims=True) for edge in edges[1:-1]]
        low, high = bounds[0], edges[1]
        for lower, upper, mass in zip(edges[1:], edges[2:], masses, strict=False):
            low, high = (jnp.where(mass >= needed, new, old) for new, old in ((lower, low), (upper, high)))
        return low, high

    # exp(-40) times the vocabulary size is below the float32 resolution of the total, which is at least 1.
    low, high = jnp.full_like(needed, -40.0), jnp.full_like(needed, 1e-6)
    low, _ = jax.lax.fori_loop(0, _BISECTIONS // at_once, halve, (low, high))
    return jnp.where(gap >= _below(low), probs, 0.0)


def _below(gap: jax.Array) -> jax.Array:
    """Returns a bound slightly below `gap`, which the token at `gap` reaches in spite of rounding.

    A compiler may compute `gap` a second time for the comparison, with a fused multiply-add that changes its last bit.
    Without this slack, the least likely token to keep could be lost.
    """
    return gap - 1e-6 * (1 - gap)


def inverse_cdf(probs: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the token `[R]` at the quantile `uniform` `[R]` of unnormalised `probs` `[R,V]`.

    A token of probability 0 is never returned. There are two levels, blocks and their entries: shorter sums are faster
    and lose less precision than one sum over the vocabulary.
    """
    rows, vocab = probs.shape
    blocks = jnp.pad(probs, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    mass = blocks.sum(axis=-1)
    block, rest = _pick(mass, uniform * mass.sum(axis=-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    entry, _ = _pick(inside, rest)
    # NaN can lead into the padding of the last block, past the vocabulary.
    return jnp.minimum(block * _BLOCK + entry, vocab - 1)


def _pick(mass: jax.Array, point: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first index whose cumulative `mass` `[R,M]` exceeds `point` `[R]`, and the point's offset in it."""
    total = jnp.cumsum(mass, axis=-1)
    exceeds = (total > point[:, None]) & (mass > 0)
    # After rounding, the point can lie past the last sum; the last entry with mass is then the right one.
    last = mass.shape[-1] - 1 - jnp.argmax((mass > 0)[:, ::-1], axis=-1)
    index = jnp.where(exceeds.any(axis=-1), jnp.argmax(exceeds, axis=-1), last)
    before = jnp.take_along_axis(total - mass, index[:, None], axis=-1)[:, 0]
    return index, jnp.maximum(point - before, 0.0)
