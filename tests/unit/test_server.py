"""Requests as values, and hostile bytes on a real socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from replicator import server
from replicator.errors import ConfigError
from replicator.server import Control, Listener, Observed, Request, Response, listen_tcp, listen_unix
from replicator.storage.measured import Operations
from replicator.store import Store


def control() -> Control:
    def make(path: Path, url: str) -> object:
        raise ConfigError(f"no: {url}")

    return Control(Store(), make, started_at=datetime(2026, 1, 1, tzinfo=UTC), operations=Operations())  # type: ignore[arg-type]


def post(path: str, body: bytes) -> tuple[int, dict[str, str]]:
    answer = control().respond(Request("POST", path, {}, body))
    assert answer.body.endswith(b"}\n")
    return answer.status, json.loads(answer.body)


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        # Each as the released Litestream answers.
        ("/sync", b"", 400, "invalid request body"),
        ("/stop", b"xx", 400, "invalid request body"),
        ("/sync", b'{"path":5}', 400, "invalid request body"),
        ("/sync", b'{"path":"/x","timeout":"1"}', 400, "invalid request body"),
        ("/sync", b'{"path":"/x","timeout":true}', 400, "invalid request body"),
        ("/sync", b"{}", 400, "path required"),
        ("/sync", b'{"path":null}', 400, "path required"),
        ("/start", b"{}", 400, "path required"),
        ("/register", b'{"path":"/x"}', 400, "replica_url required"),
        ("/register", b'{"replica_url":"x"}', 400, "path required"),
        ("/register", b'{"path":"/x","replica_url":"zz://x"}', 400, "invalid replica url: no: zz://x"),
        ("/unregister", b"{}", 400, "path required"),
        ("/sync", b'{"path":"/none"} trailing', 404, "database not found: /none"),
        ("/sync", b'{"path":"/none","unknown":1,"timeout":-1}', 404, "database not found: /none"),
        ("/start", b'{"path":"/none"}', 500, "database not found: /none"),
        ("/stop", b'{"path":"/none"}', 500, "database not found: /none"),
        # And what only a hostile client sends.
        ("/sync", b"[]", 400, "invalid request body"),
        ("/sync", b"[" * 60_000, 400, "invalid request body"),
        ("/sync", b"\xff\xfe", 400, "invalid request body"),
        ("/sync", b'{"path":"/a\\u0000b"}', 400, "invalid path: path is empty, or has control characters"),
    ],
)
def test_requests_that_are_refused(path: str, body: bytes, status: int, error: str) -> None:
    found, answer = post(path, body)
    assert (found, answer["error"]) == (status, error)
    assert ("details" in answer) == (error == "invalid request body")


def test_what_is_not_there_and_wrong_methods() -> None:
    def get(where: str, method: str = "GET", **query: str) -> Response:
        return control().respond(Request(method, where, query))

    assert (get("/nope").status, get("/nope").body) == (404, b"404 page not found\n")
    assert (get("/sync").status, get("/sync").body, ("Allow", "POST") in get("/sync").headers) == (405, b"Method Not Allowed\n", True)
    assert ("Allow", "GET, HEAD") in get("/list", "POST").headers
    assert get("/txid").status == 400
    assert (get("/txid", path="/x").status, get("/txid", path="/x").body) == (404, b'{"error":"database not found"}\n')
    assert get("/debug/sync-status", path="/x").status == 404
    assert get("/debug/sync-status").body == get("/list").body == b'{"databases":[]}\n'
    assert post("/unregister", b'{"path":"/none"}') == (200, {"status": "already_unregistered", "path": "/none", "txid": 0})


def test_an_empty_store_is_ready_from_its_start_until_it_closes() -> None:
    store = Store()
    observed = Observed(store, lambda: b"text")
    assert observed.respond(Request("GET", "/metrics", {})).body == b"text"
    assert observed.respond(Request("GET", "/readyz", {})).status == 503
    store.start()
    assert observed.respond(Request("GET", "/readyz", {})).status == 200
    store.close(0.1)
    assert observed.respond(Request("GET", "/readyz", {})).status == 503
    assert observed.respond(Request("GET", "/healthz", {})).status == 200
    assert observed.respond(Request("POST", "/healthz", {})).status == 405


# -- sockets ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Answers with what it was asked."""
    monkeypatch.setattr(server, "REQUEST_S", 0.3)
    monkeypatch.setattr(server, "CONNECTIONS", 3)

    def respond(request: Request) -> Response:
        if request.path == "/broken":
            raise RuntimeError("a defect")
        return Response(200, f"{request.method} {request.path} {dict(request.query)} {request.body!r}".encode())

    listener = Listener(listen_tcp("127.0.0.1", 0), respond, "echo")
    listener.start()
    yield listener
    listener.close()


