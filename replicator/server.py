"""HTTP/1.1 for two kinds of askers: control requests on a Unix socket, and metrics and health on a TCP address.

A `Listener` owns a socket and its threads; what it answers is a function from `Request` to `Response`, so that the two services below need no
socket to be tested. Limits: a request must arrive within ten seconds and be small, and there are 64 connections at most; what comes on top is
closed at once. Nothing wakes up while nobody asks.

`Control` is Litestream's API, shape by shape (specification 0.5, section 7, tried with the released binary): status words, keys, error bodies
and codes. What the peer has no word for is in the log, in `/readyz`, and in the one request of our own, `/pyrepl/overview`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import selectors
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from replicator import __version__
from replicator.errors import ConfigError
from replicator.losses import LossWindow
from replicator.overview import Overview
from replicator.storage.measured import Operations
from replicator.store import FAILURES, Member, Store

__all__ = ["Control", "Listener", "Observed", "Request", "Response", "listen_tcp", "listen_unix"]

MAX_BODY = 64 << 10
REQUEST_S = 10.0
CONNECTIONS = 64
FOLDER_LOCK_S = 2.0
DEFAULT_TIMEOUT_S = 30
MAX_TIMEOUT_S = 86400

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """`query`: the last value of each parameter."""

    method: str
    path: str
    query: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def listen_unix(path: Path, permissions: int) -> socket.socket:
    """Return a listening socket at a path. One that nobody serves any more is replaced.

    Raises:
        ConfigError: something else is there, another process serves it, or it cannot be made.
    """
    with _alone_in(path.parent):
        return _listen_unix(path, permissions)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep others of our kind from finding out at the same time that nobody serves a socket: each would replace that of the other.

    Whoever may read the folder may hold the lock, so it is waited for a moment only.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # `bind` says why not
        return
    end = time.monotonic() + FOLDER_LOCK_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _listen_unix(path: Path, permissions: int) -> socket.socket:
    try:
        found = os.lstat(path)
    except OSError:
        pass  # nothing there, or `bind` says why not
    else:
        if not stat.S_ISSOCK(found.st_mode):
            raise ConfigError(f"socket path exists but is not a socket: {path}", hint="remove it, or give another socket.path")
        if _is_served(path):
            raise ConfigError(f"another process serves the control socket: {path}", hint="stop it, or give another socket.path")
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(os.fspath(path))
        os.chmod(path, permissions)  # before it listens, nobody can connect
        made.listen(CONNECTIONS)
    except OSError as error:
        made.close()
        raise ConfigError(f"cannot listen on {path}: {(error.strerror or str(error)).lower()}") from error
    return made


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(2.0)
        try:
            asking.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # full, or not ours to ask: somebody is there
            return True
        return True


def listen_tcp(host: str, port: int) -> socket.socket:
    """Return a listening socket; an empty host is all addresses. Raises `ConfigError`."""
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if not host:
            with contextlib.suppress(OSError):
                if socket.has_dualstack_ipv6():
                    return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=CONNECTIONS)
        family = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        hint = "another process listens there; give another addr" if in_use else "check addr"
        raise ConfigError(f"cannot listen on {name}: {(error.strerror or str(error)).lower()}", hint=hint) from error


class Listener:
    """A listening socket, the thread that accepts, and one thread for each connection. It owns them all."""

    def __init__(self, listening: socket.socket, respond: Callable[[Request], Response], name: str) -> None:
        self.respond = respond
        self._socket, self._name = listening, name
        self._reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._run, name=f"pyrepl {name}", daemon=True)
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._is_unix = listening.family == socket.AF_UNIX
        self._inode = os.stat(listening.getsockname()).st_ino if self._is_unix else 0

    @property
    def address(self) -> Any:
        """Where it listens, as the socket has it."""
        return self._socket.getsockname()

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Accept nothing more, remove the socket's file, and end connections. Closing twice does nothing."""
        if self._writer < 0:
            return
        if self._is_unix:
            path = self._socket.getsockname()
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == self._inode:  # not that of a process which came after us
                    os.unlink(path)
        os.write(self._writer, b"x")
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self._socket.close()
        with self._lock:
            open_now = list(self._connections.items())
        end = time.monotonic() + timeout_s
        for connection, thread in open_now:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # what is being answered may still be
            thread.join(max(0.0, end - time.monotonic()))
        for descriptor in (self._reader, self._writer):
            os.close(descriptor)
        self._reader = self._writer = -1

    def _run(self) -> None:
        self._socket.settimeout(0)
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._reader, selectors.EVENT_READ)
            while True:
                if any(key.fd == self._reader for key, _ in selector.select()):
                    return
                try:
                    connection, _ = self._socket.accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    log.warning("cannot accept a connection listener=%s error=%r", self._name, str(error))
                    time.sleep(0.1)  # out of descriptors: the next one would fail at once, too
                    continue
                self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(connection,), name=f"pyrepl {self._name} request", daemon=True)
        with self._lock:
            if len(self._connections) >= CONNECTIONS:
                connection.close()
                return
            self._connections[connection] = thread
        thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            _Handler(connection, ("", 0), self)  # type: ignore[arg-type]  # of the server it only wants `respond`
        except OSError:
            pass  # the other side left, or was too slow
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()


