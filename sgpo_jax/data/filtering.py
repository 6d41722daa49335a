"""Filters the rows of a stage by duplicates, contamination and length, and accounts for every row left out."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sgpo_jax.data.overlap import SHORT, key, runs, sentences
from sgpo_jax.data.rows import load, load_parts
from sgpo_jax.runtime import tables
from sgpo_jax.runtime.files import jsonl, read_jsonl, write_text

COMMON = 10  # problems; a run of words in more of them is a common phrase


def duplicates(rows: Sequence[dict]) -> dict[str, str]:
    """Returns {id: id of the first row with the same problem} for all later rows."""
    first: dict[str, str] = {}
    originals = {}
    for row in rows:
        original = first.setdefault(key(row["problem"]), row["id"])
        if original != row["id"]:
            originals[row["id"]] = original
    return originals


class Hits(NamedTuple):
    """Rows that match one evaluation set: {id: id of the evaluation problem}."""

    same: dict[str, str]  # they share a run of 13 words that few problems have, or the whole problem
    phrase: dict[str, str]  # they share only a common phrase


def contaminated(rows: Sequence[dict], evaluation: Mapping[str, Sequence[dict]]) -> dict[str, Hits]:
    """Finds the rows that share 13 words in a row, or the whole text, with a problem of an evaluation set.

    The order of words counts; case, accents, punctuation and LaTeX layout do not. A problem without a run of 13 words
    is the same as a whole (see `overlap.key`), or with all its sentences, in their order, inside a row: under a frame
    such as "Solve the following problem." In sentences all marks but the last count too. What occurs in more than 10
    problems of the rows and sets together ("where m and n are relatively prime positive integers") is a common phrase,
    and no evidence for the same problem. In scripts without spaces 26 characters are a run.

    Args:
      rows: rows for training.
      evaluation: name of a set -> its rows.

    Returns:
      {name of a set: hits}. A row that matches several sets is listed once: under `same` if any set has it there, and
      under the first such set.
    """
    whole: dict[str, tuple[str, str]] = {}  # key -> (set, id)
    parts: dict[tuple[str, ...], tuple[str, str]] = {}  # run of words, or sentences of a short problem -> (set, id)
    lengths: set[int] = set()  # sentences of the short problems
    spread: Counter[tuple[str, ...]] = Counter()  # number of problems that have a part
    for name, problems in evaluation.items():
        for row in problems:
            whole.setdefault(key(row["problem"]), (name, row["id"]))
            found = runs(row["problem"])
            if not found and len(key(row["problem"]).split()) >= SHORT:
                found = [sentences(row["problem"])]
                lengths.add(len(found[0]))
            spread.update(found)
            for part in found:
                parts.setdefault(part, (name, row["id"]))
    shared = {row["id"]: [part for part in _parts(row["problem"], lengths) if part in parts] for row in rows}
    for found in shared.values():
        spread.update(found)
    hits = {name: Hits({}, {}) for name in evaluation}
    for row in rows:
        found = shared[row["id"]]
        rare = (parts[part] for part in found if spread[part] <= COMMON)
        if same := whole.get(key(row["problem"])) or next(rare, None):
            hits[same[0]].same[row["id"]] = same[1]
        elif phrase := next((parts[part] for part in found), None):
            hits[phrase[0]].phrase[row["id"]] = phrase[1]
    return hits


def _parts(problem: str, lengths: set[int]) -> list[tuple[str, ...]]:
    """Returns the different runs of words of a problem, and of its sentences for each of some lengths."""
    pieces = sentences(problem) if lengths else ()
    inside = (pieces[i : i + length] for length in sorted(lengths) for i in range(len(pieces) - length + 1))
    return list(dict.fromkeys([*runs(problem), *inside]))


def too_long(rows: Sequence[dict], tokens: Sequence[Sequence[int]], most: int) -> dict[str, str]:
    """Returns {id: length as text} of the rows with more than `most` tokens.

    Args:
      rows: rows.
      tokens: token ids of each row.
      most: tokens.
    """
    return {row["id"]: f"{len(ids)} tokens" for row, ids in zip(rows, tokens, strict=True) if len(ids) > most}


class Finding(NamedTuple):
    """A reason to leave out a row."""

    id: str
    reason: str
    detail: str
    kept: bool  # the reason is only reported; the row stays


class Sieve:
    """The rows of a stage while they are filtered: `rows` are left, `findings` say why the others are not.

    A row that is left out is counted once, for the first reason.

    Args:
      parts: source -> its rows; no two rows share an id.
    """

    def __init__(self, parts: Mapping[str, Sequence[dict]]):
        self.origin = {row["id"]: source for source, rows in parts.items() for row in rows}
        self.read = {source: len(rows) for source, rows in parts.items()}
        self.rows = [row for rows in parts.values() for row in rows]
        self.findings: list[Finding] = []
        self.reasons: dict[tuple[str, bool], None] = {}  # (reason, rows are kept) in the order of the checks

    def leave_out(self, reason: str, details: Mapping[str, str], *, keep: bool = False) -> None:
        """Leaves out rows for a reason.

        Args:
          reason: the reason.
          details: id -> detail, for each row to leave out.
          keep: only report the rows.
        """
        self.reasons[reason, keep] = None
        affected = [row["id"] for row in self.rows if row["id"] in details]
        self.findings += [Finding(id, reason, details[id], keep) for id in affected]
        if not keep:
            self.rows = [row for row in self.rows if row["id"] not in details]

    def counts(self) -> dict[str, dict[str, Any]]:
        """Returns the numbers of rows of each source.

        Returns:
          {source: {"read", "left_out": {reason: rows}, "kept_although": {reason: rows}, "kept"}}, where rows read are
          the sum of those left out and those kept.
        """
        tally = Counter((self.origin[finding.id], finding.reason, finding.kept) for finding in self.findings)
        kept = Counter(self.origin[row["id"]] for row in self.rows)
        return {
            source: {
                "read": read,
                "left_out": {reason: tally[source, reason, False] for reason, keep in self.reasons if not keep},
                "kept_although": {reason: tally[source, reason, True] for reason, keep in self.reasons if keep},
                "kept": kept[source],
            }
            for source, read in self.read.items()
        }

    def table(self, title: str) -> str:
        """Prints a table of the counts, each with its first row as an example, and returns it."""
        examples: dict[tuple[str, str], str] = {}
        for finding in self.findings:
            text = f"{finding.id} ({finding.detail})" if finding.detail else finding.id
            examples.setdefault((self.origin[finding.id], finding.reason), text)
        lines = []
        for source, count in self.counts().items():
            lines.append((source, count["read"], ""))
            for reason, number in count["left_out"].items():
                lines.append((f"  left out: {reason}", number, examples.get((source, reason), "")))
            lines.append(("  kept", count["kept"], ""))
            for reason, number in count["kept_although"].items():
                lines.append((f"    although: {reason}", number, examples.get((source, reason), "")))
        return tables.table(title, ("source", "rows", "for example"), lines)

    def fingerprint(self) -> str:
        """Returns a hash of the content and order of the kept rows, their `extra` fields left out."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(sorted((name, text) for name, text in row.items() if name != "extra")).encode())
        return digest.hexdigest()


