"""Objects of buckets, on servers that misbehave: written whole, created once, copied once."""

import json

import pytest
from helpers.bucket_servers import SERVERS

from sgpo_jax import data
from sgpo_jax.runtime import buckets


@pytest.fixture(scope="module", params=SERVERS)
def server(request):
    with SERVERS[request.param]() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/sgpo_jax"


def test_objects_are_written_read_listed_and_deleted(server):
    url = f"{server.root}/objects"
    assert buckets.listing(url) == {}
    buckets.write(f"{url}/a.txt", b"one")
    buckets.write(f"{url}/below/b.txt", b"two")
    buckets.write(f"{server.root}/objects-of-others/c.txt", b"")
    before = buckets.listing(url)
    assert {name: about.size for name, about in before.items()} == {"a.txt": 3, "below/b.txt": 3}
    buckets.write(f"{url}/a.txt", b"six")
    after = buckets.listing(url)
    assert after["a.txt"] != before["a.txt"] and after["below/b.txt"] == before["below/b.txt"]
    assert buckets.read(f"{url}/a.txt") == b"six"
    for _ in range(2):
        buckets.delete(f"{url}/a.txt")
    assert [*buckets.listing(url)] == ["below/b.txt"]
    with pytest.raises(FileNotFoundError):
        buckets.read(f"{url}/a.txt")


def test_an_object_is_created_once(server):
    url = f"{server.root}/created"
    buckets.create(url, b"first")
    with pytest.raises(FileExistsError):
        buckets.create(url, b"second")
    assert buckets.read(url) == b"first"


@pytest.mark.parametrize("how", [("cut", 429), ("lost", 503)])
def test_a_request_that_fails_is_repeated(server, how):
    url = f"{server.root}/{how[0]}"
    server.fails[:] = [("P(OS|U)T", how[0])]
    buckets.write(f"{url}/a", b"content")
    server.fails += [("GET", how[1])]
    assert buckets.read(f"{url}/a") == b"content"
    assert not server.fails


def test_patience_ends_and_is_not_lost_on_what_another_try_does_not_change():
    calls = []

    def fail(error):
        calls.append(error)
        raise error

    with pytest.raises(OSError, match="^gs://bucket/a: ConnectionError: down$"):
        buckets.patiently(lambda: fail(ConnectionError("down")), "gs://bucket/a", seconds=0.6)
    assert len(calls) == 2
    for error in (FileNotFoundError("a"), PermissionError("a"), RuntimeError("Forbidden: a")):
        calls.clear()
        with pytest.raises(OSError, match="a$"):
            buckets.patiently(lambda error=error: fail(error), "gs://bucket/a")
        assert len(calls) == 1


def test_a_copy_is_kept_until_the_bucket_has_other_content(server, cache):
    url = f"{server.root}/model"
    buckets.write(f"{url}/config.json", b"{}")
    buckets.write(f"{url}/model.bin", b"not wanted")
    first = buckets.fetch(url, lambda name: name.endswith(".json"))
    assert first.name == "model" and [path.name for path in first.iterdir()] == ["config.json"]
    server.requests.clear()
    assert buckets.fetch(url, lambda name: name.endswith(".json")) == first
    assert not [line for line in server.requests if "alt=media" in line or line.endswith("/config.json")]
    buckets.write(f"{url}/config.json", b"[]")
    second = buckets.fetch(url, lambda name: name.endswith(".json"))
    assert second != first and (second / "config.json").read_bytes() == b"[]"
    assert sorted(path.name for path in cache.iterdir()) == sorted([first.parent.name, second.parent.name])


def test_rows_of_a_bucket_are_those_of_the_file_and_messages_name_the_bucket(server, tmp_path):
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text)
    buckets.write(f"{server.root}/data/train.jsonl", text.encode())
    buckets.write(f"{server.root}/data/other.txt", b"no rows")
    expected = data.load(str(tmp_path / "train.jsonl"))
    assert data.load(f"{server.root}/data/train.jsonl") == expected
    assert data.load(f"{server.root}/data") == data.load(f"{server.root}/data/?files=tr*") == expected
    buckets.write(f"{server.root}/data/train.jsonl", (text + "{").encode())
    with pytest.raises(ValueError, match=f"^{server.root}/data/train.jsonl:4: not valid JSON"):
        data.load(f"{server.root}/data/train.jsonl")
    with pytest.raises(ValueError, match=f"{server.root}/nothing.jsonl: there is nothing of this name"):
        data.load(f"{server.root}/nothing.jsonl")


def test_a_name_that_leads_out_of_the_folder_is_refused(monkeypatch, tmp_path):
    class Store:
        def isfile(self, path):
            return False

        def find(self, path, detail):
            return {f"{path}/../../evil": {"type": "file", "size": 1, "ETag": "x"}}

    monkeypatch.setattr(buckets, "client", lambda kind: Store())
    with pytest.raises(ValueError, match="s3://bucket/data: holds an object named 'bucket/data/../../evil'; must have"):
        buckets.fetch("s3://bucket/data")


def test_other_kinds_of_urls_are_refused():
    with pytest.raises(ValueError, match="source=https://bucket/x.jsonl: must be .* gs://, s3://, hf://"):
        data.load("https://bucket/x.jsonl")
