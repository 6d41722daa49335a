"""A stand-in for the Hugging Face hub on loopback: what its own client asks when it reads and writes repositories.

Repositories, LFS objects and commits are kept as they arrive; `fails` makes an address answer with an error.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.local_server import LocalServer

TOKEN = "hf_canary_0123456789"
LFS = (".safetensors", ".model")  # names that the hub asks to be sent as LFS objects, as it does files that are no text
PAGE = 20  # files in one answer to a listing; the hub's own has 1000
_FIRST = {".gitattributes": b"*.safetensors filter=lfs\n"}  # what the hub puts into a new repository


class HubServer(LocalServer):
    """A context manager with `url`, and what has arrived."""

    def __init__(self):
        self.repositories: dict[str, bool] = {}  # "models/OWNER/NAME" -> private
        self.files: dict[str, dict[str, bytes]] = {}  # repository -> path -> content of the last commit
        self.history: dict[str, list[tuple[str, str, dict[str, bytes]]]] = {}  # commits: (sha, title, all files)
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}  # LFS
        self.requests: list[str] = []
        self.fails: dict[str, list[int]] = {}  # part of an address -> statuses of the next answers to it
        self._large: set[str] = set()  # hashes of files that came as LFS objects
        self._answering = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(handler):
                length = handler.headers.get("Content-Length")
                body = handler.rfile.read(int(length)) if length else b""
                with hub._answering:
                    hub.requests.append(f"{handler.command} {handler.path}")
                    status, content, *more = hub.answer(handler.command, handler.path, body, handler.headers)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                handler.send_response(status)
                for name, value in (more[0] if more else {}).items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                if handler.command != "HEAD":
                    handler.wfile.write(data)

            do_GET = do_POST = do_PUT = do_HEAD = handle_request

            def log_message(handler, *arguments):
                pass

        self.listen(Handler)

    def answer(self, method, path, body, headers):
        """Returns (status, content), and a dictionary of headers where there are more."""
        for part, statuses in self.fails.items():
            if part in path and statuses:
                return statuses.pop(0), {"error": "as the test wants"}
        if method == "PUT":
            name = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == name
            self.objects[name] = body
            return 200, {}
        if path.startswith("/large/"):  # where the hub sends those who read an LFS object
            return 200, self.objects[path.removeprefix("/large/")]
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        asked = json.loads(body) if body and "/commit/" not in path else {}
        if path == "/api/repos/create":
            return self._create(asked)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}} if o["oid"] not in self.objects
                else o for o in asked["objects"]
            ]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/([^?]+)", path):
            kind, name, revision, file = found.groups()
            return self._resolve(f"{kind or 'models/'}{name}", unquote(revision), unquote(file))
        if not (found := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)(/(.*))?", urlsplit(path).path)):
            return 404, {"error": "Not found"}
        place, _, action = found.groups()
        if place not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        what, _, rest = (action or "revision/main").partition("/")
        if what == "revision":
            sha, _ = self._at(place, unquote(rest))
            about = {"id": place.partition("/")[2], "private": self.repositories[place], "siblings": [], "tags": []}
            return (200, about | {"sha": sha}) if sha else _NO_REVISION
        if what == "tree":
            return self._tree(place, rest, parse_qs(urlsplit(path).query))
        if what == "commits":
            author = {"authors": [{"user": "me"}], "date": "2026-01-01T00:00:00.000Z", "message": ""}
            return 200, [{"id": sha, "title": title, **author} for sha, title, _ in reversed(self.history[place])]
        if what == "super-squash":
            _, _, files = self.history.pop(place)[-1]
            self._commit(place, asked["message"], files)
            return 200, {}
        if what == "preupload":
            return 200, {"files": [self._uploaded(place, file) for file in asked["files"]]}
        assert action == "commit/main", path
        return self._change(place, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked):
        kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        place = f"{kind}s/{name}"
        known = place in self.repositories
        self.repositories.setdefault(place, asked.get("private", asked.get("visibility") == "private"))
        if not known:
            self._commit(place, "initial commit", _FIRST)
        prefix = "" if kind == "model" else f"{kind}s/"
        content = {"url": f"{self.url}/{prefix}{name}", "name": name}
        return (409, content | {"error": "You already created this repo"}) if known else (200, content)

    def _commit(self, place, title, files):
        history = self.history.setdefault(place, [])
        sha = hashlib.sha1(f"{place} {len(self.requests)} {title}".encode()).hexdigest()
        history.append((sha, title, dict(files)))
        return sha

    def _at(self, place, revision):
        """Returns (sha, files) of a revision."""
        history = self.history[place]
        found = history[-1:] if revision == "main" else [commit for commit in history if commit[0] == revision]
        return (found[0][0], found[0][2]) if found else ("", {})

    def _uploaded(self, place, file):
        """Returns how a file is to be sent, and the hash of what the repository has of its name."""
        large = file["path"].endswith(LFS) or b"\0" in base64.b64decode(file["sample"])
        content = self._at(place, "main")[1].get(file["path"])
        known = None if content is None else hashlib.sha256(content).hexdigest() if large else _blob(content)
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": known}

    def _change(self, place, lines):
        files = dict(self._at(place, "main")[1])
        title, arrived = "", {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit", self.history[place][-1][0]) != self.history[place][-1][0]:
                    return 412, {"error": "A commit has happened since. Please refresh and try again."}
            elif line["key"] == "file":
                arrived[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    error = "A file with this name doesn't exist"
                    return 404, {"error": error}, {"X-Error-Code": "EntryNotFound"}
                del files[value["path"]]
            else:
                assert line["key"] == "lfsFile" and len(self.objects[value["oid"]]) == value["size"]
                arrived[value["path"]] = self.objects[value["oid"]]
                self._large.add(value["oid"])
        self.commits.append(title)
        sha = self._commit(place, title, files | arrived)
        self.files[place] = {name: content for name, content in (files | arrived).items() if name not in _FIRST}
        return 200, {"commitUrl": f"{self.url}/{place}/commit/{sha}", "commitOid": sha, "hookOutput": ""}

    def _tree(self, place, rest, query):
        revision, _, folder = rest.partition("/")
        sha, files = self._at(place, unquote(revision))
        if not sha:
            return _NO_REVISION
        prefix = f"{unquote(folder)}/" if folder else ""
        below = sorted(name for name in files if name.startswith(prefix))
        if prefix and not below:
            return 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"}
        entries, recursive = {}, query.get("recursive", ["False"])[0].lower() in ("true", "1")
        for name in below:
            parts = name.removeprefix(prefix).split("/")
            for i in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:i])
                entries[folder] = {"type": "directory", "oid": _blob(folder.encode()), "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "path": name, **self._about(files[name])}
        found, start = list(entries.values()), int(query.get("cursor", ["0"])[0])
        link = f"{self.url}/api/{place}/tree/{rest}?recursive={recursive}&cursor={start + PAGE}"
        more = {"Link": f'<{link}>; rel="next"'} if start + PAGE < len(found) else {}
        return 200, found[start : start + PAGE], more

    def _about(self, content):
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._large:
            return {"oid": _blob(content), "size": len(content)}
        about = {"oid": digest, "size": len(content), "pointerSize": 134}
        return {"oid": _blob(digest.encode()), "size": len(content), "lfs": about}

    def _resolve(self, place, revision, file):
        if place not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        sha, files = self._at(place, revision)
        if not sha:
            return _NO_REVISION
        if file not in files:
            return 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"}
        digest = hashlib.sha256(files[file]).hexdigest()
        about = {"X-Repo-Commit": sha, "ETag": f'"{digest}"'}
        if digest in self._large:
            return 302, b"", about | {"Location": f"{self.url}/large/{digest}"}
        return 200, files[file], about


_NO_REVISION = 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}


def _blob(content):
    """Returns the name that git gives to a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
