"""Measures gradings per second of the verifier's pool, on gold answers and predictions from your data.

    python benchmarks/grading.py FILE.jsonl [...] [--seconds=20] [--workers=N] [--json=OUT.json]

A row with "gold" and "prediction" is one pair. For a row with "answer" the gold answer is paired with itself, with
another way to write it, and with the answer of the next row. The first pass parses every pair. In later passes the
workers remember what they parsed last, as in training, where the responses of a group share a gold answer. The share
"by mathematics" counts the pairs that text cannot decide. Hostile cases are left out.
"""

import argparse
import json
import os
import platform
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from sgpo_jax import rewards
from sgpo_jax.rewards import answers
from sgpo_jax.runtime import tables
from sgpo_jax.runtime.files import read_jsonl

BATCH = 512  # gradings per call: 128 problems with 4 responses
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


def measure(pairs: list[tuple[str, str]], seconds: float, workers: int | None) -> dict:
    """Returns gradings per second over about `seconds`, the first pass separately; starting workers is not counted."""
    undecided = 0
    for gold, response in pairs:
        box = answers.extract_boxed(response)
        pair = box is not None and (answers.normalize_answer(gold), answers.normalize_answer(box))
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
    parser = argparse.ArgumentParser(description="Gradings per second of the verifier's pool.")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each file")
    parser.add_argument("--workers", type=int, default=None, help="processes; by default one per CPU, at most 8")
    parser.add_argument("--json", default="", help="file for the figures")
    arguments = parser.parse_args()
    results = {Path(file).name: measure(read(file), arguments.seconds, arguments.workers) for file in arguments.files}
    machine = {
        "cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(), "load": os.getloadavg(),
        "python": platform.python_version(), **{name: version(name) for name in ("math-verify", "sympy")},
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
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
