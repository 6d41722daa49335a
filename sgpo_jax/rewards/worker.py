"""The program of the grading workers: compares answers with math-verify, or calls a reward function.

    python -P worker.py SECONDS MEGABYTES MODULE:FUNCTION SYS_PATH_AS_JSON

An empty MODULE:FUNCTION means math-verify. The program reads requests from stdin, one JSON object per line, and answers
each with one line. It imports neither jax nor this package. `pool` starts it, and kills it when a request takes too
long.
"""

import contextlib
import importlib
import json
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any


def serve(seconds: float, megabytes: int, reward: str, path: list[str]) -> None:
    """Answers the lines of stdin until it closes, which also happens when the parent dies.

    Args:
      seconds: limit of one request, after which the process ends.
      megabytes: limit of the process's address space.
      reward: `module:function`; "" is math-verify.
      path: sys.path for the user's module.
    """
    # SIGALRM's default action ends the process even inside C code and after its parent has died.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    memory = megabytes * 2**20
    for kind, limit in [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory)]:
        with contextlib.suppress(ValueError):  # the system's limit is lower
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # output that a library prints must not become a reply

    def reply(**fields: object) -> None:
        replies.write(json.dumps(fields).encode() + b"\n")

    try:
        answer = _calling(reward, path) if reward else _compare
        if not reward:
            _equal("1", "2")  # imports the libraries and builds their parsing tables
    except Exception as error:
        return reply(error=f"{type(error).__name__}: {error}"[:500])
    reply(error=None)
    at_start = _peak_bytes()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        fields = answer(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        # math-verify turns a MemoryError into "wrong", so the memory of earlier answers must not cause one.
        reply(**fields, retire=_peak_bytes() > (at_start + memory) // 2)
    os._exit(0)  # at once: to take down the interpreter needs seconds on a busy machine


def _peak_bytes() -> int:
    """Returns the peak memory of this process in bytes."""
    try:
        # In ru_maxrss a child inherits the peak of a large parent, and it would retire after every answer.
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):  # not on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _calling(reward: str, path: list[str]) -> Callable[[dict], dict[str, Any]]:
    """Loads the user's `module:function` and returns a function from {"problem": row, "response": text} to a reply."""
    sys.path[:] = path
    module, _, name = reward.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is {function!r:.80}, which cannot be called")

    def call(request: dict) -> dict[str, Any]:
        try:
            value = function(request["problem"], request["response"])
        except Exception as error:
            return {"outcome": "crash", "note": f"{type(error).__name__}: {error}"[:300]}
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 <= number <= 1:
            return {"outcome": "invalid", "note": f"it returned {value!r:.100}; allowed: a number from 0 to 1"}
        return {"outcome": "correct" if number == 1 else "wrong", "reward": number}

    return call


def _compare(request: dict) -> dict[str, Any]:
    """Returns the reply to a comparison of normalised texts.

    Args:
      request: {"ratios": [gold's parts, answer's parts]}; or {"pairs": [(gold, answer), ...], "items": [...]}, where
        one equal pair suffices. A pair of lists has its `structure.Items`, another pair None.
    """
    try:
        if "ratios" in request:
            same = _proportional(*request["ratios"])
        else:
            both = zip(request["pairs"], request["items"], strict=True)
            same = any(_equal_lists(*pair, *items) if items else _equal(*pair) for pair, items in both)
        return {"outcome": "correct" if same else "wrong"}
    except Exception:  # from a library, on unexpected text
        return {"outcome": "crash"}


def _proportional(golds: list[str], answers: list[str]) -> bool:
    """Returns True if two ratios of the same number of parts are equal part by part, up to a common factor."""
    zeros = [[_equal("0", part) for part in parts] for parts in (golds, answers)]
    if zeros[0] != zeros[1] or all(zeros[0]):
        return False
    first = zeros[0].index(False)
    return all(
        _equal(f"({gold}) \\cdot ({answers[first]})", f"({golds[first]}) \\cdot ({answer})")
        for gold, answer in zip(golds, answers, strict=True)
    )


def _equal_lists(gold: str, answer: str, golds: list[str], answers: list[str], decide: bool) -> bool:
    """Returns True if two lists are equal as sets and have every item equally often.

    math-verify drops repeated items, so that it cannot tell 1,2,2 from 1,2.
    """
    if not decide:
        if not _equal(gold, answer):
            return False
        if not (_repeats(golds) or _repeats(answers)):
            return True
    rest = list(answers)
    for item in golds:
        match = next((i for i, other in enumerate(rest) if _equal(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return not rest


def _repeats(items: list[str]) -> bool:
    """Returns True if a value is repeated among the items."""
    if all(re.fullmatch("[-+]?[0-9]{1,30}", item) for item in items):
        return len(set(map(int, items))) < len(items)
    return any(_equal(first, later) for i, later in enumerate(items) for first in items[:i])


# What sympy raises on an expression that it can read but not compute: such an answer is wrong, no crash. Only
# computations of sympy are guarded by it, so that it hides no fault of this program.
_NO_SENSE = (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError)


@lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """Returns math-verify's reading of a normalised answer: a sympy object if there is one, then the string."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse  # only workers need it
    from sympy import I, Symbol

    # LaTeX only, because plain expressions go through eval. Only the first match and no unanchored search, which would
    # pick a number out of text that does not parse. No units, because math-verify's include single letters (it reads
    # 2t, 5c, 3ab as 2, 5, 3); `answers` removes units. No time limits, because this program uses SIGALRM itself.
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    config = [
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=normal)
    ]
    text = rf"\boxed{{{text}}}"
    parsed = parse(text, config, extraction_mode="first_match", parsing_timeout=None)
    unit = {Symbol("i", real=False): I}  # math-verify reads i as a symbol
    with contextlib.suppress(*_NO_SENSE):  # in 1 < i, 0 < i < 1 and [1, i] it is one
        parsed = [value if isinstance(value, str) else value.xreplace(unit) for value in parsed]
    return parsed


def _equal(gold: str, answer: str) -> bool:
    """Returns True if math-verify finds two normalised answers equal, with or without their percent signs."""
    from math_verify import verify

    expected, predicted = _parse(gold), _parse(answer)
    if not (expected and predicted):
        return False
    # The quick check comes first. verify is not symmetric in its arguments.
    apart = _far_apart(expected[0], predicted[0])
    if not apart and verify(expected, predicted, timeout_seconds=None, allow_set_relation_comp=True):
        return True
    if _same_equation(expected[:1], predicted[:1]):
        return True
    bare = re.sub(r"\\?%", "", gold), re.sub(r"\\?%", "", answer)
    return bare != (gold, answer) and _equal(*bare)


def _same_equation(gold: list[Any], answer: list[Any]) -> bool:
    """Returns True if two equations differ only by moved terms or a constant factor."""
    from sympy import Eq, Expr, cancel
    from sympy.polys.polyerrors import BasePolynomialError

    if not all(isinstance(value, Eq) for value in gold + answer):
        return False
    if not all(isinstance(side, Expr) for value in gold + answer for side in value.args):
        return False
    expected, predicted = (value.lhs - value.rhs for value in gold + answer)
    if not (expected.free_symbols and predicted.free_symbols):
        return False
    try:
        factor = cancel(expected / predicted)
        return bool(factor.is_number and factor.is_finite and factor != 0)
    except (*_NO_SENSE, BasePolynomialError):
        return False


def _far_apart(gold: Any, answer: Any) -> bool:
    """Returns True if two sympy numbers differ in six digits: math-verify accepts 1e-20 for 1e-19."""
    expected, predicted = (getattr(value, "rhs", value) for value in (gold, answer))
    if not (getattr(expected, "is_number", False) and getattr(predicted, "is_number", False)):
        return False
    try:
        expected, predicted = expected.doit().evalf(), predicted.doit().evalf()
        return expected not in (0, predicted) and bool(abs(expected - predicted) > 5e-6 * abs(expected))
    except _NO_SENSE:  # not a number, such as 0 times infinity
        return True


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
