"""Habits of servers below and around the reply: broken connections, packing, redirects, counts, names.

Each has an outcome, a number of requests, and words; what has arrived is not asked for again.
"""

import gzip
import json
import socketserver
import threading
import time
import zlib
from email.utils import formatdate

import pytest
from helpers.chat_server import Answer, ChatServer, completion

from sgpo_jax.strategies import clients, faults, parsing, replies

pytest.importorskip("openai", reason="needs the extra 'extract'")

REQUEST = replies.Request("1", "What is 2 + 3?", 1, 50)
WHOLE = completion("five").body
FIVE = replies.Reply(["five"], ["stop"], 11, 7)
RETRIES = 2


class RawServer(socketserver.ThreadingTCPServer):
    """Sends the same bytes to every request, and closes the connection `stay` seconds later; a context manager."""

    daemon_threads = True

    def __init__(self, answer: bytes, stay: float = 0.0):
        self.requests = []

        class Handler(socketserver.StreamRequestHandler):
            def handle(handler):
                length = 0
                while (line := handler.rfile.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                self.requests.append(json.loads(handler.rfile.read(length)))
                handler.wfile.write(answer)
                time.sleep(stay)

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


def asked(answer, request=REQUEST, **options):
    """Returns (reply or exception, number of requests, reasons of the retries, notices)."""
    reasons, notices = [], []
    fields = {"key": "", "temperature": 0.6, "top_p": 0.95, "backoff": 0.001, "retries": RETRIES, **options}
    with RawServer(answer) if isinstance(answer, bytes) else ChatServer(lambda *_: answer) as server:
        ask = clients.endpoint(
            clients.Endpoint("big-model", server.url, **fields), threading.Event(), reasons.append, notices.append
        )
        try:
            result = ask(request)
        except Exception as error:
            result = error
    return result, len(server.requests), reasons, notices


def http(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunks(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + end


def changed(**fields) -> Answer:
    return Answer(json.dumps(json.loads(WHOLE) | fields).encode())


def message(finish="stop", **fields) -> Answer:
    return changed(choices=[{"message": {"role": "assistant", **fields}, "finish_reason": finish}])


CHUNKED = "Transfer-Encoding: chunked"
ARRIVED = {
    "chunks": http(chunks(WHOLE[:30], WHOLE[30:]), CHUNKED),
    "chunks without an end": http(chunks(WHOLE, end=b""), CHUNKED),
    "a last chunk that is cut after the text": http(chunks(WHOLE + b" " * 20, end=b"")[:-15], CHUNKED),
    "fewer bytes than announced": http(WHOLE, f"Content-Length: {len(WHOLE) + 40}"),
    "no length, until the connection ends": http(WHOLE),
    "an older protocol": http(WHOLE).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "more bytes than announced": http(WHOLE + b"<html>", f"Content-Length: {len(WHOLE)}"),
    "gzip": http(gzip.compress(WHOLE), "Content-Encoding: gzip"),
    "gzip by another name": http(gzip.compress(WHOLE), "Content-Encoding: x-gzip"),
    "gzip that nobody announced": http(gzip.compress(WHOLE)),
    "gzip that is none": http(WHOLE, "Content-Encoding: gzip"),
    "zlib": http(zlib.compress(WHOLE), "Content-Encoding: deflate"),
    "a packing that is none": http(WHOLE, "Content-Encoding: br"),
    "keys twice": WHOLE[:-1] + b', "usage": {"prompt_tokens": 11, "completion_tokens": 7}}',
    "the place of an older protocol": changed(choices=[{"text": "five", "finish_reason": "stop"}]),
    "parts": message(content=[{"type": "text", "text": "fi"}, {"type": "text", "text": "ve"}]),
    "status 201": Answer(WHOLE, 201),
    "an error that is empty": changed(error={}),
    "calls that are none": message(content="five", tool_calls=[]),
}


@pytest.mark.parametrize("name", ARRIVED)
def test_a_reply_that_has_arrived_is_not_asked_for_again(name):
    answer = ARRIVED[name]
    answer = http(answer) if isinstance(answer, bytes) and not answer.startswith(b"HTTP") else answer
    assert asked(answer) == (FIVE, 1, [], [])


CUT = WHOLE[:-20]
FAULTS = {  # what is sent, the exception, words of the message; one request, or all tries for Unavailable
    "chunks that are cut": (http(chunks(CUT, end=b""), CHUNKED), faults.Unavailable, "RemoteProtocolError"),
    "a body that is cut": (http(CUT, f"Content-Length: {len(WHOLE)}"), faults.Unavailable, "RemoteProtocolError"),
    "too small a length": (http(WHOLE, "Content-Length: 50"), faults.Unavailable, "not JSON"),
    "a connection that ends at once": (b"", faults.Unavailable, "disconnected without sending a response"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n", faults.Unavailable, "APIConnectionError"),
    "gzip that is cut": (http(gzip.compress(WHOLE)[:-30]), faults.Unavailable, "not JSON"),
    "no content": (http(b"", status="204 No Content"), faults.Unavailable, "an empty body"),
    "still working": (http(b'{"status": "queued"}', status="202 Accepted"), faults.Unavailable, "queued"),
    "choices: null": (changed(choices=None), faults.Unavailable, "without choices"),
    "choices as an object": (changed(choices={"0": "five"}), faults.Unavailable, "without choices"),
    "text outside UTF-8 and JSON": (http(b"\xff\xfe\x00"), faults.Unavailable, "UnicodeDecodeError"),
    "a text of JSON": (http(json.dumps(WHOLE.decode()).encode()), faults.Unavailable, "not a JSON object but a str"),
    "an error in another field": (
        http(b'{"code": 401, "msg": "token expired", "success": false}'), faults.Denied, "token expired",
    ),
    "an error of yet another name": (
        http(b'{"error_code": 17, "error_msg": "daily limit reached"}'), faults.Unavailable,
        "an error in a 200: daily limit reached",
    ),
    "an error in a broken body": (
        http(b'{"error": {"message": "no credit", "code": 402}}', "Content-Length: 999"), faults.Denied, "no credit",
    ),
    "an error that is cut": (
        http(b'{"error": {"mess', "Content-Length: 999", status="401 No"), faults.Denied, "401: a body that breaks off",
    ),
    "an error that is packed": (
        http(gzip.compress(b'{"error": {"message": "bad key"}}'), "Content-Encoding: gzip", status="401 No"),
        faults.Denied, "401: bad key",
    ),
    "an error whose packing is none": (
        http(b'{"error": {"message": "bad key"}}', "Content-Encoding: gzip", status="401 No"),
        faults.Denied, "401: bad key",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_connection_or_the_wrapping(name):
    answer, kind, words = FAULTS[name]
    result, count, reasons, notices = asked(answer)
    assert type(result) is kind and words in str(result), result
    assert count == (RETRIES + 1 if kind is faults.Unavailable else 1) and len(reasons) == count - 1 and not notices


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_says_where_it_leads(status):
    seen = []
    with ChatServer(lambda *rest: seen.append(rest) or completion("stolen")) as other:
        there = Answer(b"", status, {"Location": f"{other.url}/chat/completions"})
        result, count, _, _ = asked(there)
    assert type(result) is faults.Denied and count == 1 and not seen
    assert f"{status}: redirects to {other.url}/chat/completions" in str(result)


@pytest.mark.parametrize("asked_for", [formatdate(4e9, usegmt=True), "36000", "1e99"])
def test_a_server_that_asks_for_hours_is_asked_again_in_minutes(asked_for):
    waited = []

    class Clock(threading.Event):
        def wait(self, seconds=None):
            waited.append(seconds)

    busy = Answer(b'{"error": {"message": "come back"}}', 429, {"Retry-After": asked_for})
    with ChatServer(lambda *rest: completion("five", usage=(11, 7)) if rest[-1] else busy) as server:
        endpoint = clients.Endpoint("big-model", server.url, "", temperature=0.6, top_p=0.95, retries=1)
        assert clients.endpoint(endpoint, Clock())(REQUEST) == FIVE
    assert waited == [clients.LONGEST_WAIT]


def test_a_reply_that_nothing_follows_but_the_time_limit():
    reasons = []
    with RawServer(http(WHOLE), stay=2.0) as server:
        endpoint = clients.Endpoint("big-model", server.url, "", temperature=0.6, top_p=0.95, timeout=0.3)
        assert clients.endpoint(endpoint, retried=reasons.append)(REQUEST) == FIVE
    assert len(server.requests) == 1 and not reasons


def test_a_text_with_half_a_character_is_a_text():
    body = completion("five €").body.replace(b"\\u20ac", "€".encode()[:2])
    reply, count, reasons, _ = asked(http(body))
    assert reply.texts == ["five \ufffd"] and count == 1 and not reasons


def test_calls_of_tools_in_place_of_a_text_are_named():
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    for finish in ("tool_calls", "stop"):
        reply, count, _, _ = asked(message(finish, content=None, tool_calls=calls))
        assert reply.finish == ["tool_calls"] and count == 1
        assert parsing.parse(reply.texts[0], reply.finish[0]) == parsing.Parsed(None, "unknown_finish", "tool_calls")
    assert asked(message("tool_calls", content="five", tool_calls=calls))[0].finish == ["stop"], "there is a text"
    assert asked(message("stop", content="", tool_calls=[]))[0].finish == ["stop"], "which is empty"


def test_a_text_without_an_end_has_ended_by_the_limit_if_the_count_says_so():
    for tokens, end in ((49, "stop"), (50, "length"), (60, "length")):
        assert asked(completion("x", finish=None, usage=(11, tokens)))[0].finish == [end]
    assert asked(completion("x", finish="stop", usage=(11, 60)))[0].finish == ["stop"]
    assert asked(completion("x", finish=None, usage=None))[0].finish == ["stop"]
    odd = [None, 3, {"message": {"content": "x"}}]
    usage = {"prompt_tokens": 11, "completion_tokens": 50}
    reply, count, _, _ = asked(changed(choices=odd, usage=usage), REQUEST._replace(choices=3))
    assert reply.texts == ["x"] and reply.finish == ["length"] and count == 1


def test_a_server_that_ignores_the_limit_is_said_once_and_counted_in_full():
    endless = completion("y" * 4000, usage=(11, 1000))
    reply, count, _, notices = asked(endless)
    assert reply == replies.Reply(["y" * 4000], ["stop"], 11, 1000) and count == 1
    (notice,) = notices
    assert "more tokens than the limit" in notice and "budget" in notice
    assert not asked(completion("y" * 4000, usage=None))[3], "bytes are no tokens"


def second_is_cut(tokens: int):
    """Returns a reply of two texts, of which the second ends by the limit."""
    body = completion("y" * 80, "z" * 90, finish="length", usage=(11, tokens)).body
    return Answer(body.replace(b'"length"', b'"stop"', 1))


@pytest.mark.parametrize(
    ("answer", "choices", "counted"),
    [
        (completion("y" * 80, "z" * 90, finish="length", usage=(11, 50)), 2, 170),
        (completion("y" * 80, "z" * 90, finish="length", usage=(11, 99)), 2, 170),
        (completion("y" * 80, "z" * 90, finish="length", usage=(11, 100)), 2, 100),
        (completion("y" * 80, "z" * 90, finish="stop", usage=(11, 50)), 2, 50),
        (completion("yy", "z" * 60, finish="length", usage=(11, 52)), 2, 52),
        (second_is_cut(50), 2, 170),  # the first text has a token too
        (second_is_cut(51), 2, 51),
        (completion("y" * 80, finish="length", usage=(11, 30)), 1, 30),  # the context ends before the limit
    ],
)
def test_a_count_of_one_text_of_several_is_no_count(answer, choices, counted):
    reply, _, _, notices = asked(answer, REQUEST._replace(choices=choices))
    assert reply.completion_tokens == counted
    assert ["counts too few tokens" in notice for notice in notices] == [True] * (counted == 170)


def test_another_model_than_the_one_asked_for_is_said_once():
    names = iter(["big-model", "", None, 3, "small-model", "small-model", "big-model-2", *"abcdefghijklmnopqrstuvwxyz"])
    notices = []
    with ChatServer(lambda *_: changed(model=next(names))) as server:
        endpoint = clients.Endpoint("big-model", server.url, "", temperature=0.6, top_p=0.95, retries=0)
        ask = clients.endpoint(endpoint, notice=notices.append)
        for _ in range(7):
            assert ask(REQUEST) == FIVE
        assert [notice.split("'")[3] for notice in notices] == ["small-model", "big-model-2"]
        for _ in range(26):
            ask(REQUEST)
    assert len(notices) == clients.MAX_NOTICES, "a server that has a new name every time does not fill the journal"
