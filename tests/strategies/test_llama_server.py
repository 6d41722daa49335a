"""An extraction from a server that this project did not write: llama.cpp's, with SmolLM2, on loopback.

A recorder in between passes every request and every answer on as it is.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.chat_server import Answer, ChatServer, problems
from helpers.configs import extraction
from helpers.paths import ROOT

from sgpo_jax import strategies
from sgpo_jax.models import gguf
from sgpo_jax.runtime.files import read_jsonl

pytest.importorskip("openai", reason="needs the extra 'extract'")
pytest.importorskip("xllamacpp", reason="needs the extra 'llama'")

KEY = "sk-canary-0123456789"
LONG = 600  # repetitions that make a problem longer than the context
TOKENS = 16  # of every reply


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Returns (the server's base URL, its process)."""
    try:
        model = gguf.smollm2_path()
    except ImportError as error:
        pytest.skip(str(error))
    log = tmp_path_factory.mktemp("llama") / "log"
    command = [sys.executable, str(ROOT / "tests/helpers/llama_server.py"), str(model), KEY]
    with log.open("w") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process:
        try:
            line = next((line for line in process.stdout if line.startswith("listening on")), "")
            assert line, log.read_text()[-2000:]
            yield f"{line.split()[-1]}/v1", process
        finally:
            process.kill()


class Recorder(ChatServer):
    """Passes requests on to another server; `answers` has the bodies of its replies in order."""

    def __init__(self, url: str):
        self.answers: list[bytes] = []

        def forward(prompt, body, headers, number):
            passed_on = {"Content-Type": "application/json", "Authorization": headers["authorization"]}
            request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), passed_on)
            with contextlib.ExitStack() as stack:
                try:
                    reply = stack.enter_context(urllib.request.urlopen(request))
                except urllib.error.HTTPError as error:
                    reply = error
                answer = Answer(reply.read(), reply.status)
            self.answers.append(answer.body)
            return answer

        super().__init__(forward)


def changes(tmp_path: Path, url: str) -> dict:
    """Returns the fields of `config.extract` for the problems in a folder."""
    return {
        "source": str(tmp_path / "problems.jsonl"), "strong.name": "smollm2", "strong.base_url": url, "candidates": 2,
        "expert_tries": 1, "score_tries": 1, "max_expert_tokens": TOKENS, "max_strategy_tokens": TOKENS,
        "max_score_tokens": TOKENS, "concurrency": 2, "retries": 1, "backoff": 0.01, "timeout": 600.0,
    }  # fmt: skip


def command(tmp_path: Path, url: str, work: str) -> subprocess.Popen:
    """Starts an extraction in the folder `work`."""
    arguments = [f"--config.extract.{name}={value}" for name, value in changes(tmp_path, url).items()]
    return subprocess.Popen(
        [sys.executable, "-m", "sgpo_jax.strategies", f"--config={ROOT / 'configs/strategies.py'}",
         f"--workdir={tmp_path / work}", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(tmp_path: Path, url: str, work: str = "work", **fields) -> str:
    """Runs an extraction in this process, and returns what is not finished and why."""
    config = extraction(tmp_path, url, **changes(tmp_path, url) | fields)
    return strategies.run(config, tmp_path / work, tmp_path / f"{work}.jsonl")


def replies(tmp_path: Path) -> list[dict]:
    path = tmp_path / "work/extraction.jsonl"
    return [record for record in read_jsonl(path) if record["kind"] == "reply"] if path.exists() else []


@pytest.mark.slow
def test_an_extraction_that_is_killed_goes_on_and_asks_for_nothing_twice(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = problems(4)
    rows[3]["problem"] += " It is a sum." * LONG
    del rows[2]["solution"]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url, process = server
    with Recorder(url) as recorder:
        with command(tmp_path, recorder.url, "work") as first:
            while len(replies(tmp_path)) < 2:
                assert first.poll() is None, first.stdout.read()
                time.sleep(0.01)
            first.send_signal(signal.SIGKILL)
        kept = replies(tmp_path)
        time.sleep(0.1)  # what was sent before the kill arrives
        lost = len(recorder.requests) - len(kept)
        assert 0 <= lost <= 2, "only what was under way"
        assert run(tmp_path, recorder.url) == ""
        said = capsys.readouterr().out
        # Two candidates for each of two problems, a solution that is wrong, and a prompt that is too long.
        paid = replies(tmp_path)
        assert len(paid) == 5 and paid[: len(kept)] == kept and len(recorder.requests) <= 5 + lost + 1
        usage = [json.loads(body).get("usage") for body in recorder.answers]
        answered = sorted((use["prompt_tokens"], use["completion_tokens"]) for use in usage if use)
        counted = sorted((reply["prompt_tokens"], reply["completion_tokens"]) for reply in paid)
        for pair in counted:
            answered.remove(pair)
        assert len(answered) <= lost
        total = sum(tokens_in + tokens_out for tokens_in, tokens_out in counted)
        assert re.search(rf"calls\D+{5 - len(kept)}\D+5\D", said) and f"tokens {total} " in said
        verdicts = {r["id"]: r for r in read_jsonl(tmp_path / "work/extraction.jsonl") if r["kind"] == "verdict"}
        assert verdicts["sum/3"]["reason"] == "prompt_too_long"
        assert "exceeds the available context size (1024 tokens)" in verdicts["sum/3"]["detail"]
        before = len(recorder.requests)
        assert run(tmp_path, recorder.url) == "" and len(recorder.requests) == before

        # This server counts the tokens of one of several texts. A text of four tokens is cut, whatever is sampled.
        (tmp_path / "problems.jsonl").write_text(json.dumps(rows[0]) + "\n")
        assert run(tmp_path, recorder.url, "both", choices=2, max_strategy_tokens=4) == ""
        (reply,) = [r for r in read_jsonl(tmp_path / "both/extraction.jsonl") if r["kind"] == "reply"]
        assert json.loads(recorder.answers[-1])["usage"]["completion_tokens"] <= 4
        assert len(reply["texts"]) == 2 and reply["completion_tokens"] > 4

    monkeypatch.setenv("OPENAI_API_KEY", "sk-other-0123456789")
    assert "stopped early: 401: Invalid API Key" in run(tmp_path, url, "other")
    process.terminate()
    process.wait()
    with command(tmp_path, url, "stopped") as stopped:
        said = stopped.communicate()[0]
    assert stopped.returncode == 1 and "left open: 1 for APIConnectionError" in said and url in said, said
