"""Runs an extraction over all problems of a source, resumably, and rates a sample of what was kept."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sgpo_jax import data, sharding
from sgpo_jax import policy as policies
from sgpo_jax.runtime import journal, tables
from sgpo_jax.runtime.journal import Journal
from sgpo_jax.strategies import clients, leakage, parsing, prompts
from sgpo_jax.strategies.budget import Meter, digest, payer, work_through
from sgpo_jax.strategies.extraction import extract, rate

# name: (mean ratings, share of the paper's 500); App. H
BANDS = {"high": ("[0.8, 1]", 0.394), "medium": ("[0.5, 0.8)", 0.544), "low": ("[0, 0.5)", 0.062)}
# What `extraction.extract` takes from the config.
TRIES = ("expert_tries", "candidates", "choices", "score_tries")
LIMITS = (*TRIES, "max_expert_tokens", "max_strategy_tokens", "max_score_tokens")
_PLAIN_SECONDS = 5.0  # least time between two lines when the output is not a terminal


def run(config: ConfigDict, workdir: Path, to: Path) -> str:
    """Extracts strategies, or goes on with it; returns why it ended early, or "".

    Raises:
      ValueError: something about the config, the problems or an earlier run in `workdir` is wrong.
    """
    fields = config.extract
    rows = data.load(fields.source)[: fields.problems or None]
    _refuse_source(fields.source, to)
    limits = {name: fields[name] for name in LIMITS}
    name = _model_name(fields.strong, "strong")
    meter, stop = _meter(fields, fields.strong), threading.Event()
    # The model is loaded last: what is wrong with the journal is known sooner.
    with Journal(workdir / "extraction.jsonl", _settings(config, fields.strong, name, limits)) as log:
        _count_paid(meter, log)
        ask = _model(config, fields.strong, name, "strong", meter, stop)

        def work(row: dict[str, str]) -> str:
            verdict = extract(row, payer(row["id"], ask, log, meter, name, stop), **limits)
            made_by = {"model": name, "version": prompts.PROMPT_VERSION}
            log.append({"kind": "verdict", "id": row["id"], **_valid_for(row), **verdict, **made_by})
            return verdict["reason"]

        finished = [row for row in rows if _verdict(log, row)]
        waiting = [row for row in rows if not _verdict(log, row)]
        before = _counts(meter)
        with _Progress("strategies", len(finished), len(rows), meter) as progress:
            why = work_through(
                waiting, work, concurrency=fields.concurrency, max_failures=fields.max_failures,
                stop=stop, done=progress.done,
            )  # fmt: skip
        reasons = _write_rows(to, rows, log)
    _report(len(rows), len(finished), reasons, meter, before)
    print(f"kept strategies: {to}\neverything else: {workdir / 'extraction.jsonl'}", flush=True)
    return why


def audit(config: ConfigDict, workdir: Path) -> str:
    """Has the judge rate a sample of what was kept; returns why it ended early, or "".

    Raises:
      ValueError: there is nothing to rate, or the judge is the model that wrote it.
    """
    fields = config.extract
    path = workdir / "extraction.jsonl"
    if not path.is_file():
        raise ValueError(f"--workdir={workdir}: there is no extraction.jsonl; extract strategies first")
    name, writer = _model_name(fields.judge, "judge"), journal.settings(path).get("model")
    if name == writer:
        raise ValueError(f"config.extract.judge.name={name!r}: must be another model than the one that wrote")
    verdicts = journal.verdicts(path)
    loaded = {row["id"]: row for row in data.load(fields.source)}
    kept = [
        {"solution": verdict.get("solution", ""), **loaded[id], "strategy": verdict["strategy"]}
        for id, verdict in verdicts.items()
        if verdict["reason"] == "kept" and id in loaded and verdict["row"] == _valid_for(loaded[id])["row"]
    ]
    if not kept:
        raise ValueError(f"{path}: no strategy of the problems in {fields.source!r} was kept")
    # By a hash of the id: a larger sample later has the smaller one in it.
    sample = sorted(kept, key=lambda row: digest("audit", str(config.seed), row["id"]))[: fields.audit_sample]
    limits = {"tries": fields.score_tries, "max_tokens": fields.max_score_tokens}
    meter, stop = _meter(fields, fields.judge), threading.Event()
    settings = {"writer": writer, **_settings(config, fields.judge, name, limits)}
    with Journal(workdir / "audit.jsonl", settings) as log:
        _count_paid(meter, log)
        before = _counts(meter)
        ask = _model(config, fields.judge, name, "judge", meter, stop)

        def work(row: dict[str, str]) -> str:
            rating = rate(row, payer(row["id"], ask, log, meter, name, stop), **limits)
            log.append({"kind": "verdict", "id": row["id"], "row": digest(row["strategy"]), **rating})
            return "rated" if rating["mean"] is not None else "unrated"

        def rating_of(row: dict[str, str]) -> dict[str, Any] | None:
            found = log.verdict(row["id"])
            return found if found and found["row"] == digest(row["strategy"]) else None

        waiting = [row for row in sample if not rating_of(row)]
        with _Progress("audit", len(sample) - len(waiting), len(sample), meter) as progress:
            why = work_through(
                waiting, work, concurrency=fields.concurrency, max_failures=fields.max_failures,
                stop=stop, done=progress.done,
            )  # fmt: skip
        _report_audit([found for row in sample if (found := rating_of(row))], len(sample), name)
        tables.table("Spent", ["", "this run", "in all"], _spent(meter, before))
    return why


def _valid_for(row: dict[str, str]) -> dict[str, str]:
    """What a verdict holds for: this problem, answer and solution, under these rules."""
    return {"row": digest(row["problem"], row["answer"], row.get("solution")), "rules": leakage.RULES_VERSION}


def _verdict(log: Journal, row: dict[str, str]) -> dict[str, Any] | None:
    found = log.verdict(row["id"])
    return found if found and found.items() >= _valid_for(row).items() else None


def _settings(config: ConfigDict, model: ConfigDict, name: str, limits: dict[str, int]) -> dict[str, Any]:
    """What shapes the replies; the journal goes on only with the same. Where the endpoint is may change."""
    fields = config.extract
    sampling = {"temperature": fields.temperature, "top_p": fields.top_p}
    own = {"seed": config.seed, "max_prompt_tokens": fields.max_prompt_tokens} if model.engine == "local" else {}
    return {"version": prompts.PROMPT_VERSION, "engine": model.engine, "model": name, **sampling, **limits, **own}


def _model_name(model: ConfigDict, role: str) -> str:
    name = model.name or (os.environ.get("OPENAI_MODEL", "") if model.engine == "endpoint" else "")
    if not name:
        raise ValueError(f"config.extract.{role}.name='': must name a model, or OPENAI_MODEL be set for an endpoint")
    return name


def _model(
    config: ConfigDict, model: ConfigDict, name: str, role: str, meter: Meter, stop: threading.Event
) -> clients.Ask:
    fields = config.extract
    sampling = {"temperature": fields.temperature, "top_p": fields.top_p}
    if model.engine == "local":
        mesh = sharding.make_mesh(**config.mesh)
        policy, initial = policies.load(
            name, "", layers=0, hidden=0, heads=0, mlp=0, dtype=jnp.dtype(config.model.dtype), instruction=""
        )
        params = initial(jax.random.key(config.seed), mesh)
        rows_over = mesh.shape["data"] * mesh.shape["fsdp"]
        batch = int(np.ceil(fields.concurrency / rows_over)) * rows_over
        return clients.local(
            policy, params, mesh, seed=config.seed, max_prompt_tokens=fields.max_prompt_tokens, batch=batch, **sampling
        )
    base_url = model.base_url or os.environ.get("OPENAI_BASE_URL", "")
    if not base_url:
        raise ValueError(f"config.extract.{role}.base_url='': must be a URL, or OPENAI_BASE_URL be set")
    key = os.environ.get(model.key_variable, "") if model.key_variable else ""
    if model.key_variable and not key:
        raise ValueError(
            f"the environment variable {model.key_variable} (config.extract.{role}.key_variable) is not set"
        )
    return clients.endpoint(
        name, base_url=base_url, key=key, limit_field=model.limit_field, timeout=fields.timeout,
        retries=fields.retries, backoff=fields.backoff, stop=stop, retried=meter.retried, **sampling,
    )  # fmt: skip


def _meter(fields: ConfigDict, model: ConfigDict) -> Meter:
    return Meter(model.price_in, model.price_out, fields.budget_tokens, fields.budget_cost)


def _count_paid(meter: Meter, log: Journal) -> None:
    """The budget is for all runs together."""
    for reply in log.replies():
        meter.count(reply["prompt_tokens"], reply["completion_tokens"])


def _refuse_source(source: str, to: Path) -> None:
    parts = [Path(part.strip()) for part in source.split(";")]
    if any(to.resolve() in (part.resolve(), *(f.resolve() for f in part.parent.glob(part.name))) for part in parts):
        raise ValueError(f"--to={to}: must not be the file that the problems are read from")


def _write_rows(path: Path, rows: Sequence[dict[str, str]], log: Journal) -> list[tuple[str, list[str]]]:
    """What was kept, for `data.load`, in a file that is whole at any moment.

    Returns:
      For every finished problem the reason of its verdict, and those of its candidates ("" for one that passed).
    """
    reasons = []
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            verdict = _verdict(log, row)
            if verdict is None:
                continue
            reasons.append((verdict["reason"], [candidate["reason"] for candidate in verdict["candidates"]]))
            if verdict["reason"] == "kept":
                solution = row.get("solution") or verdict["solution"]
                line = {**row, "solution": solution, "strategy": verdict["strategy"]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return reasons


class _Progress:
    """A bar on a terminal, elsewhere a line every few seconds; with ETA, what was kept, and what it cost."""

    def __init__(self, name: str, finished: int, total: int, meter: Meter):
        self._name, self._finished, self._total, self._meter = name, finished, total, meter
        self._begun, self._first = time.monotonic(), finished
        self._reasons: Counter[str] = Counter()
        self._printed = -float("inf")
        left, spent = TimeRemainingColumn(), TextColumn("{task.fields[spent]}")
        bar = Progress(TextColumn(name), BarColumn(), MofNCompleteColumn(), left, spent)
        self._bar = bar if Console().is_terminal else None

    def __enter__(self) -> "_Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, completed=self._finished, spent="")
        self._show()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def done(self, reason: str) -> None:
        self._reasons[reason] += 1
        self._finished += reason != "left_open"
        self._show()

    def _show(self) -> None:
        tokens = self._meter.tokens_in + self._meter.tokens_out
        parts = [f"{reason} {count}" for reason, count in self._reasons.most_common()]
        parts += [f"tokens {tokens}", f"cost {self._meter.spent:.4f}", f"retries {self._meter.retries}"]
        if self._bar is not None:
            self._bar.update(self._task, completed=self._finished, spent="  ".join(parts))
            return
        now = time.monotonic()
        if now - self._printed < _PLAIN_SECONDS and self._finished < self._total:
            return
        new, self._printed = self._finished - self._first, now
        left = (now - self._begun) / new * (self._total - self._finished) if new else None
        eta = [] if left is None else [f"ETA {timedelta(seconds=round(left))}"]
        print("  ".join([f"{self._name} {self._finished}/{self._total}", *eta, *parts]), flush=True)


def _report(
    read: int, finished: int, reasons: Sequence[tuple[str, list[str]]], meter: Meter, before: tuple[float, ...]
) -> None:
    """The tables at the end: problems, candidates, and what it took."""
    rejected = Counter(reason for reason, _ in reasons if reason != "kept")
    kept = len(reasons) - rejected.total()
    lines = [("read", read), ("already done", finished), ("kept", kept), ("rejected", rejected.total())]
    lines += [(f"  {reason}", count) for reason, count in rejected.most_common()]
    tables.table("Problems", ["", "number"], [*lines, ("left open", read - len(reasons))])
    candidates = Counter(reason or "passed" for _, each in reasons for reason in each)
    lines = [("asked for", candidates.total()), ("passed", candidates.pop("passed", 0))]
    lines += [("rejected", candidates.total()), *((f"  {reason}", n) for reason, n in candidates.most_common())]
    tables.table("Candidate strategies", ["", "number"], lines)
    tables.table("Spent", ["", "this run", "in all"], _spent(meter, before))


def _spent(meter: Meter, before: tuple[float, ...]) -> list[tuple[str, object, str]]:
    """(what, in this run, in all) for a table; `before` is what `_counts` said at the start."""
    names, forms = ("calls", "tokens in", "tokens out", "cost"), ("d", "d", "d", ".4f")
    numbers = zip(names, forms, before, _counts(meter), strict=True)
    lines: list[tuple[str, object, str]] = [(n, format(now - then, f), format(now, f)) for n, f, then, now in numbers]
    return [*lines, ("retries", meter.retries, "")]


def _counts(meter: Meter) -> tuple[float, ...]:
    return meter.calls, meter.tokens_in, meter.tokens_out, meter.spent


def _report_audit(found: Sequence[dict[str, Any]], sample: int, judge: str) -> None:
    """Quality bands beside the paper's, and the mean of each criterion."""
    rated = [rating for rating in found if rating["mean"] is not None]
    bands = Counter(parsing.band(rating["mean"]) for rating in rated)
    lines = [
        (f"{name} {edges}", f"{paper:.1%}", f"{bands[name] / len(rated):.1%}" if rated else "-", bands[name])
        for name, (edges, paper) in BANDS.items()
    ]
    tables.table(f"Quality as {judge} rates it: {len(rated)} of {sample}", ["", "paper", "here", "number"], lines)
    if rated:
        means = np.mean([rating["ratings"] for rating in rated], axis=0)
        shown = [(name, f"{mean:.3f}") for name, mean in zip(prompts.CRITERIA, means, strict=True)]
        tables.table("Mean rating", ["", ""], shown)
    unrated = Counter(rating["reason"] for rating in found if rating["mean"] is None)
    if unrated:
        tables.table("Not rated", ["", "number"], unrated.most_common())
