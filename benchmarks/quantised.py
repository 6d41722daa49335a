"""Measures how far kernels in int8 or nf4 are from the same ones in bfloat16, on texts that the model has not written.

    python benchmarks/quantised.py --data=gsm8k_test.jsonl
    python benchmarks/quantised.py --data=gsm8k_test.jsonl --model=DIR --rows=16

Compared are the log-probabilities of the tokens of solutions, each given its problem's prompt and all tokens before it,
in nats. Activations are float32, so that only the weights differ. A share of the tokens is far apart: by more than 0.1.
The last rows are decoded token by token, as a rollout does it: with the kernels of `rl.rollout_weights=int8`, which
have a scale for a whole column, with the cache of `rl.rollout_cache=int8`, and with both.
"""

import json
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np

from sgpo_jax import logprobs, models, policy, sharding
from sgpo_jax.models import quantised
from sgpo_jax.policy.generation import encode_prompts
from sgpo_jax.policy.prompts import INSTRUCTION
from sgpo_jax.policy.tokenizer import encode_response, pad_right
from sgpo_jax.runtime import tables

FAR = 0.1  # nats


def main() -> None:
    parser = common.arguments(
        "Log-probabilities with a quantised base against those with a bfloat16 base.",
        data=("", "JSONL file with problem and solution, such as GSM8K"), rows=(64, "first rows of the file"),
        model=("smollm2", "as model.source"), at_once=(8, "rows of a forward pass"),
    )  # fmt: skip
    flags = parser.parse_args()
    if not Path(flags.data).is_file():
        parser.error(f"--data={flags.data}: is no file; GSM8K is at https://huggingface.co/datasets/openai/gsm8k")
    with Path(flags.data).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(flags.rows), strict=False)]
    ours, initial = policy.load(
        flags.model, "", layers=0, hidden=0, heads=0, mlp=0, dtype=jnp.float32, instruction=INSTRUCTION
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    base = initial(jax.random.key(0), mesh, jnp.bfloat16)
    prompts = encode_prompts(ours, rows, guided=False)
    solutions = [encode_response(ours.tokenizer, row["solution"], ours.stop_ids[0]) for row in rows]
    exact = measure(base, ours, prompts, solutions, flags.at_once)
    found = {"bfloat16": {"bits": 16.0, "logp": float(exact.mean())}}
    rounded = {kind: quantised.quantise(base, kind, mesh) for kind in quantised.CODES}
    by_kind = {kind: measure(params, ours, prompts, solutions, flags.at_once) for kind, params in rounded.items()}
    rounded["int8, rollout"] = rounded["int8, both"] = jax.jit(quantised.by_column)(base)
    rounded["cache in int8"] = base
    for kind, cache in {"int8, rollout": jnp.float32, "cache in int8": jnp.int8, "int8, both": jnp.int8}.items():
        by_kind[kind] = decoded(rounded[kind], ours, prompts, solutions, flags.at_once, cache)
    for kind, logp in by_kind.items():
        params, apart = rounded[kind], np.abs(logp - exact)
        found[kind] = {
            "bits": bits(params), "logp": float(logp.mean()), "apart": float(apart.mean()),
            "far": float((apart > FAR).mean()), "most": float(apart.max()),
        }  # fmt: skip
    columns = ["base", "bits of a kernel's weight", "mean log p", "mean |change|", f"above {FAR}", "most"]
    cells = [
        [kind, f"{one['bits']:.2f}", f"{one['logp']:.4f}", *([f"{one['apart']:.4f}", f"{one['far']:.1%}",
         f"{one['most']:.2f}"] if "apart" in one else ["", "", ""])] for kind, one in found.items()
    ]  # fmt: skip
    tables.table(f"{flags.model}, {exact.size} tokens of {len(rows)} solutions", columns, cells)
    common.save(flags.json, __file__, flags=vars(flags), tokens=exact.size, bases=found)


def measure(params, ours, prompts, solutions, at_once: int) -> np.ndarray:
    """Returns the log-probabilities of all tokens of all solutions, one after the other."""
    longest = max(len(prompt) + len(solution) for prompt, solution in zip(prompts, solutions, strict=True))
    head = models.head_weight(params, ours.config)

    @jax.jit
    def logp_of(params, tokens, lengths):
        mask = jnp.arange(longest) < lengths[:, None]
        hidden, _ = models.apply(params, ours.config, tokens, models.positions_of(mask), mask)
        targets = jnp.roll(tokens, -1, axis=1)
        logp, _ = logprobs.chunked_logprobs(hidden, head, targets, len(tokens), tied=ours.config.tie_embeddings)
        return logp

    def measure_batch(pairs):
        texts = [prompt + solution for prompt, solution in pairs]
        rows = np.asarray(logp_of(params, *pad_right(texts, longest, ours.pad_id)))
        return [row[len(p) - 1 : len(p) + len(s) - 1] for row, (p, s) in zip(rows, pairs, strict=True)]

    return in_batches(measure_batch, prompts, solutions, at_once)


def decoded(params, ours, prompts, solutions, at_once: int, dtype) -> np.ndarray:
    """Returns what `measure` does, from prompts that are prefilled and solutions fed to a cache of a type."""
    longest = [max(map(len, texts)) for texts in (prompts, solutions)]
    head, active = models.head_weight(params, ours.config), np.ones(at_once, bool)

    @jax.jit
    def logp_of(params, prompts, lengths, solutions):
        mask = jnp.arange(longest[0]) < lengths[:, None] - 1  # the last token is the first one to be decoded
        cache = models.init_cache(ours.config, at_once, sum(longest), dtype)
        _, cache = models.apply(params, ours.config, prompts, models.positions_of(mask), mask, cache)
        last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)

        def step(cache, tokens):
            hidden, cache = models.decode(params, ours.config, tokens[0], active, cache)
            logp = jax.nn.log_softmax(hidden @ (head.T if ours.config.tie_embeddings else head))
            return cache, jnp.take_along_axis(logp, tokens[1][:, None], axis=1)[:, 0]

        fed = jnp.concatenate([last, solutions[:, :-1]], axis=1)
        return jax.lax.scan(step, cache, (fed.T, solutions.T))[1].T

    def decode_batch(pairs):
        prompts, solutions = zip(*pairs, strict=True)
        padded, _ = pad_right(solutions, longest[1], ours.pad_id)
        rows = np.asarray(logp_of(params, *pad_right(prompts, longest[0], ours.pad_id), padded))
        return [row[: len(solution)] for row, (_, solution) in zip(rows, pairs, strict=True)]

    return in_batches(decode_batch, prompts, solutions, at_once)


def in_batches(measure_batch, prompts, solutions, at_once: int) -> np.ndarray:
    """Returns the log-probabilities of all tokens, of `at_once` pairs of a prompt and a solution at a time."""
    pairs, found = list(zip(prompts, solutions, strict=True)), []
    for first in range(0, len(pairs), at_once):
        batch = pairs[first : first + at_once]
        # A last batch of other shape would be compiled again.
        found += measure_batch(batch + batch[:1] * (at_once - len(batch)))[: len(batch)]
    return np.concatenate(found)


def bits(params) -> float:
    """Returns the bits of a quantised weight, with its share of the scales; 16 where none is."""
    kernels = [leaves for leaves in params["layers"].values() if "kernel_scale" in leaves]
    leaves = jax.tree.leaves([(kernel["kernel"], kernel["kernel_scale"]) for kernel in kernels])
    total = sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in leaves)
    return total / sum(kernel["kernel"].size for kernel in kernels) if kernels else 16.0


if __name__ == "__main__":
    main()
