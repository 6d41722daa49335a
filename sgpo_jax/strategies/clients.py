"""Models that answer requests in text: one behind an OpenAI-compatible endpoint, or one in this process.

Both are a function `ask(request) -> reply` that may be called from many threads. Nothing that an endpoint sends is
trusted: every reply is cut to size, turned into plain strings and numbers, and cleared of the key.
"""

import random
import re
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from jax.sharding import Mesh

from sgpo_jax.policy import Policy
from sgpo_jax.policy import tokenizer as tokenizers
from sgpo_jax.policy.generation import noise_key, pad_prompts, respond
from sgpo_jax.rollout import STOP, Sampling
from sgpo_jax.strategies.faults import (
    Denied,
    Failed,
    Fault,
    Filtered,
    TooLong,
    Unavailable,
    Unreadable,
    refused_parameter,
)
from sgpo_jax.strategies.replies import MAX_TEXT, Reply, Request, read_fault, read_reply

MAX_BODY = 64 * 2**20  # bytes of a response from the server, packed or unpacked; a longer one is dropped
MAX_NOTICES = 20  # lines about a server's habits; a server may have a new one in every reply
LONGEST_WAIT = 300.0  # seconds; most that a server can delay a retry
SHORTEST_SECRET = 12  # characters; a shorter key, such as "EMPTY" for a server without keys, may be a word of a text


Ask = Callable[[Request], Reply]
_OTHER_LIMIT = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


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
    server: Endpoint,
    stop: threading.Event | None = None,
    retried: Callable[[str], None] = lambda why: None,
    notice: Callable[[str], None] = lambda text: None,
) -> Ask:
    """Returns `ask` for a model behind an endpoint.

    Rate limits, server errors, timeouts, broken connections and malformed replies are retried after a wait, which
    doubles every time and is at least as long as the server requests. What no retry mends is not retried. A prompt that
    the server's filter stops has a reply that is refused. A parameter that the model does not support is left out.
    Redirects are not followed: the prompts go to the server that was named, and to no other.

    Args:
      server: the endpoint.
      stop: ends all waiting for a retry when it is set.
      retried: called with the reason before every retry, from any thread.
      notice: called once for every parameter that is left out and every odd habit of the server, from any thread.

    Raises:
      ValueError: the base URL is not one, or has a password in it.
      ImportError: the package openai is missing.
    """
    try:
        import openai
    except ImportError as error:
        raise ImportError("a model behind an endpoint needs the extra 'extract': pip install -e .[extract]") from error
    check_base_url(server.base_url)
    heard = threading.local()  # status of the thread's last response

    def as_it_came(response: Any) -> None:
        """Leaves a body as it came, because what a server says about its packing may be wrong."""
        response.headers.pop("content-encoding", None)
        heard.status = response.status_code

    client = openai.OpenAI(
        base_url=server.base_url, api_key=server.key or "none", max_retries=0, timeout=server.timeout,
        default_headers={"Accept-Encoding": "gzip"},
        http_client=openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"response": [as_it_came]}),
    )  # fmt: skip
    stop = stop or threading.Event()
    address = f"{server.base_url.rstrip('/')}/chat/completions"
    left_out: set[str] = set()  # parameters that the model refused
    said: set[str] = set()  # notices
    lock = threading.Lock()

    def clean(text: str) -> str:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written to a file
        secret = server.key.strip()  # an error may show the key without the line break after it
        text = text.replace(secret, "[key]") if len(secret) >= SHORTEST_SECRET else text
        return text[:MAX_TEXT]  # cut last, because a cut could leave a part of the key

    def say(text: str) -> None:
        """Gives a notice, once."""
        text = clean(text)[:500]
        with lock:
            new = text not in said and len(said) < MAX_NOTICES
            said.update({text} if new else ())
        if new:
            notice(text)

    def parameters(request: Request) -> dict[str, Any]:
        limit = server.limit_field
        if limit in left_out:
            limit = _OTHER_LIMIT[limit]
        # One choice is the default of every server, even of one that does not know "n".
        several = {"n": request.choices} if request.choices > 1 else {}
        chosen = {"top_p": server.top_p, "temperature": server.temperature, **several}
        return {limit: request.max_tokens} | {name: chosen[name] for name in chosen if name not in left_out}

    def send(request: Request, body: dict[str, Any]) -> tuple[bytes, Exception | None]:
        """Returns (the response's body, the error that ended it, or None)."""
        deadline = time.monotonic() + server.timeout
        with client.chat.completions.with_streaming_response.create(
            model=server.model, messages=[{"role": "user", "content": request.prompt}], extra_body=body
        ) as response:
            parts, size = [], 0
            try:
                for part in response.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > MAX_BODY or time.monotonic() > deadline:
                        break
                else:
                    return b"".join(parts), None
            except Exception as error:  # the HTTP library's own, for a connection that breaks off
                return b"".join(parts), error
        if size > MAX_BODY:
            raise ValueError(f"a body of over {MAX_BODY} bytes")
        return b"".join(parts), TimeoutError(f"no whole reply in {server.timeout:g} s")

    def leave_out(fault: Fault, sent: dict[str, Any]) -> bool:
        """Leaves out the parameter that a fault refuses, and returns whether there is one to leave out."""
        name = refused_parameter(fault, list(sent))
        limit = name in _OTHER_LIMIT
        if not name or (limit and name != server.limit_field):
            return False  # a request must have a limit, so only the other name is tried
        with lock:
            new = name not in left_out
            left_out.add(name)
        if new:
            instead = f"{_OTHER_LIMIT[name]} is sent instead" if limit else "it is left out of all requests"
            notice(f"{server.model} refuses {name}, so {instead}. {clean(str(fault))[:500]}")
        return True

    def reply_to(request: Request, sent: dict[str, Any]) -> Reply:
        heard.status = 0
        try:
            body, error = send(request, sent)
        except openai.APIStatusError as refused:
            response = refused.response
            if response.is_redirect:
                words = f"redirects to {response.headers.get('location')}; the base URL must be the address itself"
                raise Fault(str(response.status_code), words, status=response.status_code) from None
            fault = read_fault(unpacked(response.content), response.status_code)
            fault.wait = retry_after(response.headers.get("retry-after", ""))
            raise fault from None
        except Exception as broken:  # the HTTP library's own
            if heard.status < 300:
                raise
            raise Fault(str(heard.status), f"a body that breaks off ({broken})", status=heard.status) from None
        try:
            return read_reply(unpacked(body), request, clean, server.model, say)
        except Unreadable as fault:
            raise error or fault from None  # what ended the body early says more than the part that came

    def failed(error: Failed, lost: tuple[int, int]) -> Failed:
        error.lost = lost
        return error

    def ask(request: Request) -> Reply:
        lost = (0, 0)  # tokens of replies without a text, which are paid for too
        attempt = 0
        while True:
            wait = min(60.0, server.backoff * 2**attempt)
            wait *= random.uniform(0.75, 1.25)  # so that the threads do not retry at the same moment
            sent = parameters(request)
            try:
                reply = reply_to(request, sent)
                return reply._replace(
                    prompt_tokens=reply.prompt_tokens + lost[0], completion_tokens=reply.completion_tokens + lost[1]
                )
            except Fault as fault:
                lost = lost[0] + fault.tokens[0], lost[1] + fault.tokens[1]
                why, kind, wait = clean(str(fault))[:500], fault.kind(), max(wait, fault.wait)
                # Slips in the base URL give these.
                why += f" (from {address})" if fault.status in (404, 405, 410) or "HTML" in fault.words else ""
                if kind is Filtered:
                    return Reply([why] * request.choices, ["refused"] * request.choices, *lost)
                if leave_out(fault, sent):
                    continue
                if kind is not None:
                    raise failed(kind(why), lost) from None
            # Anything else: the HTTP library's own exceptions for a broken connection.
            except Exception as error:
                cause = f" ({error.__cause__}; {address})" if error.__cause__ else ""
                why = clean(f"{type(error).__name__}: {error}{cause}")[:500]
            if attempt == server.retries:
                raise failed(Unavailable(f"{server.retries + 1} tries, the last one: {why}"), lost)
            attempt += 1
            retried(why)
            if stop.wait(wait):
                raise failed(Unavailable(f"stopped while waiting after {why}"), lost)

    return ask


