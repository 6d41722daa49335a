"""An endpoint at its worst: retries are bounded, every token that was paid for is counted once, no work is lost."""

import gzip
import json
import random
import resource
import threading
from pathlib import Path

import pytest
from helpers.chat_server import Answer, ChatServer, completion, failure, helpful, problems
from helpers.configs import extraction

from sgpo_jax import config as configs
from sgpo_jax import strategies
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.strategies import clients, faults, replies

pytest.importorskip("openai", reason="needs the extra 'extract'")

KEY = "sk-canary-fedcba9876543210"
REQUEST = replies.Request("1", "What is 2 + 3?", 1, 50)


class Clock(threading.Event):
    """A stop event whose waits take no time and are summed."""

    def __init__(self):
        super().__init__()
        self.waited = 0.0

    def wait(self, seconds=None):
        self.waited += seconds
        return self.is_set()


def client(url, stop, retried=lambda why: None, **options):
    fields = {"key": KEY, "temperature": 0.6, "top_p": 0.95, "timeout": 5.0, **options}
    return clients.endpoint(clients.Endpoint("big-model", url, **fields), stop, retried)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def write_problems(tmp_path, count):
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems(count)))


def run(tmp_path, url, **fields):
    config = extraction(tmp_path, url, **{"retries": 8} | fields)
    why = strategies.run(config, tmp_path / "work", tmp_path / "out.jsonl")
    return why, read_jsonl(tmp_path / "out.jsonl")


def paid_for(tmp_path):
    return [record for record in read_jsonl(tmp_path / "work/extraction.jsonl") if record["kind"] == "reply"]


# ---- one request


@pytest.mark.parametrize("minutes", [0.5, 0.75])
def test_the_default_patience_outlasts_a_short_outage(minutes):
    """Six retries with waits that double from one second make at least 63 * 0.75 seconds."""
    clock = Clock()
    with ChatServer(lambda *_: completion("five") if clock.waited > 60 * minutes else failure(503, "down")) as server:
        assert client(server.url, stop=clock)(REQUEST).texts == ["five"]
    assert clock.waited < 80


def test_the_waits_of_a_long_outage_are_bounded():
    clock, fields = Clock(), configs.base().extract
    with ChatServer(lambda *_: failure(503, "down")) as server:
        ask = client(server.url, stop=clock, retries=fields.retries, backoff=fields.backoff)
        with pytest.raises(faults.Unavailable, match="7 tries, the last one: 503"):
            ask(REQUEST)
    assert len(server.requests) == 7 and 63 * 0.75 <= clock.waited <= 63 * 1.25
    clock = Clock()
    with ChatServer(lambda *_: failure(429, **{"Retry-After": "1e300"})) as server:
        with pytest.raises(faults.Unavailable):
            client(server.url, stop=clock, retries=3)(REQUEST)
    assert len(server.requests) == 4 and clock.waited == 3 * clients.LONGEST_WAIT


def test_nobody_listens_and_then_somebody_does():
    clock = Clock()
    with ChatServer(lambda *_: completion("gone")) as server:
        pass
    reasons, back = [], []

    def retried(why):
        reasons.append(why)
        if len(reasons) == 3:
            back.append(ChatServer(lambda *_: completion("five"), port=int(server.url.split(":")[2].split("/")[0])))
            back[0].__enter__()

    try:
        assert client(server.url, stop=clock, retried=retried)(REQUEST).texts == ["five"]
    finally:
        for server in back:
            server.__exit__()
    assert len(reasons) == 3 and all("APIConnectionError" in why for why in reasons)


