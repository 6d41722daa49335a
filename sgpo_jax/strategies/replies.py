"""Reads what a server answers: a reply, or a fault with the server's own words and what to do about it.

Servers that call themselves compatible differ in where they put an error, a thought, a refusal and the reason why a
text ends. docs/strategies.md has the rules of this module as tables. Nothing that a server sends is trusted.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sgpo_jax.strategies.faults import Fault, Unreadable

MAX_TEXT = 1_000_000  # characters of a reply; the rest is cut off
MAX_WORDS = 400  # characters of a server's words in a message


class Request(NamedTuple):
    """A request for replies to one prompt."""

    id: str  # different for every request of an extraction; the noise of a local model derives from it
    prompt: str  # the user's turn
    choices: int  # replies requested
    max_tokens: int  # of each reply


class Reply(NamedTuple):
    """The reply to a request: from one text to as many as were requested."""

    texts: list[str]
    # For each text: "stop", "length" (cut at the limit), "refused" (by the server's own filter; the text may then be
    # the server's words), or the server's own reason, if it is none that this module knows.
    finish: list[str]
    prompt_tokens: int
    completion_tokens: int  # of all texts together


# Why a text ends, by the names of several servers, in lower case with "_" between words.
_ENDS = {
    "stop": "stop stop_sequence stop_sequences end end_turn eos eos_token eos_token_id complete completed finish "
    "finished done tool_calls function_call tool_use",
    "length": "length max_length max_tokens max_new_tokens max_output_tokens max_completion_tokens model_length limit "
    "token_limit token_limit_reached model_context_window_exceeded context_length_exceeded incomplete truncated",
    "refused": "content_filter content_filtered safety refusal refused recitation blocklist blocked prohibited_content "
    "spii sensitive moderation guardrail_intervened image_safety content_policy_violation",
    "error": "error failed network_error insufficient_system_resource abort aborted cancelled canceled timeout "
    "malformed_function_call malformed_response server_error model_error",
}
_END_OF = {name: end for end, names in _ENDS.items() for name in names.split()}


def ending(reason: Any) -> str:
    """Returns why a text ends: "stop", "length", "refused", "error", or the server's own name if it is not known.

    A server that gives no reason is taken to have stopped.
    """
    if reason is None or reason == "":
        return "stop"
    name = re.sub(r"[\s-]+", "_", str(reason).strip().lower()).removeprefix("finish_reason_")
    return _END_OF.get(name, " ".join(str(reason).split())[:40] or "stop")


def read_reply(
    body: bytes,
    request: Request,
    clean: Callable[[str], str],
    model: str = "",
    notice: Callable[[str], None] = lambda text: None,
) -> Reply:
    """Reads the reply in a response's body.

    Args:
      body: the response's body, which may be anything: one JSON object, or a stream of server-sent events.
      request: the request that it answers.
      clean: applied to every text.
      model: the name of the model that was asked for; "" accepts any.
      notice: called with what a user should know of a reply that is taken all the same.

    Raises:
      Fault: the body has no reply.
    """
    content = _content(body)
    usage = content.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    texts: list[str] = []
    finish: list[str] = []
    reasons: list[Any] = []  # as the server has them
    words = ""
    choices = content.get("choices")
    for choice in choices[: request.choices] if isinstance(choices, list) else []:
        if isinstance(choice, dict) and isinstance(choice.get("text"), str):  # the place of an older protocol
            choice = {"message": {"content": choice["text"]}} | choice
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            continue
        reason = choice.get("finish_reason")
        reasons.append(reason)
        end = ending(reason)
        if end == "error" or choice.get("error") or (content.get("error") and not reason):
            words = words or _choice_words(choice, content.get("error"), reason)  # a part of a text, which is no reply
            continue
        text, thought, refusal = _text(choice["message"])
        if not text and refusal:
            text, end = refusal, "refused"
        elif not text and end == "stop" and any(map(choice["message"].get, ("tool_calls", "function_call"))):
            end = "tool_calls"  # kept as an end that is not known, because there is no text
        elif thought and not text.lstrip().startswith("<think>"):
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        texts.append(clean(text))
        finish.append("length" if end == "stop" and len(text) > MAX_TEXT else clean(end))
    sizes = [len(text.encode()) for text in texts]  # a token has at least one byte
    tokens_in = _count(usage.get("prompt_tokens"), len(request.prompt.encode()) if texts else 0)
    tokens_out = counted = _count(usage.get("completion_tokens"), -1)
    # Some servers count one of several texts. All have at least this many tokens: those that were cut have the limit.
    limits = [request.max_tokens if end == "length" else 1 for end in finish]
    least = sum(map(min, sizes, limits))
    if counted < 0 or (len(texts) > 1 and counted < least):
        tokens_out = sum(sizes)
    if not texts:
        raise _fault(content, words, (tokens_in, tokens_out))
    if counted >= len(texts) * request.max_tokens and not any(reasons):
        finish = ["length" if end == "stop" else end for end in finish]  # the limit says what the server does not
    if 0 <= counted < tokens_out:
        notice(f"the server counts too few tokens for {len(texts)} texts; one for each byte is counted instead")
    if counted > request.choices * request.max_tokens:
        notice("the server writes more tokens than the limit that it is sent, so a budget can be exceeded")
    named = content.get("model")
    if model and isinstance(named, str) and named not in ("", model):
        notice(f"asked for the model {model!r}; the server says that {named[:100]!r} answers")
    return Reply(texts, finish, tokens_in, tokens_out)


def _choice_words(choice: dict[str, Any], error: Any, reason: Any) -> str:
    error = choice.get("error") or error
    return _words({"error": error}) if error else f"a text that ends with {str(reason)[:40]!r}"


def read_fault(body: bytes, status: int) -> Fault:
    """Reads the body of a response whose HTTP status is an error."""
    try:
        content = _content(body)
    except Fault as fault:
        return Fault(str(status), fault.words or str(fault), status=status)
    return Fault(str(status), _words(content), status=status, codes=_codes(content), parameter=_parameter(content))


def _fault(content: dict[str, Any], words: str, tokens: tuple[int, int]) -> Fault:
    """Returns the fault of a body with HTTP status 200 that has no reply."""
    codes = _codes(content)
    statuses = [int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)]
    feedback = content.get("promptFeedback") or content.get("prompt_feedback")
    if isinstance(feedback, dict) and feedback:
        codes |= {"content_filter"}
    told = words or any(content.get(key) for key in ("error", "errors", *_WORDS_IN)) or "error" in codes
    title = "an error in a 200" if told else "a reply without choices"
    status = statuses[0] if len(statuses) == 1 else 0
    words, parameter = words or _words(content), _parameter(content)
    return Fault(title, words, status=status, codes=codes, parameter=parameter, tokens=tokens, told=bool(told))


def beginning(text: str) -> str:
    """Returns how a text begins, on one line; of a web page its title."""
    if title := re.search(r"<title[^>]{0,200}>([^<]{1,200})</title>", text[:100_000], re.IGNORECASE):
        return f"a web page (HTML) titled {' '.join(title[1].split())!r}"
    return repr(" ".join(text[: 4 * MAX_WORDS].split())[:MAX_WORDS])


def _content(body: bytes) -> dict[str, Any]:
    """Parses a body, whose choices may come as a stream of events.

    Raises:
      Unreadable: it is no JSON object.
    """
    try:
        text, wrong = body.decode("utf-8-sig"), ""
    except UnicodeDecodeError:  # may be part of a character in a text that is fine otherwise
        text, wrong = body.decode("utf-8-sig", "replace"), repr(body[:100])
    # Keep-alive lines are blank, or comments of an event stream.
    text = re.sub(r"\A(?:[ \t]*(?::[^\r\n]*)?(?:\r\n|\r|\n))+", "", text)
    if not text.strip() or re.fullmatch(r":[^\r\n]*", text):
        raise Unreadable("an empty body", "")
    try:
        if re.match(r"(?:data|event|id|retry):", text):
            return _joined(text)
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if wrong:
            raise Unreadable("not text in UTF-8 (UnicodeDecodeError)", wrong) from error
        raise Unreadable(f"not JSON ({type(error).__name__})", beginning(text)) from error
    if not isinstance(content, dict):
        raise Unreadable(f"not a JSON object but a {type(content).__name__}", beginning(text))
    return content


def _joined(text: str) -> dict[str, Any]:
    """Joins the events of a stream into the body that a request without streaming gets."""
    lines = [line[5:].strip() for line in re.split(r"\r\n|\r|\n", text) if line.startswith("data:")]
    chunks = [json.loads(line) for line in lines if line and line != "[DONE]"]
    content: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        if not isinstance(chunk, dict):
            continue
        deltas = chunk.get("choices")
        content |= {key: value for key, value in chunk.items() if key != "choices" and value is not None}
        for delta in deltas if isinstance(deltas, list) else []:
            if isinstance(delta, dict):
                index = delta.get("index")
                _extend(choices.setdefault(index if type(index) is int else 0, {"message": {}}), delta)
    for choice in choices.values():
        if choice.get("finish_reason") is None and "[DONE]" not in lines:
            choice.setdefault("error", "the stream breaks off")
    return content | ({"choices": [choices[index] for index in sorted(choices)]} if choices else {})


def _extend(choice: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds an event's part to a choice."""
    choice |= {key: delta[key] for key in ("finish_reason", "error") if delta.get(key) is not None}
    parts, message = delta.get("delta") or delta.get("message"), choice["message"]
    for key, value in parts.items() if isinstance(parts, dict) else []:
        if isinstance(value, str | list):
            before: Any = message.get(key)
            joins = isinstance(before, str | list) and type(before) is type(value)
            message[key] = before + value if joins else value


