"""Measures the verifier on gold answers and predictions from your data: wrong verdicts, and gradings per second.

    python benchmarks/grading.py FILE.jsonl [...] [--seconds=20] [--workers=N] [--json=OUT.json]

A row with "gold" and "prediction" is one pair. For a row with "answer" the gold answer is paired with itself, with
another way to write it, and with the answer of the next row. The first pass parses every pair. In later passes the
workers remember what they parsed last, as in training, where the responses of a group share a gold answer. The share
"by mathematics" counts the pairs that text cannot decide. Hostile cases are left out.

For rows with "answer" every gold answer is also graded against answers made from it. Those of the same value (written
in other LaTeX, a list in another order) must be right: the others count as false negatives. Those of another value (an
item dropped, repeated, negated or doubled, a tuple in another order) must be wrong: the others are false positives.

Rows that say whether their prediction "should_be_correct" are counted likewise. With --compare the same answers are
also graded by math-verify alone and, where it is installed, by mathruler, the grader of PRM800K as a package: `pip
install mathruler pylatexenc tqdm`.
"""

import argparse
import json
import os
import platform
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from sgpo_jax import rewards
from sgpo_jax.rewards import answers, boxes, structure
from sgpo_jax.runtime import tables
from sgpo_jax.runtime.files import read_jsonl

BATCH = 512  # gradings per call: 128 problems with 4 responses
LIMIT = 30  # seconds for one answer where errors are counted, so that a busy machine causes none
BOMBS = ("bomb", "long")  # categories of hostile grading cases


def read(path: str) -> list[tuple[str, str]]:
    """Returns the (gold, response) pairs of a file."""
    rows = [row for row in read_jsonl(path) if row.get("category") not in BOMBS]
    if "gold" in rows[0]:
        return [(row["gold"], row["prediction"]) for row in rows]
    golds = [row["answer"] for row in rows]
    pairs = []
    for gold, other in zip(golds, golds[1:] + golds[:1], strict=True):
        rewritten = gold.replace(r"\frac", r"\dfrac") if "frac" in gold else f"{{{gold}}}"
        pairs += [(gold, rf"Thus it is $\boxed{{{answer}}}$.") for answer in (gold, rewritten, other)]
    return pairs


def variants(gold: str) -> list[tuple[str, bool]]:
    """Returns answers made from a gold answer, each with whether it has the same value."""
    same = [gold, f"{{{gold}}}", rf"\displaystyle {gold}", f"  {gold} ."]
    if "frac" in gold:
        same += [gold.replace(r"\frac", r"\dfrac"), gold.replace(r"\frac", r"\tfrac")]
    changed: list[str] = []
    entries = re.fullmatch(r"(?:\\left ?)?\(([^()]*)(?:\\right ?)?\)", gold)
    items = structure.split(entries[1] if entries else gold)
    thousands = re.fullmatch(r"(?:\\\$)?[-+]?[0-9]{1,3}(,(\\!)? ?[0-9]{3})+", gold)
    prose = re.search(r"(?<![\\A-Za-z])[a-z]{4}", gold)
    if len(items) > 1 and not thousands and not prose:
        frame = "({})" if entries else "{}"
        lists = [items[:-1], [*items, items[0]]]
        if _number(items[0]):
            lists.append([f"-({items[0]})", *items[1:]])
        if entries and len(set(items)) > 1:
            lists.append(items[1:] + items[:1])
        elif not entries:
            same.append(", ".join(items[::-1]))
        changed += [frame.format(", ".join(parts)) for parts in lists]
    elif _number(gold):
        changed += [f"-({gold})", rf"2 \cdot ({gold})", f"{gold} + 1", rf"{gold} \text{{ million}}", f"{gold}, {gold}"]
    return [(answer, True) for answer in same] + [(answer, False) for answer in changed]


def _number(text: str) -> bool:
    """Returns True for a number other than 0, written with digits, roots, fractions and pi."""
    return bool(re.fullmatch(r"(?:[-+0-9. {}]|\\d?frac|\\sqrt|\\pi)+", text) and re.search("[1-9]|pi", text))


def labelled(path: str) -> list[tuple[str, str, bool]]:
    """Returns (gold, response, whether it is right) for each labelled pair and each answer made from a gold answer."""
    rows = [row for row in read_jsonl(path) if row.get("category") not in BOMBS]
    pairs = [(row["gold"], row["prediction"], row["should_be_correct"]) for row in rows if "should_be_correct" in row]
    golds = [row["answer"] for row in rows if "answer" in row]
    return pairs + [(gold, rf"\boxed{{{answer}}}", same) for gold in golds for answer, same in variants(gold)]


def count_errors(cases: list[tuple[str, str, bool]], verdicts: list[bool]) -> dict:
    """Returns how many labelled pairs are graded wrongly, with the first few of each kind."""
    graded = [(*case, right) for case, right in zip(cases, verdicts, strict=True)]
    positives = [f"{gold} ¦ {answer}" for gold, answer, same, right in graded if right and not same]
    negatives = [f"{gold} ¦ {answer}" for gold, answer, same, right in graded if same and not right]
    return {
        "same_value": sum(case[2] for case in cases),
        "other_value": sum(not case[2] for case in cases),
        "false_negatives": len(negatives),
        "false_positives": len(positives),
        "examples": negatives[:10] + positives[:10],
    }


