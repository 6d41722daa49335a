"""Measures how many drafted tokens are right: SmolLM2 on problems of a file, over several epochs with fixed weights.

    python benchmarks/speculation.py --data=gsm8k_train.jsonl
    python benchmarks/speculation.py --data=gsm8k_train.jsonl --group=8 --longest=512 --temperatures=1.0

A draft is right if it equals the token that its own noise draws, so drafts can be counted on responses that are there
already: they are replayed with `rollout.drafts`, all at once, `--draft` tokens for each in every pass. The tail is the
time in which at most a quarter of the responses is left. Earlier epochs are texts as `training.earlier` keeps them.

Then the last epoch is sampled with drafts and without in turn, for the CPU time, and the responses are compared.
"""

import json
import statistics
import time
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np

from sgpo_jax import policy, rollout, sharding
from sgpo_jax.policy.generation import encode_prompts, noise_key, pad_prompts
from sgpo_jax.policy.prompts import INSTRUCTION
from sgpo_jax.rollout import Problems, Prompts, Sampling, drafts
from sgpo_jax.runtime import tables
from sgpo_jax.training.earlier import text_of


def main() -> None:
    parser = common.arguments(
        "Drafted tokens of SmolLM2's responses that are right, and the CPU time of a rollout with drafts and without.",
        data=("", "JSONL file with a field problem, such as GSM8K"), problems=(4, "first problems of the file"),
        group=(6, "responses to a problem"), longest=(200, "most tokens of a response"), epochs=(3, "rollouts"),
        draft=(8, "most drafted tokens"), temperatures=("1.0,0.6", "separated by commas"), top_p=(0.95, "nucleus"),
        calls=(1, "timed rollouts of each side"), at_once=("48,96", "tokens of a timed pass at most"),
    )  # fmt: skip
    flags = parser.parse_args()
    if not Path(flags.data).is_file():
        parser.error(f"--data={flags.data}: is no file; GSM8K is at https://huggingface.co/datasets/openai/gsm8k")
    with Path(flags.data).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(flags.problems), strict=False)]
    ours, initial = policy.load(
        "smollm2", "", layers=0, hidden=0, heads=0, mlp=0, dtype=jnp.float32, instruction=INSTRUCTION
    )
    params = initial(jax.random.key(0), sharding.make_mesh(devices=jax.devices()[:1]))
    tokens = encode_prompts(ours, rows, guided=False)
    prompts, ids = pad_prompts(ours, tokens, max(map(len, tokens))), np.arange(len(rows), dtype=np.uint32)
    size = 4 * flags.longest  # as rl takes
    found, lines, times = [], [], []
    for temperature in map(float, flags.temperatures.split(",")):
        sampling = Sampling(flags.longest, temperature, flags.top_p)
        texts = np.full((len(rows), size), drafts.NONE, np.int32)

        def compiled(sampling, problems):
            return rollout.generate.lower(
                params, ours.language_model, prompts, noise_key(0, "", 0), problems, sampling=sampling,
                group=flags.group,
            ).compile()  # fmt: skip

        plain = compiled(sampling, ids)
        for epoch in range(flags.epochs):
            key, known = noise_key(0, "speculation", epoch), texts
            started = time.process_time()
            responses = jax.device_get(plain(params, prompts, key, ids)[0])
            seconds = time.process_time() - started
            counts = replay(prompts, responses, known, flags.draft)
            found.append({"temperature": temperature, "epoch": epoch + 1, "cpu": seconds, **counts})
            lines.append([
                f"{temperature:g}", str(epoch + 1), f"{responses.lengths.mean():.0f}",
                f"{counts['tokens'] / counts['passes']:.2f}",
                f"{counts['tail_tokens'] / max(counts['tail_passes'], 1):.2f}",
                f"{(counts['tokens'] - counts['passes']) / counts['drafted']:.1%}",
            ])  # fmt: skip
            pairs = [
                [(prompt, group[k, :length]) for k, length in enumerate(lengths)]
                for prompt, group, lengths in zip(tokens, responses.tokens, responses.lengths, strict=True)
            ]
            texts = np.stack([text_of(pair, size) for pair in pairs])
            print(f"temperature {temperature:g}, epoch {epoch + 1}: {seconds:.0f} CPU-s", flush=True)
        for at_once in map(int, flags.at_once.split(",")):
            drafts.AT_ONCE_CPU = at_once
            jax.clear_caches()  # a program that is traced already has the number of before
            last = Problems(ids, None, known)
            drafting = compiled(Sampling(flags.longest, temperature, flags.top_p, draft=flags.draft), last)
            cpu = {"with": [], "without": []}
            for _ in range(flags.calls):
                started = time.process_time()
                again, steps = jax.device_get(drafting(params, prompts, key, last))
                halfway = time.process_time()
                jax.block_until_ready(plain(params, prompts, key, ids))
                cpu["with"].append(halfway - started)
                cpu["without"].append(time.process_time() - halfway)
            same = bool((again.tokens == responses.tokens).all())
            passes, medians = int(steps.passes.sum()), {name: statistics.median(values) for name, values in cpu.items()}
            times.append({"temperature": temperature, "at_once": at_once, "cpu": cpu, "same": same, "passes": passes})
            print(
                f"temperature {temperature:g}, {at_once} tokens at once: {medians['with']:.0f} CPU-s with drafts, "
                f"{medians['without']:.0f} without, ratio {medians['with'] / medians['without']:.2f}; "
                f"{responses.lengths.sum()} tokens in {passes} passes; {'the same' if same else 'OTHER'} responses",
                flush=True,
            )
    title = f"SmolLM2, {flags.problems} problems of {Path(flags.data).name}, {flags.group} responses to each"
    columns = ["temperature", "epoch", "mean length", "tokens a pass", "in the tail", "drafts right"]
    tables.table(f"{title}, at most {flags.draft} tokens drafted", columns, lines)
    common.save(flags.json, __file__, flags=vars(flags), acceptance=found, times=times)


