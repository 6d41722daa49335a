"""A server on loopback that a test starts and stops."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes connections of many clients wait for seconds

    def handle_error(self, request, address):
        pass  # a client that was killed


class LocalServer:
    """A context manager that serves requests at `url`."""

    def listen(self, handler: type[BaseHTTPRequestHandler], port: int = 0) -> None:
        """Takes an address; requests wait until the server is entered."""
        self._server = _Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
