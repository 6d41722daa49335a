"""Models that answer requests in text: one behind an OpenAI-compatible endpoint, or one in this process.

Both are a function `ask(request) -> reply` that may be called from many threads. Nothing that an endpoint sends is
trusted: every reply is cut to size, turned into plain strings and numbers, and cleared of the key.
"""

import json
import random
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from jax.sharding import Mesh

from sgpo_jax.policy import Policy
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.generation import noise_key, pad_prompts, respond
from sgpo_jax.rollout import STOP, Sampling

MAX_TEXT = 1_000_000  # characters of a reply; the rest is cut off
MAX_BODY = 64 * 2**20  # bytes of a response from the server; a longer one is dropped
LONGEST_WAIT = 300.0  # seconds; most that a server can delay a retry
SHORTEST_SECRET = 12  # characters; a shorter key, such as "EMPTY" for a server without keys, may be a word of a text


class Request(NamedTuple):
    """A request for replies to one prompt."""

    id: str  # different for every request of an extraction; the noise of a local model derives from it
    prompt: str  # the user's turn
    choices: int  # replies requested
    max_tokens: int  # of each reply


class Reply(NamedTuple):
    """The reply to a request: from one text to as many as were requested."""

    texts: list[str]
    finish: list[str]  # "stop", "length" (cut at the limit) or "refused" (by the server's own filter), for each text
    prompt_tokens: int
    completion_tokens: int  # of all texts together


class Denied(Exception):
    """No request can succeed: the key, the balance, the permission or the model's name is wrong."""


class Refused(Exception):
    """The server rejects this request, or it is too long for a local model."""


class TooLong(Refused):
    """The prompt does not fit into the model's context."""


class Unavailable(Exception):
    """The retries are used up, or the caller stopped waiting."""


