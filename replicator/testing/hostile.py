"""`HostileS3`: a proxy in front of an S3 server that does to requests what networks and stores do on bad days, by a seed or by a script.

    with HostileS3(endpoint, access_key="...", secret_key="...", seed=7, troubles={Trouble.BUSY: 0.2}) as s3:
        client = open_client(f"s3://bucket/app?endpoint={s3.endpoint}&forcePathStyle=true")
        s3.trouble_next(Trouble.LOST_REPLY, "PUT")

It listens on a free port of the loopback address, in threads of this process. Requests are signed again on their way to the server, so that they can be
changed; what the client signed with is not checked.

| trouble | methods | what happens |
|---|---|---|
| `BUSY` | all | 500, 503 SlowDown or 429; nothing is done |
| `CONFLICT` | PUT, POST, DELETE with a condition | 409; nothing is done |
| `PRECONDITION` | PUT with a condition | 412, though the condition was not looked at; nothing is done |
| `DROP` | all | the connection ends before the request is passed on |
| `LOST_REPLY` | PUT, POST, DELETE | it is done; the connection ends without a reply |
| `LATE` | PUT without a condition | the connection ends; the request arrives `max_delay_s` later |
| `DUPLICATE` | PUT, DELETE without a condition | it is done twice |
| `DELAY` | all | it is done up to `max_delay_s` later, so that requests overtake each other |
| `CUT` | GET | the body ends at some byte, and so does the connection |
| `CORRUPT` | GET of an object | one bit of the body is flipped |
| `IGNORE_RANGE` | GET with a range | the whole object, status 200 |
| `IGNORE_CONDITIONS` | PUT, DELETE with a condition | it is done without the condition |
| `STALE_LIST` | GET of a listing | the reply that the same request got before, if it was asked before |

An engine must come through all of them but `PRECONDITION`, `CORRUPT` and `IGNORE_CONDITIONS`: those are lies, and what counts is that nothing false is
acknowledged or restored.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

__all__ = ["HostileS3", "Trouble"]

TIMEOUT_S = 30.0
MAX_BODY_BYTES = 1 << 30


class Trouble(StrEnum):
    """What can happen to a request. See the table in the module's docstring."""

    BUSY = "busy"
    CONFLICT = "conflict"
    PRECONDITION = "precondition"
    DROP = "drop"
    LOST_REPLY = "lost reply"
    LATE = "late"
    DUPLICATE = "duplicate"
    DELAY = "delay"
    CUT = "cut"
    CORRUPT = "corrupt"
    IGNORE_RANGE = "ignore range"
    IGNORE_CONDITIONS = "ignore conditions"
    STALE_LIST = "stale list"


