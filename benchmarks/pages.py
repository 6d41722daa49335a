"""Counts the responses that decode at once in the memory of a few whole caches, where slots share a pool of pages.

    python benchmarks/pages.py                                # rl.pool_tokens, simulated without a model
    python benchmarks/pages.py --caches=8 --slots=64 --ahead=0,1,2,4
    python benchmarks/pages.py --time                         # rollouts of a small model, timed

In the simulation slots, pages and the queue are those of the engine, with one device; a response ends at a length that
is drawn, exponential and cut at the limit, as in a plan. The memory is that of `caches` slots with room for the longest
response, beside the prompts. Both sides have it. A slot without a pool always decodes, so `caches` responses do.

With --time, a model of random weights draws one of many stop ids with about the same probability at every token, so
that lengths have a long tail. A pool with room for all slots shows what pages cost where they save nothing.
"""

import argparse
import time

import common
import jax
import jax.numpy as jnp
import numpy as np

from sgpo_jax import models
from sgpo_jax.rollout import LanguageModel, Prompts, Sampling, generate, pages, paging
from sgpo_jax.rollout.records import Steps
from sgpo_jax.rollout.stages import Slots
from sgpo_jax.runtime import tables

SMALL = models.ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=8192, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=64, mlp_size=1024, rope_theta=1e5, qkv_bias=True, norm_eps=1e-5, tie_embeddings=True, max_positions=8192,
)  # fmt: skip


