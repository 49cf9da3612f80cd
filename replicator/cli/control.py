"""What asks a running daemon, ours or Litestream's, through its control socket: `list`, `info`, `sync`, `register`, `unregister`, `start`, `stop`.

Flags, keys and texts are Litestream's, so that scripts written for one work with the other.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from replicator.cli.configured import home
from replicator.cli.output import fail, redacted, time_text
from replicator.cli.parse import Command, UsageError
from replicator.errors import ReplicatorError, RequestRefused

__all__ = ["COMMANDS", "SOCKET", "ask_daemon", "timeout_flag"]

SOCKET = "/var/run/litestream.sock"
LATE_S = 5.0
MAX_ANSWER = 64 << 20


def _ask(flags: dict[str, str], path: str, body: Mapping[str, object] | None = None, *, default_s: int = 30) -> tuple[Any, str]:
    return ask_daemon(Path(flags.get("socket", SOCKET)), path, body, timeout_s=timeout_flag(flags, default_s) + LATE_S)


def ask_daemon(where: Path, path: str, body: Mapping[str, object] | None = None, *, timeout_s: float) -> tuple[Any, str]:
    """Send a request, with a body a POST, and return the answer, and what the daemon is called.

    Raises:
        RequestRefused: the daemon refuses.
        ReplicatorError: nobody answers.
    """
    import http.client

    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(timeout_s)
    try:
        connection.sock.connect(os.fspath(where))
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read(MAX_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        hint = "is the daemon running, with socket.enabled in its configuration? -socket names another path"
        raise ReplicatorError(f"failed to connect to control socket: {where}: {reason.lower()}", hint=hint) from error
    finally:
        connection.close()
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise RequestRefused(path.strip("/"), response.status, f"{response.status} {response.reason}")
    if response.status != 200:
        details = f": {answer['details']}" if answer.get("details") else ""
        raise RequestRefused(path.strip("/"), response.status, f"{answer.get('error', response.reason)}{details}")
    return answer, "pyrepl" if (response.getheader("Server") or "").startswith("pyrepl") else "Litestream"


def timeout_flag(flags: dict[str, str], default_s: int) -> int:
    """Return the value of `-timeout` in whole seconds. Raises `UsageError`."""
    text = flags.get("timeout", str(default_s))
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise UsageError(f"invalid value for -timeout: {text!r} (whole seconds)")
    if not int(text):
        raise UsageError("timeout must be greater than 0")
    return int(text)


def _database(arguments: list[str]) -> str:
    from replicator.config import database_path

    if not arguments:
        raise UsageError("database path required")
    if len(arguments) > 1:
        raise UsageError("too many arguments")
    return str(database_path(arguments[0], home=home(), folder=Path.cwd()))


def _print(flags: dict[str, str], fields: Mapping[str, object]) -> int:
    if flags.get("json") == "true":
        print(json.dumps(fields, indent=2))
    else:
        for key, value in fields.items():
            print(f"{key}: {value}")
    return 0


# -- commands --------------------------------------------------------------------------------------------------------------------


def list_databases(flags: dict[str, str], arguments: list[str]) -> int:
    if arguments:
        raise UsageError("too many arguments")
    answer, _ = _ask(flags, "/list", default_s=10)
    if flags.get("json") == "true":
        return _print(flags, answer)
    databases = answer.get("databases") or []
    if not databases:
        print("No databases configured")
    for item in databases:
        when = item.get("last_sync_at")
        print(f"{item['path']} [{item['status']}] (last sync: {time_text(_when(when)) if when else 'never'})")
    return 0


def info(flags: dict[str, str], arguments: list[str]) -> int:
    if arguments:
        raise UsageError("too many arguments")
    answer, name = _ask(flags, "/info", default_s=10)
    if flags.get("json") == "true":
        return _print(flags, answer)
    from replicator.durations import format_duration

    print(f"{name} {answer['version']}")
    print(f"  PID:        {answer['pid']}")
    print(f"  Uptime:     {format_duration(answer['uptime_seconds'])}")
    print(f"  Started at: {time_text(_when(answer['started_at']))}")
    print(f"  Databases:  {answer['database_count']}")
    return 0


def sync(flags: dict[str, str], arguments: list[str]) -> int:
    path, wait, began = _database(arguments), flags.get("wait") == "true", time.monotonic()
    answer, _ = _ask(flags, "/sync", {"path": path, "wait": wait, "timeout": timeout_flag(flags, 30)})
    fields = {"db_path": path, "txid": answer["txid"], **({"replica_txid": answer["replicated_txid"]} if wait else {})}
    return _print(flags, {**fields, "duration_ms": int((time.monotonic() - began) * 1000)})


def register(flags: dict[str, str], arguments: list[str]) -> int:
    path, url = _database(arguments), flags.get("replica", "")
    if not url:
        return fail("-replica is required", "pyrepl register -replica s3://bucket/prefix /path/to/db")
    answer, _ = _ask(flags, "/register", {"path": path, "replica_url": url})
    status = answer["status"] if flags.get("json") == "true" else answer["status"].replace("_", " ")
    return _print(flags, {"status": status, "db_path": path, "replica": redacted(url), "socket": flags.get("socket", SOCKET)})


def unregister(flags: dict[str, str], arguments: list[str]) -> int:
    path, where, timeout_s = _database(arguments), flags.get("socket", SOCKET), timeout_flag(flags, 30)
    if flags.get("dry-run") == "true":
        print("Dry run: unregister request preview")
        print(f"  database: {path}\n  socket: {where}\n  replicas: daemon-managed replica for this database")
        print("  final sync: daemon close will sync the database and replica before the command completes")
        print(f"  timeout: {timeout_s}s\nNo unregister request was sent.")
        return 0
    answer, _ = _ask(flags, "/unregister", {"path": path, "timeout": timeout_s})
    return _print(flags, {"status": answer["status"], "db_path": path, "final_txid": answer["txid"], "socket": where})


def start(flags: dict[str, str], arguments: list[str]) -> int:
    return _start_or_stop(flags, arguments, "start", "running")


def stop(flags: dict[str, str], arguments: list[str]) -> int:
    return _start_or_stop(flags, arguments, "stop", "stopped")


def _start_or_stop(flags: dict[str, str], arguments: list[str], verb: str, state: str) -> int:
    path = _database(arguments)
    answer, _ = _ask(flags, f"/{verb}", {"path": path, "timeout": timeout_flag(flags, 30)})
    where = os.fspath(flags.get("socket", SOCKET))
    return _print(flags, {"status": answer["status"], "db_path": path, "state": state, "txid": answer["txid"], "socket": where})


def _when(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:  # nanoseconds, before Python 3.11
        return datetime.fromisoformat(text[:26].rstrip("Z") + "+00:00")


_FLAGS = "[-socket PATH] [-timeout SECONDS] [-json]"
_COMMON = ("socket", "timeout")

COMMANDS = {
    "list": Command(f"pyrepl list {_FLAGS}", "List the databases of a running daemon.", ("json",), _COMMON, list_databases),
    "info": Command(f"pyrepl info {_FLAGS}", "Show a running daemon's version, process and age.", ("json",), _COMMON, info),
    "sync": Command(
        f"pyrepl sync [-wait] {_FLAGS} DB",
        "Let a running daemon read a database now.\n\n-wait: return when every replica has it.",
        ("wait", "json"),
        _COMMON,
        sync,
    ),
    "register": Command(
        f"pyrepl register -replica URL {_FLAGS} DB",
        "Add a database to a running daemon, until that ends.",
        ("json",),
        ("replica", *_COMMON),
        register,
    ),
    "unregister": Command(
        f"pyrepl unregister [-dry-run] {_FLAGS} DB",
        "Store a database a last time and remove it from a running daemon.",
        ("dry-run", "json"),
        _COMMON,
        unregister,
    ),
    "start": Command(f"pyrepl start {_FLAGS} DB", "Replicate a database of a running daemon again.", ("json",), _COMMON, start),
    "stop": Command(f"pyrepl stop {_FLAGS} DB", "Store a database a last time and stop replicating it.", ("json",), _COMMON, stop),
}
