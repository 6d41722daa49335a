"""Ratings of a sample of the extracted strategies by a judge (App. H)."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sgpo_jax import data
from sgpo_jax.runtime import journal, tables
from sgpo_jax.strategies import parsing, prompts
from sgpo_jax.strategies.budget import digest
from sgpo_jax.strategies.extraction import rate
from sgpo_jax.strategies.runs import EXTRACTION, valid_for
from sgpo_jax.strategies.session import model_name, model_settings, open_session

# name: (mean ratings, share of the paper's 500); App. H
BANDS = {"high": ("[0.8, 1]", 0.394), "medium": ("[0.5, 0.8)", 0.544), "low": ("[0, 0.5)", 0.062)}


def audit(config: ConfigDict, workdir: Path) -> str:
    """Has the judge rate a sample of the kept strategies, resumably, and prints the ratings.

    Args:
      config: its section `extract` is used.
      workdir: folder of the extraction; the ratings go to audit.jsonl there.

    Returns:
      What is not finished and why, or "".

    Raises:
      ValueError: there is no strategy to rate, or the judge is the model that wrote the strategies.
    """
    fields, path = config.extract, workdir / EXTRACTION
    if not path.is_file():
        raise ValueError(f"--workdir={workdir}: there is no {EXTRACTION}; extract strategies first")
    judge, writer = model_name(config, "judge"), journal.settings(path).get("model")
    if judge == writer:
        raise ValueError(f"config.extract.judge.name={judge!r}: must be another model than the one that wrote")
    kept = _kept(path, fields.source)
    if not kept:
        raise ValueError(f"{path}: no strategy of the problems in {fields.source!r} was kept")
    # Sorted by a hash of the id, so that a larger sample includes a smaller one.
    sample = sorted(kept, key=lambda row: digest("audit", str(config.seed), row["id"]))[: fields.audit_sample]
    limits = {"tries": fields.score_tries, "max_tokens": fields.max_score_tokens}
    settings = {"writer": writer, **model_settings(config, "judge", limits)}
    with open_session(config, "judge", workdir / "audit.jsonl", settings) as session:

        def work(row: dict[str, str]) -> str:
            rating = rate(row, session.payer(row["id"]), **limits)
            session.journal.append({"kind": "verdict", "id": row["id"], "row": digest(row["strategy"]), **rating})
            return "rated" if rating["mean"] is not None else "unrated"

        def rating_of(row: dict[str, str]) -> dict[str, Any] | None:
            rating = session.journal.verdict(row["id"])
            return rating if rating and rating["row"] == digest(row["strategy"]) else None

        waiting = [row for row in sample if not rating_of(row)]
        why = session.work_through("audit", waiting, len(sample), work)
        _print_ratings([rating for row in sample if (rating := rating_of(row))], len(sample), judge)
        session.print_spent()
    return why


def _kept(path: Path, source: str) -> list[dict[str, str]]:
    """Returns the rows of `source` whose strategy was kept, with the strategy and the solution that it is from."""
    rows = {row["id"]: row for row in data.load(source)}
    return [
        {"solution": verdict.get("solution", ""), **rows[id], "strategy": verdict["strategy"]}
        for id, verdict in journal.verdicts(path).items()
        if verdict["reason"] == "kept" and id in rows and verdict["row"] == valid_for(rows[id])["row"]
    ]


def _print_ratings(ratings: Sequence[dict[str, Any]], sample: int, judge: str) -> None:
    """Prints the quality bands beside the paper's, the mean of each criterion, and why strategies were not rated."""
    rated = [rating for rating in ratings if rating["mean"] is not None]
    bands = Counter(parsing.band(rating["mean"]) for rating in rated)
    shares = [
        (f"{name} {edges}", f"{paper:.1%}", f"{bands[name] / len(rated):.1%}" if rated else "-", bands[name])
        for name, (edges, paper) in BANDS.items()
    ]
    tables.table(f"Quality as {judge} rates it: {len(rated)} of {sample}", ["", "paper", "here", "number"], shares)
    if rated:
        means = np.mean([rating["ratings"] for rating in rated], axis=0)
        lines = [(name, f"{mean:.3f}") for name, mean in zip(prompts.CRITERIA, means, strict=True)]
        tables.table("Mean rating", ["", ""], lines)
    unrated = Counter(rating["reason"] for rating in ratings if rating["mean"] is None)
    if unrated:
        tables.table("Not rated", ["", "number"], unrated.most_common())