def unpacked(body: bytes) -> bytes:
    """Returns a body without gzip or zlib, which its first bytes tell; any other body as it is.

    Raises:
      ValueError: it is too long.
    """
    if body[:2] != b"\x1f\x8b" and not (body[:1] == b"\x78" and int.from_bytes(body[:2], "big") % 31 == 0):
        return body
    unpacker = zlib.decompressobj(wbits=47)
    try:
        text = unpacker.decompress(body, MAX_BODY + 1)
    except zlib.error:
        return body
    if len(text) > MAX_BODY:
        raise ValueError(f"a body of over {MAX_BODY} bytes")
    return text


def check_base_url(base_url: str) -> None:
    """Checks the URL of an endpoint.

    Raises:
      ValueError: it is not an HTTP URL to which /chat/completions can be added, or has a password in it, which the
        message does not repeat.
    """
    parts = urlsplit(base_url)
    if parts.username or parts.password or "@" in parts.netloc:
        raise ValueError("the base URL has a user or password in it; a key goes into an environment variable")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base URL {base_url!r}: must begin with http:// or https:// and name a host")
    place = f"base URL {parts.scheme}://{parts.netloc}{parts.path}"
    if "?" in base_url or "#" in base_url:  # may hold a key
        raise ValueError(f"{place}: has a query or fragment after it; allowed: none")
    if base_url.split() != [base_url]:
        raise ValueError(f"{place!r}: has a space or line break in it; allowed: none")
    if re.search("/(?:completions|responses|messages|models)/*$", parts.path):
        raise ValueError(f"{place}: ends with the address of a request; allowed: the part before it, such as .../v1")


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
        if model.max_prompt_tokens + request.max_tokens > policy.config.reach:
            raise Denied(
                f"{model.max_prompt_tokens} tokens of prompt and {request.max_tokens} of reply: "
                f"the model has {policy.config.reach} positions"
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
