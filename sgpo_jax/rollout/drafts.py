"""Drafts the next tokens of a response from texts that are known, and counts those that the policy samples itself.

A drafted token is what followed elsewhere on the last tokens of the response. It is right if it equals the token that
is sampled in its place, whose noise depends on nothing else. So drafts change how many passes through the model a
response takes, and no response. Matching costs no model and no word with the host.

Axis key: W shards, Q responses of a shard, R slots of a shard, E responses to a problem, P prompt length, T most tokens
of a response, K drafted tokens of a slot, J = K + 1 tokens of a slot in a pass, S tokens of a text.
"""

import jax
import jax.numpy as jnp

from sgpo_jax.sharding import platform

NONE = -1  # stands where a text has no token: nothing matches across it
SUFFIX = 8  # last tokens of a response that are compared at most
AT_ONCE = 64  # tokens of a shard with which a pass takes about the time that the weights take: more cost nothing
AT_ONCE_CPU = 8  # the same for CPUs, where arithmetic decides earlier


def most_drafted(draft: int, width: int, slots: int) -> int:
    """Returns K in a stage of `width` slots of a shard, which begins with `slots`: at most `draft`.

    The fewer slots are left, the more tokens of each are verified at once. A pass of a later stage has no more tokens,
    and takes no more memory, than one of the first stage, or it has few.
    """
    few = AT_ONCE_CPU if platform() == "cpu" else max(AT_ONCE, slots)
    return max(min(draft, few // max(width, 1) - 1), 0)


def before(prompts: jax.Array) -> jax.Array:
    """Returns what stands before a response in its text, `[...,SUFFIX+1]`: NONE, then the end of its prompt.

    The prompts `[...,P]` have NONE on the left in place of padding.
    """
    ends = prompts[..., -SUFFIX:]
    left = SUFFIX + 1 - ends.shape[-1]
    return jnp.pad(ends, [(0, 0)] * (ends.ndim - 1) + [(left, 0)], constant_values=NONE)


def last_tokens(texts: jax.Array, response: jax.Array, sampled: jax.Array) -> jax.Array:
    """Returns the last tokens of responses `[W,R,SUFFIX]`, or of their prompts where these are shorter.

    Args:
      texts: `[W,Q,SUFFIX+1+T]`, `before` and the response.
      response: `[W,R]` index of a response, below Q.
      sampled: `[W,R]` tokens that it has.
    """
    places = jnp.minimum(sampled, texts.shape[2] - SUFFIX - 1)[..., None] + 1 + jnp.arange(SUFFIX)
    return texts[jnp.arange(len(texts))[:, None, None], response[..., None], places]


def propose(text: jax.Array, last: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Finds the last tokens of a response in a text, and returns those that follow there.

    The place where most of the last tokens agree is taken; of several such places the last one.

    Args:
      text: `[...,S]` int32; NONE where there is no token.
      last: `[...,SUFFIX]` the response's last tokens.
      most: K.

    Returns:
      (drafts `[...,K]`, number of them `[...]`; what stands beyond it means nothing).
    """
    size, outer = text.shape[-1], [(0, 0)] * (text.ndim - 1)
    text = jnp.pad(text, [*outer, (SUFFIX, most + 1)], constant_values=NONE)
    same, agree = jnp.bool(True), jnp.int32(0)
    for i in range(SUFFIX):
        earlier, wanted = text[..., SUFFIX - i : SUFFIX - i + size], last[..., SUFFIX - 1 - i, None]
        same = same & (earlier == wanted) & (wanted != NONE)
        agree = agree + same
    agree = jnp.where(text[..., SUFFIX + 1 : SUFFIX + 1 + size] == NONE, 0, agree)
    place = size - 1 - jnp.argmax(agree[..., ::-1], axis=-1, keepdims=True)
    drafts = jnp.take_along_axis(text, SUFFIX + 1 + place + jnp.arange(most), axis=-1)
    count = jnp.cumprod(drafts != NONE, axis=-1).sum(axis=-1)
    return drafts, jnp.where(agree.any(axis=-1), count, 0)


def accept(
    token: jax.Array, drafts: jax.Array, drafted: jax.Array, stops: jax.Array, left: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns how many of the tokens that a pass sampled belong to the response.

    The first one does. Each later one was sampled after a draft, and does if all drafts before it are right, none of
    them ends the response, and it is within the limit.

    Args:
      token: `[...,J]` token sampled after the one that was due, and after each draft.
      drafts: `[...,K]`.
      drafted: `[...]` number of drafts that are to be considered.
      stops: stop tokens.
      left: `[...]` tokens up to the limit, at least 1.

    Returns:
      (number of tokens `[...]`, from 1 to J; whether the last of them is a stop token `[...]`).
    """
    right = (drafts == token[..., :-1]) & (jnp.arange(drafts.shape[-1]) < drafted[..., None])
    goes_on = right & ~jnp.isin(token[..., :-1], stops)
    kept = jnp.minimum(1 + jnp.cumprod(goes_on, axis=-1).sum(axis=-1), left)
    last = jnp.take_along_axis(token, jnp.maximum(kept, 1)[..., None] - 1, axis=-1)[..., 0]
    return kept, jnp.isin(last, stops)
