r"""Answer extraction and verification: the outcome reward of a response.

`score` takes the last balanced \boxed{...} of each response and compares it with the gold answer:
as text where certain, else by math-verify in processes that can be killed: answers are hostile.

What counts as correct, where opinions differ:
  * Only a box (\boxed or \fbox) counts: the one that closes last, not in an unfinished <think>.
  * 0.333333 is 1/3, 0.33333 is not: decimals agree to 6 places, and never differ by over 0.1 %.
  * Percent signs and units are decoration: 62.5\% takes 62.5 and 0.625, 90^\circ takes 90.
  * Lists and sets are unordered, tuples are not. (2, \infty) takes x > 2, y = 2x takes 2x.
  * 52_8 takes 52, not 52_9. i is the imaginary unit. Words are compared as strings.

This file is also the program of the workers (`_serve`): it imports neither jax nor this package.
"""

import atexit
import contextlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal, cast

Outcome = Literal["correct", "wrong", "no_box", "timeout", "crash"]

MAX_ANSWER = 1000  # characters; a longer answer is wrong unless it is the gold letter by letter


@dataclass(frozen=True)
class Verdict:
    """Grade of one response. `extracted` is the box's content, cut at MAX_ANSWER, None without."""

    reward: float  # 0.0 or 1.0
    outcome: Outcome
    extracted: str | None