class _Timely(io.RawIOBase):
    """Reads from a socket until a time; `TimeoutError` afterwards."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.end = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("request too slow")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "pyrepl", ""
    wbufsize = -1  # head and body in one piece: two small ones would wait for the other side's delayed acknowledgement
    server: Listener  # type: ignore[assignment]

    def setup(self) -> None:
        super().setup()
        self._timely = _Timely(self.connection)
        self.rfile = io.BufferedReader(self._timely)

    def handle_one_request(self) -> None:
        self._timely.end = time.monotonic() + REQUEST_S
        super().handle_one_request()

    def _answer(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding") or not length.isascii() or not length.isdigit():
            self._refuse(HTTPStatus.LENGTH_REQUIRED)
        elif len(length) > 9 or int(length) > MAX_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                self.close_connection = True
                return
            self._send(self._respond(body))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _answer

    def _respond(self, body: bytes) -> Response:
        try:
            parts = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True, max_num_fields=20).items()}
        except ValueError:
            return _text(HTTPStatus.BAD_REQUEST)
        try:
            return self.server.respond(Request(self.command, parts.path, query, body))
        except Exception as error:
            log.error("request failed, by a defect path=%s", parts.path, exc_info=error)
            return _error(500, "internal error")

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # the body was not read
        self._send(_text(status))

    def _send(self, response: Response) -> None:
        self.connection.settimeout(REQUEST_S)
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        for name, value in response.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, format: str, *args: object) -> None:
        log.debug("request " + format, *args)


# -- control ---------------------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """An error body."""

    def __init__(self, status: int, error: str, details: str | None = None) -> None:
        super().__init__(error)
        self.response = _error(status, error, details)


class Control:
    """Litestream's control API for a store.

    `make` returns the member for a database and a replica URL, not started; it raises `ConfigError`.
    """

    def __init__(self, store: Store, make: Callable[[Path, str], Member], *, started_at: datetime, operations: Operations) -> None:
        self._store, self._make, self._started_at = store, make, started_at
        self._overview = Overview(store, operations)
        self._routes: dict[str, tuple[str, Callable[[Request], Mapping[str, object]]]] = {
            "/start": ("POST", self._start),
            "/stop": ("POST", self._stop),
            "/sync": ("POST", self._sync),
            "/register": ("POST", self._register),
            "/unregister": ("POST", self._unregister),
            "/txid": ("GET", self._txid),
            "/list": ("GET", self._list),
            "/info": ("GET", self._info),
            "/debug/sync-status": ("GET", self._sync_status),
            "/pyrepl/overview": ("GET", lambda request: self._overview.answer()),
        }

    def respond(self, request: Request) -> Response:
        """Answer a request."""
        if (refused := _route(request, {path: method for path, (method, _) in self._routes.items()})) is not None:
            return refused
        try:
            return _json(200, self._routes[request.path][1](request))
        except _Refused as error:
            return error.response
        except FAILURES as error:
            return _error(500, str(error))

    # -- requests ----------------------------------------------------------------------------------------------------------------

    def _start(self, request: Request) -> Mapping[str, object]:
        fields = _fields(request, path=str, timeout=int)
        member = self._member(fields, missing=500)
        self._check_open()
        tried = member.start(again=True, timeout_s=_timeout(fields))
        if member.error is not None and member.replicator is None and not member.is_parked:
            raise _Refused(500, str(member.error))
        return {"status": "started" if tried else "already_running", "path": fields["path"], "txid": member.txid}

    def _stop(self, request: Request) -> Mapping[str, object]:
        fields = _fields(request, path=str, timeout=int)
        member = self._member(fields, missing=500)
        was_running = member.stop(_timeout(fields))
        return {"status": "stopped" if was_running else "already_stopped", "path": fields["path"], "txid": member.txid}

    def _sync(self, request: Request) -> Mapping[str, object]:
        fields = _fields(request, path=str, wait=bool, timeout=int)
        member = self._member(fields, missing=404)
        timeout_s = _timeout(fields)
        with member.awake(timeout_s) as replicator:
            if replicator is None:
                raise _Refused(409, f"database not open: {fields['path']}", member.problem)
            before, _ = replicator.reached()
            txid = replicator.wait(timeout_s=timeout_s) if fields["wait"] else replicator.capture(timeout_s=timeout_s)
            status = "no_change" if txid <= before else "synced" if fields["wait"] else "synced_local"
            return {"status": status, "path": fields["path"], "txid": txid, "replicated_txid": replicator.reached()[1]}

    def _register(self, request: Request) -> Mapping[str, object]:
        fields = _fields(request, path=str, replica_url=str)
        path = _absolute(fields)
        if not fields["replica_url"]:
            raise _Refused(400, "replica_url required")
        self._check_open()
        known = self._store.get(path)
        if known is None:
            try:
                member = self._make(path, str(fields["replica_url"]))
            except ConfigError as error:
                raise _Refused(400, f"invalid replica url: {error}") from error
            used = next((other.path for other in self._store.members() if set(other.urls) & set(member.urls)), None)
            if used is not None:
                raise _Refused(400, f"invalid replica url: it is that of another database: {used}")
            if self._store.add(member):
                if member.state == "failed":  # it would never begin
                    error_text = str(member.error)
                    with contextlib.suppress(*FAILURES):
                        self._store.remove(path, 1.0)
                    raise _Refused(500, error_text)
                return {"status": "registered", "path": fields["path"]}
        return {"status": "already_registered", "path": fields["path"]}

    def _unregister(self, request: Request) -> Mapping[str, object]:
        fields = _fields(request, path=str, timeout=int)
        member = self._store.remove(_absolute(fields), _timeout(fields))
        status = "already_unregistered" if member is None else "unregistered"
        return {"status": status, "path": fields["path"], "txid": member.txid if member is not None else 0}

    def _txid(self, request: Request) -> Mapping[str, object]:
        fields = {"path": request.query.get("path", "")}
        if not fields["path"]:
            raise _Refused(400, "path required")
        return {"txid": self._member(fields, missing=404, brief=True).txid}

    def _list(self, request: Request) -> Mapping[str, object]:
        return {"databases": [_listed(member) for member in self._store.members()]}

    def _info(self, request: Request) -> Mapping[str, object]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": int((datetime.now(UTC) - self._started_at).total_seconds()),
            "started_at": _time(self._started_at),
            "database_count": len(self._store.members()),
        }

    def _sync_status(self, request: Request) -> Mapping[str, object]:
        if path := request.query.get("path", ""):
            return {"databases": [_synced(self._member({"path": path}, missing=404, brief=True))]}
        return {"databases": [_synced(member) for member in self._store.members()]}

    # -- helpers -----------------------------------------------------------------------------------------------------------------

    def _member(self, fields: Mapping[str, Any], *, missing: int, brief: bool = False) -> Member:
        member = self._store.get(_absolute(fields))
        if member is None:
            raise _Refused(missing, "database not found" if brief else f"database not found: {fields['path']}")
        return member

    def _check_open(self) -> None:
        if self._store.is_closing:
            raise _Refused(500, "the daemon is stopping")


def _fields(request: Request, **types: type) -> dict[str, Any]:
    """Return the fields of a JSON body. What stands after the first value is ignored, and so are unknown fields, as the peer does."""
    try:
        text = request.body.decode().lstrip()
        if not text:
            raise ValueError("EOF")
        body, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, "invalid request body", str(error)) from None
    if not isinstance(body, dict):
        raise _Refused(400, "invalid request body", "not an object")
    fields: dict[str, Any] = {}
    for name, kind in types.items():
        value = body.get(name)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise _Refused(400, "invalid request body", f"{name} must be of type {kind.__name__}")
        fields[name] = kind() if value is None else value
    return fields


def _absolute(fields: Mapping[str, Any]) -> Path:
    from replicator.config import database_path

    if not fields["path"]:
        raise _Refused(400, "path required")
    try:
        return database_path(fields["path"], home=None, folder=Path.cwd())
    except ConfigError as error:
        raise _Refused(400, f"invalid path: {error}") from error


def _timeout(fields: Mapping[str, Any]) -> float:
    return float(min(fields["timeout"], MAX_TIMEOUT_S) if fields["timeout"] > 0 else DEFAULT_TIMEOUT_S)


def _listed(member: Member) -> dict[str, object]:
    words = {"replicating": "replicating", "parked": "replicating", "waiting": "open", "failed": "stopped", "stopped": "stopped"}
    listed: dict[str, object] = {"path": str(member.path), "status": words[member.state]}
    if (when := member.synced_at) is not None:
        listed["last_sync_at"] = _time(when)
    return listed


def _synced(member: Member) -> dict[str, object]:
    found: dict[str, object] = {"path": str(member.path), "active": False}
    if member.txid:
        found["txid"] = member.txid
    replicator = member.replicator
    if replicator is not None:
        status = replicator.status()
        lag_s = max((item.lag_s for item in status.replicas), default=0.0)
        if lag_s:
            found |= {"active": True, "operation": "sync", "elapsed_seconds": round(lag_s, 6)}
        if losses := {item.url: _window(item.loss_window) for item in status.replicas if item.loss_window.count}:
            found["loss_window"] = losses
        if status.synced_at is not None:
            found["updated_at"] = _time(status.synced_at)
        if (lease := status.lease) is not None:
            expires = {"expires_at": _time(lease.expires_at)} if lease.expires_at is not None else {}
            wanted = {"wanted_by": lease.wanted_by} if lease.wanted_by else {}
            found["lease"] = {"state": lease.state, "owner": lease.owner, "generation": lease.generation, **expires, **wanted}
        if status.wal_size_bytes:
            found |= {"wal_size": status.wal_size_bytes, "last_synced_wal_offset": status.wal_size_bytes}
    if (problem := member.problem) is not None:
        found["error"] = problem
    return found


def _window(window: LossWindow) -> dict[str, object]:
    """What the peer has no word for: how long commits were on this machine alone."""
    seconds = {"p50_seconds": window.p50_s, "p99_seconds": window.p99_s, "max_seconds": window.max_s}
    return {**{key: round(value, 6) for key, value in seconds.items()}, "txids": window.count}


# -- metrics and health ------------------------------------------------------------------------------------------------------------


class Observed:
    """`/metrics`, `/healthz` and `/readyz` of a store. `render` makes the text of the metrics."""

    def __init__(self, store: Store, render: Callable[[], bytes]) -> None:
        self._store, self._render = store, render

    def respond(self, request: Request) -> Response:
        """Answer a request."""
        refused = _route(request, dict.fromkeys(["/metrics", "/healthz", "/readyz"], "GET"))
        if refused is not None:
            return refused
        if request.path == "/metrics":
            return Response(200, self._render(), "text/plain; version=0.0.4; charset=utf-8")
        if request.path == "/healthz":
            return Response(200, b"ok\n", "text/plain; charset=utf-8")
        return self._ready()

    def _ready(self) -> Response:
        """Ready: every database that is wanted is replicating. One whose replica does not answer is: it is stored later."""
        databases = [
            {"path": str(member.path), "state": member.state, **({"error": member.problem} if member.problem else {})}
            for member in self._store.members()
        ]
        running = self._store.is_started and not self._store.is_closing
        ready = running and all(item["state"] in ("replicating", "parked", "stopped") for item in databases)
        return _json(200 if ready else 503, {"ready": ready, "databases": databases})


# -- responses -------------------------------------------------------------------------------------------------------------------


def _route(request: Request, methods: Mapping[str, str]) -> Response | None:
    method = methods.get(request.path)
    if method is None:
        return _plain(404, b"404 page not found\n")
    if request.method != method and not (method == "GET" and request.method == "HEAD"):
        return _plain(405, b"Method Not Allowed\n", ("Allow", "GET, HEAD" if method == "GET" else method))
    return None


def _json(status: int, value: Mapping[str, object]) -> Response:
    return Response(status, json.dumps(value, separators=(",", ":")).encode() + b"\n")


def _error(status: int, error: str, details: str | None = None) -> Response:
    return _json(status, {"error": error, **({"details": details} if details else {})})


def _text(status: HTTPStatus) -> Response:
    return _plain(status, status.phrase.encode() + b"\n")


def _plain(status: int, body: bytes, *headers: tuple[str, str]) -> Response:
    return Response(status, body, "text/plain; charset=utf-8", (("X-Content-Type-Options", "nosniff"), *headers))


def _time(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