def test_a_small_body_that_unpacks_into_a_large_one_is_given_up(monkeypatch):
    monkeypatch.setattr(clients, "MAX_BODY", 2**20)
    packed = gzip.compress(bytes(2**28), 9)
    bomb = Answer(packed, headers={"Content-Type": "application/json", "Content-Encoding": "gzip"})
    before, reasons = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    with ChatServer(lambda *rest: bomb if rest[-1] == 0 else completion("five")) as server:
        ask = client(server.url, stop=Clock(), retried=reasons.append)
        assert ask(REQUEST).texts == ["five"]
    assert "over 1048576 bytes" in reasons[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024, "KiB"


# ---- whole extractions


def test_every_token_is_counted_once_whatever_the_server_does(tmp_path, capsys):
    """The journal has the tokens that the server charged for every reply that arrived."""
    write_problems(tmp_path, 8)
    chosen, lock, charged = random.Random(0), threading.Lock(), []

    def answer(prompt, body, headers, number):
        usage = {"prompt_tokens": 100 + number, "completion_tokens": 10_000 + number}
        with lock:
            kind = chosen.choice(["good"] * 3 + ["429", "500", "html", "list", "cut", "empty", "slow"])
            if kind in ("good", "empty"):
                charged.append((usage["prompt_tokens"], usage["completion_tokens"]))
        if kind == "empty":  # paid for, but nothing in it
            return completion(usage=usage)
        good = helpful(prompt, body, headers, number)
        good = good._replace(body=json.dumps(json.loads(good.body) | {"usage": usage}).encode())
        return {
            "429": failure(429, **{"Retry-After": "0.01"}), "500": failure(500), "list": Answer(b"[]"),
            "html": Answer(b"<html>", 200, {"Content-Type": "text/html"}),
            "cut": good._replace(body=good.body[:-20], cut=20),
            "slow": good._replace(delay=0.9), "good": good,
        }[kind]  # fmt: skip

    with ChatServer(answer) as server:
        why, written = run(tmp_path, server.url, retries=30, timeout=0.5, backoff=1e-6)
    assert why == "" and len(written) == 8
    paid = paid_for(tmp_path)
    assert len({(record["id"], record["stage"], record["index"]) for record in paid}) == len(paid) == 48
    assert sum(record["prompt_tokens"] for record in paid) == sum(a for a, _ in charged)
    assert sum(record["completion_tokens"] for record in paid) == sum(b for _, b in charged)
    cost = sum(a + 2 * b for a, b in charged) / 1e6
    assert sum(record["cost"] for record in paid) == pytest.approx(cost, rel=1e-12)
    assert f"cost {cost:.4f}" in capsys.readouterr().out
    assert len(server.requests) < 48 * 10


def test_tokens_of_requests_that_fail_count_for_all_runs_together(tmp_path):
    """Every answer is charged and has no usable text."""
    write_problems(tmp_path, 2)
    with ChatServer(lambda *_: completion("half", finish="error", usage=(30, 20))) as server:
        why, written = run(tmp_path, server.url, retries=2, max_failures=20)
        assert why.startswith("left open: 2 for an error in a 200; ") and not written and len(server.requests) == 6
        assert sum(record["prompt_tokens"] for record in paid_for(tmp_path)) == 6 * 30
        assert sum(record["completion_tokens"] for record in paid_for(tmp_path)) == 6 * 20
        why, _ = run(tmp_path, server.url, budget_tokens=310)
        assert "the budget (310) is reached: 300 tokens" in why and len(server.requests) == 6
    with ChatServer(helpful) as server:
        assert len(run(tmp_path, server.url)[1]) == 2 and len(server.requests) == 12


def test_a_server_that_goes_away_in_the_middle_costs_no_reply(tmp_path):
    write_problems(tmp_path, 6)
    with ChatServer(lambda *rest: helpful(*rest) if rest[-1] < 14 else failure(503, "down")) as server:
        why, _ = run(tmp_path, server.url, retries=1, max_failures=3)
    assert "problems in a row could not be finished" in why
    paid = paid_for(tmp_path)
    assert len(paid) == 14
    with ChatServer(helpful) as server:
        why, written = run(tmp_path, server.url)
    assert why == "" and len(written) == 6 and len(server.requests) == 36 - 14
    assert paid_for(tmp_path)[:14] == paid


def test_a_full_disk_stops_an_extraction_and_the_next_goes_on(tmp_path):
    write_problems(tmp_path, 6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ChatServer(helpful) as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                run(tmp_path, server.url, concurrency=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        first, kept = len(server.requests), len(paid_for(tmp_path))
        assert 1 <= kept < 36 and first <= kept + 4, "those under way when the disk was full"
        why, written = run(tmp_path, server.url, concurrency=2)
    assert why == "" and len(written) == 6 and len(server.requests) == first + 36 - kept


def test_the_key_is_nowhere_in_what_an_audit_leaves(tmp_path, capsys, caplog):
    """The judge's key is not in files, in the output or in the logs of any library."""
    write_problems(tmp_path, 3)
    with caplog.at_level(0), ChatServer(helpful) as server:
        run(tmp_path, server.url)

        def indiscreet(prompt, body, headers, number):
            assert headers["authorization"] == f"Bearer {KEY}"
            if number == 0:
                return failure(500, f"bad key {KEY}")
            return completion(f"{KEY}\nRatings: [0.9, 0.7, 0.8, 1]")

        with ChatServer(indiscreet) as judge:
            config = extraction(tmp_path, server.url, retries=8, **{"judge.name": "judge", "judge.base_url": judge.url})
            assert strategies.audit(config, tmp_path / "work") == ""
    (tmp_path / "config.json").write_text(configs.to_json(config))
    texts = [path.read_text() for path in Path(tmp_path).rglob("*") if path.is_file()]
    shown = capsys.readouterr()
    assert "[key]" in (tmp_path / "work/audit.jsonl").read_text()
    for text in (*texts, shown.out, shown.err, caplog.text):
        assert KEY not in text and KEY[3:] not in text
