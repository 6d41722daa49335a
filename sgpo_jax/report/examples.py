"""Example responses: the same problems in several evaluations side by side, a few of every outcome."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.stats.benchmark import CONTEXTS

PER_OUTCOME = 12  # problems shown of each outcome
MOST_CHARACTERS = 4000  # shown of a response
GAINED, LOST = "newly correct", "no longer correct"


class Answer(NamedTuple):
    """A response to a problem in one of the evaluations."""

    column: str
    verdict: str
    text: str
    left_out: int  # characters that are not shown
    tokens: int
    token_kl: tuple[tuple[str, float], ...] = ()  # (text of a token, nats) if the response was analysed


class Problem(NamedTuple):
    """A problem with its responses in several evaluations."""

    id: str
    problem: str
    gold: str
    tags: tuple[str, ...]  # the verdict that it is counted by, and GAINED or LOST if that verdict has changed
    answers: tuple[Answer, ...]


class Samples(NamedTuple):
    """Some problems of a set, and the number of all its problems that have each tag."""

    problems: tuple[Problem, ...]
    counts: dict[str, int]
    total: int


def verdict(line: Mapping[str, Any]) -> str:
    """Returns the verdict on a line of a generations file: its outcome, or "cut" if the token limit ended it."""
    return "cut" if line["truncated"] else line["outcome"]


def collect(sets: Iterable[str], folders: Mapping[str, Path]) -> list[tuple[str, Samples, str]]:
    """Returns (set, samples, column they are counted by) of every set that was evaluated.

    Args:
      sets: names of the sets.
      folders: when -> folder of the generations, of which the latest evaluation is read. The columns are
        "when, unguided" and "when, guided".
    """
    collected = []
    for name in sets:
        files = {}
        for when, folder in folders.items():
            for context in CONTEXTS:
                # A set whose turn has not come yet has an empty file.
                found = sorted(file for file in folder.glob(f"{name}_{context}_*.jsonl") if file.stat().st_size)
                if found:
                    files[f"{when}, {context}"] = found[-1]
        if unguided := [column for column in files if column.endswith(f", {CONTEXTS[False]}")]:
            collected.append((name, side_by_side(files, unguided[-1], before=unguided[0]), unguided[-1]))
    return collected


def with_token_kl(samples: Samples, lines: Iterable[Mapping[str, Any]]) -> Samples:
    """Returns the samples with the token KL of every response that was analysed.

    Args:
      samples: of `collect` or `side_by_side`.
      lines: rows of analysis_generations.jsonl, as `analyze` writes them.
    """
    token_kl = {
        (line["column"], line["id"], line["response"]): tuple(zip(line["tokens"], line["token_kl"], strict=True))
        for line in lines
    }

    def add(problem: Problem) -> Problem:
        answers = (a._replace(token_kl=token_kl.get((a.column, problem.id, a.text), ())) for a in problem.answers)
        return problem._replace(answers=tuple(answers))

    return samples._replace(problems=tuple(map(add, samples.problems)))


def side_by_side(files: Mapping[str, Path], judged: str, before: str | None = None) -> Samples:
    """Returns the first response to each of the first problems of each verdict.

    Args:
      files: column -> generations, as `evaluation.evaluate` writes them. A column leaves out problems that its file
        lacks.
      judged: column by whose verdicts the problems are counted and chosen.
      before: column to compare with, which tells whether a problem is newly correct or no longer correct.
    """
    columns = {
        column: {line["id"]: line for line in read_jsonl(path) if line["sample"] == 0} for column, path in files.items()
    }
    tags = {id: _tags(line, columns.get(before or "", {}).get(id)) for id, line in columns[judged].items()}
    shown: Counter[str] = Counter()
    problems = []
    for id, line in columns[judged].items():
        if any(shown[tag] < PER_OUTCOME for tag in tags[id]):
            shown.update(tags[id])
            answers = tuple(_answer(column, lines[id]) for column, lines in columns.items() if id in lines)
            problems.append(Problem(str(id), line["problem"], str(line["answer"]), tags[id], answers))
    counts = Counter(tag for problem_tags in tags.values() for tag in problem_tags)
    return Samples(tuple(problems), dict(counts.most_common()), len(tags))


def _tags(line: Mapping[str, Any], before: Mapping[str, Any] | None) -> tuple[str, ...]:
    now = verdict(line)
    if before is None or (verdict(before) == "correct") == (now == "correct"):
        return (now,)
    return now, GAINED if now == "correct" else LOST


def _answer(column: str, line: Mapping[str, Any]) -> Answer:
    text = line["response"]
    return Answer(column, verdict(line), text[:MOST_CHARACTERS], max(len(text) - MOST_CHARACTERS, 0), line["tokens"])
