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
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, find_source
from replicator.cli.output import Bar, log_to, table, time_text
from replicator.cli.parse import Command, UsageError, duration_flag
from replicator.cli.restoretree import configured_directory, restore_tree
from replicator.errors import NoBackups
from replicator.signalpipe import SignalPipe

if TYPE_CHECKING:
    from replicator.format.ltx import FileInfo
    from replicator.storage.base import ReplicaClient
    from replicator.v3plan import V3Plan

__all__ = ["COMMAND"]


def restore(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give one replica URL, or the path of a database in the configuration")
    directories = configured_directory(flags, arguments[0])
    if directories or flags.get("recursive") == "true":
        return restore_tree(flags, arguments[0], directories)
    log_to(sys.stderr if flags.get("json") == "true" else sys.stdout, flags.get("log-level", "info"))
    source = find_source(flags, arguments[0])
    output = flags.get("o") or (os.fspath(source.database) if source.database else None)
    if output is None:
        raise UsageError("output path required: -o PATH")
    if "txid" in flags and "timestamp" in flags:
        raise UsageError("cannot specify -txid and -timestamp")
    if "index" in flags and "timestamp" in flags:
        raise UsageError("cannot specify index & timestamp to restore")
    for flag in ("generation", "index") if "txid" in flags else ():
        if flag in flags:
            raise UsageError(f"cannot specify -txid and -{flag}")
    following = flags.get("f") == "true"
    for flag in ("txid", "timestamp", "generation", "index") if following else ():
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
    from replicator.format.ltx import TXID, parse_txid
    from replicator.format.v3 import is_generation, parse_index
    from replicator.recover import parse_timestamp
    from replicator.recover import restore as restore_database

    txid = parse_txid(flags["txid"]) if "txid" in flags else None
    if "timestamp" in flags:
        parse_timestamp(flags["timestamp"])
    index = parse_index(flags["index"]) if "index" in flags else None
    generation = flags.get("generation")
    if generation is not None and not is_generation(generation):
        raise UsageError(f"invalid value for -generation: {generation!r} (16 hex digits)")
    try:
        if flags.get("dry-run") == "true":
            from replicator.restorer import first_answer
            from replicator.v3restore import find_any_plan

            def show(client: ReplicaClient) -> int:
                plan = find_any_plan(
                    client,
                    txid=None if txid is None else TXID(txid),
                    timestamp_ns=parse_timestamp(flags["timestamp"]) if "timestamp" in flags else None,
                    generation=generation,
                    index=index,
                )
                return _show_plan(client, plan, output, as_json=flags.get("json") == "true")

            return first_answer(source.clients, show)
        if following:
            return _follow(source.clients[0], output, flags, interval_s)
        with Bar() as bar:
            result = restore_database(
                source.clients,
                output,
                txid=txid,
                timestamp=flags.get("timestamp"),
                generation=generation,
                index=index,
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
        _print_result(
            str(result.output), _kind(source.clients, result.url), result.txid, result.duration_s, check, result.generation, result.index
        )
    elif result.generation:
        log.info(
            "restored db path=%s generation=%s index=%08x files=%d pages=%d duration=%.3fs",
            output,
            result.generation,
            result.index,
            result.files,
            result.commit,
            result.duration_s,
        )
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
    stop, pipe = threading.Event(), SignalPipe()

    def on_signal(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    pipe.take((signal.SIGINT, signal.SIGTERM), on_signal)
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
            task.add_done_callback(lambda _: pipe.wake())
            while not task.done():
                pipe.wait()
            txid = task.result()
    finally:
        client.close()
    if flags.get("json") == "true":
        _print_result(output, client.kind, txid or 0, time.monotonic() - started, check)
    return 0


def _kind(clients: Sequence[ReplicaClient], url: str) -> str:
    return next((client.kind for client in clients if client.url == url), clients[0].kind)


def _print_result(output: str, kind: str, txid: int, duration_s: float, check: str, generation: str = "", index: int = 0) -> None:
    what = {"format": "0.3", "generation": generation, "index": f"{index:08x}"} if generation else {"txid": f"{txid:016x}"}
    document = {"db_path": output, "replica": kind, **what, "duration_ms": round(duration_s * 1000), "integrity_check": check}
    print(json.dumps(document, indent=2))


def _show_plan(client: ReplicaClient, plan: Sequence[FileInfo] | V3Plan, output: str, *, as_json: bool) -> int:
    from replicator.v3plan import V3Plan

    files: list[dict[str, object]]
    if isinstance(plan, V3Plan):
        low, high = f"{plan.snapshot.index:08x}", f"{plan.index:08x}"
        what: dict[str, object] = {"format": "0.3", "generation": plan.generation, "min_index": low, "max_index": high}
        lines = f"  format: 0.3\n  generation: {plan.generation}\n  index range: {low} - {high}"
        files = [
            {
                "name": info.name.rpartition("/")[2],
                "index": f"{info.index:08x}",
                "offset": getattr(info, "offset", None),
                "size": info.size,
                "timestamp": time_text(info.created_at),
            }
            for info in plan.files
        ]
        header = ["file", "index", "offset", "size", "timestamp"]
    else:
        low, high = f"{plan[0].min_txid:016x}", f"{plan[-1].max_txid:016x}"
        what = {"min_txid": low, "max_txid": high}  # the peer's document says no format
        lines = f"  format: ltx\n  txid range: {low} - {high}"
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
        header = ["level", "file", "min_txid", "max_txid", "size", "timestamp"]
    if as_json:
        print(json.dumps({"source": client.url, "target_path": output, "replica": client.kind, **what, "files": files}, indent=2))
        return 0
    print(f"Restore plan:\n  source: {client.url}\n  target: {output}\n  replica: {client.kind}\n{lines}\n\nFiles to fetch:")
    table(header, [["" if value is None else str(value) for value in file.values()] for file in files])
    return 0


COMMAND = Command(
    "pyrepl restore [-o PATH] [-txid HEX | -timestamp TIME | [-generation NAME] [-index HEX]] [-f [-follow-interval D]] [-force] [-dry-run] [-json] [-recursive] [-if-db-not-exists] "
    f"[-if-replica-exists] [-integrity-check none|quick|full] [-parallelism N] {CONFIG_FLAGS} DB|DIR|URL",
    "Restore a database from a replica.\n\n"
    "Replicas of Litestream 0.3 are restored, too; -generation (also with -timestamp) and -index choose among their data.\n"
    "A directory of the configuration (dir), or with -recursive everything below a URL: all databases are restored, below -o.\n"
    "-f: go on and keep the output up to date as a read-only copy, until stopped; continues a copy that has its -txid file beside it.",
    ("f", "force", "recursive", "dry-run", "json", "if-db-not-exists", "if-replica-exists", *CONFIG_SWITCHES),
    ("o", "txid", "timestamp", "generation", "index", "follow-interval", "integrity-check", "parallelism", "log-level", *CONFIG_OPTIONS),
    restore,
)