Ask = Callable[[Request], Reply]


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible endpoint, and how it is asked."""

    model: str  # the model's name at the endpoint
    base_url: str  # up to and including the version, as in "https://api.example.com/v1"
    key: str = field(repr=False)  # goes into the request's header and nowhere else; "" for a server without keys
    temperature: float
    top_p: float
    limit_field: str = "max_tokens"  # the server's name for the limit of new tokens
    timeout: float = 600.0  # seconds for a whole request
    retries: int = 6  # most times that one request is sent again
    backoff: float = 1.0  # seconds before the first retry


@dataclass(frozen=True)
class LocalModel:
    """A model in this process, and how it is asked."""

    policy: Policy
    params: Any  # on the mesh
    mesh: Mesh
    seed: int  # of the noise
    temperature: float
    top_p: float
    max_prompt_tokens: int  # P; a longer prompt is refused
    batch: int  # B, requests answered at once


def endpoint(
    server: Endpoint, stop: threading.Event | None = None, retried: Callable[[str], None] = lambda why: None
) -> Ask:
    """Returns `ask` for a model behind an endpoint.

    Rate limits, server errors, timeouts, broken connections and malformed replies are retried after a wait, which
    doubles every time and is at least as long as the server requests.

    Args:
      server: the endpoint.
      stop: ends all waiting for a retry when it is set.
      retried: called with the reason before every retry, from any thread.

    Raises:
      ValueError: the base URL is not one, or has a password in it.
      ImportError: the package openai is missing.
    """
    try:
        import openai
    except ImportError as error:
        raise ImportError("a model behind an endpoint needs the extra 'extract': pip install -e .[extract]") from error
    check_base_url(server.base_url)
    client = openai.OpenAI(
        base_url=server.base_url, api_key=server.key or "none", max_retries=0, timeout=server.timeout
    )
    stop = stop or threading.Event()

    def clean(text: str) -> str:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written to a file
        text = text.replace(server.key, "[key]") if len(server.key) >= SHORTEST_SECRET else text
        return text[:MAX_TEXT]  # cut last, because a cut could leave a part of the key

    def send(request: Request) -> bytes:
        deadline = time.monotonic() + server.timeout
        # One choice is the default of every server, even of one that does not know "n".
        several = {"n": request.choices} if request.choices > 1 else {}
        body: dict[str, Any] = {server.limit_field: request.max_tokens, **several}
        with client.chat.completions.with_streaming_response.create(
            model=server.model, messages=[{"role": "user", "content": request.prompt}],
            temperature=server.temperature, top_p=server.top_p, extra_body=body,
        ) as response:  # fmt: skip
            parts, size = [], 0
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > MAX_BODY:
                    raise ValueError(f"a body of over {MAX_BODY} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole reply in {server.timeout:g} s")
            return b"".join(parts)

    def ask(request: Request) -> Reply:
        lost = (0, 0)  # tokens of replies without a text, which are paid for too
        for attempt in range(server.retries + 1):
            wait = min(60.0, server.backoff * 2**attempt)
            wait *= random.uniform(0.75, 1.25)  # so that the threads do not retry at the same moment
            try:
                reply = read_reply(send(request), request, clean)
                reply = reply._replace(
                    prompt_tokens=reply.prompt_tokens + lost[0], completion_tokens=reply.completion_tokens + lost[1]
                )
                if reply.texts:
                    return reply
                lost = reply.prompt_tokens, reply.completion_tokens
                why = "a reply without choices"
            except openai.APIStatusError as error:
                why = error.message.removeprefix(f"Error code: {error.status_code} - ")
                why = clean(f"{error.status_code}: {why}")[:500]
                code = error.body.get("code") if isinstance(error.body, dict) else None
                if error.status_code in (401, 402, 403, 404) or code == "insufficient_quota":
                    raise Denied(why) from None
                if code == "context_length_exceeded" or "maximum context length" in why:
                    raise TooLong(why) from None
                if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                    raise Refused(why) from None
                wait = max(wait, retry_after(error.response.headers.get("retry-after", "")))
            # Anything else: the HTTP library's own exceptions for a broken connection, RecursionError for nested JSON.
            except Exception as error:
                why = clean(f"{type(error).__name__}: {error}")[:500]
            if attempt < server.retries:
                retried(why)
                if stop.wait(wait):
                    raise Unavailable(f"stopped while waiting after {why}")
        raise Unavailable(f"{server.retries + 1} tries, the last one: {why}")

    return ask


def check_base_url(base_url: str) -> None:
    """Checks the URL of an endpoint.

    Raises:
      ValueError: it is not an HTTP URL, or has a password in it, which the message does not repeat.
    """
    parts = urlsplit(base_url)
    if parts.username or parts.password or "@" in parts.netloc:
        raise ValueError("the base URL has a user or password in it; a key goes into an environment variable")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base URL {base_url!r}: must begin with http:// or https:// and name a host")


def retry_after(value: str) -> float:
    """Returns the seconds that a Retry-After header (a number or a date) requests; 0 for any other value."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, IndexError):
            return 0.0
    return min(LONGEST_WAIT, seconds) if seconds > 0 else 0.0  # NaN gives 0 too


def read_reply(body: bytes, request: Request, clean: Callable[[str], str]) -> Reply:
    """Reads the reply in a response's body; it has no texts if the body has no choices.

    Args:
      body: the response's body, which may be anything.
      request: the request that it answers.
      clean: applied to every text.

    Raises:
      ValueError: the body is not a JSON object.
    """
    content = json.loads(body)
    if not isinstance(content, dict):
        raise ValueError(f"not a JSON object but a {type(content).__name__}")
    choices = content.get("choices")
    texts, finish = [], []
    for choice in choices[: request.choices] if isinstance(choices, list) else []:
        if isinstance(choice, dict) and isinstance(choice.get("message"), dict):
            text = _text(choice["message"])
            reason = choice.get("finish_reason")
            refused = reason == "content_filter" or (not text and bool(choice["message"].get("refusal")))
            texts.append(clean(text))
            cut = reason == "length" or len(text) > MAX_TEXT
            finish.append("refused" if refused else "length" if cut else "stop")
    usage = content.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    most = sum(len(text.encode()) for text in texts)  # a token has at least one byte
    return Reply(
        texts,
        finish,
        _count(usage.get("prompt_tokens"), len(request.prompt.encode()) if texts else 0),
        _count(usage.get("completion_tokens"), most),
    )


