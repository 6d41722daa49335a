"""Jitted generation with continuous batching: a fixed number of slots decodes, and a free slot takes the next response.

Each prompt is prefilled once. A slot's cache begins with a copy of its prompt's cache, and the response follows. So the
part of the cache that is read grows with the response. With a pool, slots share its pages instead: see `pages`.

Axis key: W shards of the rows, B prompts, G responses per prompt, C kinds of prompts with a G each, Q responses of a
shard, R slots of a shard, P prompt length, T new tokens, V vocabulary. In a cache: K key/value heads, L layers, S
length, N head size.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sgpo_jax import models, output_head
from sgpo_jax.models import cache_pages, quantised
from sgpo_jax.rollout import drafts, paging, records, weights
from sgpo_jax.rollout.cache import constrain_cache, insert
from sgpo_jax.rollout.records import LENGTH, RUNNING, Array, Rollout, Steps
from sgpo_jax.rollout.sampling import Sampling, sample
from sgpo_jax.rollout.stages import Refilling, Slots, decode_all
from sgpo_jax.sharding import BATCH, constrain, dividing, platform, weight_axes


class LanguageModel(NamedTuple):
    """The properties of a model that generation needs, without the parameters."""

    config: models.ModelConfig
    stop_ids: tuple[int, ...]  # token ids that end a response
    pad_id: int  # fills a response after its end
    dtype: Any = jnp.float32  # of weights, activations and the cache while decoding, where `Sampling` has no other


class Prompts(NamedTuple):
    """A batch of prompts."""

    tokens: Array  # [B,P] int32, padded on the left
    mask: Array  # [B,P] bool, True on real tokens


class Begun(NamedTuple):
    """The responses that earlier rollouts have begun, and when this one ends.

    A known token and its log-probability stay, whatever the policy now says. The known tokens of a response are fed as
    drafts, which are right, so that it goes on after a few passes.
    """

    rollout: Rollout  # [B/C,G], the responses so far, RUNNING where they go on
    due: Array  # [B/C] bool, problems whose responses have to end
    enough: Array  # [] int32, the rollout ends when all responses to so many problems have ended, and to those due


class Problems(NamedTuple):
    """The problems of prompts, and what may be known about their responses, which changes none of them."""

    ids: Array  # [B] integers that tell the prompts of one key apart
    expected: Array | None = None  # [B] float32, tokens of a response; with fewer slots, the longest are begun first
    earlier: Array | None = None  # [B/C,S] int32, texts about each problem to draft from, drafts.NONE between them
    begun: Begun | None = None  # responses that go on; None begins all of them


@partial(jax.jit, static_argnames=("model", "sampling", "group", "shards"))
def generate(
    params: Any,
    model: LanguageModel,
    prompts: Prompts,
    key: jax.Array,
    problems: jax.Array | Problems,
    *,
    sampling: Sampling,
    group: int | tuple[int, ...],
    shards: int = 1,
) -> tuple[Rollout, jax.Array | Steps]:
    """Samples `group` responses to each prompt.

    The noise of a token depends only on (key, problem id, sample, token position). So a response does not change with
    its batch, with the number and the order of slots, with drafts, with a pool, or with prompts of another kind.

    Args:
      params, model: the policy.
      prompts: `[B,P]` prompts.
      key: PRNG key, or `[C]` one for each kind, or `[B]` one for each prompt. The caller folds in the seed, the step
        and the purpose, and never uses a key twice.
      problems: `[B]` integers that tell the prompts of one key apart, or these and more.
      sampling: T, the filters, and the number of slots, which must be a multiple of `shards`.
      group: G, responses to each prompt; or C numbers, if the prompts of C kinds take turns.
      shards: W, number of parts into which the prompts are split over devices; W * C divides B. A slot takes prompts
        of its shard only.

    Returns:
      (rollout, slot-steps `[]` int32: decoding steps summed over slots, so the number of tokens if no slot was idle).
      With drafts or a pool, `Steps` stand in their place.

    Raises:
      ValueError: `shards` or the kinds of prompts do not divide the prompts, or `shards` does not divide the slots; or
        there are begun responses, but no drafts; or there is a pool that `paging.sizes` refuses.
    """
    count, length = prompts.tokens.shape
    config, dtype, slots, max_new_tokens = model.config, model.dtype, sampling.slots, sampling.max_new_tokens
    groups = (group,) if isinstance(group, int) else group
    known = problems if isinstance(problems, Problems) else Problems(problems)
    if count % shards or slots % shards:
        raise ValueError(f"shards={shards}: must divide the {count} prompts and slots={slots}")
    if count // shards % len(groups):
        raise ValueError(f"group={group}: must have a length that divides the {count // shards} prompts of a shard")
    begun = known.begun
    if begun is not None and not sampling.draft:
        raise ValueError("draft=0: must be above 0 for responses that are begun, whose tokens are fed as drafts")
    pool = paging.sizes(sampling, count // shards, length, shards, config.head_dim) if sampling.pool else None
    problem_count, per_problem = count // len(groups), sum(groups)  # a problem is one prompt of each kind
    responses = problem_count // shards * per_problem
    width = min(slots // shards or responses, responses)
    splits = [weight_axes(ways) for ways in sampling.decode_ways]
    params = weights.cast(quantised.by_column(params) if sampling.weights else params, dtype)
    params = weights.split(params, splits[0], weights.FROM_TRAINING)
    stops = jnp.asarray(model.stop_ids, jnp.int32)

    def by_shard(values):
        return values.reshape(shards, count // shards, *values.shape[1:])

    last_tokens, problem_ids = by_shard(prompts.tokens[:, -1]), by_shard(known.ids)
    stored = sampling.cache or dtype
    prompt_tokens = pool.longest * pool.page if pool else length - 1
    empty = constrain_cache(models.init_cache(config, count, prompt_tokens, stored))
    # Prefill all tokens but the last, which is the first one to be decoded.
    all_but_last = _left_aligned(prompts.tokens[:, :-1], prompts.mask[:, :-1])
    prefilled = models.apply(params, config, *all_but_last, empty, dtype=dtype)[1] if length > 1 else empty
    assert prefilled is not None  # the model returns a cache because it was given one

    # Kind and sample of each response to a problem.
    kinds = jnp.repeat(jnp.arange(len(groups)), np.array(groups), total_repeat_length=per_problem)
    samples = jnp.concatenate([jnp.arange(size) for size in groups])
    one_each = key.ndim and len(key) > len(groups)  # a key for each prompt
    keys = by_shard(key) if one_each else jnp.broadcast_to(key, len(groups))

    def prompt_index(response):
        first = response // per_problem * len(groups)
        return jnp.minimum(first + kinds[response % per_problem], count // shards - 1)

    def take_prompt(values, response):
        index = prompt_index(response)
        return jnp.take_along_axis(values, index.reshape(*index.shape, *(1,) * (values.ndim - 2)), axis=1)

    def keys_of(response):
        return take_prompt(keys, response) if one_each else keys[kinds][response % per_problem]

    def draw(params, head, split, slots, fed):
        """Feeds tokens `[W,R]`, or several of each slot `[W,R,J]`; returns those that follow, their logp, the cache."""
        active, rows = slots.response < responses, models.other_rows(split)
        cache = slots.cache if slots.pages is None else cache_pages.paged(slots.cache, slots.pages.table)
        hidden, cache = models.decode(
            params, config, fed.reshape(-1, *fed.shape[2:]), active.reshape(-1), cache, dtype=dtype, split=split
        )
        cache = cache if slots.pages is None else cache_pages.bare(cache)
        logits = output_head.product(constrain(hidden.reshape(-1, hidden.shape[-1]), rows, None), head)
        # Each device computes the logits of its part of the vocabulary, and then samples its part of the rows.
        logits = constrain(logits, rows, dividing(config.vocab_size, split))
        logits = constrain(logits, dividing(len(logits), (*BATCH, "tensor")), None)
        slot_keys, slot_samples = keys_of(slots.response), samples[slots.response % per_problem]
        ids = slot_keys, take_prompt(problem_ids, slots.response), slot_samples, slots.sampled
        if fed.ndim == 3:
            ids = [jnp.broadcast_to(x[..., None], fed.shape) for x in ids]
            ids[-1] = ids[-1] + jnp.arange(fed.shape[2])
        noise = [x.reshape(-1) for x in ids]
        uniform = jax.vmap(lambda *key_and_ids: jax.random.uniform(_fold(*key_and_ids)))(*noise)
        token, logp = sample(logits, uniform, sampling)
        return token.reshape(fed.shape), logp.reshape(fed.shape), cache

    def decode(params, head, split, state):
        queued, slots, out, steps = state
        token, logp, cache = draw(params, head, split, slots, slots.token)
        if sampling.watch is not None:
            jax.debug.callback(sampling.watch, slots.response, slots.sampled, token)
        stopped = jnp.isin(token, stops)
        out = records.record(out, slots, token, logp, stopped)
        ended = stopped | (slots.sampled + 1 == max_new_tokens)
        after = Slots(jnp.where(ended, responses, slots.response), slots.sampled + 1, token, cache, slots.pages)
        size = slots.response.size
        return queued, after, out, steps._replace(slots=steps.slots + size) if pool else steps + size

    def verify(params, head, split, most, state):
        """Decodes with up to `most` drafted tokens of each slot, of which the right ones need no pass of their own."""
        queued, slots, out, steps = state
        left = max_new_tokens - slots.sampled
        guesses, drafted = drafts.propose(*texts(out, slots), most)
        if begun is not None:
            recalled, *stored = records.recall(out, known_lengths, slots, most + 1)
            guesses = jnp.where(recalled[..., :-1], stored[0][..., :-1], guesses)
            drafted = jnp.where(recalled[..., 0], recalled[..., :-1].sum(axis=-1), drafted)
        drafted = jnp.where(slots.response < responses, jnp.minimum(drafted, left - 1), 0)
        fed = jnp.concatenate([slots.token[..., None], jnp.maximum(guesses, 0)], axis=-1)
        token, logp, cache = draw(params, head, split, slots, fed)
        if begun is not None:
            token, logp = (jnp.where(recalled, *pair) for pair in zip(stored, (token, logp), strict=True))
        kept, stopped = drafts.accept(token, guesses, drafted, stops, left)
        # What follows a wrong draft leaves the cache: nothing reads it before it is overwritten.
        grown = jnp.where(slots.response < responses, kept, 0)
        cache |= {"length": slots.cache["length"] + grown.reshape(-1)}
        if sampling.watch is not None:
            for i in range(most + 1):
                watched = jnp.where(i < kept, slots.response, responses)
                jax.debug.callback(sampling.watch, watched, slots.sampled + i, token[..., i])
        out, passes = records.record_several(out, slots, token, logp, kept, stopped), 1
        if begun is not None:
            out = out._replace(lengths=jnp.maximum(out.lengths, known_lengths))
            passes = ~jnp.take_along_axis(recalled, kept[..., None] - 1, axis=-1)[..., 0]  # the last token is new
            drafted = jnp.where(recalled[..., 0], 0, drafted)
        steps = records.count(steps, slots, passes, drafted)
        last = jnp.take_along_axis(token, kept[..., None] - 1, axis=-1)[..., 0]
        ended = stopped | (kept == left)
        slots = Slots(jnp.where(ended, responses, slots.response), slots.sampled + kept, last, cache, slots.pages)
        return queued, slots, out, steps

    def texts(out, slots):
        """Returns all texts about the problem of each slot `[W,R,S]`, and the last tokens of its response."""
        response = jnp.minimum(slots.response, responses - 1)
        tokens = jnp.where(jnp.arange(max_new_tokens) < out.lengths[..., None], out.tokens, drafts.NONE)
        by_response = jnp.concatenate([befores, tokens], axis=2)
        by_problem = by_response.reshape(shards, responses // per_problem, -1)
        if known.earlier is not None:
            by_problem = jnp.concatenate([known.earlier.reshape(*by_problem.shape[:2], -1), by_problem], axis=2)
        of_problem = jnp.take_along_axis(by_problem, (response // per_problem)[..., None], axis=1)
        last = drafts.last_tokens(by_response, response, slots.sampled)
        return jnp.concatenate([take_prompt(prompt_texts, response), of_problem], axis=2), last

    def refill(state):
        queued, slots, out, steps = state
        free = slots.response == responses
        response = jnp.minimum(queued[:, None] + jnp.cumsum(free, axis=1) - 1, responses)
        refilled = free & (response < responses)
        if queue is not None:
            response = jnp.take_along_axis(queue, jnp.minimum(response, responses - 1), axis=1)
        response = jnp.where(refilled, response, slots.response)
        cache = insert(slots.cache, prefilled, refilled, prompt_index(response))
        token = jnp.where(refilled, take_prompt(last_tokens, response), slots.token)
        slots = Slots(response, jnp.where(refilled, 0, slots.sampled), token, cache)
        return queued + refilled.sum(axis=1), slots, out, steps

    slot_pages = None
    if pool:
        cache, slot_pages = paging.pooled(prefilled, pool, shards, width)
    else:
        cache = constrain_cache(models.init_cache(config, shards * width, length - 1 + max_new_tokens, stored))
    if not pool and platform() == "gpu" and length > 1:
        # A zero that is known after the prefill: the cache takes no memory beside the activations of the prefill.
        last = jax.tree.leaves(prefilled["key"])[-1][0, -1, 0, 0, 0]  # of codes, a scale: integers would be known
        both = {name: cache[name] for name in ("key", "value")}
        cache |= jax.tree.map(lambda x: x + jnp.nan_to_num(last - last).astype(x.dtype), both)
    idle = jnp.full((shards, width), responses, jnp.int32)
    out = Rollout(
        jnp.full((shards, responses, max_new_tokens), model.pad_id, jnp.int32),
        jnp.zeros((shards, responses, max_new_tokens), jnp.float32),
        jnp.zeros((shards, responses), jnp.int32),
        jnp.full((shards, responses), LENGTH, jnp.int32),
    )
    steps = Steps(jnp.int32(0), out.lengths, out.lengths) if sampling.draft or pool else jnp.int32(0)
    if pool:
        steps = steps._replace(put_back=out.lengths)
    every = jnp.broadcast_to(jnp.arange(responses), (shards, responses))
    queue = None
    if known.expected is not None:
        queue = -take_prompt(by_shard(known.expected), every)
    if begun is not None:
        out = jax.tree.map(lambda x: x.reshape(shards, responses, *x.shape[2:]), begun.rollout)
        known_lengths, done = out.lengths, records.ended(out, max_new_tokens)
        # What has ended stands first, and counts as taken.
        queue = jnp.where(done, -jnp.inf, 0.0 if queue is None else queue)
    if queue is not None:
        queue = jnp.argsort(queue, axis=1, stable=True)
    if sampling.draft:
        prompt_texts = by_shard(jnp.where(prompts.mask, prompts.tokens, drafts.NONE))
        befores = take_prompt(drafts.before(prompt_texts), every)
    queued = jnp.zeros(shards, jnp.int32) if begun is None else done.sum(axis=1)
    refilling = Refilling(
        lambda state: jnp.any(state[0] < responses),
        lambda state: jnp.any((state[0] < responses)[:, None] & (state[1].response == responses)), refill,
    )  # fmt: skip
    if pool:
        cached, ends = (take_prompt(x, every) for x in (by_shard(prefilled["length"]), last_tokens))
        starts = paging.Starts(prompt_index(every), cached, ends, every if queue is None else queue)
        refilling, grow = paging.make(sampling, pool, starts, width)
        queued = jnp.ones((shards, responses), bool) if begun is None else ~done
    state = queued, Slots(idle, idle * 0, idle * 0, cache, slot_pages), out, steps
    decodes = []
    for i, split in enumerate(splits):
        params = weights.split(params, split) if i else params
        read = models.for_decoding(params, split, sampling.often)
        decodes.append((read, weights.contiguous_head(params, config), split))

    def step(stage, stage_width):
        by = decodes[min(stage, len(decodes) - 1)]
        if sampling.draft:
            by = *by, drafts.most_drafted(sampling.draft, stage_width, width)
        decoded = partial(verify if sampling.draft else decode, *by)
        return (lambda state: decoded(grow(state))) if pool else decoded

    def reached(state):
        assert begun is not None
        complete = records.ended(state[2], max_new_tokens).reshape(problem_count, per_problem).all(axis=1)
        return (complete.sum() >= begun.enough) & (complete | ~begun.due).all()

    _, at_end, out, steps = decode_all(state, responses, refilling, step, None if begun is None else reached)
    if pool:
        out = records.cut(out, model.pad_id)
        steps = steps._replace(pool_used=1 - at_end.pages.least.min() / pool.total)
        steps = steps if sampling.draft else steps._replace(passes=out.lengths)
    if begun is not None:
        out = out._replace(finish=jnp.where(records.ended(out, max_new_tokens), out.finish, RUNNING))
    return jax.tree.map(lambda x: x.reshape(problem_count, per_problem, *x.shape[2:]) if x.ndim else x, (out, steps))


def _fold(key: jax.Array, *ids: jax.Array) -> jax.Array:
    for i in ids:
        key = jax.random.fold_in(key, i)
    return key


def _left_aligned(prompts: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns prompts `[B,P]` padded on the left into (prompts padded on the right, positions, mask)."""
    lengths = mask.sum(axis=-1, keepdims=True)
    positions = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    tokens = jnp.take_along_axis(prompts, (positions - lengths) % mask.shape[1], axis=1)
    return tokens, positions, positions < lengths
