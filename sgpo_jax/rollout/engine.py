"""Jitted generation: each prompt is prefilled once, its cache shared out to the G responses, then decoded together.

Axis key: B prompts, G responses per prompt, R = B * G rows, P prompt length, T new tokens, V vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sgpo_jax import models
from sgpo_jax.rollout.sampling import sample
from sgpo_jax.sharding import BATCH, constrain

Array = jax.Array | np.ndarray

STOP, LENGTH = 0, 1  # finish reasons: ended by a stop token, or cut at the limit


class Rollout(NamedTuple):
    """Responses, G per prompt."""

    tokens: Array  # [B,G,T] int32, the stop token included, padded after it
    logp: Array  # [B,G,T] float32, log-probability of each token at temperature 1 without filter, nats; 0 after
    lengths: Array  # [B,G] int32, tokens in each response, the stop token included
    finish: Array  # [B,G] int32, STOP or LENGTH


@partial(
    jax.jit,
    static_argnames=(
        "config", "group", "max_new_tokens", "temperature", "top_p", "top_k", "stop_ids", "pad_id", "dtype",
    ),
)  # fmt: skip
def generate(
    params: Any,
    config: models.ModelConfig,
    prompts: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    problem_ids: jax.Array,
    *,
    group: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    dtype: Any = jnp.float32,
) -> Rollout:
    """Samples `group` responses to each prompt.

    The noise of a token depends on (key, problem id, sample, token position) and on nothing else, so a response does
    not change with the batch it is sampled in.

    Args:
      params, config: the policy.
      prompts: `[B,P]` token ids, padded on the left.
      mask: `[B,P]` bool, True on real tokens.
      key: PRNG key; the caller folds in the seed, the step and the purpose, and never uses it twice.
      problem_ids: `[B]` integers that tell the prompts of one key apart.
      group: G, responses per prompt.
      max_new_tokens: T, tokens; a response without a stop token by then is cut.
      temperature, top_p, top_k: see `sampling.sample`; temperature 0 is greedy.
      stop_ids: token ids that end a response.
      pad_id: fills `tokens` after the end.
      dtype: of activations and cache.
    """
    rows = prompts.shape[0] * group
    head = models.head(params, config)
    stops = jnp.asarray(stop_ids, jnp.int32)
    keys = jax.vmap(
        lambda problem: jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, problem), i))(jnp.arange(group))
    )(problem_ids).reshape(rows)

    def choose(hidden, step):
        """Hidden state `[R,D]` -> the token each row takes at `step`, and its log-probability."""
        logits = jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        logits = constrain(logits, BATCH, None)
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(keys)
        return sample(logits, uniform, temperature=temperature, top_p=top_p, top_k=top_k)

    def record(carry, token, logp, step):
        tokens, logps, lengths, done = carry
        tokens = tokens.at[:, step].set(jnp.where(done, pad_id, token))
        logps = logps.at[:, step].set(jnp.where(done, 0.0, logp))
        lengths = jnp.where(done, lengths, step + 1)
        return tokens, logps, lengths, done | jnp.isin(token, stops)

    cache = models.init_cache(config, prompts.shape[0], prompts.shape[1], dtype)
    hidden, filled = models.apply(params, config, prompts, models.positions_of(mask), mask, cache, dtype=dtype)
    assert filled is not None  # a cache went in
    cache = _share(filled, group, max_new_tokens - 1)
    prompt_lengths = jnp.repeat(mask.sum(axis=-1), group)

    token, logp = choose(jnp.repeat(hidden[:, -1], group, axis=0), 0)
    empty = (
        jnp.full((rows, max_new_tokens), pad_id, jnp.int32),
        jnp.zeros((rows, max_new_tokens), jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )
    responses = record(empty, token, logp, 0)

    def decode(state):
        step, token, cache, responses = state
        position = (prompt_lengths + step - 1)[:, None]
        seen = jnp.ones((rows, 1), bool)
        hidden, cache = models.apply(params, config, token[:, None], position, seen, cache, dtype=dtype)
        token, logp = choose(hidden[:, 0], step)
        return step + 1, token, cache, record(responses, token, logp, step)

    def unfinished(state):
        step, done = state[0], state[3][3]
        return (step < max_new_tokens) & ~jnp.all(done)

    state = jax.lax.while_loop(unfinished, decode, (jnp.int32(1), token, cache, responses))
    tokens, logps, lengths, done = state[3]
    finish = jnp.where(done, STOP, LENGTH)
    shape = (prompts.shape[0], group)
    return Rollout(
        tokens.reshape(*shape, -1), logps.reshape(*shape, -1), lengths.reshape(shape), finish.reshape(shape)
    )


def _share(cache: dict[str, jax.Array], group: int, room: int) -> dict[str, jax.Array]:
    """The prompts' cache `[L,B,P,K,N]`, repeated for each response, with `room` free slots: `[L,R,P+room,K,N]`."""

    def widen(x, axis):
        x = jnp.repeat(x, group, axis=axis)
        padding = [(0, 0)] * x.ndim
        padding[axis + 1] = (0, room)
        return jnp.pad(x, padding)

    layout = (None, BATCH, None, "tensor", None)
    return {
        "key": constrain(widen(cache["key"], 1), *layout),
        "value": constrain(widen(cache["value"], 1), *layout),
        "mask": widen(cache["mask"], 0),
        "index": cache["index"],
    }
