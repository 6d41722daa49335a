"""Extraction, grading policy, and a worker pool that hostile answers cannot stop."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT, SHARED
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgpo_jax import rewards
from sgpo_jax.rewards import Pool, score
from sgpo_jax.rewards.answers import compare_text, normalize_answer, readings
from sgpo_jax.rewards.boxes import extract_boxed
from sgpo_jax.rewards.verifier import _shared_pool

BOMBS = [
    r"10^{10^9}",
    r"10^{10^{10}}",
    r"\gcd(10^{10^9}, 6)",
    r"9^{9^{9^9}}",
    r"(x+y+z+1)^{400}",
    r"(1000000!)!",
    r"\binom{10^{9}}{5\cdot 10^{8}}",
    "{" * 400 + "5" + "}" * 400,
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with closing(Pool(workers=2, seconds=10.0)) as pool:
        yield pool


def rows(name: str) -> list[dict]:
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def boxed(answers: list[str]) -> list[str]:
    return [rf"Thus $\boxed{{{answer}}}$." for answer in answers]


def processes(pool: Pool) -> list[int]:
    return [worker.process.pid for worker in pool._workers.values()]


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    """Returns True if the process has ended, even if its new parent has not collected it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# Extraction


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so $\boxed{204}$.", "204"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and {more}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\\boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{5} and \boxed{6", None),
        (r"\boxed{5} and \boxed{", "5"),
        (r"\boxed{5}, in \boxed{} as asked", "5"),
        (r"\boxed{5}, in \boxed{ ... } or \boxed{\ldots} as asked", "5"),
        (r"\boxed{5}. It is in a \boxed as asked", "5"),
        (r"\boxed{ is the command: \boxed{6}", "6"),
        (r"}} \boxed{5} }", "5"),
        (r"\boxed{}", ""),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"\boxed{1}</think> nothing", None),
        (r"<think> perhaps \boxed{1}", None),
        (r"a</think> <think> perhaps \boxed{1}", None),
        (r"no <think> here: \boxed{1}", "1"),
        (r"\boxed 5", "5"),
        (r"so $\boxed7$.", "7"),
        (r"first \boxed{5}, then $\fbox 7$", "7"),
        (r"\(\boxed\frac{1}{2}\)", r"\frac{1}{2}"),
        (r"$\boxed\frac12$", r"\frac12"),
        (r"$\boxed\text{A}$", r"\text{A}"),
        (r"$\boxed A$", "A"),
        (r"$\boxed -3$.", "-3"),
        (r"it is \boxed 7. Done", "7"),
        (r"it is \boxed 7.5.", "7.5"),
        (r"$\boxed 7\sqrt{2}$", r"7\sqrt{2}"),
        (r"$\boxed 72$", "72"),
        (r"{\boxed 7} more", "7"),
        (r"\boxed{\boxed 7}", r"\boxed 7"),
        (r"$\boxed\frac{1", None),
        (r"a \boxed answer", None),
        ("the answer is 204", None),
        ("", None),
    ],
)
def test_extract_boxed(text: str, content: str | None) -> None:
    assert extract_boxed(text) == content


balanced = st.recursive(
    st.text(st.characters(exclude_characters="{}\\/"), max_size=8),  # no backslash, no </think>
    lambda inner: st.builds("{}{{{}}}{}".format, inner, inner, inner),
)


@given(before=st.text() | st.text(r"{}\bofxed "), content=balanced)
def test_extract_returns_balanced_content(before: str, content: str) -> None:
    assert extract_boxed(f"so{before} \\boxed{{{content}}}") == content