def sift(source: str, evaluation: Mapping[str, str], *, remove_duplicates: bool, decontaminate: bool) -> Sieve:
    """Reads the rows of a source for training, and finds duplicates and problems of the evaluation sets.

    Args:
      source: as in `data.load`.
      evaluation: name of each evaluation set -> its source.
      remove_duplicates: leave out the rows that `duplicates` finds, else only report them.
      decontaminate: leave out the rows that `contaminated` finds, else only report them.

    Raises:
      ValueError: as in `data.load`.
    """
    sieve = Sieve(load_parts(source))
    sieve.leave_out("duplicate", duplicates(sieve.rows), keep=not remove_duplicates)
    sets = {name: load(chosen) for name, chosen in evaluation.items()}
    for name, hits in contaminated(sieve.rows, sets).items():
        sieve.leave_out(f"in {name}", hits.same, keep=not decontaminate)
        if hits.phrase:
            sieve.leave_out(f"a common phrase of {name}", hits.phrase, keep=True)
    return sieve


def record(sieve: Sieve, workdir: Path, stage: str, *, resuming: bool) -> None:
    """Writes a stage's counts to `workdir/data.json` and its findings to `data_left_out.jsonl`.

    Both files keep the records of other stages.

    Args:
      sieve: the rows of the stage.
      workdir: folder of the run.
      stage: name of the stage.
      resuming: the stage has trained before, on the rows that it recorded then.

    Raises:
      ValueError: the stage resumes with different rows.
    """
    path, listing = workdir / "data.json", workdir / "data_left_out.jsonl"
    stages = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = {"sources": sieve.counts(), "fingerprint": sieve.fingerprint()}
    before = stages.get(stage, now)
    if resuming and before["fingerprint"] != now["fingerprint"]:
        kept = sum(source["kept"] for source in before["sources"].values())
        raise ValueError(
            f"the {stage} stage in {workdir} began with different rows: {kept} then (see {path}), {len(sieve.rows)} "
            "now; resume with the same data and evaluation sets, or choose another --workdir"
        )
    lines = [line for line in read_jsonl(listing) if line["stage"] != stage] if listing.is_file() else []
    for finding in sieve.findings:
        lines.append({"stage": stage, "source": sieve.origin[finding.id], **finding._asdict()})
    write_text(listing, jsonl(lines))
    write_text(path, json.dumps({**stages, stage: now}, indent=2, ensure_ascii=False) + "\n")
