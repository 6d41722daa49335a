"""Jitted generation with continuous batching: a fixed number of slots decodes, and a free slot takes the next response.

Each prompt is prefilled once. A slot's cache begins with a copy of its prompt, and its response follows, so that what
is read of it grows with it.

Axis key: W shards of the rows, B prompts, G responses per prompt, C kinds of prompts with a G of their own, Q responses
of a shard, R slots of a shard, P prompt length, T new tokens, V vocabulary; of a cache K key/value heads, L layers,
S length, N head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sgpo_jax import models
from sgpo_jax.rollout.sampling import Sampling, sample
from sgpo_jax.sharding import BATCH, constrain, path_name, spec_for

Array = Any  # JAX's, or numpy's on the host

STOP, LENGTH = 0, 1  # finish reasons: ended by a stop token, or cut at the limit
NARROW = 4  # when nothing waits, the last responses go on in 1/4 of the slots, and again in 1/4 of these
LEAST = 8, 2  # slots of a shard that these must be: the first time, which takes memory for a copy, and after it


class LanguageModel(NamedTuple):
    """What generation needs of a model besides its parameters."""

    config: models.ModelConfig
    stop_ids: tuple[int, ...]  # token ids that end a response
    pad_id: int  # fills a response after its end
    dtype: Any = jnp.float32  # of weights, activations and the cache while decoding


class Prompts(NamedTuple):
    """A batch of prompts."""

    tokens: Array  # [B,P] int32, padded on the left
    mask: Array  # [B,P] bool, True on real tokens


class Rollout(NamedTuple):
    """Responses, G to each prompt. With prompts of C kinds, G is the sum over the kinds, and B counts problems."""

    tokens: Array  # [B,G,T] int32, the stop token included, padded after it
    logp: Array  # [B,G,T] float32, log-probability of each token at temperature 1 without filter, nats; 0 after
    lengths: Array  # [B,G] int32, tokens in each response, the stop token included
    finish: Array  # [B,G] int32, STOP or LENGTH


class _Slots(NamedTuple):
    """What decodes now."""

    item: jax.Array  # [W,R] response of the shard; Q: none
    sampled: jax.Array  # [W,R] tokens of it so far
    token: jax.Array  # [W,R] token to feed next, at first the prompt's last
    cache: models.Cache  # of W * R rows, with room for P - 1 + T tokens


@partial(jax.jit, static_argnames=("model", "sampling", "group", "shards"))
def generate(
    params: Any,
    model: LanguageModel,
    prompts: Prompts,
    key: jax.Array,
    problem_ids: jax.Array,
    *,
    sampling: Sampling,
    group: int | tuple[int, ...],
    shards: int = 1,
) -> tuple[Rollout, jax.Array]:
    """Samples `group` responses to each prompt.

    The noise of a token depends on (key, problem id, sample, token position) and on nothing else. So a response does
    not change with the batch it is sampled in, nor with the number of slots, nor with prompts of another kind.

    Args:
      params, model: the policy.
      prompts: `[B,P]` prompts.
      key: PRNG key, or `[C]` one for each kind. The caller folds in the seed, the step and the purpose, and never
        uses a key twice.
      problem_ids: `[B]` integers that tell the prompts of one key apart.
      sampling: T, the filters, and the number of slots, which must be a multiple of `shards`.
      group: G, responses to each prompt; or C numbers, if the prompts of C kinds take turns.
      shards: W, ways in which the prompts are split over devices; W * C divides B. Slots take prompts of their own
        shard.

    Returns:
      (rollout, slot-steps `[]` int32: the tokens that could have been decoded in the same time with no slot idle).

    Raises:
      ValueError: `shards` or the kinds of prompts do not divide the prompts, or `shards` does not divide the slots.
    """
    count, length = prompts.tokens.shape
    config, dtype, slots, max_new_tokens = model.config, model.dtype, sampling.slots, sampling.max_new_tokens
    groups = (group,) if isinstance(group, int) else group
    if count % shards or slots % shards:
        raise ValueError(f"shards={shards}: must divide the {count} prompts and slots={slots}")
    if count // shards % len(groups):
        raise ValueError(f"group={group}: must have a length that divides the {count // shards} prompts of a shard")
    turns, together = count // len(groups), sum(groups)
    waiting = turns // shards * together
    width = min(slots // shards or waiting, waiting)
    params = _resident(params, dtype)
    head = _contiguous_head(params, config)
    stops = jnp.asarray(model.stop_ids, jnp.int32)

    by_shard = partial(jnp.reshape, shape=(shards, count // shards))
    last, problem_ids = by_shard(prompts.tokens[:, -1]), by_shard(problem_ids)
    empty = _laid_out(models.init_cache(config, count, length - 1, dtype))
    # All but the last token, which is the first to be decoded.
    early = _left_aligned(prompts.tokens[:, :-1], prompts.mask[:, :-1])
    filled = models.apply(params, config, *early, empty, dtype=dtype)[1] if length > 1 else empty
    assert filled is not None  # a cache went in

    # Of the responses of a turn.
    kinds = jnp.repeat(jnp.arange(len(groups)), np.array(groups), total_repeat_length=together)
    samples = jnp.concatenate([jnp.arange(size) for size in groups])
    keys = jnp.broadcast_to(key, len(groups))

    def prompt_of(item):
        return jnp.minimum(item // together * len(groups) + kinds[item % together], count // shards - 1)

    def of_problem(values, item):
        return jnp.take_along_axis(values, prompt_of(item), axis=1)

    def decode(state):
        queued, now, out, steps = state
        active = now.item < waiting
        position = now.cache["length"]
        hidden, cache = models.apply(
            params, config, *(x.reshape(-1, 1) for x in (now.token, position, active)), now.cache, dtype=dtype
        )
        assert cache is not None
        logits = jnp.dot(hidden[:, 0], head, preferred_element_type=jnp.float32)
        # Each device makes its part of the vocabulary, and then samples a part of the rows.
        logits = constrain(constrain(logits, BATCH, "tensor"), (*BATCH, "tensor"), None)
        own_key, sample_id = (of_turn[now.item % together] for of_turn in (keys[kinds], samples))
        noise = [x.reshape(-1) for x in (own_key, of_problem(problem_ids, now.item), sample_id, now.sampled)]
        uniform = jax.vmap(lambda *key_and_ids: jax.random.uniform(_fold(*key_and_ids)))(*noise)
        token, logp = sample(logits, uniform, sampling)
        token, logp = token.reshape(now.item.shape), logp.reshape(now.item.shape)
        stopped = jnp.isin(token, stops)
        out = _record(out, now, token, logp, stopped)
        ended = stopped | (now.sampled + 1 == max_new_tokens)
        now = _Slots(jnp.where(ended, waiting, now.item), now.sampled + 1, token, cache)
        return queued, now, out, steps + now.item.size

    def refill(state):
        queued, now, out, steps = state
        free = now.item == waiting
        item = jnp.minimum(queued[:, None] + jnp.cumsum(free, axis=1) - 1, waiting)
        fresh = free & (item < waiting)
        item = jnp.where(fresh, item, now.item)
        cache = _insert(now.cache, filled, fresh, prompt_of(item))
        token = jnp.where(fresh, of_problem(last, item), now.token)
        now = _Slots(item, jnp.where(fresh, 0, now.sampled), token, cache)
        return queued + fresh.sum(axis=1), now, out, steps

    cache = _laid_out(models.init_cache(config, shards * width, length - 1 + max_new_tokens, dtype))
    idle = jnp.full((shards, width), waiting, jnp.int32)
    out = Rollout(
        jnp.full((shards, waiting, max_new_tokens), model.pad_id, jnp.int32),
        jnp.zeros((shards, waiting, max_new_tokens), jnp.float32),
        jnp.zeros((shards, waiting), jnp.int32),
        jnp.full((shards, waiting), LENGTH, jnp.int32),
    )
    state = jnp.zeros(shards, jnp.int32), _Slots(idle, idle * 0, idle * 0, cache), out, jnp.int32(0)
    state = _drain(state, waiting, refill, decode)
    return jax.tree.map(lambda field: field.reshape(turns, together, *field.shape[2:]), state[2]), state[3]


def narrowed(slots: int, all_slots: int) -> int:
    """Slots of a shard in which the last responses go on when so few are left; 0 if they stay in `slots`."""
    fewer = slots // NARROW
    return fewer if fewer >= LEAST[slots < all_slots] else 0


def _drain(state: Any, waiting: int, refill: Callable, decode: Callable) -> Any:
    """Decodes, in ever fewer slots once none waits, until every response has ended."""

    all_slots = width = state[1].item.shape[1]

    def busy(state, narrower):
        going = (state[1].item < waiting).sum(axis=1)
        return jnp.any(state[0] < waiting) | jnp.any(going > narrower)

    def refill_due(state):
        return jnp.any((state[0] < waiting)[:, None] & (state[1].item == waiting))

    def refill_and_decode(state):
        def going(state):
            return busy(state, narrowed(all_slots, all_slots)) & ~refill_due(state)

        state = refill(state)
        with jax.named_scope(f"decode_{all_slots}"):
            return jax.lax.while_loop(going, decode, state)

    step = refill_and_decode
    while width:
        narrower = narrowed(width, all_slots)
        with jax.named_scope("refill" if step is refill_and_decode else f"decode_{width}"):
            state = jax.lax.while_loop(partial(busy, narrower=narrower), step, state)
        if narrower:
            state = state[0], _active_first(state[1], waiting, narrower), *state[2:]
        step, width = decode, narrower
    return state


def _fold(key: jax.Array, *ids: jax.Array) -> jax.Array:
    for i in ids:
        key = jax.random.fold_in(key, i)
    return key


def _record(out: Rollout, now: _Slots, token: jax.Array, logp: jax.Array, stopped: jax.Array) -> Rollout:
    """Writes each slot's token; a slot without a response points beyond the end, and is dropped."""

    def write(tokens, logps, lengths, finish, item, count, token, logp, stopped):
        return Rollout(
            tokens.at[item, count].set(token, mode="drop"),
            logps.at[item, count].set(logp, mode="drop"),
            lengths.at[item].set(count + 1, mode="drop"),
            finish.at[item].set(jnp.where(stopped, STOP, LENGTH), mode="drop"),
        )

    return jax.vmap(write)(*out, now.item, now.sampled, token, logp, stopped)


