"""Fuzz the control socket: python fuzz/fuzz_socket.py [corpus folder] (needs atheris).

Invariant: whatever bytes come through the socket, the handler ends, and what it answers is HTTP with a status that the API has; a request that was understood gets JSON
or one of the router's plain texts, and never "internal error".
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from replicator.errors import ConfigError
from replicator.server import Control, Request, Response, _Handler
from replicator.storage.measured import Operations

STATUSES = {200, 400, 404, 405, 409, 411, 413, 414, 431, 500, 501, 505}
ROUTES = (
    "/start",
    "/stop",
    "/sync",
    "/register",
    "/unregister",
    "/txid",
    "/list",
    "/info",
    "/debug/sync-status",
    "/pyrepl/overview",
    "/nothing",
)


class NoDatabases:
    """A store without members: what is fuzzed is how requests are read."""

    is_closing = False

    def members(self) -> list[Any]:
        return []

    def get(self, path: Path) -> None:
        assert path.is_absolute()

    def remove(self, path: Path, timeout_s: float) -> None:
        assert path.is_absolute()
        assert 0 < timeout_s <= 86400


def refuse(path: Path, url: str) -> Any:
    raise ConfigError("no databases here")


CONTROL = Control(NoDatabases(), refuse, started_at=datetime(2026, 1, 1, tzinfo=UTC), operations=Operations())  # type: ignore[arg-type]


def check(data: bytes) -> None:
    """Raise `AssertionError`, or what must not be raised, when the invariant does not hold."""
    check_body(data)
    check_bytes(data)


def check_body(data: bytes) -> None:
    """The first byte chooses route and method, the rest is the body; it is the query's path as well."""
    if not data:
        return
    route, method = ROUTES[data[0] % len(ROUTES)], "GET" if data[0] & 0x80 else "POST"
    query = {"path": data[1:].decode("utf-8", errors="replace")} if data[0] & 0x40 else {}
    response = CONTROL.respond(Request(method, route, query, data[1:]))
    assert response.status in STATUSES
    if response.content_type == "application/json":
        assert isinstance(json.loads(response.body), dict)


def check_bytes(data: bytes) -> None:
    """All of it is what comes through the socket."""
    responses: list[Response] = []

    def respond(request: Request) -> Response:
        responses.append(CONTROL.respond(request))
        return responses[-1]

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        theirs.send(data[: 32 << 10])
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            _Handler(ours, "", SimpleNamespace(respond=respond))  # type: ignore[arg-type]
        ours.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := theirs.recv(1 << 16):
            answer += piece
    assert b"internal error" not in answer
    if answer.startswith(b"HTTP/1.1 "):
        assert int(answer[9:12]) in STATUSES | {100}, answer[:100]
    assert all(response.status in STATUSES for response in responses)


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