# A box, an escaped character (\{ opens no group) or a brace. In `\\boxed` the first \ is a slip.
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:\\(?!boxed|fbox)|[^\\])|[{}]", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""Content of the balanced \boxed{...} that closes last, after the last "</think>", or None.

    Takes time linear in the length of the text. Of nested boxes the outermost counts.
    """
    text = text.rpartition("</think>")[2]
    if text.lstrip().startswith("<think>"):
        return None  # an unfinished thought
    last: slice | None = None
    opened: list[re.Match[str]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else token
            if len(start[0]) > 1:  # a box, not a plain group
                last = slice(start.end(), token.start())
        elif token[0] == "{" or len(token[0]) > 2:
            opened.append(token)
    return None if last is None else text[last]


_SYMBOLS: dict[str, str | int | None] = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
    "π": r"\pi ", "°": r"^\circ ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "，": ",",
    "²": "^2", "³": "^3",
}  # fmt: skip
_REWRITES = [
    (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # math delimiters and dollars
    (r"√\s*([0-9]+|[a-z])", r"\\sqrt{\1}"),
    (r"\b(?:np|numpy|math)\.([a-z]+)", r"\\\1"),
    (r"\*\*", "^"),
    (r"\\(?:mathrm|text)\{([ie])\}", r"\1"),
    (r"(?<=[0-9])i\b", " i"),
    (r"_\{ ?\\(?:max|min) ?\}|^\s*\\approx", ""),
    # One number: 10,\!080 and 10\,080 and 10{,}080, then 10 080 at the end.
    (r"(?<=[0-9])(?:,?\\!|\\[,;: ]|\{,\}|~)\s*(?=[0-9]{3}(?![0-9]))", ""),
    (r"\\!", ""),
    (r"(?<!\\)(?:\\[ ,;:]|~|\\q?quad\b)|\s+", " "),
    (r"(?<=[0-9]) (?=[0-9]{3}(?: [0-9]{3}){0,5}$)", ""),
    # 1e-05, which LaTeX reads as 1*e - 05; "2e - 3" with spaces stays Euler's number.
    (
        r"(?<![\w.}\\])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]\+?(-?)0{0,3}([0-9]{1,6})(?![\w.^{/])",
        r"\1 \\times 10^{\2\3}",
    ),
    (r"(?<=[0-9])\.(?= ?(?:$|[-+*/^,;)\]}]))", ""),  # 1./3
    (r"(?<!\\left)(?<!\\right)(?<!\.)\. *$", ""),  # a full stop
]


def normalize_answer(text: str) -> str:
    """Rewrite an answer, gold or predicted, into LaTeX that math-verify reads as it was meant.

    Removes dollars, thousands separators, spacing commands and a final full stop; rewrites
    e-notation, Python's spelling (`**`, `1./3`, `np.arcsin`) and common Unicode symbols.
    """
    text = text.translate(str.maketrans(_SYMBOLS))
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text.strip()


_INTEGER = re.compile(r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+))(?:\.0*)?(?:_\{?([0-9]+)\}?)?")
_WRAPPED = re.compile(r"\\(?:text|mbox|textbf|textrm|mathrm|mathbf) ?\{([A-Za-z .'()-]*)\}")


def _words(text: str) -> list[str] | None:
    """The sides (one or two, sorted) of an answer in words such as `even` or `MR=MC`, else None."""
    wrapped = _WRAPPED.fullmatch(text)
    if not wrapped and not (re.fullmatch(r"[A-Za-z =]+", text) and re.search("[A-Za-z]{4}", text)):
        return None
    plain = wrapped[1] if wrapped else text
    if re.search(r"\b(?:and|or)\b", plain):
        return None  # a list, for math-verify
    return sorted(re.sub("[^a-z=]", "", plain.lower()).split("="))


def _compare_text(gold: str, answer: str) -> bool | None:
    """Equality of two normalised answers where it is certain without mathematics, else None."""
    if gold == answer:
        return bool(gold)
    if not (0 < len(gold) <= MAX_ANSWER and 0 < len(answer) <= MAX_ANSWER):
        return False
    g, a = _INTEGER.fullmatch(gold), _INTEGER.fullmatch(answer)
    if g and a:
        same_base = g[2] == a[2] or not (g[2] and a[2])
        return same_base and int(g[1].replace(",", "")) == int(a[1].replace(",", ""))
    words = _words(gold), _words(answer)
    return None if None in words else words[0] == words[1]


class _Worker:
    """One grading process, used by one thread at a time.

    A plain program on pipes: no fork of a process that runs jax, no second import of the user's
    __main__, no pickle. Raises RuntimeError if it cannot start.
    """

    def __init__(self, seconds: float, megabytes: int):
        self.seconds = seconds
        # -P keeps this folder off sys.path, the hash seed makes sympy's orderings repeatable, and
        # in a session of its own Ctrl-C does not reach it: it ends when its stdin closes.
        self.process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), str(0.75 * seconds), str(megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        self.stdin = cast(IO[bytes], self.process.stdin)
        self.stdout = cast(IO[bytes], self.process.stdout)
        try:
            error = self._read(120.0)["error"]  # imports: 0.5 s, on a busy host much longer
        except (TimeoutError, EOFError) as failure:
            error = f"{type(failure).__name__}, status {self.process.poll()}"
        if error is not None:
            self.kill()
            raise RuntimeError(f"a grading worker did not start: {error}")

    def grade(self, gold: str, answer: str) -> Outcome:
        """Compare two normalised answers; the process may be dead afterwards."""
        try:
            # Two answers are at most 24 kB of JSON, a pipe holds 64: this cannot block.
            self.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            reply = self._read(self.seconds)
        except TimeoutError:
            self.kill()
            return "timeout"
        except (EOFError, OSError):
            self.kill()
            return "timeout" if self.process.returncode == -signal.SIGALRM else "crash"
        if reply["retire"]:
            self.kill()
        return reply["outcome"]

    def _read(self, seconds: float) -> dict[str, Any]:
        poller = select.poll()  # not select(), which fails when the run has over 1024 open files
        poller.register(self.stdout, select.POLLIN)
        if not poller.poll(1000 * seconds):
            raise TimeoutError
        line = os.read(self.stdout.fileno(), select.PIPE_BUF)  # a reply is written at once
        if not line:
            raise EOFError
        return json.loads(line)

    def kill(self) -> None:
        with self.process:  # closes the pipes and waits
            self.process.kill()


class Pool:
    """Grading processes, each driven by its own thread and started with that thread's first item.

    Args:
        workers: number of processes; None for one per CPU, at most 8.
        seconds: wall-clock limit of one grading. The process ends itself after 75 % of it, so that
            the start of its successor fits in too; what is stuck even so is killed at the limit.
        megabytes: limit of each process' address space.
    """

    def __init__(self, workers: int | None = None, seconds: float = 6.0, megabytes: int = 1024):
        count = min(8, os.cpu_count() or 1) if workers is None else workers
        for name, value in [("workers", count), ("seconds", seconds), ("megabytes", megabytes)]:
            if not value > 0:
                raise ValueError(f"{name} is {value!r}; it must be positive")
        self._limits = (seconds, megabytes)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="grading")
        self._workers: dict[int, _Worker] = {}  # by thread

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Grade (gold, answer) pairs of normalised answers, in order."""
        return list(self._threads.map(self._grade, pairs))

    def _grade(self, pair: tuple[str, str]) -> Outcome:
        thread = threading.get_ident()
        worker = self._workers.get(thread)
        if worker is None or worker.process.poll() is not None:
            if worker is not None:
                worker.kill()  # closes its pipes
            worker = self._workers[thread] = _Worker(*self._limits)
        return worker.grade(*pair)

    def close(self) -> None:
        """Drop what waits, end the threads and the workers; at most one grading's time."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers.values():
            worker.kill()


_shared_pool = Pool()  # starts nothing before the first item


def _renew_shared_pool() -> None:
    global _shared_pool
    _shared_pool = Pool()


os.register_at_fork(after_in_child=_renew_shared_pool)  # a fork has not its parent's threads
atexit.register(lambda: _shared_pool.close())


def score(responses: list[str], answers: list[str], *, pool: Pool | None = None) -> list[Verdict]:
    """Grade each response against its gold answer; order kept, from any thread, on hostile text.

    `pool` is where to grade, by default the pool that the whole program shares. ValueError for
    lists of different length and an entry that is no str, RuntimeError if workers cannot start.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses for {len(answers)} answers; must be equal")
    for name, texts in [("responses", responses), ("answers", answers)]:
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{i}] is {text!r:.80}; it must be a str")
    boxes = [extract_boxed(response) for response in responses]
    pairs = [
        None if box is None else (normalize_answer(gold), normalize_answer(box))
        for gold, box in zip(answers, boxes, strict=True)
    ]
    equal = {pair: _compare_text(*pair) for pair in pairs if pair}
    undecided = [pair for pair, same in equal.items() if same is None]
    outcomes: dict[tuple[str, str] | None, Outcome] = {None: "no_box"}
    outcomes |= {pair: "correct" if same else "wrong" for pair, same in equal.items()}
    outcomes |= zip(undecided, (pool or _shared_pool).grade(undecided), strict=True)
    return [
        Verdict(float(outcomes[pair] == "correct"), outcomes[pair], box and box[:MAX_ANSWER])
        for pair, box in zip(pairs, boxes, strict=True)
    ]


