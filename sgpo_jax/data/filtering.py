"""What of the data goes into a stage: duplicates, contamination, lengths, and an account of every row left out."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sgpo_jax.data.rows import load, load_parts
from sgpo_jax.runtime import tables
from sgpo_jax.runtime.files import read_jsonl

RUN = 13  # words in a row that two problems share when they count as the same
COMMON = 10  # a run of words that more problems have is a phrase

# LaTeX that changes how a text looks, not what it says: spaces, delimiters, the size of fractions and brackets.
_LAYOUT = re.compile(r"\\(?:[,;:! ()\[\]]|(?:quad|qquad|left|right|displaystyle)(?![a-z]))|[$~]")
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")
_WORD = re.compile(r"[^\W_]+")


def _plain(text: str) -> str:
    return _LAYOUT.sub(" ", _FRACTION.sub(r"\\frac", text.casefold()))


def key(problem: str) -> str:
    """The problem without case, space and LaTeX layout; two problems with the same key are duplicates."""
    return " ".join(_TOKEN.findall(_plain(problem)))


def words(problem: str) -> list[str]:
    """The words and numbers of a problem, without case, punctuation and LaTeX layout."""
    return _WORD.findall(_plain(problem))


def duplicates(rows: Sequence[dict]) -> dict[str, str]:
    """id -> id of the first row with the same problem, for every row but the first."""
    first: dict[str, str] = {}
    found = {}
    for row in rows:
        original = first.setdefault(key(row["problem"]), row["id"])
        if original != row["id"]:
            found[row["id"]] = original
    return found


class Hits(NamedTuple):
    """Rows found in one evaluation set: id -> id of the evaluation problem.

    same: they share a run of 13 words that few problems have, or the whole text.
    phrase: what they share is a common phrase only.
    """

    same: dict[str, str]
    phrase: dict[str, str]


def contaminated(rows: Sequence[dict], evaluation: Mapping[str, Sequence[dict]]) -> dict[str, Hits]:
    """Rows that share 13 words in a row with a problem of an evaluation set, or all of them.

    The order of words counts; case, punctuation and LaTeX layout do not. A problem of fewer than 13 words must be the
    same as a whole (see `key`). A run of words that more than 10 problems have, here or there ("where m and n are
    relatively prime positive integers"), is a phrase and no sign of the same problem.

    Args:
        rows: for training.
        evaluation: name of a set -> its rows.

    Returns:
        Name of the set -> hits; a row found in several sets is under the first that says most.
    """
    whole: dict[str, tuple[str, str]] = {}
    parts: dict[tuple[str, ...], tuple[str, str]] = {}
    spread: Counter[tuple[str, ...]] = Counter()  # problems that have a run of words
    for name, problems in evaluation.items():
        for row in problems:
            whole.setdefault(key(row["problem"]), (name, row["id"]))
            runs = list(dict.fromkeys(_runs(row["problem"])))
            spread.update(runs)
            for run in runs:
                parts.setdefault(run, (name, row["id"]))
    shared = {row["id"]: list(dict.fromkeys(filter(parts.__contains__, _runs(row["problem"])))) for row in rows}
    for runs in shared.values():
        spread.update(runs)
    hits = {name: Hits({}, {}) for name in evaluation}
    for row in rows:
        runs = shared[row["id"]]
        telling = (parts[run] for run in runs if spread[run] <= COMMON)
        if same := whole.get(key(row["problem"])) or next(telling, None):
            hits[same[0]].same[row["id"]] = same[1]
        elif phrase := next((parts[run] for run in runs), None):
            hits[phrase[0]].phrase[row["id"]] = phrase[1]
    return hits


def _runs(problem: str) -> Iterator[tuple[str, ...]]:
    """All runs of 13 words."""
    listed = words(problem)
    return zip(*(listed[i:] for i in range(RUN)), strict=False)


def too_long(rows: Sequence[dict], tokens: Sequence[Sequence[int]], most: int) -> dict[str, str]:
    """id -> length, for the rows whose token ids are more than `most`."""
    return {row["id"]: f"{len(ids)} tokens" for row, ids in zip(rows, tokens, strict=True) if len(ids) > most}


class Found(NamedTuple):
    """Something about a row: why it was left out, or would have been."""

    id: str
    reason: str
    detail: str
    kept: bool


class Sieve:
    """The rows on their way into a stage: `rows` are still in, `found` says why the others are not.

    A row that is left out is counted once, for the first reason.

    Args:
        parts: source -> its rows; no two rows share an id.
    """

    def __init__(self, parts: Mapping[str, Sequence[dict]]):
        self.origin = {row["id"]: source for source, rows in parts.items() for row in rows}
        self.read = {source: len(rows) for source, rows in parts.items()}
        self.rows = [row for rows in parts.values() for row in rows]
        self.found: list[Found] = []
        self.reasons: dict[tuple[str, bool], None] = {}  # looked for, in this order

    def leave_out(self, reason: str, found: Mapping[str, str], *, keep: bool = False) -> None:
        """Leaves out the rows with these ids, each with a detail; with `keep` it only says that it found them."""
        self.reasons[reason, keep] = None
        self.found += [Found(row["id"], reason, found[row["id"]], keep) for row in self.rows if row["id"] in found]
        if not keep:
            self.rows = [row for row in self.rows if row["id"] not in found]

    def counts(self) -> dict[str, dict[str, Any]]:
        """source -> read, left_out {reason: rows}, kept_although {reason: rows}, kept; read = left out + kept."""
        tally = Counter((self.origin[item.id], item.reason, item.kept) for item in self.found)
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
        """Prints the counts, each with its first row as an example, and returns the text."""
        example: dict[tuple[str, str], str] = {}
        for item in self.found:
            text = f"{item.id} ({item.detail})" if item.detail else item.id
            example.setdefault((self.origin[item.id], item.reason), text)
        lines = []
        for source, count in self.counts().items():
            lines.append((source, count["read"], ""))
            for reason, number in count["left_out"].items():
                lines.append((f"  left out: {reason}", number, example.get((source, reason), "")))
            lines.append(("  kept", count["kept"], ""))
            for reason, number in count["kept_although"].items():
                lines.append((f"    although: {reason}", number, example.get((source, reason), "")))
        return tables.table(title, ("source", "rows", "for example"), lines)

    def fingerprint(self) -> str:
        """Of the kept rows, their content and order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(sorted(row.items())).encode())
        return digest.hexdigest()