def math_verify_alone(gold: str, response: str) -> bool:
    """Grades as math-verify does by itself, with more time, because the machine may be busy."""
    from math_verify import parse, verify

    texts = (rf"\boxed{{{gold}}}", response)
    return verify(*(parse(text, parsing_timeout=LIMIT) for text in texts), timeout_seconds=LIMIT)


def mathruler(gold: str, response: str) -> bool:
    """Grades as mathruler does by itself."""
    from mathruler.grader import extract_boxed_content, grade_answer

    return grade_answer(extract_boxed_content(response), gold)


def limited(grade: Callable[[str, str], bool], gold: str, response: str) -> bool:
    """Calls a grader; what it cannot grade in the time is wrong."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        return bool(grade(gold, response))
    except Exception:
        return False
    finally:
        signal.alarm(0)


def by_each_grader(cases: list[tuple[str, str, bool]], others: bool, workers: int | None) -> dict[str, dict]:
    """Returns the errors of the verifier and, if asked for, of the public graders that are installed."""
    golds, responses, _ = zip(*cases, strict=True)
    with closing(rewards.Pool(workers=workers, seconds=LIMIT)) as pool:
        verdicts = rewards.score(list(responses), list(golds), pool=pool)
    errors = {"sgpo_jax": count_errors(cases, [verdict.outcome == "correct" for verdict in verdicts])}
    public = {"math-verify": math_verify_alone} | ({"mathruler": mathruler} if find_spec("mathruler") else {})
    for name, grade in public.items() if others else ():
        with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn")) as processes:
            graded = processes.map(limited, [grade] * len(cases), golds, responses, chunksize=32)
            errors[name] = count_errors(cases, list(graded))
    return errors


def measure(pairs: list[tuple[str, str]], seconds: float, workers: int | None) -> dict:
    """Returns gradings per second over about `seconds`, the first pass separately; starting workers is not counted."""
    undecided = 0
    for gold, response in pairs:
        box = boxes.extract_boxed(response)
        pair = box is not None and (answers.normalize_answer(rewards.read_gold(gold)), answers.normalize_answer(box))
        undecided += bool(pair) and answers.compare_text(*pair) is None
    with closing(rewards.Pool(workers=workers)) as pool:
        rewards.score([r"\boxed{x+1}"] * 64, [f"1+x+{i}" for i in range(64)], pool=pool)  # starts the workers
        rates, outcomes = [], {}
        started = time.perf_counter()
        while not rates or time.perf_counter() - started < seconds:
            before = time.perf_counter()
            for i in range(0, len(pairs), BATCH):
                golds, responses = zip(*pairs[i : i + BATCH], strict=True)
                for verdict in rewards.score(list(responses), list(golds), pool=pool):
                    outcomes[verdict.outcome] = outcomes.get(verdict.outcome, 0) + 1
            rates.append(len(pairs) / (time.perf_counter() - before))
    return {
        "pairs": len(pairs),
        "undecided": undecided / len(pairs),
        "first_pass_per_second": rates[0],
        "later_per_second": sum(rates[1:]) / len(rates[1:]) if rates[1:] else None,
        "outcomes": outcomes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Wrong verdicts and gradings per second of the verifier.")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each file")
    parser.add_argument("--workers", type=int, default=None, help="processes; by default one per CPU, at most 8")
    parser.add_argument("--compare", action="store_true", help="count the errors of the public graders too")
    parser.add_argument("--json", default="", help="file for the figures")
    arguments = parser.parse_args()
    results = {Path(file).name: measure(read(file), arguments.seconds, arguments.workers) for file in arguments.files}
    for file in arguments.files:
        if cases := labelled(file):
            results[Path(file).name]["errors"] = by_each_grader(cases, arguments.compare, arguments.workers)
    machine = {
        "cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(), "load": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("math-verify", "sympy", "mathruler") if find_spec(name.replace("-", "_"))},
    }  # fmt: skip
    columns = ["file", "pairs", "by mathematics", "first pass, 1/s", "later, 1/s", "outcomes"]
    rows = [
        [
            name, result["pairs"], f"{result['undecided']:.0%}", f"{result['first_pass_per_second']:.0f}",
            f"{result['later_per_second']:.0f}" if result["later_per_second"] else "-", result["outcomes"],
        ]
        for name, result in results.items()
    ]  # fmt: skip
    tables.table(f"Gradings per second: {machine}", columns, rows)
    errors = {name: result["errors"] for name, result in results.items() if "errors" in result}
    counted = ["same_value", "false_negatives", "other_value", "false_positives"]
    tables.table(
        "Labelled answers, and answers made from the gold answers",
        ["file", "grader", "of the same value", "false negatives", "of another value", "false positives"],
        [
            [name, grader, *map(counts.get, counted)]
            for name, graders in errors.items()
            for grader, counts in graders.items()
        ],
    )
    for name, graders in errors.items():
        for example in graders["sgpo_jax"]["examples"]:
            print(f"{name}: {example}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
