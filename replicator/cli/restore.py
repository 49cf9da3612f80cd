"""`pyrepl restore`: restore a database from a replica, or show what that would take."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, find_source
from replicator.cli.output import Bar, log_to, table, time_text
from replicator.cli.parse import Command, UsageError, duration_flag
from replicator.errors import NoBackups

if TYPE_CHECKING:
    from replicator.storage.base import ReplicaClient

__all__ = ["COMMAND"]


def restore(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give one replica URL, or the path of a database in the configuration")
    log_to(sys.stderr if flags.get("json") == "true" else sys.stdout, flags.get("log-level", "info"))
    source = find_source(flags, arguments[0])
    output = flags.get("o") or (os.fspath(source.database) if source.database else None)
    if output is None:
        raise UsageError("output path required: -o PATH")
    if "txid" in flags and "timestamp" in flags:
        raise UsageError("cannot specify -txid and -timestamp")
    following = flags.get("f") == "true"
    for flag in ("txid", "timestamp") if following else ():
        if flag in flags:
            raise UsageError(f"cannot use follow mode with -{flag}")
    if following and flags.get("dry-run") == "true":
        raise UsageError("cannot use -dry-run with -f")
    interval_s = duration_flag(flags, "follow-interval", 1.0) or 0.0
    if interval_s <= 0:
        raise UsageError("invalid value for -follow-interval: it must be above zero")
    check = flags.get("integrity-check", "none")
    if check not in ("none", "quick", "full"):
        raise UsageError(f"invalid value for -integrity-check: {check!r} (none, quick or full)")
    parallelism = flags.get("parallelism", "8")
    if not parallelism.isdigit() or not 1 <= int(parallelism) <= 256:
        raise UsageError(f"invalid value for -parallelism: {parallelism!r} (1 to 256)")
    log = logging.getLogger("replicator.cli")
    if flags.get("if-db-not-exists") == "true" and os.path.exists(output):
        log.info("database already exists, skipping path=%s", output)
        return 0
    from replicator.api import parse_timestamp
    from replicator.api import restore as restore_database
    from replicator.format.ltx import parse_txid

    txid = parse_txid(flags["txid"]) if "txid" in flags else None
    timestamp = parse_timestamp(flags["timestamp"]) if "timestamp" in flags else None
    try:
        if flags.get("dry-run") == "true":
            from replicator.restorer import first_answer

            as_json = flags.get("json") == "true"
            return first_answer(source.clients, lambda client: _show_plan(client, output, txid, timestamp, as_json=as_json))
        if following:
            return _follow(source.clients[0], output, flags, interval_s)
        with Bar() as bar:
            result = restore_database(
                source.clients,
                output,
                txid=txid,
                timestamp=timestamp,
                force=flags.get("force") == "true",
                integrity_check=check,  # type: ignore[arg-type]
                parallelism=int(parallelism),
                progress=bar.show,
            )
    except NoBackups:
        if flags.get("if-replica-exists") == "true":
            log.info("no matching backups found url=%s", source.clients[0].url)
            return 0
        raise
    if flags.get("json") == "true":
        _print_result(str(result.output), _kind(source.clients, result.url), result.txid, result.duration_s, check)
    else:
        log.info(
            "restored db path=%s txid=%016x files=%d pages=%d duration=%.3fs",
            output,
            result.txid,
            result.files,
            result.commit,
            result.duration_s,
        )
    return 0


def _follow(client: ReplicaClient, output: str, flags: dict[str, str], interval_s: float) -> int:
    """Follow until SIGINT or SIGTERM; a second one ends the process at once, which the copy survives."""
    from replicator.follow import follow

    started = time.monotonic()
    stop = threading.Event()

    def on_signal(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
    check = flags.get("integrity-check", "none")
    try:
        # In a thread of its own: a handler that sets an event deadlocks when it interrupts that event's own wait.
        with Bar() as bar, ThreadPoolExecutor(1) as pool:
            task = pool.submit(
                follow,
                client,
                Path(output),
                stop=stop,
                interval_s=interval_s,
                force=flags.get("force") == "true",
                integrity_check=check,  # type: ignore[arg-type]
                parallelism=int(flags.get("parallelism", "8")),
                progress=bar.show,
                applied=lambda _: bar.close(),
            )
            txid = task.result()
    finally:
        client.close()
    if flags.get("json") == "true":
        _print_result(output, client.kind, txid or 0, time.monotonic() - started, check)
    return 0


def _kind(clients: Sequence[ReplicaClient], url: str) -> str:
    return next((client.kind for client in clients if client.url == url), clients[0].kind)


def _print_result(output: str, kind: str, txid: int, duration_s: float, check: str) -> None:
    document = {
        "db_path": output,
        "replica": kind,
        "txid": f"{txid:016x}",
        "duration_ms": round(duration_s * 1000),
        "integrity_check": check,
    }
    print(json.dumps(document, indent=2))


def _show_plan(client: ReplicaClient, output: str, txid: int | None, timestamp: datetime | None, *, as_json: bool) -> int:
    from replicator.format.ltx import TXID
    from replicator.restorer import find_plan

    plan = find_plan(client, txid=None if txid is None else TXID(txid), timestamp=timestamp)
    files = [
        {
            "level": info.level,
            "name": info.name,
            "min_txid": f"{info.min_txid:016x}",
            "max_txid": f"{info.max_txid:016x}",
            "size": info.size,
            "timestamp": time_text(info.created_at),
        }
        for info in plan
    ]
    low, high = f"{plan[0].min_txid:016x}", f"{plan[-1].max_txid:016x}"
    if as_json:
        document = {"source": client.url, "target_path": output, "replica": client.kind, "min_txid": low, "max_txid": high, "files": files}
        print(json.dumps(document, indent=2))
        return 0
    print(
        f"Restore plan:\n  source: {client.url}\n  target: {output}\n  replica: {client.kind}\n  txid range: {low} - {high}\n\nFiles to fetch:"
    )
    table(["level", "file", "min_txid", "max_txid", "size", "timestamp"], [[str(value) for value in file.values()] for file in files])
    return 0


COMMAND = Command(
    "pyrepl restore [-o PATH] [-txid HEX | -timestamp TIME] [-f [-follow-interval D]] [-force] [-dry-run] [-json] [-if-db-not-exists] "
    f"[-if-replica-exists] [-integrity-check none|quick|full] [-parallelism N] {CONFIG_FLAGS} DB|URL",
    "Restore a database from a replica.\n\n"
    "-f: go on and keep the output up to date as a read-only copy, until stopped; continues a copy that has its -txid file beside it.",
    ("f", "force", "dry-run", "json", "if-db-not-exists", "if-replica-exists", *CONFIG_SWITCHES),
    ("o", "txid", "timestamp", "follow-interval", "integrity-check", "parallelism", "log-level", *CONFIG_OPTIONS),
    restore,
)
