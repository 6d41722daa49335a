"""Pushing to the hub with its real client, which speaks to a stand-in on loopback."""

import json
import re
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from helpers.chat_server import ChatServer, helpful, problems
from helpers.configs import extraction
from helpers.hub_server import TOKEN, HubServer

from sgpo_jax.commands import push, strategies

KEY = "sk-canary-0123456789abcdef"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's waits before it tries again
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def model(tmp_path):
    """A folder of every kind of file: large, small, empty, in a folder, with bytes that are no text."""
    contents = {
        "model.safetensors": bytes(range(256)) * 5000, "README.md": "---\ntags:\n- sgpo\n---\n# é\n".encode(),
        "config.json": b"{}\n", "empty.txt": b"", "sub/tokenizer.model": b"\0\xff" * 7,
    }  # fmt: skip
    for name, content in contents.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return contents, {name: tmp_path / "model" / name for name in contents}


def test_every_byte_arrives_in_one_commit_of_a_private_repository(hub, model, capsys):
    contents, files = model
    push.push(files, "me/mine", "model", False, "")
    assert hub.repositories == {"models/me/mine": True}
    assert hub.files["models/me/mine"] == contents and len(hub.commits) == 1
    assert len(hub.objects) == 2, "weights and tokenizer went as LFS objects"
    assert capsys.readouterr().out == f"pushed to {hub.url}/me/mine (private)\n"
    files["config.json"].write_bytes(b'{"a": 1}')
    push.push(files, "me/mine", "model", False, "")
    assert hub.files["models/me/mine"]["config.json"] == b'{"a": 1}' and len(hub.commits) == 2


def test_a_public_repository_must_be_meant(hub, model, capsys):
    push.push(model[1], "me/open", "model", True, "")
    assert hub.repositories == {"models/me/open": False} and "(public)" in capsys.readouterr().out
    hub.files.clear()
    with pytest.raises(ValueError, match=r"^--push=me/open: is a public repository; must be a private one.* Again\.$"):
        push.push(model[1], "me/open", "model", False, "Again.")
    assert hub.files == {}


@pytest.mark.parametrize(
    ("place", "statuses", "message"),
    [
        ("/api/repos/create", [401] * 9, r"the hub does not accept the token: `hf auth login`.* \[401\]"),
        ("/commit/", [403], r"the token may not write there.* \[403\] \(as the test wants\)"),
        ("/api/models/me/mine", [404], r"there is no such owner or repository.* \[404\]"),
        ("/commit/", [409], r"something else is being written there: try again \[409\]"),
        ("/commit/", [503] * 9, r"the hub is down or busy: try again later \[503\]"),
        ("/api/repos/create", [503] * 9, r"the hub is down or busy: try again later \[503\]"),
        ("/lfs/", [503] * 99, r"503"),
        ("/objects/batch", [422], r"the hub refuses \[422\]"),
    ],
)
def test_a_push_that_fails_says_what_to_do_and_leaves_nothing_half(hub, model, place, statuses, message):
    if place == "/api/repos/create" and statuses[0] == 401:
        hub.fails["/api/models/me/mine"] = [401] * 9  # where the client looks whether the repository is there
    hub.fails[place] = statuses
    with pytest.raises(OSError, match=rf"^--push=me/mine: not pushed: .*{message}.* All is in FOLDER\.$"):
        push.push(model[1], "me/mine", "model", False, "All is in FOLDER.")
    assert hub.files == {}, "no commit"
    hub.fails.clear()
    push.push(model[1], "me/mine", "model", False, "")
    assert hub.files["models/me/mine"] == model[0]


def test_the_client_tries_again_after_a_hiccup(hub, model):
    hub.fails["/lfs/"] = [503, 500]
    hub.fails["/preupload/"] = [503]
    push.push(model[1], "me/mine", "model", False, "")
    assert hub.files["models/me/mine"] == model[0]


def test_a_hub_that_is_not_there(hub, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"^--push=me/mine: not pushed: ConnectError: .* All is in FOLDER\.$"):
        push.push(model[1], "me/mine", "model", False, "All is in FOLDER.")


@pytest.mark.parametrize("name", ["", "mine", "a/b/c", "me/..", "me/a b", "/mine", "me/"])
def test_wrong_names_are_refused(hub, name):
    push.check("me/mine")
    with pytest.raises(ValueError, match=f"^--push={re.escape(name)}: must be OWNER/NAME"):
        push.check(name)
    assert hub.requests == []


def test_without_a_token_nothing_begins(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ValueError, match="^--push=me/mine: must have a token of the hub: `hf auth login`"):
        push.check("me/mine")


def test_strategies_become_a_data_set_with_a_card(hub, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai", reason="needs the extra 'extract'")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    wrong = problems(3, solved=False)[2] | {"answer": "7"}  # which no solution gives
    rows = [*problems(2), wrong]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"workdir": str(tmp_path / "work"), "to": "", "audit": False, "push": "me/sums", "public": False}
    with ChatServer(helpful) as server:
        config = extraction(tmp_path, server.url)
        hub.fails["/commit/"] = [503] * 9
        with pytest.raises(OSError, match=r"\[503\].* The data set is whole in .*strategies\.jsonl; the same command"):
            strategies.main(config, SimpleNamespace(**given))
        asked = len(server.requests)
        hub.fails.clear()
        strategies.main(config, SimpleNamespace(**given))
        assert len(server.requests) == asked, "nothing is paid for twice"
    assert hub.repositories == {"datasets/me/sums": True}
    arrived = hub.files["datasets/me/sums"]
    assert set(arrived) == {"train.jsonl", "README.md"}
    assert arrived["train.jsonl"] == (tmp_path / "work/strategies.jsonl").read_bytes()
    card = arrived["README.md"].decode()
    assert card.startswith("---\n") and "  data_files: train.jsonl\n---\n\n# sums\n" in card
    for said in ("2 problems with strategies", "Of 3 problems, 1 have no strategy", "| model | big |",
                 "| `strategy` | problem type", "--config.data.train=me/sums?split=train", "## Limits"):  # fmt: skip
        assert said in card, said
    assert KEY not in card + capsys.readouterr().out
    with pytest.raises(ValueError, match="^--push: must not be given with --audit"):
        strategies.main(config, SimpleNamespace(**given | {"audit": True}))