def _left_aligned(prompts: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompts `[B,P]` padded on the left -> (padded on the right, positions, mask)."""
    lengths = mask.sum(axis=-1, keepdims=True)
    positions = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    tokens = jnp.take_along_axis(prompts, (positions - lengths) % mask.shape[1], axis=1)
    return tokens, positions, positions < lengths


def _insert(cache: models.Cache, prompts: models.Cache, fresh: jax.Array, problem: jax.Array) -> models.Cache:
    """The slots' cache with prompt `problem` `[W,R]` of the shard, and nothing else, in every `fresh` `[W,R]` slot."""
    shards = len(fresh)
    fresh_first = jnp.argsort(~fresh, axis=1, stable=True)

    @partial(jax.vmap, in_axes=(2, 2, 0, 0, 0), out_axes=2)
    def replace(slots, prompts, slot, problem, fresh):
        # Of one shard: [K,L,R,S,N] and [K,L,B/W,P-1,N].
        new = jax.lax.dynamic_slice_in_dim(prompts, problem, 1, axis=2)
        old = jax.lax.dynamic_slice(slots, (0, 0, slot, 0, 0), new.shape)
        return jax.lax.dynamic_update_slice(slots, jnp.where(fresh, new, old), (0, 0, slot, 0, 0))

    def by_shard(rows):
        return rows.reshape(*rows.shape[:2], shards, rows.shape[2] // shards, *rows.shape[3:])

    def copy(i, caches):
        slot = fresh_first[:, i]
        chosen = (jnp.take_along_axis(x, slot[:, None], axis=1)[:, 0] for x in (problem, fresh))
        slot_problem_fresh = slot, *chosen
        return tuple(
            replace(by_shard(slots), by_shard(source), *slot_problem_fresh).reshape(slots.shape)
            for slots, source in zip(caches, (prompts["key"], prompts["value"]), strict=True)
        )

    # A slot of each shard at a time, for most slots go on.
    most = fresh.sum(axis=1).max()
    keys, values = jax.lax.fori_loop(0, most, copy, (cache["key"], cache["value"]))
    of_slot = jnp.take_along_axis(prompts["length"].reshape(shards, -1), problem, axis=1)
    lengths = jnp.where(fresh, of_slot, cache["length"].reshape(fresh.shape))
    return {"key": keys, "value": values, "length": lengths.reshape(-1)}


def _active_first(now: _Slots, waiting: int, width: int) -> _Slots:
    """The `width` slots of each shard that hold every response still going."""
    chosen = jnp.argsort(now.item == waiting, axis=1, stable=True)[:, :width]
    shards, rows = now.item.shape

    def pick(values, axis):
        shape = values.shape
        values = values.reshape(*shape[:axis], shards, rows, *shape[axis + 1 :])
        picked = jax.vmap(lambda x, i: jnp.take(x, i, axis=axis), in_axes=(axis, 0), out_axes=axis)(values, chosen)
        return picked.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    cache = {"length": pick(now.cache["length"], 0)} | {name: pick(now.cache[name], 2) for name in ("key", "value")}
    item, sampled, token = (jnp.take_along_axis(field, chosen, axis=1) for field in now[:3])
    return _Slots(item, sampled, token, _laid_out(cache))


def _laid_out(cache: models.Cache) -> models.Cache:
    layout = ("tensor", None, BATCH, None, None)
    return {**cache, **{name: constrain(cache[name], *layout) for name in ("key", "value")}}


def _resident(params: Any, dtype: Any) -> Any:
    """Matrices in the dtype they are multiplied in, and whole but for the tensor axis.

    Done once: else every token would cast them, and gather them from all devices. Norms and biases stay.
    """

    def prepare(path, leaf):
        name = path_name(path)
        leaf = leaf.astype(dtype) if name.endswith(("kernel", "embedding")) else leaf
        return constrain(leaf, *("tensor" if axis == "tensor" else None for axis in spec_for(name, leaf.shape)))

    return jax.tree_util.tree_map_with_path(prepare, params)


def _contiguous_head(params: Any, config: models.ModelConfig) -> jax.Array:
    """The head `[D,V]`; of a tied model a transposed copy, which is faster than transposing at every token."""
    head = models.head(params, config)
    return jax.lax.optimization_barrier(head) if config.tie_embeddings else head