def simulate(lengths: np.ndarray, prompts: np.ndarray, sampling: Sampling, longest: int) -> tuple[np.ndarray, int]:
    """Plays a rollout of one shard through.

    Args:
      lengths: `[B,G]` tokens of each response.
      prompts: `[B]` cached tokens of each prompt.
      sampling: with slots and a pool.
      longest: most tokens of a prompt.

    Returns:
      (slots with a response `[N]` in each of N passes, how many responses were put back).
    """
    count, slots = lengths.size, sampling.slots
    size = paging.sizes(sampling, len(prompts), longest, 1, 128)
    every, ends = jnp.arange(count)[None], jnp.asarray(lengths.reshape(-1))
    prompt = every // lengths.shape[1]
    starts = paging.Starts(prompt, jnp.asarray(prompts)[prompt], prompt, every)
    refilling, grow = paging.make(sampling, size, starts, slots)

    def busy(state):
        return state[0].any() | (state[1].response < count).any()

    def step(state):
        (queue, slots, _, steps), active, passes = grow(state[0]), *state[1:]
        going = slots.response < count
        sampled = slots.sampled + going
        ended = going & (sampled == ends[jnp.minimum(slots.response, count - 1)])
        cache = slots.cache | {"length": slots.cache["length"] + going.reshape(-1)}
        slots = slots._replace(response=jnp.where(ended, count, slots.response), sampled=sampled, cache=cache)
        return (queue, slots, None, steps), active.at[passes].set(going.sum(), mode="drop"), passes + 1

    def refill_and_step(state):
        state = refilling.refill(state[0]), *state[1:]
        return jax.lax.while_loop(lambda state: busy(state[0]) & ~refilling.due(state[0]), step, state)

    @jax.jit
    def play():
        rows = jnp.zeros((1, 1, len(prompts), size.longest * size.page, 1), jnp.int8)
        cache, own = paging.pooled({"key": rows, "value": rows, "length": jnp.asarray(prompts)}, size, 1, slots)
        idle, zero = jnp.full((1, slots), count, jnp.int32), jnp.zeros((1, count), jnp.int32)
        steps = Steps(jnp.int32(0), zero, zero, zero)
        state = jnp.ones((1, count), bool), Slots(idle, idle * 0, idle * 0, cache, own), None, steps
        active = jnp.zeros(2 * lengths.sum() // slots + 10 * sampling.max_new_tokens, jnp.int32)
        return jax.lax.while_loop(lambda state: busy(state[0]), refill_and_step, (state, active, jnp.int32(0)))

    state, active, passes = jax.device_get(play())
    return active[:passes], int(state[3].put_back.sum())


def simulated(flags: argparse.Namespace) -> tuple[list[list[str]], list[dict]]:
    """Returns a line of the table, and the numbers, for each number of pages that stay free for a slot."""
    rng, page = np.random.default_rng(0), Sampling(1).page
    prompts = rng.exponential(flags.prompt, flags.responses // flags.group)
    prompts = np.clip(prompts, 32, flags.longest - 1).astype(np.int32)
    lengths = rng.exponential(flags.mean, (len(prompts), flags.group))
    lengths = np.clip(np.ceil(lengths), 1, flags.limit).astype(np.int32)
    whole, of_prompts = -(-(flags.longest - 1 + flags.limit) // page), len(prompts) * -(-(flags.longest - 1) // page)
    sampling = Sampling(flags.limit, slots=flags.slots, pool=(flags.caches * whole + of_prompts) * page)
    lines, found = [], []
    for ahead in map(int, flags.ahead.split(",")):
        pages.AHEAD = ahead
        active, put_back = simulate(lengths, prompts, sampling, flags.longest)
        before = active[: int(np.argmin(np.cumsum(active) < 0.7 * active.sum()))]  # without the tail
        row = {
            "ahead": ahead, "at_once": float(before.mean()), "ratio": float(before.mean() / flags.caches),
            "repeated": float(active.sum() / lengths.sum() - 1), "put_back": put_back / lengths.size,
            "passes": len(active),
        }  # fmt: skip
        found.append(row)
        kept = row["ratio"] / (1 + row["repeated"])
        figures = f"{row['at_once']:.0f}", f"{row['ratio']:.2f}", f"{row['repeated']:.1%}", f"{kept:.2f}"
        lines.append([str(ahead), *figures, f"{row['put_back']:.2f}", str(row["passes"])])
    print(f"mean length {lengths.mean():.0f}, {lengths.size} responses to prompts of {prompts.mean():.0f} tokens")
    return lines, found


def timed(calls: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of rollouts of a small model, one of each kind after the other."""
    rng, count, group, longest, length, page = np.random.default_rng(0), 32, 8, 256, 64, 16
    params, ids = models.init(jax.random.key(0), SMALL), np.arange(count, dtype=np.uint32)
    model = LanguageModel(SMALL, tuple(range(1, SMALL.vocab_size, 46)), 0)
    tokens = rng.integers(1, SMALL.vocab_size, (count, length)).astype(np.int32)
    of_prompts, whole = count * length, length + longest
    sides = {
        "32 slots": Sampling(longest, slots=32),
        "32 slots, a pool with room for all": Sampling(longest, slots=32, pool=of_prompts + 32 * whole, page=page),
        "8 slots": Sampling(longest, slots=8),
        "24 slots, a pool of as much memory": Sampling(longest, slots=24, pool=of_prompts + 8 * whole, page=page),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(calls + 1):
        for name, sampling in sides.items():
            started = time.process_time()
            rollout, _ = jax.block_until_ready(
                generate(
                    params, model, Prompts(tokens, tokens > 0), jax.random.key(0), ids, sampling=sampling, group=group
                )
            )
            seconds[name].append(time.process_time() - started)
    lengths = np.asarray(rollout.lengths)
    print(f"{lengths.size} responses of {lengths.mean():.0f} tokens on average, of {lengths.max()} at most")
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = common.arguments(
        "Responses that decode at once in the memory of a few whole caches, with a pool.",
        caches=(32, "slots with a whole cache that fit"), slots=(256, "slots with a pool"),
        responses=(2048, "responses of a device"), group=(8, "responses to a prompt"),
        mean=(4096.0, "tokens of a response"), limit=(16384, "most tokens of a response"),
        prompt=(300.0, "mean tokens of a prompt"), longest=(1024, "most tokens of a prompt"),
        ahead=("0,1,2,4,8", "pages for each slot that stay free when a response begins, separated by commas"),
        calls=(5, "timed rollouts of each side"),
    )  # fmt: skip
    parser.add_argument("--time", action="store_true", help="time rollouts of a small model")
    flags = parser.parse_args()
    if flags.time:
        seconds = timed(flags.calls)
        common.save(flags.json, __file__, flags=vars(flags), seconds=seconds)
        alone, all_of_them, few, as_many = seconds.values()
        ratios = 1.0, common.ratio(all_of_them, alone), 1.0, common.ratio(as_many, few)
        named = zip(seconds.items(), ratios, strict=True)
        rows = [[name, common.spread(values), f"{ratio:.2f}"] for (name, values), ratio in named]
        tables.table("Rollouts of a small model", ["", "CPU seconds", "over the one without a pool"], rows)
        return
    lines, found = simulated(flags)
    common.save(flags.json, __file__, flags=vars(flags), rows=found)
    columns = ["pages ahead", "at once", "of caches", "sampled again", "of caches, kept", "put back", "passes"]
    tables.table(f"{flags.slots} slots in the memory of {flags.caches} whole caches", columns, lines)


if __name__ == "__main__":
    main()
