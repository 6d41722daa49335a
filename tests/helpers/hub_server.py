"""A stand-in for the Hugging Face hub on loopback: what its own client asks when it pushes files, and no more.

Repositories, LFS objects and commits are kept as they arrive; `fails` makes an address answer with an error.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler

from helpers.local_server import LocalServer

TOKEN = "hf_canary_0123456789"
LFS = (".safetensors", ".model")  # names that the hub asks to be sent as LFS objects


class HubServer(LocalServer):
    """A context manager with `url`, and what has arrived."""

    def __init__(self):
        self.repositories: dict[str, bool] = {}  # "models/OWNER/NAME" -> private
        self.files: dict[str, dict[str, bytes]] = {}  # repository -> path -> content of the last commit
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}  # LFS
        self.requests: list[str] = []
        self.fails: dict[str, list[int]] = {}  # part of an address -> statuses of the next answers to it
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(handler):
                length = handler.headers.get("Content-Length")
                body = handler.rfile.read(int(length)) if length else b""
                hub.requests.append(f"{handler.command} {handler.path}")
                status, content = hub.answer(handler.command, handler.path, body, handler.headers)
                data = json.dumps(content).encode()
                handler.send_response(status)
                handler.send_header("Content-Type", "application/json")
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            do_GET = do_POST = do_PUT = handle_request

            def log_message(handler, *arguments):
                pass

        self.listen(Handler)

    def answer(self, method, path, body, headers):
        for part, statuses in self.fails.items():
            if part in path and statuses:
                return statuses.pop(0), {"error": "as the test wants"}
        if method == "PUT":
            name = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == name
            self.objects[name] = body
            return 200, {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        asked = json.loads(body) if body and "/commit/" not in path else {}
        if path == "/api/repos/create":
            kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
            place = f"{kind}s/{name}"
            known = place in self.repositories
            self.repositories.setdefault(place, asked.get("private", asked.get("visibility") == "private"))
            prefix = "" if kind == "model" else f"{kind}s/"
            content = {"url": f"{self.url}/{prefix}{name}", "name": name}
            return (409, content | {"error": "You already created this repo"}) if known else (200, content)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}} if o["oid"] not in self.objects
                else o for o in asked["objects"]
            ]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}
        place, _, action = re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)(/(.*))?", path).groups()
        if place not in self.repositories:
            return 404, {"error": "Repository not found"}
        if not action:
            return 200, {"id": place.partition("/")[2], "private": self.repositories[place], "siblings": [], "tags": []}
        if action == "preupload/main":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular",
                 "shouldIgnore": False, "oid": None} for f in asked["files"]
            ]  # fmt: skip
            return 200, {"files": modes}
        assert action == "commit/main", path
        files = self.files.setdefault(place, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile" and len(self.objects[value["oid"]]) == value["size"]
                files[value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{place}/commit/{'0' * 40}", "commitOid": "0" * 40, "hookOutput": ""}
