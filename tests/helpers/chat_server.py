"""A server on loopback for the chat-completions protocol, correct or as faulty as a test needs."""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

from helpers.local_server import LocalServer


class Answer(NamedTuple):
    """An HTTP response. `cut` bytes of the body are announced but not sent."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = {"Content-Type": "application/json"}
    delay: float = 0.0
    cut: int = 0
    drip: float = 0.0  # seconds after every byte


def completion(*texts: Any, finish: str = "stop", usage: Any = (11, 7), **message: Any) -> Answer:
    """Returns a well-formed reply with one choice per text."""
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
        for i, text in enumerate(texts)
    ]
    if isinstance(usage, tuple):
        usage = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    return Answer(json.dumps({"object": "chat.completion", "choices": choices, "usage": usage}).encode())


def failure(status: int, message: str = "no", code: str | None = None, **headers: str) -> Answer:
    body = json.dumps({"error": {"message": message, "code": code}}).encode()
    return Answer(body, status, {"Content-Type": "application/json", **headers})


class ChatServer(LocalServer):
    """A server that replies with `answer(prompt, request body, headers, number of the request)`; a context manager."""

    def __init__(self, answer: Callable[[str, dict, dict, int], Answer], port: int = 0):
        self.requests: list[dict] = []  # bodies, in order of arrival
        self.times: list[float] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    number = len(self.requests)
                    self.requests.append(body)
                    self.times.append(time.monotonic())
                names = {name.lower(): value for name, value in handler.headers.items()}
                reply = answer(body["messages"][0]["content"], body, names, number)
                time.sleep(reply.delay)
                handler.send_response(reply.status)
                for name, value in reply.headers.items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", str(len(reply.body) + reply.cut))
                handler.end_headers()
                for byte in reply.body if reply.drip else []:
                    handler.wfile.write(bytes([byte]))
                    time.sleep(reply.drip)
                handler.wfile.write(b"" if reply.drip else reply.body)
                handler.close_connection = reply.cut > 0

            def log_message(handler, *arguments):
                pass

        self.listen(Handler, port)
        self.url += "/v1"


def stage_of(prompt: str) -> str:
    """Returns the stage that sends a prompt: see `sgpo_jax.strategies.prompts`."""
    marks = {
        "Solve this problem": "expert",
        "Distil the strategy": "strategy",
        "Judge every candidate": "score",
        "Rate the strategy": "audit",
    }
    (stage,) = [stage for mark, stage in marks.items() if mark in prompt]
    return stage


def strategy(word: str) -> str:
    return (
        f"Problem type: addition of whole numbers\nStrategy: column addition in the {word} manner\n"
        "Steps: (a) align the numbers by place value (b) add from the right and carry"
    )


WORDS = ["plain", "usual", "careful", "quick", "written", "spoken", "modern", "ancient", "common", "school"]


def helpful(prompt: str, body: dict, headers: dict, number: int) -> Answer:
    """Returns a good model's reply to problems of the form "What is A + B?"."""
    a, b = map(int, re.search(r"What is (\d+) \+ (\d+)\?", prompt).groups())
    stage = stage_of(prompt)
    if stage == "expert":
        return completion(f"{a} + {b} = {a + b}, so \\boxed{{{a + b}}}")
    if stage == "strategy":
        return completion(strategy(WORDS[number % 10]))
    if stage == "audit":
        return completion("Fine.\nRatings: [0.9, 0.7, 0.8, 1]")
    count = len(re.findall(r"^Candidate \d+:", prompt, re.MULTILINE))
    return completion(f"Score: {[round(0.9 - 0.1 * i, 1) for i in range(count)]}")


def problems(count: int, solved: bool = True) -> list[dict[str, str]]:
    """Returns rows whose numbers and sums are not everyday values."""
    rows = []
    for i in range(count):
        a, b = 131 + 7 * i, 217 + 11 * i
        row = {"id": f"sum/{i}", "problem": f"What is {a} + {b}?", "answer": str(a + b), "source": "sums"}
        rows.append(row | ({"solution": f"{a} + {b} = {a + b}."} if solved else {}))
    return rows
