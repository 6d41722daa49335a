"""Pages of the cache that the slots of a shard share: which slot has which, and who goes on when there are few.

A slot takes a page when its response grows into it. The full pages of its prompt it shares with all responses to it:
nobody writes them. Where the pages do not suffice for the next pass, the youngest responses are put back into the
queue. They come out the same later, since their noise depends on nothing else. The oldest one always goes on, because a
shard has the pages of the longest response beside its prompts. So every rollout ends.

Axis key: W shards, Q responses of a shard, R slots of a shard, B prompts of a shard, M pages of a shard, C most pages
of a slot, F pages of the longest prompt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

AHEAD = 2  # pages for each slot that stay free when a response begins; docs/results/benchmarks.md has others


class Sizes(NamedTuple):
    """The sizes of a pool."""

    page: int  # tokens of a page
    longest: int  # F, pages of the longest prompt
    most: int  # C, pages of the longest response with its prompt
    total: int  # M, pages of a shard


class Pages(NamedTuple):
    """The pages of the slots, and those that are free."""

    table: jax.Array  # [W,R,C] int32, the pages of a slot in the order of its tokens; M where it has none
    shared: jax.Array  # [W,R] int32, of these, the first ones that are its prompt's
    taken: jax.Array  # [W,R] int32, of these, all that it has
    free: jax.Array  # [W,M] int32, of which the first ones are the free pages
    left: jax.Array  # [W] int32, number of free pages
    least: jax.Array  # [W] int32, the fewest there have been


def start(prompts: jax.Array, size: Sizes, slots: int) -> Pages:
    """Returns the pages of a pool in which the prompts are, F pages for each, and no responses.

    Args:
      prompts: `[W,B]` int32, tokens of each. Pages that only have padding are free.
      size: of the pool.
      slots: R.
    """
    shards = len(prompts)
    used = (jnp.arange(size.longest) * size.page < prompts[..., None]).reshape(shards, -1)
    used = jnp.pad(used, ((0, 0), (0, size.total - used.shape[1])))
    nothing = jnp.zeros((shards, slots), jnp.int32)
    free = jnp.argsort(used, axis=1, stable=True).astype(jnp.int32)
    table = jnp.full((shards, slots, size.most), size.total, jnp.int32)
    left = (~used).sum(axis=1, dtype=jnp.int32)
    return Pages(table, nothing, nothing, free, left, left)


def missing(taken: jax.Array, tokens: jax.Array, page: int) -> jax.Array:
    """Returns the pages `[W,R]` that slots with `taken` pages have to take for so many tokens, both `[W,R]`."""
    return jnp.maximum((tokens + page - 1) // page - taken, 0)


def take(pages: Pages, count: jax.Array, most: int) -> Pages:
    """Gives `count` `[W,R]` free pages, at most `most`, to each slot. They have to be there."""
    first, index = pages.left[:, None] - jnp.cumsum(count, axis=1), jnp.arange(most)
    places = jnp.maximum(first[..., None] + index, 0)
    columns = jnp.where(index < count[..., None], pages.taken[..., None] + index, pages.table.shape[2])

    def write(table, free, columns, places):
        return table.at[jnp.arange(len(table))[:, None], columns].set(free[places], mode="drop")

    table = jax.vmap(write)(pages.table, pages.free, columns, places)
    left = pages.left - count.sum(axis=1)
    return pages._replace(
        table=table, taken=pages.taken + count, left=left, least=jnp.minimum(pages.least, left)
    )


def release(pages: Pages, done: jax.Array) -> Pages:
    """Takes all pages from the slots `done` `[W,R]`; their own ones become free."""
    count, columns = pages.free.shape[1], jnp.arange(pages.table.shape[2])
    own = (columns >= pages.shared[..., None]) & (columns < pages.taken[..., None]) & done[..., None]
    own = own.reshape(len(own), -1)
    places = jnp.where(own, pages.left[:, None] + jnp.cumsum(own, axis=1) - 1, count)

    def write(free, places, table):
        return free.at[places].set(table.reshape(-1), mode="drop")

    free = jax.vmap(write)(pages.free, places, pages.table)
    shared, taken = (jnp.where(done, 0, x) for x in (pages.shared, pages.taken))
    table = jnp.where(done[..., None], count, pages.table)
    left = pages.left + own.sum(axis=1, dtype=jnp.int32)
    return Pages(table, shared, taken, free, left, pages.least)


def going_on(pages: Pages, needed: jax.Array, age: jax.Array, active: jax.Array) -> jax.Array:
    """Returns which slots `[W,R]` go on if each takes the pages `needed` `[W,R]`: as many of the oldest as can.

    Args:
      pages: of which the free ones and those of younger slots can be taken.
      needed: `[W,R]`.
      age: `[W,R]` tokens of a slot's response; of two that are as old, the one in the first slot counts as older.
      active: `[W,R]` whether a slot has a response.
    """
    order = jnp.argsort(jnp.where(active, -age, 1), axis=1, stable=True)
    own, needed = (
        jnp.take_along_axis(jnp.where(active, x, 0), order, axis=1) for x in (pages.taken - pages.shared, needed)
    )
    younger = own.sum(axis=1, keepdims=True) - jnp.cumsum(own, axis=1)
    enough = jnp.cumsum(needed, axis=1) <= pages.left[:, None] + younger
    return active & jnp.take_along_axis(enough, jnp.argsort(order, axis=1), axis=1)


def room(pages: Pages, needed: jax.Array, active: jax.Array, each: int) -> jax.Array:
    """Returns how many responses `[W]` may begin.

    AHEAD pages for each other slot stay free beside what the next pass needs. Otherwise the new response would soon be
    put back, as the youngest one. Where no slot has a response, one begins.

    Args:
      pages: the pages; those of slots without a response count as free.
      needed: `[W,R]` pages that each slot takes before the next pass.
      active: `[W,R]` whether a slot has a response.
      each: most pages that a new response takes before its first pass.
    """
    ended = jnp.where(active, 0, pages.taken - pages.shared).sum(axis=1)
    left = pages.left + ended - needed.sum(axis=1) - AHEAD * active.sum(axis=1)
    return jnp.maximum((left + AHEAD) // (each + AHEAD), 0)


def begin(pages: Pages, refilled: jax.Array, prompt: jax.Array, tokens: jax.Array, size: Sizes) -> Pages:
    """Gives the slots `refilled` `[W,R]`, which have no pages, the full ones of their prompts, and one of their own.

    Args:
      pages: with a free page for each of these slots.
      refilled: `[W,R]`.
      prompt, tokens: `[W,R]` index of the slot's prompt, and its tokens.
      size: of the pool.
    """
    columns, shared = jnp.arange(pages.table.shape[2]), tokens // size.page
    of_prompt = prompt[..., None] * size.longest + columns
    of_prompt = jnp.where(columns < shared[..., None], of_prompt, pages.free.shape[1])
    pages = pages._replace(
        table=jnp.where(refilled[..., None], of_prompt, pages.table),
        shared=jnp.where(refilled, shared, pages.shared),
        taken=jnp.where(refilled, shared, pages.taken),
    )
    return take(pages, refilled.astype(jnp.int32), 1)


def last_page(pages: Pages, prompt: jax.Array, longest: int) -> tuple[jax.Array, jax.Array]:
    """Returns the last page of each slot's prompt, and its copy, in which its response begins, both `[W,R]`."""
    own = jnp.take_along_axis(pages.table, pages.shared[..., None], axis=2)[..., 0]
    return prompt * longest + jnp.minimum(pages.shared, longest - 1), own


def next_ones(waiting: jax.Array, free: jax.Array, most: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns which free slots take a waiting response, and which one each takes.

    Args:
      waiting: `[W,Q]` bool, in the order of the queue.
      free: `[W,R]` bool.
      most: `[W]` responses that may begin.

    Returns:
      (`[W,R]` bool, `[W,R]` place in the queue, which means nothing for other slots).
    """
    first = jnp.argsort(~waiting, axis=1, stable=True)
    rank = jnp.cumsum(free, axis=1) - 1
    taken = free & (rank < jnp.minimum(most, waiting.sum(axis=1))[:, None])
    return taken, jnp.take_along_axis(first, jnp.clip(rank, 0, waiting.shape[1] - 1), axis=1)
