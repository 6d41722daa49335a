"""A matrix of what servers answer: each entry has an outcome, the server's words, and the number of requests."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.chat_server import Answer, ChatServer, completion

from sgpo_jax.strategies import clients, faults, parsing, replies

pytest.importorskip("openai", reason="needs the extra 'extract'")

REQUEST = replies.Request("1", "What is 2 + 3?", 1, 50)
HTML = {"Content-Type": "text/html"}
EVENTS = {"Content-Type": "text/event-stream"}
RETRIES = 2


def asked(answer, request=REQUEST, **options):
    """Returns (reply or exception, bodies of the requests, reasons of the retries, notices, the server's address)."""
    reasons, notices = [], []
    fields = {"key": "", "temperature": 0.6, "top_p": 0.95, "backoff": 0.001, "retries": RETRIES, **options}
    with ChatServer(answer if callable(answer) else lambda *_: answer) as server:
        endpoint = clients.Endpoint("big-model", server.url, **fields)
        ask = clients.endpoint(endpoint, threading.Event(), reasons.append, notices.append)
        try:
            result = ask(request)
        except Exception as error:
            result = error
    return result, server.requests, reasons, notices, server.url


def body(content, status=200):
    return Answer(json.dumps(content).encode(), status)


def error(message, status=200, **more):
    return body({"error": {"message": message, **more}}, status)


def stream(*chunks, done=True, lead=""):
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return Answer((lead + "".join(lines) + ("data: [DONE]\n\n" if done else "")).encode(), 200, EVENTS)


def delta(content=None, finish=None, index=0, **more):
    return {"choices": [{"index": index, "delta": {"content": content, **more}, "finish_reason": finish}]}


# name: (answer, exception or None for one that may pass, the server's words in the message)
FAULTS = {
    # HTTP statuses
    "400": (error("odd field", 400), faults.Refused, "400: odd field"),
    "400 as text": (Answer(b"no such thing", 400), faults.Refused, "no such thing"),
    "401": (error("bad key", 401), faults.Denied, "401: bad key"),
    "402": (error("pay", 402), faults.Denied, "402: pay"),
    "403": (body({"detail": "not you"}, 403), faults.Denied, "not you"),
    "404 of another place": (body({"detail": "Not Found"}, 404), faults.Denied, "/v1/chat/completions"),
    "404 as a web page": (Answer(b"<html><title>Gone</title></html>", 404, HTML), faults.Denied, "'Gone'"),
    "404 without a body": (Answer(b"", 404), faults.Denied, "404: an empty body"),
    "405": (Answer(b"Method Not Allowed", 405), faults.Denied, "Method Not Allowed"),
    "413": (error("too large", 413), faults.Refused, "too large"),
    "422 of a list": (body({"detail": [{"loc": ["body"], "msg": "n"}]}, 422), faults.Refused, '"loc"'),
    "429": (error("tokens per minute", 429), None, "429: tokens per minute"),
    "429 without balance": (error("Insufficient balance", 429), faults.Denied, "Insufficient balance"),
    "429 that names the context": (error("the context window is busy", 429), None, "busy"),
    "500": (error("oops", 500), None, "500: oops"),
    "501": (error("not here", 501), faults.Refused, "not here"),
    "502 as a web page": (Answer(b"<html><title>502 Bad Gateway</title></html>", 502, HTML), None, "Bad Gateway"),
    "503 with the words behind a gateway": (
        error("Provider error", 503, metadata={"raw": "out of memory"}), None, "Provider error (out of memory)",
    ),
    # an error inside a 200
    "200: overloaded": (error("upstream overloaded", code=502), None, "an error in a 200: upstream overloaded"),
    "200: rate limit": (error("free models per day", code=429), None, "free models per day"),
    "200: no credit": (error("Add more", code=402), faults.Denied, "Add more"),
    "200: no credit by words": (error("Insufficient credits"), faults.Denied, "Insufficient credits"),
    "200: status as text": (error("no such key", code="401"), faults.Denied, "no such key"),
    "200: too long": (
        error("This endpoint's maximum context length is 4096 tokens", code=400), faults.TooLong, "4096 tokens",
    ),
    "200: a bad request": (error("what?", type="invalid_request_error"), faults.Refused, "what?"),
    "200: an error as text": (body({"error": "model is loading"}), None, "model is loading"),
    "200: two texts": (body({"status": "FAILED", "error": "err.x", "why": "no map"}), None, "no map"),
    "200: detail": (body({"detail": "Model is loading"}), None, "Model is loading"),
    "200: object error": (
        body({"object": "error", "message": "The model `m` does not exist.", "code": 404}), faults.Denied, "`m`",
    ),
    "200: an error in a choice": (
        body({"choices": [{"error": {"message": "idle", "code": 502}, "message": {"content": "half"}}]}), None, "idle",
    ),
    "200: an unknown object": (body({"status": "queued"}), None, 'a reply without choices: \'{"status": "queued"}\''),
    # ends that are errors
    **{f"ends with {name}": (completion("half", finish=name), None, name) for name in (
        "error", "insufficient_system_resource", "network_error", "aborted",
    )},
    # no JSON
    "a web page": (Answer(b"<html><title>Log in</title></html>", 200, HTML), None, "a web page (HTML) titled 'Log in'"),
    "a web page without title": (Answer(b"<html><body>Hi", 200, HTML), None, "<html><body>Hi"),
    "empty": (Answer(b""), None, "an empty body"),
    "blank": (Answer(b"\n\n \n"), None, "an empty body"),
    "keep-alive only": (Answer(b": PROCESSING\n\n: PROCESSING\n\n", 200, EVENTS), None, "an empty body"),
    "two objects": (Answer(b'{"a": 1}\n{"b": 2}'), None, '{"a": 1} {"b": 2}'),
    "a number": (Answer(b"5"), None, "not a JSON object but a int: '5'"),
    # streams
    "a stream that breaks off": (stream(delta("hel"), done=False), None, "the stream breaks off"),
    "an error in a stream": (stream(delta("hel"), {"error": {"message": "idle", "code": 502}}), None, "idle"),
    "events of another protocol": (stream({"type": "ping"}, done=False), None, "ping"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_outcome_and_the_words_of_the_server(name):
    answer, kind, words = FAULTS[name]
    result, requests, reasons, notices, _ = asked(answer)
    assert type(result) is (kind or faults.Unavailable), result
    assert words in str(result) and len(str(result)) < 700
    assert len(requests) == (1 if kind else RETRIES + 1) and len(reasons) == len(requests) - 1 and not notices
    assert all(words in why for why in reasons)


FILTERS = {
    "code": error("The response was filtered", 400, code="content_filter"),
    "inner code": error("Change it", 400, innererror={"code": "ResponsibleAIPolicyViolation"}),
    "words": error("violates our content management policy", 400),
    "403 of a moderator": error("your input was flagged", 403, metadata={"reasons": ["x"]}),
    "another vendor's words": error("Content Exists Risk", 400, type="invalid_request_error"),
    "another vendor's code": error("Input data may contain inappropriate content", 400, code="data_inspection_failed"),
    "in a 200": error("no", code="content_filter"),
    "a prompt's feedback": body({"choices": [], "promptFeedback": {"blockReason": "SAFETY"}}),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_is_a_reply_that_is_refused(name):
    """It is kept in the journal as any reply, so nobody asks again."""
    reply, requests, reasons, _, _ = asked(FILTERS[name], REQUEST._replace(choices=3))
    assert reply.finish == ["refused"] * 3 and len(requests) == 1 and not reasons
    parsed = parsing.parse(reply.texts[0], "refused")
    message = json.loads(FILTERS[name].body).get("error", {}).get("message", "SAFETY")
    assert parsed.reason == "refusal" and message in parsed.detail
    assert parsing.scores(reply.texts[0], 1, "refused") == (None, "refusal")


@pytest.mark.parametrize("status", [401, 429, 500])
def test_the_word_policy_is_no_filter_in_a_status_of_another_kind(status):
    result, *_ = asked(error("by our content policy", status))
    assert isinstance(result, faults.Denied if status == 401 else faults.Unavailable)


ENDS = {
    "stop": [
        "stop",
        "STOP",
        "eos",
        "eos_token",
        "end_turn",
        "stop_sequence",
        "FINISH_REASON_STOP",
        "completed",
        None,
        "",
    ],
    "length": ["length", "max_tokens", "MAX_TOKENS", "model_length", "max-new-tokens", "model_context_window_exceeded"],
    "refused": ["content_filter", "SAFETY", "recitation", "PROHIBITED_CONTENT", "refusal", "sensitive", "SPII"],
}


@pytest.mark.parametrize(("end", "name"), [(end, name) for end, names in ENDS.items() for name in names])
def test_the_end_of_a_text_by_the_names_of_several_servers(end, name):
    reply, requests, _, _, _ = asked(completion("x", finish=name))
    assert reply == replies.Reply(["x"], [end], 11, 7) and len(requests) == 1


def test_an_end_that_is_not_known_is_kept_by_name_and_not_asked_again():
    reply, requests, _, _, _ = asked(completion("Problem type: x", finish="tired of it"))
    assert reply.finish == ["tired of it"] and len(requests) == 1
    assert parsing.parse(reply.texts[0], reply.finish[0]) == parsing.Parsed(None, "unknown_finish", "tired of it")
    assert parsing.scores("[1]", 1, "tired of it") == (None, "unknown_finish")


def part(kind, text):
    return {"type": kind, "text": text}


THOUGHTS = {
    "reasoning_content": {"reasoning_content": "carry"},
    "reasoning": {"reasoning": "carry"},
    "reasoning_details": {"reasoning_details": [part("reasoning.text", "car"), part("reasoning.text", "ry")]},
    "a summary": {"reasoning_details": [{"type": "reasoning.summary", "summary": "carry"}, {"data": "xyz"}]},
    "an object": {"reasoning": {"content": [part("reasoning_text", "carry")]}},
    "thinking": {"thinking": "carry"},
    "thinking_blocks": {"thinking_blocks": [{"type": "thinking", "thinking": "carry", "signature": "s"}]},
    "thinking parts": {"content": [{"type": "thinking", "thinking": [part("text", "carry")]}, part("text", "42")]},
    "reasoning parts": {"content": [part("reasoning", "carry"), part("output_text", "42")]},
    "twice": {"reasoning": "carry", "reasoning_content": "carry"},
    "in the text too": {"reasoning": "carry", "content": "<think>\ncarry\n</think>\n\n42"},
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_a_thought_comes_before_the_text_once(name):
    message = {"role": "assistant", "content": "42", **THOUGHTS[name]}
    reply, *_ = asked(body({"choices": [{"message": message, "finish_reason": "stop"}]}))
    assert reply.texts == ["<think>\ncarry\n</think>\n\n42"] and reply.finish == ["stop"]


@pytest.mark.parametrize("thought", [None, "", " \n", [], {}, [{"type": "reasoning.encrypted", "data": "x"}], 3])
def test_a_thought_without_text_adds_nothing(thought):
    for field in ("reasoning", "reasoning_content", "reasoning_details", "thinking"):
        assert asked(completion("42", **{field: thought}))[0].texts == ["42"]


WHOLE = completion("hello back").body
BODIES = {
    "blank lines before it": Answer(b"\n\n\r\n" + WHOLE),
    "a byte order mark before it": Answer(b"\xef\xbb\xbf" + WHOLE),
    "comments before it": Answer(b": PROCESSING\n\n: PROCESSING\n\n" + WHOLE),
    "plain text": Answer(WHOLE, 200, {"Content-Type": "text/plain"}),
    "an error that is null": body(json.loads(WHOLE) | {"error": None}),
    "a stream": stream(
        delta(role="assistant"), delta("hello"), delta(" back"), delta("", "stop"),
        {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}},
    ),
    "a stream with comments": stream(
        delta("hello back", "stop") | {"usage": json.loads(WHOLE)["usage"]}, lead=": hi\n\n", done=False
    ),
    "events with names": Answer(
        b"event: message\r\n" + stream(delta("hello back", "stop") | {"usage": json.loads(WHOLE)["usage"]}).body
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_reply_in_another_wrapping_is_read_and_not_paid_again(name):
    reply, requests, _, _, _ = asked(BODIES[name])
    assert reply == replies.Reply(["hello back"], ["stop"], 11, 7) and len(requests) == 1


def test_a_stream_of_several_choices_with_thoughts():
    answer = stream(
        delta("b", index=1), delta(None, reasoning="hm"), delta("a", "length"), delta("\u2028c", "stop", index=1)
    )
    reply, *_ = asked(answer, REQUEST._replace(choices=2))
    assert reply.texts == ["<think>\nhm\n</think>\n\na", "b\u2028c"] and reply.finish == ["length", "stop"]


@pytest.mark.parametrize("count", [1, 3])
def test_a_server_that_ignores_n_is_paid_for_what_it_sends(count):
    reply, requests, _, _, _ = asked(completion(*"abc"[:count]), REQUEST._replace(choices=2))
    assert reply.texts == ["a", "b"][: min(count, 2)] and len(requests) == 1 and requests[0]["n"] == 2


def test_a_choice_with_an_error_does_not_cost_the_others():
    whole = json.loads(completion("a", "b").body)
    whole["choices"][0] |= {"finish_reason": "error", "error": {"message": "idle"}}
    reply, requests, _, _, _ = asked(body(whole), REQUEST._replace(choices=2))
    assert reply.texts == ["b"] and reply.completion_tokens == 7 and len(requests) == 1


def test_tokens_of_broken_texts_are_counted():
    broken, answers = completion("half", finish="error", usage=(9, 4)), []

    def answer(*_):
        answers.append(broken if len(answers) < 2 else completion("five", usage=(10, 6)))
        return answers[-1]

    assert asked(answer)[0] == replies.Reply(["five"], ["stop"], 28, 14)


# ---- parameters that a model refuses


def refusing(message, *names, **more):
    """Returns an answer that refuses requests with all these parameters."""

    def answer(prompt, request, headers, number):
        return error(message, 400, **more) if all(name in request for name in names) else completion("five")

    return answer


UNSUPPORTED = "Unsupported value: '{}' does not support 0.6 with this model. Only the default (1) value is supported."
PARAMETERS = {
    "temperature": (refusing(UNSUPPORTED.format("temperature"), "temperature"), {"temperature"}),
    "top_p": (refusing(UNSUPPORTED.format("top_p"), "top_p", code="unsupported_value"), {"top_p"}),
    "by the field param": (refusing("Not this one.", "top_p", param="top_p", code="unsupported_parameter"), {"top_p"}),
    "without quotes": (refusing("invalid temperature: only 1 is allowed here", "temperature"), {"temperature"}),
    "not both": (
        refusing("`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
                 "temperature", "top_p"),
        {"top_p"},
    ),
    "n": (refusing("Unknown parameter: 'n'", "n"), {"n"}),
    "an unknown field": (refusing("Unrecognized request argument supplied: top_p", "top_p"), {"top_p"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_refused_parameter_is_left_out_and_said_once(name):
    answer, left_out = PARAMETERS[name]
    reply, requests, reasons, notices, _ = asked(answer, REQUEST._replace(choices=2), retries=0)
    assert reply.texts == ["five"] and not reasons and len(requests) == 2
    assert requests[0].keys() - requests[1].keys() == left_out
    (notice,) = notices
    assert notice.startswith(f"big-model refuses {left_out.copy().pop()}, so it is left out") and "400: " in notice


def test_both_are_left_out_one_after_the_other_and_from_then_on():
    def answer(prompt, request, headers, number):
        for name in ("temperature", "top_p"):
            if name in request:
                return error(UNSUPPORTED.format(name), 400, param=None)
        return completion("five")

    notices = []
    with ChatServer(answer) as server:
        endpoint = clients.Endpoint("big-model", server.url, "", temperature=0.6, top_p=0.95, retries=0)
        ask = clients.endpoint(endpoint, notice=notices.append)
        with ThreadPoolExecutor(8) as pool:
            assert all(reply.texts == ["five"] for reply in pool.map(ask, [REQUEST] * 8))
        before = len(server.requests)
        ask(REQUEST)
    assert len(server.requests) == before + 1 and len(notices) == 2


def test_the_limit_goes_by_its_other_name_but_is_never_left_out():
    message = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    reply, requests, _, notices, _ = asked(refusing(message, "max_tokens"), retries=0)
    assert reply.texts == ["five"] and "max_completion_tokens is sent instead" in notices[0]
    assert requests[1]["max_completion_tokens"] == 50 and "max_tokens" not in requests[1]
    result, requests, _, _, _ = asked(error("Unsupported parameter: 'max_tokens', 'max_completion_tokens'", 400))
    assert type(result) is faults.Refused and len(requests) == 2


@pytest.mark.parametrize(
    "message",
    [
        "temperature must be between 0 and 1",
        "Unsupported value: 'temperature' must be between 0 and 0.5",
        "'top_p' must be less than or equal to 0.9",
        "'max_tokens' is too large: 50. This model supports at most 20 completion tokens",
        "Unsupported value: 'stop'",
        "the temperature of the room is fine",
    ],
)
def test_a_value_out_of_range_is_the_users_mistake(message):
    result, requests, _, notices, _ = asked(error(message, 400))
    assert type(result) is faults.Refused and message in str(result)
    assert len(requests) == 1 and not notices
