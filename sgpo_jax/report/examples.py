"""Generations for the reader: the same problems in several evaluations, side by side, a few of every outcome."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sgpo_jax.runtime.files import read_jsonl

PER_OUTCOME = 12  # problems shown of each
MOST_CHARACTERS = 4000  # of a response
GAINED, LOST = "newly correct", "no longer correct"


class Answer(NamedTuple):
    """A response to a problem in one of the evaluations."""

    column: str
    verdict: str
    text: str
    left_out: int  # characters
    tokens: int
    token_kl: tuple[tuple[str, float], ...] = ()  # (text of a token, nats), where it was analysed


class Problem(NamedTuple):
    id: str
    problem: str
    gold: str
    tags: tuple[str, ...]  # the verdict it counts by, and what has become of it
    answers: tuple[Answer, ...]


class Samples(NamedTuple):
    """Problems of a set, and how many of all its problems have each tag."""

    problems: tuple[Problem, ...]
    counts: dict[str, int]
    total: int


def verdict(line: Mapping[str, Any]) -> str:
    """What is said of a line of a generations file: its outcome, or "cut" where the token limit ended it."""
    return "cut" if line["truncated"] else line["outcome"]


def of_sets(sets: Iterable[str], folders: Mapping[str, Path]) -> list[tuple[str, Samples, str]]:
    """(set, samples, column they are counted by) of the latest evaluation in each folder, where there is one.

    Args:
      sets: their names.
      folders: when it was -> folder of its generations; a column is "when, unguided" or "when, guided".
    """
    found = []
    for name in sets:
        files = {}
        for when, folder in folders.items():
            for kind in ("unguided", "guided"):
                if generations := sorted(folder.glob(f"{name}_{kind}_*.jsonl")):
                    files[f"{when}, {kind}"] = generations[-1]
        if unguided := [column for column in files if column.endswith(", unguided")]:
            found.append((name, side_by_side(files, unguided[-1], before=unguided[0]), unguided[-1]))
    return found


def with_token_kl(shown: Samples, lines: Iterable[Mapping[str, Any]]) -> Samples:
    """The samples with the KL of their tokens, of those responses that lines of `analyze` are about."""
    known = {
        (line["column"], line["id"], line["response"]): tuple(zip(line["tokens"], line["token_kl"], strict=True))
        for line in lines
    }

    def coloured(problem: Problem) -> Problem:
        answers = (a._replace(token_kl=known.get((a.column, problem.id, a.text), ())) for a in problem.answers)
        return problem._replace(answers=tuple(answers))

    return shown._replace(problems=tuple(map(coloured, shown.problems)))


def side_by_side(files: Mapping[str, Path], judged: str, before: str | None = None) -> Samples:
    """The first sample of each problem, for the first problems of each verdict.

    Args:
      files: column -> generations, as `evaluation.evaluate` writes them. A problem that a file lacks is left out there.
      judged: column by whose verdict problems are counted and chosen.
      before: column that tells which problems are newly correct, or no longer.
    """
    found = {
        column: {line["id"]: line for line in read_jsonl(path) if line["sample"] == 0}
        for column, path in files.items()
    }
    tags = {id: _tags(line, found.get(before or "", {}).get(id)) for id, line in found[judged].items()}
    shown: Counter[str] = Counter()
    problems = []
    for id, line in found[judged].items():
        if any(shown[tag] < PER_OUTCOME for tag in tags[id]):
            shown.update(tags[id])
            answers = tuple(_answer(column, lines[id]) for column, lines in found.items() if id in lines)
            problems.append(Problem(str(id), line["problem"], str(line["answer"]), tags[id], answers))
    counts = Counter(tag for each in tags.values() for tag in each)
    return Samples(tuple(problems), dict(counts.most_common()), len(tags))


def _tags(line: Mapping[str, Any], before: Mapping[str, Any] | None) -> tuple[str, ...]:
    now = verdict(line)
    if before is None or (verdict(before) == "correct") == (now == "correct"):
        return (now,)
    return now, GAINED if now == "correct" else LOST


def _answer(column: str, line: Mapping[str, Any]) -> Answer:
    text = line["response"]
    return Answer(column, verdict(line), text[:MOST_CHARACTERS], max(len(text) - MOST_CHARACTERS, 0), line["tokens"])