@given(st.text(r"{}\boxedfbk<thin/>" + " \n") | st.text())
def test_extract_and_normalize_take_any_text(text: str) -> None:
    assert extract_boxed(text) is None or extract_boxed(text) in text
    assert normalize_answer(text) == normalize_answer(text).strip()


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "}",
        "\\",
        "\\boxed{",
        "\\boxed ",
        "\\fbox{}",
        "\\boxed 7",
        "\\boxed{ ",
        "\\boxed{.",
        "\\boxed\\text{",
        "\\bf ",
        "\\color{a",
        "x²",
        "a{b$c\\(d ",
        "9",
        " 000",
        "1e",
        ". ",
        "~",
    ],
)
def test_huge_text_takes_linear_time(at_most, piece: str) -> None:
    text = piece * (200_000 // len(piece))
    with at_most(2.0):  # 0.1 s here; a quadratic rule takes minutes
        extract_boxed(text)
        normalize_answer(text)


PIECES = r"""
    \text{ } { ( [ \text{a} \frac{ \text{m}/ cm per 1 x<2 or and x>2 \pm \mp \begin{array}{c} \end{array} for all
    \forall percent ^\circ \sin( million _\text{ _{\text{base } !^ \langle not \ldots ... (A) \\[2pt] =
    A, jan sq. in , 6:00 p.m. \left an matrix \{ 1/2 \begin{array}{c} \end{array} for all at least
"""


@settings(max_examples=100)
@given(
    pieces=st.lists(st.sampled_from(PIECES.split()), min_size=1, max_size=12),
    gap=st.sampled_from(["", " "]),
    gold=st.sampled_from(["5", "x+1", r"\pm 3", "(1,2)", r"\text{(A)}", r"\begin{pmatrix}1\\2\end{pmatrix}"]),
)
def test_the_rules_for_short_text_are_quick_on_any_text(at_most, pieces: list[str], gap: str, gold: str) -> None:
    """They run in the program itself, without a limit."""
    text = (gap.join(pieces) * 1000)[: rewards.MAX_ANSWER - 1]
    with at_most(2.0):
        normal = normalize_answer(text)
        assert compare_text(gold, normal) in (None, True, False)
        assert all(len(part) <= rewards.MAX_ANSWER for pair in readings(gold, normal) for part in pair)


# Policy


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (r"\$18.90", "18.90"),
        (r"$\frac12$.", r"\frac12"),
        (r"\(7\)", "7"),
        ("204.", "204"),
        ("-1./3", "-1/3"),
        ("1e-05", r"1 \times 10^{-5}"),
        ("4.5E+33", r"4.5 \times 10^{33}"),
        ("2e - 3", "2e - 3"),
        ("2e^{3}", "2e^{3}"),
        (r"10,\!080", "10080"),
        (r"1{,}000", "1000"),
        ("1 000 000", "1000000"),
        ("3, 100", "3, 100"),
        ("27~m", "27 m"),
        ("np.arcsin(10/13)", r"\arcsin(10/13)"),
        ("x**2", "x^2"),
        ("−5", "-5"),
        (r"\left\{1\right.", r"\left\{1\right."),
        ("1,2,...", "1,2,..."),
        (r"3+2i", r"3+2 i"),
    ],
)
def test_normalize_answer(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal
    assert normalize_answer(normal) == normal


RIGHT = r"""
\frac12|0.5   \frac{1}{2}|\tfrac{2}{4}   1\frac{4}{5}|\frac95   \frac13|0.333333   204|204.0
204|0204   58,500|58500   58500|58{,}500   204|x=204   204|m+n=100+104=204   204|\text{204}
204|204\text{ minutes}   27|27~m   90^\circ|90   \frac{270}7\text{ degrees}|\frac{270}{7}^\circ
62.5\%|62.5   62.5%|0.625   62.5%|62.5\%   8\%|0.08   \$18.90|18.9   5.4 \text{ cents}|5.40
1e-5|10^{-5}   1e-5|0.00001   4.5e33|4.5\times10^{33}   -1./3|-\frac13   10^{15}|10**15
\arcsin(10/13)|np.arcsin(10/13)   2\sqrt{3}|√12   \frac{\pi}{2}|π/2   p-q|-q+p   10!|3628800
x^2+2x+1|(x+1)^2   3,5,7|7,5,3   3,5,7|3\text{and}5\text{and}7   2,-2|x=\pm2   (3,4]|3<x\le4
(2,\infty)|x>2   [-2,7]|x\in[-2,7]   y=2x+3|2x+3   y=2x+3|2x-y+3=0   (1,2),(3,4)|(3,4),(1,2)
\text{Evelyn}|evelyn   \text{even}|\text{Even.}   \text{(C)}|C   MR=SRMC|SRMC=MR   52_8|52
2516_8|2516_{8}   m_{\max}=n^{2}-1|n^2-1   6-5i|6-5\mathrm{i}   \frac{1}{2i}|-\frac{i}{2}
2e^{i\pi/3}|1+\sqrt3i   12-5i|(3-2i)^2+7+7i   1 \le i \le 5|1\leq i\leq 5   \infty|+\infty
\begin{pmatrix}1\\2\end{pmatrix}|\begin{bmatrix}1\\2\end{bmatrix}   2^{1009}|2\cdot2^{1008}
"""
WRONG = r"""
\frac13|0.33333   \frac{\pi}{2}|1.5708   204|205   204|2040   204|-204   58500|(58,500)
90^\circ|91   62.5\%|6.25   8\%|9   17.5\%|0.0175   1e-5|2e-5   1e-5|-4   -1./3|-1
\frac{1}{3}E_1+\frac{2}{3}E_2|\frac23   10^{-20}|10^{-19}   1.6e-19|3.2e-19   p-q|q-p
3,5,7|3,5   (6,31,-1)|(31,6,-1)   (3,4]|[3,4]   (1,2)|(2,1)   (2,\infty)|x<2   y=2x|y=3x
even|neve   \text{even}|\text{odd}   SRAC=LRAC|CARS=CARL   \text{(C)}|D   52_8|52_9
2x+z=1|1   i|-i   3|3i   1+\sqrt3i|2e^{-i\pi/3}   x|   2^{1009}|2^{1009}+1
\begin{pmatrix}1\\2\end{pmatrix}|\begin{pmatrix}2\\1\end{pmatrix}
"""


def test_policy(pool: Pool) -> None:
    right, wrong = (
        [pair.split("|") for pair in re.split(r"\n|  +", table.strip())] for table in (RIGHT, WRONG)
    )
    golds, answers = zip(*right, *wrong, strict=True)
    outcomes = [v.outcome for v in score(boxed(list(answers)), list(golds), pool=pool)]
    expected = ["correct"] * len(right) + ["wrong"] * len(wrong)
    cases = zip(golds, answers, outcomes, expected, strict=True)
    assert [case for case in cases if case[2] != case[3]] == []


def test_grading_pairs(pool: Pool) -> None:
    lines = (Path(__file__).parent / "grading_pairs.txt").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [line[2:].split(" ¦ ") for line in lines]
    golds, answers = zip(*pairs, strict=True)
    verdicts = score(boxed(list(answers)), list(golds), pool=pool)
    cases = [(line, verdict.outcome) for line, verdict in zip(lines, verdicts, strict=True)]
    assert [case for case in cases if {"R": "correct", "W": "wrong"}[case[0][0]] != case[1]] == []


# id -> why the verdict differs on purpose
BY_POLICY = {78: "the answer stands outside a box; the prompt asks for one"}


@pytest.mark.slow
def test_grading_cases(pool: Pool) -> None:
    cases = rows("grading_cases")
    verdicts = score([c["prediction"] for c in cases], [c["gold"] for c in cases], pool=pool)
    wrong = {
        case["id"]: (case["gold"], case["prediction"][:80], verdict.outcome)
        for case, verdict in zip(cases, verdicts, strict=True)
        if (verdict.reward == 1.0) != case["should_be_correct"]
    }
    assert wrong.keys() == BY_POLICY.keys(), wrong


@pytest.mark.parametrize("name", ["math500", "amc23", "aime24", "olympiadbench"])
def test_every_gold_verifies_against_itself(pool: Pool, name: str) -> None:
    golds = [row["answer"] for row in rows(name)]
    assert {v.outcome for v in score(boxed(golds), golds, pool=pool)} == {"correct"}
    # Without the text comparison as well.
    normal = [normalize_answer(gold) for gold in golds]
    outcomes = pool.grade([(gold, gold) for gold in normal])
    assert [gold for gold, o in zip(golds, outcomes, strict=True) if o != "correct"] == []


# The score function


def test_verdicts_keep_order_and_are_counted_apart(pool: Pool) -> None:
    responses = [
        "nothing",
        r"\boxed{2}",
        r"\boxed{3}",
        r"\boxed{}",
        r"\boxed{\frac22}",
        r"\boxed{2}",
    ]
    verdicts = score(responses, ["1", "2", "2", "", "1", "1"], pool=pool)
    assert [v.outcome for v in verdicts] == [
        "no_box",
        "correct",
        "wrong",
        "wrong",
        "correct",
        "wrong",
    ]
    assert [v.reward for v in verdicts] == [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert [v.extracted for v in verdicts] == [None, "2", "3", "", r"\frac22", "2"]
    assert score([], []) == []


def test_text_comparison_needs_no_worker() -> None:
    with closing(Pool(workers=1)) as pool:
        verdicts = score(boxed(["7", "8", "10^{10^9}"]), ["7", "7", "10^{10^9}"], pool=pool)
        assert [v.outcome for v in verdicts] == ["correct", "wrong", "correct"]
        assert processes(pool) == []


def test_an_answer_that_math_verify_cannot_read_is_wrong(pool: Pool) -> None:
    answers = ["'", "x+2", r"\infty0", "0i<1<0", r"x^2\ne 1\ne i^2", "[1,21i]", r"\{(8,18),(i2,32)\}", r"\frac{0}{0}"]
    golds = ["204", "'", "204", "204", r"\{1,2\}", "(1,2]", "1,2,3", "x=1"]
    assert {v.outcome for v in score(boxed(answers), golds, pool=pool)} == {"wrong"}


def test_long_answers_are_wrong_unless_identical() -> None:
    long = "1" + "0" * 5000
    verdicts = score(boxed([long, long, "5" + " " * 200_000 + "6"]), ["1", long, "5"])
    assert [v.outcome for v in verdicts] == ["wrong", "correct", "wrong"]
    assert len(verdicts[0].extracted or "") == rewards.MAX_ANSWER


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="2 responses for 1 answers"):
        score(["a", "b"], ["1"])
    with pytest.raises(ValueError, match=r"responses\[1\] is 5"):
        score(["a", 5], ["1", "2"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"answers\[0\] is None"):
        score(["a"], [None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="seconds is -1"):
        Pool(seconds=-1)


# Hostile answers


@pytest.mark.slow
def test_bombs_cost_their_time_and_nothing_else() -> None:
    with closing(Pool(workers=2, seconds=1.5)) as pool:
        score(boxed(["x+1", "y+1"]), ["1+x", "1+y"], pool=pool)
        start = time.monotonic()
        garbage = [r"a{b$c\(d " * 20_000, "{" * 100_000 + "}" * 100_000, r"\boxed{" * 30_000]
        nested = rf"\boxed{{{'{' * 100_000}5{'}' * 100_000}}}"
        responses = [*boxed(BOMBS), *garbage, nested, *boxed(["1+y", r"\frac{408}{2}"])]
        answers = ["204"] * (len(responses) - 2) + ["y+1", "204"]
        outcomes = [v.outcome for v in score(responses, answers, pool=pool)]
        elapsed = time.monotonic() - start
    assert set(outcomes[: len(BOMBS)]) <= {"timeout", "crash", "wrong"}
    assert "timeout" in outcomes
    assert outcomes[len(BOMBS) : -2] == ["no_box", "no_box", "no_box", "wrong"]
    assert outcomes[-2:] == ["correct", "correct"]
    # Each costs at most its limit and the start of another worker; two run at a time.
    assert elapsed < (len(BOMBS) / 2 + 1) * (1.5 + 4.0)


@pytest.mark.slow
def test_default_limit_is_six_seconds() -> None:
    for bomb in BOMBS[::3]:
        score(boxed(["1+x"]), ["x+1"])  # starts a worker, which takes seconds on slow cores
        start = time.monotonic()
        (verdict,) = score(boxed([bomb]), ["204"])
        assert verdict.reward == 0.0
        assert time.monotonic() - start < 8.0  # 6 s here
    assert score(boxed(["1+x"]), ["x+1"])[0].outcome == "correct"


@settings(max_examples=150, deadline=None)
@example(answer="0i<1<0", gold="204")
@example(answer="[1,21i]", gold="(1,2]")
@given(
    answer=st.text()
    | st.lists(
        st.sampled_from(
            r"\frac \sqrt { } ( ) [ ] ^ _ + - / = < , 1 10 x i e ! \pi \% \infty \text{a}".split()
        )
    ).map(" ".join),
    gold=st.sampled_from(["204", r"\frac{1}{2}", "x+1", "(1,2]", r"\text{even}", "6-5i", "62.5%"]),
)
def test_fuzzed_answers(pool: Pool, answer: str, gold: str) -> None:
    assert score([rf"\boxed{{{answer}}}"], [gold], pool=pool)[0].outcome != "crash"


@settings(max_examples=60, deadline=None)
@given(responses=st.lists(st.text() | st.text().map(r"\boxed{{{}}}".format), max_size=4))
def test_any_text_is_graded(pool: Pool, responses: list[str]) -> None:
    verdicts = score(responses, ["x+1"] * len(responses), pool=pool)
    assert {v.outcome for v in verdicts} <= {"wrong", "no_box"}


def test_killed_worker_costs_one_item() -> None:
    with closing(Pool(workers=1, seconds=30.0)) as pool, ThreadPoolExecutor(1) as thread:
        work = thread.submit(score, boxed([BOMBS[1], "1+x"]), ["204", "x+1"], pool=pool)
        assert wait_until(lambda: processes(pool), 20.0)
        time.sleep(0.3)
        os.kill(processes(pool)[0], signal.SIGKILL)
        assert [v.outcome for v in work.result(timeout=20.0)] == ["crash", "correct"]
        # Killing an idle worker costs no item.
        os.kill(processes(pool)[0], signal.SIGKILL)
        assert wait_until(lambda: gone(processes(pool)[0]), 5.0)
        assert score(boxed(["2+x"]), ["x+2"], pool=pool)[0].outcome == "correct"


def test_stopped_worker_is_killed_at_the_limit() -> None:
    with closing(Pool(workers=1, seconds=1.0)) as pool:
        score(boxed(["1+x"]), ["x+1"], pool=pool)
        (stopped,) = processes(pool)
        os.kill(stopped, signal.SIGSTOP)  # its own alarm cannot end it
        assert score(boxed(["2+x"]), ["x+2"], pool=pool)[0].outcome == "timeout"
        assert gone(stopped)
        assert score(boxed(["3+x"]), ["x+3"], pool=pool)[0].outcome == "correct"


def test_workers_are_limited_and_light(pool: Pool) -> None:
    score(boxed(["1+x", "2+x"]), ["x+1", "x+2"], pool=pool)
    for pid in processes(pool):
        assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == 1024 * 2**20
        assert "jaxlib" not in Path(f"/proc/{pid}/maps").read_text()


def test_threads_share_a_pool(pool: Pool) -> None:
    def work(k: int) -> list[str]:
        answers = [rf"\frac{{{2 * k}}}{{2}} + x", f"x + {k + 1}", "7"]
        return [v.outcome for v in score(boxed(answers), [f"x+{k}", f"x+{k}", "7"], pool=pool)]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(24))) == [["correct", "wrong", "correct"]] * 24


def test_first_calls_from_threads_share_one_pool() -> None:
    with ThreadPoolExecutor(8) as threads:
        verdicts = threads.map(lambda k: score(boxed([f"{k}+x"]), [f"x+{k}"])[0].outcome, range(16))
        assert set(verdicts) == {"correct"}
    assert len(processes(_shared_pool)) <= min(8, os.cpu_count() or 1)


# The worker program, with a fake math_verify


@pytest.fixture
def fake_math_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def install(code: str) -> None:
        (tmp_path / "math_verify.py").write_text(textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


def test_library_output_does_not_disturb_replies(fake_math_verify) -> None:
    fake_math_verify(
        """
        import os
        LatexExtractionConfig = dict
        def parse(text, *args, **kwargs):
            print("noise")
            return [text]
        def verify(gold, answer, **kwargs):
            os.write(1, b'{"outcome": "wrong", "retire": false}' + bytes([10]))
            return True
        """
    )
    with closing(Pool(workers=1)) as pool:
        assert [v.outcome for v in score(boxed(["x", "y"]), ["a", "b"], pool=pool)] == [
            "correct"
        ] * 2


def test_worker_that_cannot_start_is_an_error(fake_math_verify) -> None:
    fake_math_verify("raise ImportError('antlr is missing')")
    with closing(Pool(workers=1)) as pool:
        with pytest.raises(RuntimeError, match="did not start.*antlr is missing"):
            score(boxed(["x"]), ["y"], pool=pool)


def test_worker_that_grew_is_replaced(fake_math_verify) -> None:
    fake_math_verify(
        """
        LatexExtractionConfig = dict
        def parse(text, *args, **kwargs):
            return [text]
        def verify(gold, answer, **kwargs):
            if "big" in answer[0]:
                bytearray(300 * 2**20).count(1)
            return True
        """
    )
    with closing(Pool(workers=1, megabytes=600)) as pool:
        used = []
        for answer in ["x", "y", "big", "z"]:
            assert score(boxed([answer]), ["gold"], pool=pool)[0].outcome == "correct"
            used += processes(pool)
    assert used[0] == used[1] == used[2] != used[3]


# The program around it


def script(code: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}",
    ]


def test_import_is_light() -> None:
    code = "import sgpo_jax.rewards\nprint({'jax', 'sympy', 'math_verify'} & set(sys.modules))"
    assert (
        subprocess.run(script(code), capture_output=True, text=True, check=True).stdout == "set()\n"
    )


def test_works_in_a_forked_process_and_exits_cleanly() -> None:
    code = r"""
        import os
        from sgpo_jax.rewards import score
        assert score([r"\boxed{1+x}"], ["x+1"])[0].reward == 1.0
        child = os.fork()
        assert score([r"\boxed{2+x}"], ["x+2"])[0].reward == 1.0
        if child:
            assert os.waitpid(child, 0)[1] == 0
            print("done")
        """
    done = subprocess.run(script(code), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_no_worker_outlives_a_killed_parent() -> None:
    code = r"""
        import threading, time
        from sgpo_jax.rewards import Pool, score
        pool = Pool(workers=2, seconds=3.0)
        answers = [r"\boxed{10^{10^{10}}}", r"\boxed{1+x}"]
        work = threading.Thread(target=lambda: score(answers, ["204", "x+1"], pool=pool))
        work.start()
        while len(pool._workers) < 2:
            time.sleep(0.01)
        time.sleep(0.3)  # now one is idle, one is busy
        print(*[worker.process.pid for worker in pool._workers.values()], flush=True)
        time.sleep(60)
        """
    with subprocess.Popen(script(code), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and not any(map(gone, pids))
        parent.kill()
        assert wait_until(lambda: all(map(gone, pids)), 60.0)  # both need the processor once, which may be busy


def test_a_large_parent_does_not_cost_a_worker_per_answer() -> None:
    """A child inherits its parent's peak memory, which must not be taken for its own."""
    ballast = np.ones(90_000_000)  # 720 MB, over half of a worker's limit
    with closing(Pool(workers=1)) as pool:
        pids = set()
        for _ in range(3):
            assert pool.grade([("\\frac12", "0.5")]) == ["correct"]
            pids |= {worker.process.pid for worker in pool._workers.values()}
            assert all(worker.process.poll() is None for worker in pool._workers.values())
    assert len(pids) == 1 and ballast[0] == 1