def _serve(seconds: float, megabytes: int) -> None:
    """A worker: grade lines [gold, answer] of stdin until it closes, as when the parent dies."""
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
        _equal("1", "2")  # the imports, and the tables of the first parse
    except Exception as error:
        return reply(error=repr(error)[:500])
    reply(error=None)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        outcome = "correct" if _equal(*json.loads(line)) else "wrong"
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        # math-verify calls a MemoryError wrong: none may come of what earlier answers left behind.
        reply(outcome=outcome, retire=_peak_bytes() > memory // 2)


def _peak_bytes() -> int:
    """The most memory this process has held."""
    try:
        # Not ru_maxrss: a child inherits the peak of a large parent there, and would retire after every answer.
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):  # not on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """What math-verify reads in a normalised answer: a sympy object if any, then the string."""
    from math_verify import LatexExtractionConfig, parse  # only workers need it
    from sympy import I, Symbol

    # LaTeX only, as plain expressions go through eval; first match only and no unanchored search,
    # which would dig a number out of what does not parse. Its time limits are off: SIGALRM is ours.
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
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
    same = verify(g, a, timeout_seconds=None, allow_set_relation_comp=True)  # not symmetric
    if same and not _far_apart(g[0], a[0]):
        return True
    bare = re.sub(r"\\?%", "", gold), re.sub(r"\\?%", "", answer)
    return bare != (gold, answer) and _equal(*bare)


def _far_apart(gold: Any, answer: Any) -> bool:
    """Whether two sympy numbers differ by over 0.1 %: math-verify takes 1e-20 for 1e-19."""
    g, a = (getattr(value, "rhs", value) for value in (gold, answer))
    if not (getattr(g, "is_number", False) and getattr(a, "is_number", False)):
        return False
    g, a = g.doit().evalf(), a.doit().evalf()
    return g not in (0, a) and bool(abs(g - a) > 1e-3 * abs(g))


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