def _text(message: dict[str, Any]) -> str:
    """Returns a message's text, after its thought if the server sends that separately."""
    content, thought = message.get("content"), message.get("reasoning_content")
    if isinstance(content, list):  # a list of parts
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    text = content if isinstance(content, str) else ""
    return f"<think>\n{thought}\n</think>\n\n{text}" if isinstance(thought, str) and thought else text


def _count(value: Any, otherwise: int) -> int:
    """Returns a token count from the server, or `otherwise` if the value cannot be a count."""
    return value if type(value) is int and 0 <= value < 10**9 else otherwise


def local(model: LocalModel, gather: float = 0.5) -> Ask:
    """Returns `ask` for a model in this process. Requests that wait at the same time are answered as one batch.

    Every batch has the same shape, and the noise of a request depends on the seed and its id only. So a reply does not
    depend on the other requests.

    Args:
      model: the model.
      gather: seconds to wait for more requests before a batch starts.
    """
    policy = model.policy
    lock, waiting = threading.Lock(), dict[str, tuple[Request, list[int]]]()
    answered: dict[str, Reply | BaseException] = {}
    key = noise_key(model.seed, "llm", 0)

    def run(requests: list[tuple[Request, list[int]]]) -> list[Reply]:
        first = requests[0][0]
        sampling = Sampling(first.max_tokens, model.temperature, model.top_p)
        filled = [requests[min(i, len(requests) - 1)] for i in range(model.batch)]
        padded = pad_prompts(policy, [tokens for _, tokens in filled], model.max_prompt_tokens)
        ids = np.array([zlib.crc32(request.id.encode()) for request, _ in filled], np.uint32)
        rollout, _ = respond(policy, model.params, padded, ids, key, model.mesh, sampling, first.choices)
        replies = []
        for i, (_, tokens) in enumerate(requests):
            lengths = rollout.lengths[i]
            pairs = zip(rollout.tokens[i], lengths, strict=True)
            texts = [tokenizers.decode(policy.tokenizer, row, length) for row, length in pairs]
            finish = ["stop" if reason == STOP else "length" for reason in rollout.finish[i]]
            replies.append(Reply(texts, finish, len(tokens), int(lengths.sum())))
        return replies

    def ask(request: Request) -> Reply:
        tokens = tokenizers.encode_turn(policy.tokenizer, request.prompt)
        if len(tokens) > model.max_prompt_tokens:
            raise TooLong(f"a prompt of {len(tokens)} tokens; at most {model.max_prompt_tokens} fit")
        if model.max_prompt_tokens + request.max_tokens > policy.config.max_positions:
            raise Denied(
                f"{model.max_prompt_tokens} tokens of prompt and {request.max_tokens} of reply: "
                f"the model has {policy.config.max_positions} positions"
            )
        waiting[request.id] = request, tokens
        with lock:
            if request.id not in answered:
                time.sleep(gather)
                shape = request[2:]
                others = [pair for pair in list(waiting.values()) if pair[0][2:] == shape and pair[0].id != request.id]
                requests = [(request, tokens), *others][: model.batch]
                results: list[Any]
                try:
                    results = list(run(requests))
                except Exception as error:
                    results = [error] * len(requests)
                for (answered_request, _), result in zip(requests, results, strict=True):
                    answered[answered_request.id] = result
                    del waiting[answered_request.id]
            reply = answered.pop(request.id)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    return ask
