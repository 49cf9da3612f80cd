"""`pyrepl restore`: restore a database from a replica, or show what that would take."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from replicator.cli.output import Bar, kind_of, log_to, redacted, table, time_text
from replicator.cli.parse import Command, UsageError, duration_flag
from replicator.errors import NoBackups

__all__ = ["COMMAND"]


def restore(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give one replica URL")
    url = arguments[0]
    output = flags.get("o")
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
    log_to(sys.stderr if flags.get("json") == "true" else sys.stdout, flags.get("log-level", "info"))
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
            return _show_plan(url, output, txid, timestamp, as_json=flags.get("json") == "true")
        if following:
            return _follow(url, output, flags, interval_s)
        with Bar() as bar:
            result = restore_database(
                url,
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
            log.info("no matching backups found url=%s", redacted(url))
            return 0
        raise
    if flags.get("json") == "true":
        _print_result(str(result.output), result.url, result.txid, result.duration_s, check)
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


def _follow(url: str, output: str, flags: dict[str, str], interval_s: float) -> int:
    """Follow until SIGINT or SIGTERM; a second one ends the process at once, which the copy survives."""
    from replicator.follow import follow
    from replicator.storage import open_client

    started = time.monotonic()
    stop = threading.Event()

    def on_signal(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
    check = flags.get("integrity-check", "none")
    client = open_client(url)
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
        _print_result(output, url, txid or 0, time.monotonic() - started, check)
    return 0


def _print_result(output: str, url: str, txid: int, duration_s: float, check: str) -> None:
    document = {
        "db_path": output,
        "replica": kind_of(url),
        "txid": f"{txid:016x}",
        "duration_ms": round(duration_s * 1000),
        "integrity_check": check,
    }
    print(json.dumps(document, indent=2))


def _show_plan(url: str, output: str, txid: int | None, timestamp: datetime | None, *, as_json: bool) -> int:
    from replicator.format.ltx import TXID
    from replicator.restorer import find_plan
    from replicator.storage import open_client

    client = open_client(url)
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
    "pyrepl restore -o PATH [-txid HEX | -timestamp TIME] [-f [-follow-interval D]] [-force] [-dry-run] [-json] [-if-db-not-exists] "
    "[-if-replica-exists] [-integrity-check none|quick|full] [-parallelism N] URL",
    "Restore a database from a replica.\n\n"
    "-f: go on and keep the output up to date as a read-only copy, until stopped; continues a copy that has its -txid file beside it.",
    ("f", "force", "dry-run", "json", "if-db-not-exists", "if-replica-exists"),
    ("o", "txid", "timestamp", "follow-interval", "integrity-check", "parallelism", "log-level"),
    restore,
)
