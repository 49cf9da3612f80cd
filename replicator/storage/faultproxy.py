"""A proxy on loopback that loses requests, or their replies, when it is told to: what a network does to a client, on purpose."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

__all__ = ["FaultProxy"]

Fault = Literal["before", "after"]

_TIMEOUT_S = 30.0
_HOP_BY_HOP = frozenset(["connection", "keep-alive", "transfer-encoding", "expect"])


class FaultProxy:
    """Forwards to one HTTP server. `lose` says what happens to the next writes (PUT, and POST)."""

    def __init__(self, target: str) -> None:
        """`target`: an http endpoint, as in `http://127.0.0.1:9000`."""
        self._host = urlsplit(target).netloc
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self.lost = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = _TIMEOUT_S

            def _forward(self) -> None:
                outer._forward(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="pyrepl fault proxy", daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def lose(self, *faults: Fault) -> None:
        """Lose the next writes, one for each: "before" the server gets it, or its reply "after" the server has acted."""
        with self._lock:
            self._faults = list(faults)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _next_fault(self, method: str) -> Fault | None:
        with self._lock:
            if method not in ("PUT", "POST") or not self._faults:
                return None
            self.lost += 1
            return self._faults.pop(0)

    def _forward(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self._next_fault(request.command)
        if fault == "before":
            request.close_connection = True
            return
        with self._answered(request, body) as reply:
            data = reply.read()
            if fault == "after":
                request.close_connection = True
                return
            request.send_response_only(reply.status, reply.reason)
            for name, value in reply.getheaders():
                if name.lower() not in _HOP_BY_HOP and name.lower() != "content-length":
                    request.send_header(name, value)
            length = reply.getheader("Content-Length") if request.command == "HEAD" else None
            request.send_header("Content-Length", length or str(len(data)))
            request.end_headers()
            request.wfile.write(data)

    @contextlib.contextmanager
    def _answered(self, request: BaseHTTPRequestHandler, body: bytes) -> Iterator[http.client.HTTPResponse]:
        # The Host header stays as it was sent: it is signed.
        connection = http.client.HTTPConnection(self._host, timeout=_TIMEOUT_S)
        try:
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.endheaders(body)
            yield connection.getresponse()
        finally:
            connection.close()