_BUSY = ((500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests"))
_CONDITIONS = ("if-match", "if-none-match")
_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-authorization", "host", "content-length", "expect"}
)


@dataclass(slots=True)
class _Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def has_condition(self) -> bool:
        return any(name in self.headers for name in _CONDITIONS)

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type=" in self.path


@dataclass(slots=True)
class _Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    length: str | None


class HostileS3:
    """The proxy. A context manager.

    Attributes:
        endpoint: its URL, for clients.
        happened: how often each trouble has been made.
        requests: how many requests came, by method.
    """

    def __init__(
        self,
        upstream: str,
        *,
        access_key: str,
        secret_key: str,
        region: str = "us-east-1",
        seed: int = 0,
        troubles: Mapping[Trouble, float] | None = None,
        max_delay_s: float = 0.05,
    ) -> None:
        """Prepare; entering the context listens.

        Args:
            upstream: URL of the server, `http://host:port` or `https://...`.
            access_key, secret_key, region: what requests to the server are signed with.
            troubles: probability of each trouble for each request that it can happen to; none by chance when not given.
        """
        self.troubles: dict[Trouble, float] = dict(troubles or {})
        self.happened: Counter[Trouble] = Counter()
        self.requests: Counter[str] = Counter()
        self.endpoint = ""
        self.max_delay_s = max_delay_s
        self._upstream = urlsplit(upstream)
        self._keys = (access_key, secret_key, region)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._script: deque[tuple[Trouble, str | None]] = deque()
        self._listed: dict[str, _Reply] = {}
        self._late: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = TIMEOUT_S

            def answer(self) -> None:
                size = int(self.headers.get("Content-Length", 0))
                if size > MAX_BODY_BYTES or "chunked" in self.headers.get("Transfer-Encoding", ""):
                    self.send_error(501)
                    return
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                headers = {name.lower(): value for name, value in self.headers.items()}
                proxy._answer(self, _Request(self.command, self.path, headers, self.rfile.read(size)))

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def handle_expect_100(self) -> bool:
                return True

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that has gone away

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="hostile s3", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for thread in self._late:
            thread.join(TIMEOUT_S)

    def trouble_next(self, trouble: Trouble, method: str | None = None, *, times: int = 1) -> None:
        """Make trouble for the next requests that it can happen to, of that method when given, in the order in which this is called."""
        with self._lock:
            self._script.extend([(trouble, method)] * times)

    # -- requests ----------------------------------------------------------------------------------------------------------------

    def _answer(self, handler: BaseHTTPRequestHandler, request: _Request) -> None:
        with self._lock:
            self.requests[request.method] += 1
            trouble = self._choose(request)
            if trouble is not None:
                self.happened[trouble] += 1
            delay_s = self._random.random() * self.max_delay_s
            place, busy = self._random.random(), self._random.choice(_BUSY)
        match trouble:
            case Trouble.BUSY:
                return _send_error(handler, request, *busy)
            case Trouble.CONFLICT:
                return _send_error(handler, request, 409, "ConditionalRequestConflict")
            case Trouble.PRECONDITION:
                return _send_error(handler, request, 412, "PreconditionFailed")
            case Trouble.DROP:
                return _hang_up(handler)
            case Trouble.LATE:
                self._send_late(request)
                return _hang_up(handler)
            case Trouble.DELAY:
                time.sleep(delay_s)
            case Trouble.DUPLICATE:
                self._pass_on(request)
            case Trouble.IGNORE_RANGE:
                request.headers.pop("range", None)
            case Trouble.IGNORE_CONDITIONS:
                for name in _CONDITIONS:
                    request.headers.pop(name, None)
        reply = self._pass_on(request)
        if reply is None:
            return _hang_up(handler)
        if request.is_listing:
            with self._lock:
                if trouble is Trouble.STALE_LIST:
                    reply = self._listed.get(request.path, reply)
                else:
                    self._listed[request.path] = reply
        if trouble is Trouble.LOST_REPLY:
            return _hang_up(handler)
        if trouble is Trouble.CORRUPT and reply.body and reply.status < 300:
            at = int(place * len(reply.body))
            reply.body = reply.body[:at] + bytes([reply.body[at] ^ 1 << int(place * 1e6) % 8]) + reply.body[at + 1 :]
        return _send(handler, request, reply, int(place * len(reply.body)) if trouble is Trouble.CUT else None)

    def _choose(self, request: _Request) -> Trouble | None:
        for index, (trouble, method) in enumerate(self._script):
            if method in (None, request.method) and _happens(trouble, request):
                del self._script[index]
                return trouble
        for trouble, probability in self.troubles.items():
            if _happens(trouble, request) and self._random.random() < probability:
                return trouble
        return None

    def _send_late(self, request: _Request) -> None:
        def run() -> None:
            self._stopped.wait(self.max_delay_s)
            self._pass_on(request)

        thread = threading.Thread(target=run, name="hostile s3 late", daemon=True)
        self._late.append(thread)
        thread.start()

    def _pass_on(self, request: _Request) -> _Reply | None:
        """Send a request to the server; None when it does not answer."""
        secure = self._upstream.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._upstream.hostname is not None
        connection = kind(self._upstream.hostname, self._upstream.port, timeout=TIMEOUT_S)
        try:
            connection.request(request.method, request.path, body=request.body or None, headers=self._signed(request))
            answer = connection.getresponse()
            body = answer.read()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
            return _Reply(answer.status, headers, body, answer.getheader("Content-Length"))
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _signed(self, request: _Request) -> dict[str, str]:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        access_key, secret_key, region = self._keys
        # What proxies and servers may change is not part of the new signature; the body's hash is computed again.
        dropped = {*_HOP, "authorization", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token", "accept-encoding"}
        headers = {name: value for name, value in request.headers.items() if name not in dropped}
        signed = AWSRequest(request.method, f"{self._upstream.scheme}://{self._upstream.netloc}{request.path}", headers, request.body)
        S3SigV4Auth(Credentials(access_key, secret_key), "s3", region).add_auth(signed)
        size = {"Content-Length": str(len(request.body))} if request.body or request.method in ("PUT", "POST") else {}
        return {**dict(signed.headers.items()), **size, "Accept-Encoding": "identity"}


def _happens(trouble: Trouble, request: _Request) -> bool:
    method, condition = request.method, request.has_condition
    match trouble:
        case Trouble.BUSY | Trouble.DROP | Trouble.DELAY:
            return True
        case Trouble.CONFLICT:
            return condition and method in ("PUT", "POST", "DELETE")
        case Trouble.PRECONDITION:
            return condition and method == "PUT"
        case Trouble.LOST_REPLY:
            return method in ("PUT", "POST", "DELETE")
        case Trouble.LATE:
            return method == "PUT" and not condition
        case Trouble.DUPLICATE:
            return method in ("PUT", "DELETE") and not condition
        case Trouble.CUT:
            return method == "GET"
        case Trouble.CORRUPT:
            return method == "GET" and not request.is_listing
        case Trouble.IGNORE_RANGE:
            return method == "GET" and "range" in request.headers
        case Trouble.IGNORE_CONDITIONS:
            return condition and method in ("PUT", "DELETE")
        case Trouble.STALE_LIST:
            return request.is_listing


def _send(handler: BaseHTTPRequestHandler, request: _Request, reply: _Reply, cut: int | None) -> None:
    with contextlib.suppress(OSError):
        handler.send_response_only(reply.status)
        for name, value in reply.headers:
            handler.send_header(name, value)
        length = reply.length if request.method == "HEAD" and reply.length is not None else str(len(reply.body))
        if reply.status != 204:
            handler.send_header("Content-Length", length)
        handler.end_headers()
        if request.method != "HEAD":
            handler.wfile.write(reply.body[:cut])
    if cut is not None and cut < len(reply.body):
        handler.close_connection = True


def _send_error(handler: BaseHTTPRequestHandler, request: _Request, status: int, code: str) -> None:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>made by HostileS3</Message></Error>'.encode()
    _send(handler, request, _Reply(status, [("Content-Type", "application/xml")], body, str(len(body))), None)


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    """End the connection with a reset, as a crashed peer does."""
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
