"""Extracts the strategies of all problems of a source, resumably."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sgpo_jax import data
from sgpo_jax.runtime import files, mirror, tables
from sgpo_jax.runtime.journal import Journal
from sgpo_jax.strategies import leakage, prompts
from sgpo_jax.strategies.budget import digest
from sgpo_jax.strategies.extraction import Limits, extract
from sgpo_jax.strategies.session import model_settings, open_session

EXTRACTION = "extraction.jsonl"  # the journal in the working folder


def run(config: ConfigDict, workdir: Path, to: Path) -> str:
    """Extracts strategies, or resumes an extraction, and prints what it did and spent.

    Args:
      config: its section `extract` is used.
      workdir: folder of the journal.
      to: file for the problems with strategies, which `data.load` reads.

    Returns:
      What is not finished and why, or "".

    Raises:
      ValueError: something is wrong with the config, the problems or an earlier run in `workdir`.
    """
    fields = config.extract
    rows = data.load(fields.source)[: fields.problems or None]
    _refuse_source(fields.source, to)
    limits = Limits.from_config(fields)
    settings = model_settings(config, "strong", asdict(limits))
    with open_session(config, "strong", workdir / EXTRACTION, settings) as session:

        def work(row: dict[str, str]) -> str:
            verdict = extract(row, session.payer(row["id"]), limits)
            origin = {"model": session.model, "version": prompts.PROMPT_VERSION}
            session.journal.append({"kind": "verdict", "id": row["id"], **valid_for(row), **verdict, **origin})
            return verdict["reason"]

        waiting = [row for row in rows if not _verdict(session.journal, row)]
        why = session.work_through("strategies", waiting, len(rows), work)
        reasons = _write_kept(to, rows, session.journal)
    _print_counts(len(rows), len(rows) - len(waiting), reasons)
    session.print_spent()
    print(mirror.shown(f"kept strategies: {to}\neverything else: {workdir / EXTRACTION}"), flush=True)
    return why


def valid_for(row: dict[str, str]) -> dict[str, str]:
    """Returns what a verdict depends on: the row's problem, answer and solution, and the version of the rules."""
    return {"row": digest(row["problem"], row["answer"], row.get("solution")), "rules": leakage.RULES_VERSION}


def _verdict(journal: Journal, row: dict[str, str]) -> dict[str, Any] | None:
    """Returns the journal's verdict on a row, or None if it has none that is valid."""
    verdict = journal.verdict(row["id"])
    return verdict if verdict and verdict.items() >= valid_for(row).items() else None


def _refuse_source(source: str, to: Path) -> None:
    """Checks that the output is none of the files that the problems are read from."""
    parts = [Path(part.strip()) for part in source.split(";")]
    if any(to.resolve() in (part.resolve(), *(f.resolve() for f in part.parent.glob(part.name))) for part in parts):
        raise ValueError(f"--to={to}: must not be the file that the problems are read from")


def _write_kept(path: Path, rows: Sequence[dict[str, str]], journal: Journal) -> list[tuple[str, list[str]]]:
    """Writes the rows whose strategy was kept, with the strategy and the solution that it is from.

    Returns:
      The reason of each finished problem's verdict, and those of its candidates ("" for one that passed).
    """
    reasons = []
    with files.replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            verdict = _verdict(journal, row)
            if verdict is None:
                continue
            reasons.append((verdict["reason"], [candidate["reason"] for candidate in verdict["candidates"]]))
            if verdict["reason"] == "kept":
                solution = row.get("solution") or verdict["solution"]
                line = {**row, "solution": solution, "strategy": verdict["strategy"]}
                file.write(files.jsonl([line]))
    return reasons


def _print_counts(read: int, finished_before: int, reasons: Sequence[tuple[str, list[str]]]) -> None:
    """Prints how many problems and candidates were kept, and why the others were not."""
    rejected = Counter(reason for reason, _ in reasons if reason != "kept")
    kept = len(reasons) - rejected.total()
    lines = [("read", read), ("already done", finished_before), ("kept", kept), ("rejected", rejected.total())]
    lines += [(f"  {reason}", count) for reason, count in rejected.most_common()]
    tables.table("Problems", ["", "number"], [*lines, ("left open", read - len(reasons))])
    candidates = Counter(reason or "passed" for _, candidate_reasons in reasons for reason in candidate_reasons)
    lines = [("asked for", candidates.total()), ("passed", candidates.pop("passed", 0))]
    lines += [("rejected", candidates.total()), *((f"  {reason}", n) for reason, n in candidates.most_common())]
    tables.table("Candidate strategies", ["", "number"], lines)
