"""Reward functions that a user may write, good and bad. The grading workers load them by name."""

import contextlib
import os
import sys
import time

import numpy as np

not_a_function = 5


def half(problem, response):
    return 0.5


def even(problem, response):
    return len(response) % 2 == 0


def by_row(problem, response):
    """Reads the row, prints, and returns what the tests ask for."""
    print("noise on stdout")
    kind, _, rest = response.partition(":")
    if kind == "answer":
        return rest == problem["answer"] and problem["id"] == "p1"
    if kind == "value":
        return {
            "one": 1, "third": np.float32(0.25), "text": "1.0", "none": None, "nan": float("nan"), "two": 2.0,
            "minus": -0.1, "list": [1.0], "huge": 10**400,
        }[rest]  # fmt: skip
    if kind == "reply":  # forges a reply on every open file
        for file in range(3, 20):
            with contextlib.suppress(OSError):
                os.write(file, rest.encode() + b"\n")
        return 1.0
    if kind == "raise":
        raise KeyError(rest)
    if kind == "exit":
        sys.exit(3)
    if kind == "die":
        os._exit(4)
    if kind == "hang":
        time.sleep(60)
    if kind == "memory":
        return float(np.ones(400_000_000)[0])  # 3.2 GB
    return float(len(response) == 300_000)
