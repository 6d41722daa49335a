"""Shows where a strategy changes the model: the KL between guided and unguided context, by token and by step.

    sgpo analyze --config=configs/NAME.py --workdir=DIR [--problems=8]

The best RL checkpoint (without one, the warm-up) answers problems with their strategies, as in training. For every
token of a response, d_t = KL(guided || unguided) of Eq. 3 is computed over the whole vocabulary. Written are
DIR/analysis.jsonl and the figure DIR/analysis.png. Where the run was evaluated after RL, the same is done for the
generations that its page shows: DIR/analysis_generations.jsonl. `sgpo report` shows it all in the page.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from rich.console import Console
from rich.text import Text

from sgpo_jax import cli, config_checks, data, logprobs, models, rewards, sharding
from sgpo_jax import config as configs
from sgpo_jax.cli.processes import join
from sgpo_jax.policy import Policy
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.generation import encode_prompts, grade, noise_key, pad_prompts, respond
from sgpo_jax.report import examples, figures, reasoning_steps
from sgpo_jax.rollout import STOP, Prompts, Sampling
from sgpo_jax.runtime import distributed, is_first, jsonl, write_text
from sgpo_jax.training import stage

_FULL = (213, 94, 0)  # colour of a token whose KL is delta or more


def run(config: ConfigDict, workdir: Path, problems: int) -> list[dict[str, Any]]:
    """Analyzes guided responses to the first problems that have strategies, those of the evaluation sets first.

    Returns:
      The lines of analysis.jsonl: id, set, problem, strategy, answer, response, outcome, truncated, stage and step of
      the checkpoint, delta (nats, null for none); tokens (their texts), token_kl (nats, one a token); steps, each with
      start, stop, text and mean_kl: see `reasoning_steps.split`.

    Raises:
      ValueError: the run has no checkpoint, or there is no problem with a strategy.
    """
    configs.check_resume(config, workdir / "config.json")
    rewards.check(config.rl.reward)
    mesh = sharding.make_mesh(**config.mesh)
    names, rows = _problems(config, problems)
    run, _ = stage.open_run(config, workdir, mesh)
    policy = run.policy
    for part in ("rl", "sft"):
        if (step := stage.find_step(config, workdir, part, "best")) is not None:
            break
    else:
        raise ValueError(f"workdir={str(workdir)!r}: there is no checkpoint of stage 'rl' or 'sft'")
    params = stage.weights_at(run, part, step)

    ways = sharding.row_ways(mesh)
    filled = [rows[min(i, len(rows) - 1)] for i in range(-(-len(rows) // ways) * ways)]  # a row for every device
    sampling = dataclasses.replace(Sampling.from_config(config.rl), slots=0, weights="", often=False)
    encoded = {guided: encode_prompts(policy, filled, guided) for guided in (False, True)}
    prompts = {guided: pad_prompts(policy, tokens, max(map(len, tokens))) for guided, tokens in encoded.items()}
    with jax.set_mesh(mesh):
        generations = _generations(config, workdir, policy, params, mesh) if part == "rl" else []
        key = noise_key(config.seed, "analysis", step)
        rollout, _ = respond(policy, params, prompts[True], np.arange(len(filled)), key, mesh, sampling, 1)
        tokens, lengths = (np.asarray(x)[:, 0] for x in (rollout.tokens, rollout.lengths))
        kl = response_kl(policy, params, prompts[True], prompts[False], tokens, lengths, mesh)
    graded = grade(policy, rollout, filled, config.rl.reward)
    delta = config.rl.delta if math.isfinite(config.rl.delta) else None  # JSON has no infinity
    lines = []
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        pieces = tokenizers.pieces(policy.tokenizer, tokens[i, : lengths[i]].tolist())
        values = kl[i, : lengths[i]].tolist()
        line = {"id": row["id"], "set": name, **{field: row[field] for field in ("problem", "strategy", "answer")}}
        line |= {"response": graded.texts[i][0], "outcome": graded.verdicts[i][0].outcome}
        line |= {"truncated": bool(rollout.finish[i, 0] != STOP), "stage": part, "step": step}
        line |= {"delta": delta, "tokens": pieces, "token_kl": values}
        lines.append(line | {"steps": [step._asdict() for step in reasoning_steps.steps(pieces, values)]})
    if is_first():
        write_text(workdir / "analysis_generations.jsonl", jsonl(generations))
        write_text(workdir / "analysis.jsonl", jsonl(lines))
        figures.token_kl(lines, workdir / "analysis.png")
        _show(lines)
    return lines


def _problems(config: ConfigDict, count: int) -> tuple[list[str], list[dict]]:
    """Returns (names of the sets, rows) of the first problems that have strategies."""
    sources = {name: chosen.source for name, chosen in config.eval.sets.items()} | {"training": config.data.train}
    problems: list[tuple[str, dict]] = []
    for name, source in sources.items():
        if source and len(problems) < count:
            problems += [(name, row) for row in data.load(source) if "strategy" in row]
    if not problems:
        raise ValueError(f"config.data.train={config.data.train!r}: must have problems with strategies")
    names, rows = zip(*problems[:count], strict=True)
    return list(names), list(rows)


def _generations(config: ConfigDict, workdir: Path, policy: Policy, params: Any, mesh: Mesh) -> list[dict[str, Any]]:
    """Measures the responses after RL that the page shows; of those that it cuts, the part that it shows.

    Returns:
      For each response: column, id, response, tokens (their texts, encoded again), token_kl (nats).
    """
    folders = {when: workdir / "eval" / when for when in ("before", "after")}

    def shown() -> list[tuple[str, str, str, str]]:
        return [
            (name, problem.id, answer.column, answer.text)
            for name, samples, _ in examples.collect(config.eval.sets, folders)
            for problem in samples.problems for answer in problem.answers if answer.column.startswith("after")
        ]  # fmt: skip

    rows = {
        (name, str(row["id"])): row
        for name, chosen in config.eval.sets.items() for row in data.load(chosen.source) if "strategy" in row
    }  # fmt: skip
    answers = distributed.first(shown)
    responses = [(rows[name, id], column, text) for name, id, column, text in answers if text and (name, id) in rows]
    if not responses:
        return []
    filled = responses + responses[-1:] * (-len(responses) % sharding.row_ways(mesh))  # a row for every device
    encoded = [tokenizers.encode_response(policy.tokenizer, text, policy.stop_ids[0])[:-1] for _, _, text in filled]
    tokens, lengths = tokenizers.pad_right(encoded, max(map(len, encoded)), policy.pad_id)
    sides = [encode_prompts(policy, [row for row, _, _ in filled], guided) for guided in (True, False)]
    with_strategy, without = (pad_prompts(policy, side, max(map(len, side))) for side in sides)
    kl = response_kl(policy, params, with_strategy, without, tokens, lengths, mesh)
    return [
        {"column": column, "id": str(row["id"]), "response": text,
         "tokens": tokenizers.pieces(policy.tokenizer, ids), "token_kl": kl[i, : len(ids)].tolist()}
        for i, ((row, column, text), ids) in enumerate(zip(responses, encoded, strict=False))
    ]  # fmt: skip


def response_kl(
    policy: Policy, params: Any, guided: Prompts, unguided: Prompts, tokens: np.ndarray, lengths: np.ndarray, mesh: Mesh
) -> np.ndarray:
    """Computes d_t of Eq. 3, KL(guided || unguided) of the next token, for each token of responses.

    Args:
      policy, params: the model, with both prompts.
      guided, unguided: `[B,P]` prompts of the two sides; their lengths may differ.
      tokens: `[B,T]` responses, padded on the right.
      lengths: `[B]`.
      mesh: its data and fsdp axes divide B.

    Returns:
      `[B,T]` nats; 0 after the end of a response.
    """
    inside = np.arange(tokens.shape[1]) < lengths[:, None]

    @jax.jit
    def kl(params, guided, unguided, tokens, inside):
        def hidden(prompt):
            mask = jnp.concatenate([prompt.mask, inside], axis=1)
            joined = jnp.concatenate([prompt.tokens, tokens], axis=1)
            out, _ = models.apply(
                params, policy.config, joined, models.positions_of(mask), mask, dtype=policy.dtype
            )
            first = prompt.tokens.shape[1] - 1  # the token before predicts the first of the response
            return out[:, first : first + tokens.shape[1]].reshape(-1, out.shape[-1])

        head = models.head(params, policy.config)
        return logprobs.token_kl(hidden(guided), hidden(unguided), head).reshape(tokens.shape)

    ways, parts = sharding.axis_ways(mesh, sharding.ROWS), []
    for start in range(0, len(tokens), ways):  # one response a device at a time, as long ones fill its memory
        arrays = jax.tree.map(lambda x, at=slice(start, start + ways): x[at], (guided, unguided, tokens, inside))
        by_row = jax.tree.map(lambda _: P(sharding.ROWS), arrays)
        parts.append(sharding.fetch(kl(params, *sharding.put(arrays, by_row, mesh))))
    return np.where(inside, np.concatenate(parts), 0.0)


def coloured(line: dict[str, Any]) -> Text:
    """Colours a response for the terminal: the larger a token's KL, the stronger its background."""
    text = Text()
    for piece, kl in zip(line["tokens"], line["token_kl"], strict=True):
        share = reasoning_steps.strength(kl, line["delta"])
        red, green, blue = (round(255 + share * (full - 255)) for full in _FULL)
        text.append(piece, f"black on rgb({red},{green},{blue})")
    return text


def _show(lines: Sequence[dict[str, Any]]) -> None:
    console = Console()
    for line in lines:
        console.print(Text(f"{line['id']} [{line['outcome']}] {line['problem']}", style="bold"))
        console.print(Text(line["strategy"], style="dim"))
        console.print(coloured(line))
        for step in line["steps"]:
            console.print(Text(f"  {step['mean_kl']:7.4f} nats  {' '.join(step['text'].split())}"), overflow="ellipsis",
                          no_wrap=True)  # fmt: skip
        console.print()


def main(config, given) -> None:
    """Checks the config, joins the other processes, and analyzes."""
    config_checks.check(config)
    join(config, given)
    run(config, cli.existing_folder("workdir", given.workdir), given.problems)
