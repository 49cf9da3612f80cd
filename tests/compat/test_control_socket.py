"""One control socket, two clients and two daemons: `litestream` asks ours, `pyrepl` asks the released one, and the answers have the same keys."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compat.litestream import litestream
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, until
from tests.servers import tool

Client = Callable[..., subprocess.CompletedProcess[str]]


def pyrepl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "replicator", *arguments], capture_output=True, text=True, timeout=60)


CLIENTS: dict[str, Client] = {"pyrepl": pyrepl, "litestream": litestream}


@contextlib.contextmanager
def daemon(name: str, config: Path, socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "replicator"] if name == "pyrepl" else [str(tool("litestream"))]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("LITESTREAM_")}
    with (config.parent / "daemon.log").open("wb") as log:
        process = subprocess.Popen([*command, "replicate", "-config", str(config)], stdout=log, stderr=log, env=environ)
    try:
        until(lambda: socket.exists() and "replicating" in pyrepl("list", "-socket", str(socket)).stdout)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Two databases, of which the configuration has the first."""
    connections = [connect(tmp_path / name) for name in ("a.db", "b.db")]
    for connection in connections:
        insert(connection, 3)
    (tmp_path / "c.yml").write_text(
        f"socket: {{enabled: true, path: {tmp_path}/s.sock}}\ndbs: [{{path: {tmp_path}/a.db, replica: {{path: {tmp_path}/ra}}}}]"
    )
    yield tmp_path
    for connection in connections:
        connection.close()


def keys(value: object) -> object:
    """The shape of a JSON value: its keys, and the types of what is not a container."""
    if isinstance(value, dict):
        return {key: keys(item) for key, item in value.items()}
    return [keys(item) for item in value] if isinstance(value, list) else type(value).__name__


def ask(client: Client, place: Path, command: str, *arguments: str) -> dict[str, object]:
    done = client(command, "-socket", str(place / "s.sock"), "-json", *arguments)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def conversation(client: Client, place: Path) -> dict[str, dict[str, object]]:
    """Everything that the commands can be asked, in an order in which each answer is known."""
    a, b = str(place / "a.db"), str(place / "b.db")
    said = {"nothing new": ask(client, place, "sync", "-wait", a), "info": ask(client, place, "info")}
    until(lambda: "last_sync_at" in ask(client, place, "list")["databases"][0])  # type: ignore[index]
    said["list"] = ask(client, place, "list")
    writer = connect(place / "a.db")
    insert(writer, 1)
    writer.close()
    said["sync"] = ask(client, place, "sync", "-wait", a)
    said["sync locally"] = ask(client, place, "sync", a)
    said["stop"] = ask(client, place, "stop", a)
    said["stop again"] = ask(client, place, "stop", a)
    said["list stopped"] = ask(client, place, "list")
    said["start"] = ask(client, place, "start", a)
    said["start again"] = ask(client, place, "start", a)
    said["register"] = ask(client, place, "register", "-replica", f"file://{place}/rb", b)
    said["register again"] = ask(client, place, "register", "-replica", f"file://{place}/rb", b)
    said["sync b"] = ask(client, place, "sync", "-wait", b)
    said["list both"] = ask(client, place, "list")
    said["unregister"] = ask(client, place, "unregister", b)
    said["unregister again"] = ask(client, place, "unregister", b)
    return said


