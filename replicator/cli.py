"""The `pyrepl` command: parse, call the library, print. The only reader of `argv` and the environment.

Flags are Litestream's: one dash or two, `-name value` or `-name=value`, switches also as `-name=false`; they may follow the positional
arguments. Exit codes: 0 done, 1 failed, 2 wrong usage. Errors are one line, with the next step on a second one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from replicator import __version__
from replicator.errors import NoBackups, ReplicatorError

if TYPE_CHECKING:
    from replicator.chain import Progress
    from replicator.format.ltx import FileInfo

__all__ = ["main"]

EXIT_FAILED, EXIT_USAGE = 1, 2
DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class UsageError(Exception):
    """The command line is wrong."""


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand. `switches` take no value, `options` take one."""

    usage: str
    about: str
    switches: tuple[str, ...]
    options: tuple[str, ...]
    run: Callable[[dict[str, str], list[str]], int]


def parse(arguments: Sequence[str], command: Command) -> tuple[dict[str, str], list[str]]:
    """Split arguments into flags and positional ones. A switch that is on has the value "true". Raises `UsageError`."""
    flags: dict[str, str] = {}
    positional: list[str] = []
    items = list(arguments)
    while items:
        item = items.pop(0)
        if item == "--":
            positional += items
            break
        match = re.fullmatch(r"--?([A-Za-z][\w-]*)(?:=(.*))?", item, re.DOTALL)
        if not match:
            positional.append(item)
            continue
        name, value = match[1], match[2]
        if name in ("h", "help"):
            raise UsageError("")
        if name in command.switches:
            if value not in (None, "true", "false"):
                raise UsageError(f"invalid value for -{name}: {value!r} (true or false)")
            flags[name] = value or "true"
        elif name in command.options:
            if value is None:
                if not items:
                    raise UsageError(f"flag needs an argument: -{name}")
                value = items.pop(0)
            flags[name] = value
        else:
            raise UsageError(f"flag provided but not defined: -{name}")
    return flags, positional


