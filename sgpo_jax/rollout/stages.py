"""The slots of a rollout, and the stages in which they decode: fewer and fewer once the queue is empty.

Axis key: W shards of the rows, Q responses of a shard, R slots of a shard, P prompt length, T new tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sgpo_jax import models
from sgpo_jax.rollout.cache import constrain_cache, copy_row
from sgpo_jax.rollout.pages import Pages, release
from sgpo_jax.sharding import platform, row_ways

NARROW = 4  # when the queue is empty, the last responses continue in 1/4 of the slots, later in 1/4 of these, and so on
# Fewest slots of a shard after narrowing: the first time, which takes memory for a copy, and later. On a CPU every slot
# takes time.
LEAST = {"cpu": (4, 2), "gpu": (8, 2), "tpu": (8, 2)}


class Slots(NamedTuple):
    """The state of the slots."""

    response: jax.Array  # [W,R] index of the slot's response in its shard; Q if the slot is free
    sampled: jax.Array  # [W,R] tokens of the response so far
    token: jax.Array  # [W,R] token to feed next; at first the last one of the prompt
    cache: models.Cache  # of W * R rows, with room for P - 1 + T tokens; or pools, and the lengths of the rows
    pages: Pages | None = None  # where the caches are pools


def narrowed(slots: int, all_slots: int) -> int:
    """Returns the slots of a shard in the stage after `slots`, on the platform of the mesh; 0 if that is the last."""
    narrower = slots // NARROW
    return narrower if narrower >= LEAST[platform()][slots < all_slots] else 0


class Refilling(NamedTuple):
    """The functions of the state by which free slots take responses from the queue."""

    waiting: Callable[[Any], jax.Array]  # whether any response is in the queue
    due: Callable[[Any], jax.Array]  # whether slots have to be refilled before the next pass
    refill: Callable[[Any], Any]  # returns the state, in which nothing is due or more responses have begun


def decode_all(
    state: Any,
    responses: int,
    refilling: Refilling,
    decode: Callable[[int, int], Callable],
    reached: Callable[[Any], jax.Array] | None = None,
) -> Any:
    """Decodes until every response has ended; once the queue is empty, in fewer and fewer slots.

    Args:
      state: the queue, slots, and more.
      responses: Q.
      refilling: in the first stage; with pages in all of them, since responses can be put back into the queue.
      decode: returns the step of a stage, from its number and its width.
      reached: whether decoding ends before every response has ended; None: it does not.

    Returns:
      The state at the end.
    """
    all_slots = width = state[1].response.shape[1]

    def busy(state, narrower):
        active = (state[1].response < responses).sum(axis=1)
        going = refilling.waiting(state) | jnp.any(active > narrower)
        return going if reached is None else going & ~reached(state)

    def refill_and_decode(state, stage, width, narrower):
        def no_refill_due(state):
            return busy(state, narrower) & ~refilling.due(state)

        state = refilling.refill(state)
        with jax.named_scope(f"decode_{width}"):
            return jax.lax.while_loop(no_refill_due, decode(stage, width), state)

    stage = 0
    while width:
        narrower = narrowed(width, all_slots)
        step, scope = decode(stage, width), f"decode_{width}"
        if stage == 0 or state[1].pages is not None:
            step, scope = partial(refill_and_decode, stage=stage, width=width, narrower=narrower), "refill"
        with jax.named_scope(scope):
            state = jax.lax.while_loop(partial(busy, narrower=narrower), step, state)
        if narrower:
            state = state[0], _active_first(state[1], responses, narrower), *state[2:]
        stage, width = stage + 1, narrower
    return state


def _active_first(slots: Slots, responses: int, width: int) -> Slots:
    """Returns `width` slots of each shard; all responses that have not ended are among them.

    On GPUs with a shard each, their caches move to the first rows of the cache, which keeps its size: a quarter of it
    would not fit beside it. Elsewhere the cache becomes narrower. Pages stay where they are.
    """
    chosen = jnp.argsort(slots.response == responses, axis=1, stable=True)[:, :width]
    shards, rows = slots.response.shape

    def pick(values, axis):
        shape = values.shape
        values = values.reshape(*shape[:axis], shards, rows, *shape[axis + 1 :])
        picked = jax.vmap(lambda x, i: jnp.take(x, i, axis=axis), in_axes=(axis, 0), out_axes=axis)(values, chosen)
        return picked.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    def move(i, caches):
        # No row is read after it is written: the i-th of the chosen ones is the i-th or a later one.
        row = jnp.full(shards, i, jnp.int32)
        return jax.tree.map(lambda cache: copy_row(cache, cache, row, chosen[:, i]), caches)

    def of_chosen(fields):
        return (jnp.take_along_axis(field, chosen, axis=1) for field in fields)

    if slots.pages is not None:
        own = release(slots.pages, slots.response == responses)
        shared, taken = of_chosen((own.shared, own.taken))
        table = jnp.take_along_axis(own.table, chosen[..., None], axis=1)
        cache = slots.cache | {"length": pick(slots.cache["length"], 0)}
        response, sampled, token = of_chosen(slots[:3])
        return Slots(response, sampled, token, cache, own._replace(table=table, shared=shared, taken=taken))
    both = slots.cache["key"], slots.cache["value"]
    mesh = jax.sharding.get_abstract_mesh()
    if platform() == "gpu" and shards == (1 if mesh.empty else row_ways(mesh)):
        keys, values = jax.lax.fori_loop(0, width, move, both)
    else:
        keys, values = jax.tree.map(lambda cache: pick(cache, 2), both)
    cache = {"key": keys, "value": values, "length": pick(slots.cache["length"], 0)}
    response, sampled, token = of_chosen(slots[:3])
    return Slots(response, sampled, token, constrain_cache(cache))
