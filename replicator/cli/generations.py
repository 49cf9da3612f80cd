"""`pyrepl generations`, `snapshots` and `wal`: what a replica of Litestream 0.3 holds, in 0.3.13's columns."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, Source, chosen, find_source
from replicator.cli.output import EXIT_FAILED, log_to, table, time_text
from replicator.cli.parse import Command, UsageError
from replicator.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from replicator.storage.v3 import V3Client

__all__ = ["GENERATIONS", "SNAPSHOTS", "WAL"]

Rows = list[list[str]]

log = logging.getLogger("replicator.cli")

SECOND = 1_000_000_000
NO_TIME = "0001-01-01T00:00:00Z"
"""What 0.3.13 prints as the time of a generation without files."""
NO_LAG = 2**63 - 1


def generations(flags: dict[str, str], arguments: list[str]) -> int:
    source = _source(flags, arguments)
    reference_ns = time.time_ns() if source.database is None else _changed_ns(source.database)

    def rows(name: str, client: V3Client) -> Rows:
        found = []
        for generation in client.list_generations():
            times = [info.created_ns for info in client.list_snapshots(generation)]
            times += [info.created_ns for info in client.list_segments(generation)]
            lag_ns = reference_ns - max(times) if times else NO_LAG
            start, end = (_time(min(times)), _time(max(times))) if times else (NO_TIME, NO_TIME)
            found.append([name, generation, lag_text(lag_ns), start, end])
        return found

    return _list(source, flags, ["name", "generation", "lag", "start", "end"], rows)


def snapshots(flags: dict[str, str], arguments: list[str]) -> int:
    def rows(name: str, client: V3Client) -> Rows:
        return [
            [name, generation, str(info.index), str(info.size), _time(info.created_ns)]
            for generation in client.list_generations()
            for info in client.list_snapshots(generation)
        ]

    return _list(_source(flags, arguments), flags, ["replica", "generation", "index", "size", "created"], rows)


def wal(flags: dict[str, str], arguments: list[str]) -> int:
    only = flags.get("generation")

    def rows(name: str, client: V3Client) -> Rows:
        return [
            [name, generation, str(info.index), str(info.offset), str(info.size), _time(info.created_ns)]
            for generation in client.list_generations()
            if only in (None, generation)
            for info in client.list_segments(generation)
        ]

    return _list(_source(flags, arguments), flags, ["replica", "generation", "index", "offset", "size", "created"], rows)


def lag_text(lag_ns: int) -> str:
    """Return a duration as Go prints it, cut to seconds above 10 s, to tenths above 1 s, to milliseconds, to microseconds."""
    for above, unit in ((10 * SECOND, SECOND), (SECOND, SECOND // 10), (1_000_000, 1_000_000), (1000, 1000)):
        if lag_ns > above:
            lag_ns -= lag_ns % unit
            break
    sign, rest = ("-", -lag_ns) if lag_ns < 0 else ("", lag_ns)
    if rest < SECOND:
        for unit, name in ((1_000_000, "ms"), (1000, "µs"), (1, "ns")):
            if rest >= unit:
                return f"{sign}{_decimal(rest, unit)}{name}"
        return "0s"
    minutes, seconds_ns = divmod(rest, 60 * SECOND)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{sign}{text}{_decimal(seconds_ns, SECOND)}s"


def _decimal(count: int, unit: int) -> str:
    whole, rest = divmod(count, unit)
    fraction = str(rest).zfill(len(str(unit)) - 1).rstrip("0")
    return f"{whole}.{fraction}" if rest else str(whole)


def _source(flags: dict[str, str], arguments: list[str]) -> Source:
    if len(arguments) != 1:
        raise UsageError("give one replica URL, or the path of a database in the configuration")
    log_to(sys.stderr, "warn")
    return find_source(flags, arguments[0])


def _list(source: Source, flags: dict[str, str], header: list[str], rows: Callable[[str, V3Client], Rows]) -> int:
    """Print the table of all replicas, or of the one that was named. One that cannot be listed does not hide the others."""
    from replicator.storage.v3 import v3_client

    named = [(source.names[number], source.clients[number]) for number in chosen(source, flags.get("replica"))]
    found: Rows = []
    failure: StorageError | None = None
    for name, client in named:
        v3 = v3_client(client)
        try:
            found += rows(name, v3) if v3 is not None else []
        except StorageError as error:
            if len(named) == 1:
                raise
            failure = error
            log.error("cannot list replica=%s error=%r", name, str(error))
    table(header, found)
    return 0 if failure is None else EXIT_FAILED


def _changed_ns(database: Path) -> int:
    """Return when the database was changed last: its own time or its WAL's, whichever is later. Raises `OSError`."""
    changed = os.stat(database).st_mtime_ns
    try:
        return max(changed, os.stat(f"{database}-wal").st_mtime_ns)
    except FileNotFoundError:
        return changed


def _time(created_ns: int) -> str:
    from replicator.format.v3 import time_of

    return time_text(time_of(created_ns))


_SWITCHES = CONFIG_SWITCHES
_OPTIONS = ("replica", *CONFIG_OPTIONS)

GENERATIONS = Command(
    f"pyrepl generations [-replica NAME] {CONFIG_FLAGS} DB|URL",
    "List the generations of a Litestream 0.3 replica.",
    _SWITCHES,
    _OPTIONS,
    generations,
)
SNAPSHOTS = Command(
    f"pyrepl snapshots [-replica NAME] {CONFIG_FLAGS} DB|URL",
    "List the snapshots of a Litestream 0.3 replica.",
    _SWITCHES,
    _OPTIONS,
    snapshots,
)
WAL = Command(
    f"pyrepl wal [-replica NAME] [-generation NAME] {CONFIG_FLAGS} DB|URL",
    "List the WAL segments of a Litestream 0.3 replica.",
    _SWITCHES,
    ("generation", *_OPTIONS),
    wal,
)