def replay(prompts: Prompts, responses: rollout.Rollout, earlier: np.ndarray, most: int) -> dict[str, int]:
    """Counts tokens, passes and drafts of a rollout in which all responses are drafted for from the beginning.

    Args:
      prompts, responses: of B problems.
      earlier: `[B,S]` texts of earlier epochs.
      most: tokens drafted for a response and pass.
    """
    count, group, longest = responses.tokens.shape
    prompt_texts = jnp.where(prompts.mask, prompts.tokens, drafts.NONE)
    own_prompts = jnp.repeat(prompt_texts, group, axis=0)
    tokens = jnp.pad(jnp.asarray(responses.tokens.reshape(count * group, longest)), ((0, 0), (0, most + 1)))
    lengths = jnp.asarray(responses.lengths.reshape(-1))
    every = jnp.arange(count * group)

    @jax.jit
    def step(sampled):
        known = jnp.where(jnp.arange(longest) < sampled[:, None], tokens[:, :longest], drafts.NONE)
        texts = jnp.concatenate([drafts.before(own_prompts), known], axis=1)
        siblings = jnp.repeat(texts.reshape(count, -1), group, axis=0)
        text = jnp.concatenate([own_prompts, jnp.repeat(earlier, group, axis=0), siblings], axis=1)
        last = drafts.last_tokens(texts[None], every[None], sampled[None])[0]
        guesses, drafted = drafts.propose(text, last, most)
        left = lengths - sampled
        drafted = jnp.clip(drafted, 0, jnp.maximum(left - 1, 0))
        due = jnp.take_along_axis(tokens, sampled[:, None] + jnp.arange(most + 1), axis=1)
        kept, _ = drafts.accept(due, guesses, drafted, jnp.zeros(0, jnp.int32), left)
        return jnp.where(left > 0, kept, 0), jnp.where(left > 0, drafted, 0)

    sampled = jnp.zeros_like(lengths)
    counts = dict.fromkeys(("tokens", "passes", "drafted", "tail_tokens", "tail_passes"), 0)
    while (active := int((sampled < lengths).sum())) > 0:
        kept, drafted = step(sampled)
        sampled += kept
        parts = ("", "tail_") if active <= len(every) // 4 else ("",)
        for part in parts:
            counts[f"{part}tokens"] += int(kept.sum())
            counts[f"{part}passes"] += active
        counts["drafted"] += int(drafted.sum())
    return counts


if __name__ == "__main__":
    main()