def sift(source: str, evaluation: Mapping[str, str], *, remove_duplicates: bool, decontaminate: bool) -> Sieve:
    """The rows of a source for training, with duplicates and evaluation problems found, and left out if so wished.

    Args:
        source: as in `data.load`.
        evaluation: name of each evaluation set -> its source.
        remove_duplicates: leave out every row whose problem an earlier one has (`duplicates`).
        decontaminate: leave out every row that shares its problem with an evaluation set (`contaminated`).

    Raises:
        ValueError: as `data.load`.
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
    """Puts the counts into `workdir/data.json` and what was found into `data_left_out.jsonl`, beside other stages'.

    Args:
        resuming: the stage has begun already, with the rows it recorded then.

    Raises:
        ValueError: the stage has begun with other rows.
    """
    path, listing = workdir / "data.json", workdir / "data_left_out.jsonl"
    stages = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = {"sources": sieve.counts(), "fingerprint": sieve.fingerprint()}
    before = stages.get(stage, now)
    if resuming and before["fingerprint"] != now["fingerprint"]:
        kept = sum(source["kept"] for source in before["sources"].values())
        raise ValueError(
            f"the {stage} stage in {workdir} has begun with other rows: {kept} then (see {path}), {len(sieve.rows)} "
            "now; go on with the same data and evaluation sets, or choose another --workdir"
        )
    lines = [line for line in read_jsonl(listing) if line["stage"] != stage] if listing.is_file() else []
    lines += [{"stage": stage, "source": sieve.origin[item.id], **item._asdict()} for item in sieve.found]
    _replace(listing, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    _replace(path, json.dumps({**stages, stage: now}, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