def send(listener: Listener, data: bytes) -> bytes:
    with socket.create_connection(listener.address, timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_one_connection_carries_several_requests(echo: Listener) -> None:
    answer = send(echo, b"POST /a?x=1&x=2 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\nHost: h\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert b"POST /a {'x': '2'} b'abc'" in answer
    assert b"GET /b {} b''" in answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"POST /a HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", b"413"),
        (b"POST /a HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", b"413"),
        (b"POST /a HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"411"),
        (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"431"),
        (b"GET /?" + b"&".join(b"a=1" for _ in range(100)) + b" HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /broken HTTP/1.1\r\n\r\n", b"500"),
        (b"BREW / HTTP/1.1\r\n\r\n", b"501"),
        (b"\x16\x03\x01\x00\xff garbage\r\n\r\n", b"400"),
    ],
)
def test_hostile_bytes_get_an_answer_and_the_next_asker_too(echo: Listener, data: bytes, status: bytes) -> None:
    answer = send(echo, data)
    assert status in answer[:400], answer[:400]
    assert b"Traceback" not in answer
    assert b"200 OK" in send(echo, b"GET / HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nHost", b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc"])
def test_who_says_nothing_is_cut_off(echo: Listener, data: bytes) -> None:
    with socket.create_connection(echo.address, timeout=10) as connection:
        connection.sendall(data)
        assert b"200" not in connection.recv(65536)


def test_more_connections_than_are_allowed_are_closed(echo: Listener) -> None:
    kept = [socket.create_connection(echo.address, timeout=10) for _ in range(3)]
    for connection in kept:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(65536)
    with socket.create_connection(echo.address, timeout=10) as late, pytest.raises(ConnectionError):  # noqa: PT012
        late.sendall(b"GET / HTTP/1.1\r\n\r\n")
        if not late.recv(65536):
            raise ConnectionError("closed")
    for connection in kept:
        connection.close()


def test_closing_ends_connections_and_frees_the_address(echo: Listener) -> None:
    address = echo.address
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        reply = b""
        while not reply.endswith(b"GET / {} b''"):  # it may come in several pieces
            piece = connection.recv(65536)
            assert piece
            reply += piece
        echo.close()
        echo.close()
        assert connection.recv(65536) == b""
    listen_tcp(*address).close()


def test_a_socket_of_another_process_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    first = Listener(listen_unix(path, 0o600), lambda request: Response(200, b""), "first")
    first.start()
    path.unlink()
    second = listen_unix(path, 0o600)
    first.close()
    assert path.exists()
    second.close()


@pytest.mark.parametrize("name", ["no/such/folder/s.sock", "x" * 150])
def test_socket_paths_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        listen_unix(tmp_path / name, 0o600)


def test_addresses_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:"), listen_tcp("127.0.0.1", 0) as taken:
        listen_tcp("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="cannot listen on"):
        listen_tcp("192.0.2.1", 0)
    everywhere = listen_tcp("", 0)
    socket.create_connection(("127.0.0.1", everywhere.getsockname()[1]), timeout=10).close()
    everywhere.close()
