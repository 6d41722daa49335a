"""Text in, text out: an endpoint over real HTTP, good and bad, and our own model in process."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import jax
import jax.numpy as jnp
import pytest
from helpers.chat_server import Answer, ChatServer, completion, failure
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_jax import policy, sharding
from sgpo_jax.policy.generation import respond
from sgpo_jax.strategies import clients, faults, replies

pytest.importorskip("openai", reason="needs the extra 'extract'")

KEY = "sk-canary-0123456789abcdef"
REQUEST = replies.Request("1", "What is 2 + 3?", 1, 50)


def client(server, stop=None, **options):
    """Returns (ask, list of the reasons for its retries)."""
    reasons: list[str] = []
    fields = {"key": KEY, "temperature": 0.6, "top_p": 0.95, "backoff": 0.01, "timeout": 5.0, "retries": 3, **options}
    return clients.endpoint(clients.Endpoint("big-model", server.url, **fields), stop, reasons.append), reasons


def scripted(*answers):
    """Returns a server that gives the answers in order and then repeats the last one."""
    return ChatServer(lambda prompt, body, headers, number: answers[min(number, len(answers) - 1)])


def test_a_normal_reply_and_what_was_asked():
    seen = {}

    def answer(prompt, body, headers, number):
        seen.update(headers)
        return completion("five", usage=(9, 4))

    with ChatServer(answer) as server:
        ask, reasons = client(server)
        assert ask(REQUEST) == replies.Reply(["five"], ["stop"], 9, 4)
        ask, _ = client(server, limit_field="max_completion_tokens", key="")
        assert ask(REQUEST._replace(choices=3)).texts == ["five"]
    wanted = {"model": "big-model", "messages": [{"role": "user", "content": "What is 2 + 3?"}]}
    sampling = {"temperature": 0.6, "top_p": 0.95}
    assert server.requests[0] == wanted | sampling | {"max_tokens": 50}
    assert server.requests[1] == wanted | sampling | {"max_completion_tokens": 50, "n": 3}
    assert seen["authorization"] == "Bearer none" and not reasons


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (failure(429, "slow down"), "429: "),
        (failure(500, "oops"), "500: "),
        (Answer(b"<html>bad gateway</html>", 502, {"Content-Type": "text/html"}), "502: "),
        (completion("late")._replace(delay=0.8), "Timeout"),
        (completion("drip")._replace(drip=0.02), "Timeout"),
        (completion("half")._replace(body=completion("half").body[:-20], cut=50), "Error"),
        (Answer(b'{"choices": [{"mess'), "JSONDecodeError"),
        (Answer(b"\xff\xfe not text"), "UnicodeDecodeError"),
        (Answer(b"[" * 100_000), "RecursionError"),
        (Answer(b"<html>hello</html>", 200, {"Content-Type": "text/html"}), "JSONDecodeError"),
        (Answer(b"[]"), "not a JSON object but a list"),
        (Answer(b"{}"), "without choices"),
        (Answer(b'{"choices": null}'), "without choices"),
        (Answer(b'{"choices": [null, 3, {"message": "x"}]}'), "without choices"),
        (completion(), "without choices"),
    ],
    ids=["429", "500", "502", "slow", "drip", "cut", "garbage", "bytes", "nested", "html", "list", "empty object",
         "null choices", "odd choices", "empty choices"],
)  # fmt: skip
def test_a_passing_failure_is_tried_again(bad, reason):
    with scripted(bad, bad, completion("five")) as server:
        ask, reasons = client(server, timeout=0.4)
        assert ask(REQUEST).texts == ["five"]
    assert len(server.requests) == 3
    assert len(reasons) == 2 and all(reason in why for why in reasons), reasons


def test_tokens_of_replies_without_choices_are_counted():
    with scripted(completion(usage=(9, 4)), completion("five", usage=(10, 6))) as server:
        reply = client(server)[0](REQUEST)
    assert (reply.prompt_tokens, reply.completion_tokens) == (19, 10)


def test_tries_end():
    with scripted(failure(503, "down")) as server:
        ask, reasons = client(server, retries=2)
        with pytest.raises(faults.Unavailable, match="3 tries, the last one: 503"):
            ask(REQUEST)
    assert len(server.requests) == 3 and len(reasons) == 2


def test_waits_double_and_last_as_long_as_the_server_asks():
    with scripted(failure(429, **{"Retry-After": "1"}), failure(500), failure(500), completion("x")) as server:
        client(server, backoff=0.1)[0](REQUEST)
    waits = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert waits[0] >= 1.0 and waits[1] >= 0.15 and waits[2] >= 0.3


def test_retry_after():
    in_a_minute = clients.retry_after(formatdate(time.time() + 60, usegmt=True))
    assert 55 < in_a_minute <= 60
    assert clients.retry_after("7.5") == 7.5 and clients.retry_after("86400") == clients.LONGEST_WAIT
    for nonsense in ("", "soon", "-5", "nan", formatdate(0, usegmt=True), "Wed, 99 Foo 2026"):
        assert clients.retry_after(nonsense) == 0.0
    assert clients.retry_after("inf") == clients.LONGEST_WAIT


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (failure(401, f"wrong key {KEY}"), faults.Denied),
        (failure(402, "no money"), faults.Denied),
        (failure(403, "not you"), faults.Denied),
        (failure(404, "no such model"), faults.Denied),
        (failure(429, "pay first", "insufficient_quota"), faults.Denied),
        (failure(400, "odd"), faults.Refused),
        (failure(422, "odd"), faults.Refused),
        (failure(400, "long", "context_length_exceeded"), faults.TooLong),
        (failure(400, "maximum context length is 4096 tokens"), faults.TooLong),
    ],
)
def test_what_no_retry_mends_is_not_tried_again(bad, error):
    with scripted(bad) as server:
        ask, _ = client(server)
        with pytest.raises(error) as raised:
            ask(REQUEST)
    assert type(raised.value) is error and len(server.requests) == 1
    assert KEY not in str(raised.value) and raised.value.__cause__ is None


def test_stopping_ends_the_wait():
    stop = threading.Event()
    with scripted(failure(429, **{"Retry-After": "100"})) as server:
        ask, _ = client(server, stop=stop)
        threading.Timer(0.3, stop.set).start()
        started = time.monotonic()
        with pytest.raises(faults.Unavailable, match="stopped while waiting"):
            ask(REQUEST)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("reply", "texts", "finish", "tokens"),
    [
        (completion(None), [""], ["stop"], (11, 7)),
        (completion(None, refusal="no"), ["no"], ["refused"], (11, 7)),
        (completion("x", finish="content_filter"), ["x"], ["refused"], (11, 7)),
        (completion("x", finish="length"), ["x"], ["length"], (11, 7)),
        (completion("a", "b", "c"), ["a", "b"], ["stop", "stop"], (11, 7)),
        (completion("x", reasoning_content="hm"), ["<think>\nhm\n</think>\n\nx"], ["stop"], (11, 7)),
        (completion([{"type": "text", "text": "x"}, 3, {"text": 4}]), ["x"], ["stop"], (11, 7)),
        (completion(5), [""], ["stop"], (11, 7)),
        (completion("a\ud800b"), ["a?b"], ["stop"], (11, 7)),
        (completion(f"key {KEY}."), ["key [key]."], ["stop"], (11, 7)),
        (completion("é", usage=None), ["é"], ["stop"], (14, 2)),
        (completion("x", usage={"prompt_tokens": -3, "completion_tokens": "many"}), ["x"], ["stop"], (14, 1)),
        (completion("x", usage={"prompt_tokens": True, "completion_tokens": 1e300}), ["x"], ["stop"], (14, 1)),
        (completion("y" * 2_000_000), ["y" * replies.MAX_TEXT], ["length"], (11, 7)),
    ],
)
def test_odd_replies_become_plain_ones(reply, texts, finish, tokens):
    with scripted(reply) as server:
        found = client(server)[0](REQUEST._replace(choices=2))
    assert found == replies.Reply(texts, finish, *tokens)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "usage", "finish_reason", "prompt_tokens"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=50)
@given(JSON, st.binary(max_size=50))
def test_any_body_is_a_reply_or_a_value_error(content, noise):
    for body in (json.dumps(content).encode(), noise, json.dumps({"choices": [{"message": content}]}).encode()):
        try:
            reply = replies.read_reply(body, REQUEST, str)
        except ValueError:
            continue
        assert all(isinstance(text, str) for text in reply.texts) and len(reply.finish) == len(reply.texts) <= 1
        assert reply.prompt_tokens >= 0 and reply.completion_tokens >= 0


def test_an_endless_body_is_given_up(monkeypatch):
    monkeypatch.setattr(clients, "MAX_BODY", 1000)
    with scripted(completion("y" * 5000), completion("short")) as server:
        ask, reasons = client(server)
        assert ask(REQUEST).texts == ["short"]
    assert "over 1000 bytes" in reasons[0]


@pytest.mark.parametrize("url", ["https://user:secretpass@host/v1", "https://secretpass@host/v1"])
def test_a_password_in_the_url_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="environment variable") as error:
        clients.check_base_url(url)
    assert "secretpass" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://host/v1/chat/completions", "https://host/v1/chat/completions: ends with the address of a request"),
        ("https://host/v1/chat/completions/", "ends with the address of a request"),
        ("https://host/v1/models", "ends with the address of a request"),
        ("https://host/v1?key=secretpass", "https://host/v1: has a query or fragment"),
        ("https://host/v1#top", "has a query or fragment"),
        ("https://host/v1 ", "has a space or line break"),
        ("https://host/a b/v1", "has a space or line break"),
    ],
)
def test_a_url_to_which_no_path_can_be_added_is_refused(url, said):
    with pytest.raises(ValueError) as error:
        clients.check_base_url(url)
    assert said in str(error.value) and "secretpass" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://host", "http://host/", "https://host:8000/v1/", "https://host/openai/my-models/v1"]
)
def test_other_urls_are_accepted(url):
    clients.check_base_url(url)


@pytest.mark.parametrize("url", ["", "api.example.com/v1", "ftp://host/v1", "https://"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="must begin with http"):
        clients.check_base_url(url)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match="extra 'extract'"):
        clients.endpoint(clients.Endpoint("m", "http://x/v1", "", temperature=1.0, top_p=1.0))


def test_the_key_is_not_shown_with_its_endpoint():
    assert KEY not in repr(clients.Endpoint("m", "http://x/v1", KEY, temperature=1.0, top_p=1.0))


# ---- our own model


@pytest.fixture(scope="module")
def small():
    """Returns (policy, params on a mesh of one device, mesh) of a random decoder for the embedded world."""
    loaded, initial = policy.load(
        "scratch", "arithmetic", layers=1, hidden=16, heads=2, mlp=16, dtype=jnp.float32, instruction=""
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return loaded, initial(jax.random.key(0), mesh), mesh


def local(small, seed=0, gather=0.05):
    model = clients.LocalModel(*small, seed=seed, temperature=1.0, top_p=1.0, max_prompt_tokens=24, batch=4)
    return clients.local(model, gather)


def requests(count):
    return [replies.Request(f"r{i}", f"Prices at copper market: {i} 3", 2, 6) for i in range(count)]


def test_replies_of_our_own_model_depend_on_seed_and_id_alone(small):
    alone = [local(small)(request) for request in requests(6)]
    ask = local(small)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, requests(6)))
    assert together == alone
    assert all(len(reply.texts) == 2 for reply in alone)
    assert len({text for reply in alone for text in reply.texts}) > 6
    one = requests(1)[0]
    assert local(small, seed=1)(one).texts != alone[0].texts
    assert local(small)(one._replace(id="other")).texts != alone[0].texts


def test_waiting_requests_share_a_batch(small, monkeypatch):
    calls = []
    monkeypatch.setattr(clients, "respond", lambda *args: calls.append(args[6].max_new_tokens) or respond(*args))
    ask = local(small, gather=0.5)
    first, *rest = requests(4)
    mixed = [first, replies.Request("long", "Prices at copper market: 1 1", 2, 7), *rest]
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, mixed))
    assert sorted(calls) == [6, 7], "four of one shape at once, the fifth by itself"
    assert len(answers) == 5


def test_tokens_and_ends_are_counted(small):
    reply = local(small)(requests(1)[0])
    prompt = clients.tokenizers.encode_turn(small[0].tokenizer, requests(1)[0].prompt)
    assert reply.prompt_tokens == len(prompt)
    assert 2 <= reply.completion_tokens <= 12 and set(reply.finish) <= {"stop", "length"}
    full = [finish == "length" for finish in reply.finish]
    assert reply.completion_tokens >= 6 * sum(full)


def test_what_does_not_fit_is_refused(small):
    with pytest.raises(faults.TooLong, match="at most 24 fit"):
        local(small)(replies.Request("1", "3 " * 40, 1, 6))
    with pytest.raises(faults.Denied, match="4096 positions"):
        local(small)(replies.Request("1", "3 3", 1, 5000))


def test_an_error_of_the_engine_reaches_everybody_who_waits(small, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(clients, "respond", broken)
    ask = local(small)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(ask, request) for request in requests(3)]
    assert [str(future.exception(timeout=20)) for future in futures] == ["out of memory"] * 3
