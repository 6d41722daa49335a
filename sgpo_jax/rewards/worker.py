"""The program of the grading workers: compares answers by math-verify, or calls a reward function.

    python -P worker.py SECONDS MEGABYTES MODULE:FUNCTION SYS_PATH_AS_JSON

An empty MODULE:FUNCTION is math-verify. It reads requests from stdin, one JSON object a line, and answers each with one
line; it imports neither jax nor this package. `rewards` starts it, and kills it when need be.
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
    """Answers the lines of stdin until it closes, as when the parent dies."""
    # SIGALRM's default action ends the process even inside C code and with its parent gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    memory = megabytes * 2**20
    for kind, limit in [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory)]:
        with contextlib.suppress(ValueError):  # the system allows even less
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not become a reply

    def reply(**fields: object) -> None:
        replies.write(json.dumps(fields).encode() + b"\n")

    try:
        answer = _calling(reward, path) if reward else _compare
        if not reward:
            _equal("1", "2")  # the imports, and the tables of the first parse
    except Exception as error:
        return reply(error=f"{type(error).__name__}: {error}"[:500])
    reply(error=None)
    at_start = _peak_bytes()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        fields = answer(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        # math-verify calls a MemoryError wrong: none may come of what earlier answers left behind.
        reply(**fields, retire=_peak_bytes() > (at_start + memory) // 2)


def _peak_bytes() -> int:
    """The most memory this process has held."""
    try:
        # Not ru_maxrss: a child inherits the peak of a large parent there, and would retire after every answer.
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):  # not on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _calling(reward: str, path: list[str]) -> Callable[[dict], dict[str, Any]]:
    """Replies with what the user's `module:function` says of {"problem": row, "response": text}."""
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
    """Whether one of the pairs (gold, answer) of normalised texts is equal."""
    try:
        return {"outcome": "correct" if any(_equal(gold, answer) for gold, answer in request["pairs"]) else "wrong"}
    except Exception:  # of a library, on text that it did not expect
        return {"outcome": "crash"}


@lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """What math-verify reads in a normalised answer: a sympy object if any, then the string."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse  # only workers need it
    from sympy import I, Symbol

    # LaTeX only, as plain expressions go through eval; first match only and no unanchored search, which would dig a
    # number out of what does not parse. Its units are letters too (2t, 5c, 3ab are 2, 5, 3): `answers` has our own.
    # Its time limits are off: SIGALRM is ours.
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    config = [
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=normal)
    ]
    text = rf"\boxed{{{text}}}"
    parsed = parse(text, config, extraction_mode="first_match", parsing_timeout=None)
    unit = {Symbol("i", real=False): I}  # for math-verify i is any symbol
    with contextlib.suppress(TypeError):  # and so it is for us in 1 < i
        parsed = [value if isinstance(value, str) else value.xreplace(unit) for value in parsed]
    return parsed


def _equal(gold: str, answer: str) -> bool:
    """Equality of two normalised answers by math-verify, with or without percent signs."""
    from math_verify import verify

    g, a = _parse(gold), _parse(answer)
    if not (g and a):
        return False
    # First what is quick. verify is not symmetric.
    if not _far_apart(g[0], a[0]) and verify(g, a, timeout_seconds=None, allow_set_relation_comp=True):
        return True
    if _same_equation(g[:1], a[:1]):
        return True
    bare = re.sub(r"\\?%", "", gold), re.sub(r"\\?%", "", answer)
    return bare != (gold, answer) and _equal(*bare)


def _same_equation(gold: list[Any], answer: list[Any]) -> bool:
    """Whether two equations are the same one, brought to other sides or multiplied by a number."""
    from sympy import Eq, Expr, cancel

    if not all(isinstance(value, Eq) for value in gold + answer):
        return False
    if not all(isinstance(side, Expr) for value in gold + answer for side in value.args):
        return False
    g, a = (value.lhs - value.rhs for value in gold + answer)
    if not (g.free_symbols and a.free_symbols):
        return False
    factor = cancel(g / a)
    return bool(factor.is_number and factor.is_finite and factor != 0)


def _far_apart(gold: Any, answer: Any) -> bool:
    """Whether two sympy numbers differ by over 0.1 %: math-verify takes 1e-20 for 1e-19."""
    g, a = (getattr(value, "rhs", value) for value in (gold, answer))
    if not (getattr(g, "is_number", False) and getattr(a, "is_number", False)):
        return False
    g, a = g.doit().evalf(), a.doit().evalf()
    try:
        return g not in (0, a) and bool(abs(g - a) > 1e-3 * abs(g))
    except TypeError:  # not a number, such as 0 times infinity
        return True


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