_WORDS_IN = ("message", "detail", "msg", "error_msg", "errmsg", "error_message")


def _words(content: dict[str, Any]) -> str:
    """Returns what an error says; without a message in one of the usual places, how the body begins."""
    error = content.get("error")
    source = error if isinstance(error, dict) else content
    message = next((source[key] for key in _WORDS_IN if isinstance(source.get(key), str)), "")
    if isinstance(error, str) and list(content) == ["error"]:
        message = error
    metadata = source.get("metadata")
    if message and isinstance(metadata, dict) and isinstance(metadata.get("raw"), str):
        message = f"{message} ({metadata['raw']})"  # a gateway repeats the words of the server behind it
    return " ".join(message.split())[:MAX_WORDS] or beginning(json.dumps(content, ensure_ascii=False))


def _errors(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the objects that may describe an error, the innermost first."""
    error = content.get("error")
    if isinstance(error, dict):
        for name in ("innererror", "inner_error"):
            if isinstance(error.get(name), dict):
                yield error[name]
        yield error
    choices = content.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict) and isinstance(choice.get("error"), dict):
            yield choice["error"]
    yield content


def _codes(content: dict[str, Any]) -> frozenset[str]:
    """Returns the codes, types and statuses that an error names."""
    keys = ("code", "type", "status", "status_code", "object")
    values = [error.get(key) for error in _errors(content) for key in keys]
    return frozenset(str(value).lower() for value in values if isinstance(value, str) or type(value) is int)


def _parameter(content: dict[str, Any]) -> str:
    return next((e["param"] for e in _errors(content) if isinstance(e.get("param"), str)), "")


def _text(message: dict[str, Any]) -> tuple[str, str, str]:
    """Returns (a message's text, the thought that the server sends separately, the refusal)."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts: list[str] = []
    thoughts: list[str] = []
    refusals = [_flat(message.get("refusal"))]
    for part in parts:
        kind = str(part.get("type", "")).lower() if isinstance(part, dict) else ""
        where = thoughts if "think" in kind or "reason" in kind else refusals if kind == "refusal" else texts
        where.append(_flat(part))
    # The same thought may be in several fields.
    fields = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks")
    candidates = [*(_flat(message.get(field)) for field in fields), "".join(thoughts)]
    thought = next((candidate for candidate in candidates if candidate.strip()), "")
    return "".join(texts), thought, "".join(refusals)


def _flat(value: Any, depth: int = 0) -> str:
    """Returns the text in a value: itself, its parts one after the other, or the entry of an object that holds text."""
    if isinstance(value, str):
        return value
    if depth > 5:
        return ""
    if isinstance(value, list):
        return "".join(_flat(item, depth + 1) for item in value)
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "refusal", "summary", "content")
        return next(filter(None, (_flat(value.get(name), depth + 1) for name in names)), "")
    return ""


def _count(value: Any, otherwise: int) -> int:
    """Returns a token count from the server, or `otherwise` if the value cannot be a count."""
    return value if type(value) is int and 0 <= value < 10**9 else otherwise