def test_the_same_conversation_with_each_client_and_each_daemon(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    said: dict[tuple[str, str], dict[str, dict[str, object]]] = {}
    for server in ("pyrepl", "litestream"):
        for client in ("pyrepl", "litestream"):
            for leftover in (place / "ra", place / "rb", place / ".a.db-litestream", place / ".b.db-litestream"):
                if leftover.exists():
                    leftover.rename(tmp_path_factory.mktemp("old") / "x")
            with daemon(server, place / "c.yml", place / "s.sock") as process:
                said[server, client] = conversation(CLIENTS[client], place)
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
            for name in ("a", "b"):
                database = place / f"{name}.db"
                assert restored(f"file://{place}/r{name}", place).read_bytes() == checkpointed_bytes(database, place)
    reference = said["litestream", "litestream"]
    for pair, found in said.items():
        for step, answer in found.items():
            assert keys(answer) == keys(reference[step]), (pair, step)
            for key in ("status", "state", "db_path", "replica", "socket"):
                assert answer.get(key) == reference[step].get(key), (pair, step)
        for step in ("list", "list stopped"):
            statuses = [[item["status"] for item in answer[step]["databases"]] for answer in (found, reference)]  # type: ignore[attr-defined]
            assert statuses[0] == statuses[1], (pair, step)
        assert [item["path"] for item in found["list both"]["databases"]] == [f"{place}/a.db", f"{place}/b.db"]  # type: ignore[attr-defined]
        assert found["sync"]["txid"] == found["sync"]["replica_txid"] == found["nothing new"]["txid"] + 1  # type: ignore[operator]


@pytest.mark.parametrize("server", ["pyrepl", "litestream"])
def test_texts_and_errors_are_the_same(place: Path, server: str) -> None:
    socket = str(place / "s.sock")
    commands = [
        ["list", "-socket", socket],
        ["info", "-socket", socket],
        ["sync", "-socket", socket, "-wait", f"{place}/a.db"],
        ["stop", "-socket", socket, f"{place}/a.db"],
        ["sync", "-socket", socket, f"{place}/a.db"],
        ["start", "-socket", socket, f"{place}/a.db"],
        ["sync", "-socket", socket, f"{place}/none.db"],
        ["start", "-socket", socket, f"{place}/none.db"],
        ["stop", "-socket", socket, f"{place}/none.db"],
        ["unregister", "-socket", socket, "-dry-run", f"{place}/a.db"],
        ["unregister", "-socket", socket, f"{place}/none.db"],
        ["sync", "-socket", socket, "-timeout", "0", f"{place}/a.db"],
        ["register", "-socket", socket, f"{place}/b.db"],
    ]
    with daemon(server, place / "c.yml", place / "s.sock"):
        for command in commands:
            ours, theirs = pyrepl(*command), litestream(*command)
            wrong_usage = ours.returncode == 2
            assert (ours.returncode != 0) == (theirs.returncode != 0), (command, ours, theirs)
            assert wrong_usage or ours.returncode == theirs.returncode
            again = ("status: stopped", "status: already_stopped"), ("status: started", "status: already_running")
            left = ours.stdout
            for first, second in again:  # the second one to ask finds it done
                left = left.replace(first, second)
            # Between the two questions the first sync may have come.
            shape = [re.sub(r"[0-9][0-9:TZ.ms-]*|pyrepl|Litestream|(?<=last sync: )never", "#", text) for text in (left, theirs.stdout)]
            assert shape[0] == shape[1], command
            assert ours.stderr.splitlines()[:1] == theirs.stderr.splitlines()[:1], command


def test_plain_requests_get_the_same_answers(place: Path) -> None:
    """What scripts with an HTTP client see: status, type, and the shape of the body."""
    a = f"{place}/a.db"
    requests: list[tuple[str, str, bytes | None]] = [
        ("GET", f"/txid?path={a}", None),
        ("GET", "/txid", None),
        ("GET", "/txid?path=/none.db", None),
        ("GET", "/debug/sync-status?path=/none.db", None),
        ("GET", "/list", None),
        ("GET", "/info", None),
        ("POST", "/list", b"{}"),
        ("GET", "/sync", None),
        ("GET", "/nothing", None),
        ("POST", "/sync", b""),
        ("POST", "/sync", b"{"),
        ("POST", "/sync", b'{"path":5}'),
        ("POST", "/sync", b'{"path":"/none.db"}'),
        ("POST", "/start", b"{}"),
        ("POST", "/stop", b'{"path":"/none.db"}'),
        ("POST", "/register", b'{"path":"/x.db"}'),
        ("POST", "/register", b'{"path":"/x.db","replica_url":"zz://x"}'),
        ("POST", "/unregister", b'{"path":"/none.db"}'),
    ]
    said: dict[str, list[object]] = {}
    for server in ("pyrepl", "litestream"):
        with daemon(server, place / "c.yml", place / "s.sock"):
            pyrepl("sync", "-wait", "-socket", str(place / "s.sock"), a)
            until(lambda: b"last_sync_at" in plain_request(place / "s.sock", "GET", "/list", None)[2])
            said[server] = []
            for request in requests:
                status, kind, body = plain_request(place / "s.sock", *request)
                answer = json.loads(body) if kind == "application/json" else {}
                error = re.sub(r"(?<=^invalid replica url: ).*", "#", answer.get("error", ""))  # in words of its own
                said[server].append((request, status, kind, keys(answer) if kind == "application/json" else body, error))
            status, _, body = plain_request(place / "s.sock", "GET", f"/debug/sync-status?path={a}", None)
            (found,) = json.loads(body)["databases"]
            assert (status, found["path"], type(found["active"])) == (200, a, bool)
        shutil.rmtree(place / "ra")
        shutil.rmtree(place / ".a.db-litestream")
    for ours, theirs in zip(*said.values(), strict=True):
        assert ours == theirs


def plain_request(path: Path, method: str, target: str, body: bytes | None) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(30)
    connection.sock.connect(str(path))
    with contextlib.closing(connection):
        connection.request(method, target, body)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type") or "", answer.read()


def test_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    for client in (pyrepl, litestream):
        done = client("list", "-socket", str(tmp_path / "none.sock"))
        assert done.returncode == 1
        assert done.stderr.startswith("Error: failed to connect to control socket: ")
        assert "no such file or directory" in done.stderr