def parse_duration(text: str) -> float:
    """Read a duration such as `300ms`, `1m30s`; returns seconds. Raises `UsageError`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise UsageError(f"invalid duration: {text!r} (such as 500ms, 1s, 5m)")
    return sum(float(number) * DURATION_UNITS[unit] for number, unit in parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    items = list(sys.argv[1:] if arguments is None else arguments)
    if not items:
        print(usage(), file=sys.stderr)
        return EXIT_USAGE
    name = items.pop(0)
    if name.lstrip("-") in ("h", "help"):
        print(usage())
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"Error: pyrepl {name}: unknown command\nTry: pyrepl help", file=sys.stderr)
        return EXIT_USAGE
    try:
        flags, positional = parse(items, command)
        return command.run(flags, positional)
    except UsageError as error:
        text = f"usage: {command.usage}\n\n{command.about}"
        if not str(error):
            print(text)
            return 0
        print(f"Error: {error}\n{text}", file=sys.stderr)
        return EXIT_USAGE
    except ReplicatorError as error:
        return fail(str(error), error.hint)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILED
    except OSError as error:
        return fail(f"{(error.strerror or str(error)).lower()}: {error.filename}" if error.filename else str(error), "")


def fail(text: str, hint: str) -> int:
    """Print an error in one line, and the next step."""
    print("Error: " + " ".join(text.split()), file=sys.stderr)
    if hint:
        print(f"Try: {hint}", file=sys.stderr)
    return EXIT_FAILED


def usage() -> str:
    lines = ["pyrepl replicates SQLite databases, in Litestream's format.", "", "usage: pyrepl COMMAND [flags] [arguments]", ""]
    lines += [f"  {name:<10} {command.about.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "pyrepl COMMAND -h describes a command."])


# -- replicate -------------------------------------------------------------------------------------------------------------------


def replicate(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) < 2:
        raise UsageError("give a database and at least one replica URL")
    _log_to(sys.stdout, flags.get("log-level", "info"))
    from replicator.api import Replicator

    log = logging.getLogger("replicator.cli")
    path, urls = arguments[0], arguments[1:]
    interval = parse_duration(flags["sync-interval"]) if "sync-interval" in flags else None
    engine = Replicator(
        path, *urls, meta_path=flags.get("meta-path"), sync_interval_s=interval, force_snapshot=flags.get("force-snapshot") == "true"
    )
    stopped = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
    engine.start()
    log.info("initialized db path=%s", path)
    for replica in engine.status().replicas:
        log.info("replicating to type=%s url=%s txid=%016x", replica.kind, replica.url, replica.txid)
    try:
        if flags.get("once") == "true":
            engine.wait(timeout_s=parse_duration(flags.get("timeout", "30s")))
            if flags.get("force-snapshot") == "true":
                engine.snapshot()
        else:
            while not stopped.wait(0.5):
                if engine.status().state == "failed":
                    break
    finally:
        engine.close()
    status = engine.status()
    log.info("replication stopped txid=%016x", status.txid)
    return 0


# -- restore ---------------------------------------------------------------------------------------------------------------------


def restore(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give one replica URL")
    url = arguments[0]
    output = flags.get("o")
    if output is None:
        raise UsageError("output path required: -o PATH")
    if "txid" in flags and "timestamp" in flags:
        raise UsageError("cannot specify -txid and -timestamp")
    check = flags.get("integrity-check", "none")
    if check not in ("none", "quick", "full"):
        raise UsageError(f"invalid value for -integrity-check: {check!r} (none, quick or full)")
    parallelism = flags.get("parallelism", "8")
    if not parallelism.isdigit() or not 1 <= int(parallelism) <= 256:
        raise UsageError(f"invalid value for -parallelism: {parallelism!r} (1 to 256)")
    _log_to(sys.stderr if flags.get("json") == "true" else sys.stdout, flags.get("log-level", "info"))
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
        with _Bar() as bar:
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
            log.info("no matching backups found url=%s", _redacted(url))
            return 0
        raise
    if flags.get("json") == "true":
        print(
            json.dumps(
                {
                    "db_path": str(result.output),
                    "replica": _kind(url),
                    "txid": f"{result.txid:016x}",
                    "duration_ms": round(result.duration_s * 1000),
                    "integrity_check": check,
                },
                indent=2,
            )
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
            "timestamp": _time(info.created_at),
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
    _table(["level", "file", "min_txid", "max_txid", "size", "timestamp"], [[str(value) for value in file.values()] for file in files])
    return 0


class _Bar:
    """A progress bar on a terminal, for what takes longer than a second."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._bar: object | None = None
        self._wanted = sys.stderr.isatty()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]

    def show(self, progress: Progress) -> None:
        if not self._wanted or (self._bar is None and time.monotonic() - self._started < 1):
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("restoring"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
            bar = Bar(*columns, console=Console(stderr=True), transient=True)
            bar.add_task("restoring", total=progress.bytes_total)
            bar.start()
            self._bar = bar
        self._bar.update(0, completed=progress.bytes_done)  # type: ignore[attr-defined]


# -- ltx, version, demo ----------------------------------------------------------------------------------------------------------


def ltx(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give one replica URL")
    level = flags.get("level", "0")
    if level != "all" and not re.fullmatch(r"[0-9]", level):
        raise UsageError(f"invalid value for -level: {level!r} (0 to 9, or all)")
    from replicator.storage import open_client

    client = open_client(arguments[0])
    files: list[FileInfo] = []
    for number in range(10) if level == "all" else [int(level)]:
        files += client.list(number)
    if flags.get("json") == "true":
        document = [
            {
                "level": info.level,
                "min_txid": f"{info.min_txid:016x}",
                "max_txid": f"{info.max_txid:016x}",
                "size": info.size,
                "timestamp": _time(info.created_at),
            }
            for info in files
        ]
        print(json.dumps(document, indent=2))
        return 0
    rows = [[str(info.level), f"{info.min_txid:016x}", f"{info.max_txid:016x}", str(info.size), _time(info.created_at)] for info in files]
    _table(["level", "min_txid", "max_txid", "size", "created"], rows)
    return 0


def version(flags: dict[str, str], arguments: list[str]) -> int:
    print(__version__)
    return 0


def demo(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) > 1:
        raise UsageError("give one replica URL at most")
    seconds = parse_duration(flags.get("duration", "5s"))
    from replicator.demo import run

    return run(arguments[0] if arguments else None, seconds=seconds, keep=flags.get("keep") == "true")


# -- printing --------------------------------------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _time(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _redacted(url: str) -> str:
    from replicator.storage.url import redact

    return redact(url)


def _kind(url: str) -> str:
    from replicator.storage.url import scheme

    return scheme(url) or "file"


class _Lines(logging.Formatter):
    """`time=... level=INFO msg="..." key=value`, as Litestream logs."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        words = record.getMessage().split(" ")
        first = next((at for at, word in enumerate(words) if "=" in word), len(words))
        facts = "".join(f" {word}" for word in words[first:])
        level = {"WARNING": "WARN"}.get(record.levelname, record.levelname)
        return f'time={when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03d}Z level={level} msg="{" ".join(words[:first])}"{facts}'


def _log_to(stream: TextIO, level: str) -> None:
    levels = {"trace": 10, "debug": 10, "info": 20, "warn": 30, "error": 40}
    if level.lower() not in levels:
        raise UsageError(f"invalid value for -log-level: {level!r} ({', '.join(levels)})")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines())
    root = logging.getLogger("replicator")
    root.handlers[:] = [handler]
    root.setLevel(levels[level.lower()])


COMMANDS = {
    "replicate": Command(
        "pyrepl replicate [-once] [-force-snapshot] [-sync-interval D] [-meta-path PATH] [-log-level L] DB URL...",
        "Replicate a database until stopped.\n\n-once: store what is committed now, then exit.\n"
        "-force-snapshot: with -once, store a full image; begin anew where a replica has lost its files.",
        ("once", "force-snapshot"),
        ("sync-interval", "meta-path", "log-level", "timeout"),
        replicate,
    ),
    "restore": Command(
        "pyrepl restore -o PATH [-txid HEX | -timestamp TIME] [-force] [-dry-run] [-json] [-if-db-not-exists] [-if-replica-exists] "
        "[-integrity-check none|quick|full] [-parallelism N] URL",
        "Restore a database from a replica.",
        ("force", "dry-run", "json", "if-db-not-exists", "if-replica-exists"),
        ("o", "txid", "timestamp", "integrity-check", "parallelism", "log-level"),
        restore,
    ),
    "ltx": Command("pyrepl ltx [-level 0..9|all] [-json] URL", "List the stored files.", ("json",), ("level",), ltx),
    "version": Command("pyrepl version", "Print the version.", ("verbose",), (), version),
    "demo": Command(
        "pyrepl demo [-duration D] [-keep] [URL]",
        "Write, replicate, kill, delete, restore, compare; about ten seconds.",
        ("keep",),
        ("duration",),
        demo,
    ),
}
