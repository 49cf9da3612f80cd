"""`pyrepl replicate`: replicate one database, or all of a configuration file, until stopped."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, load_config, log_warnings
from replicator.cli.output import EXIT_FAILED, log_to
from replicator.cli.parse import Command, UsageError, duration_flag
from replicator.errors import ConfigError, DatabaseStateError, LeaseError, NoBackups, ReplicaStateError, ReplicatorError

if TYPE_CHECKING:
    from replicator.api import Replicator
    from replicator.config import DatabaseSettings
    from replicator.formats import Format
    from replicator.storage.base import ReplicaClient

__all__ = ["COMMAND"]

AT_ONCE = 8  # databases that start or stop at the same time
LOOK_S = 0.5
NOT_READY_RETRY_S = 2.0
RETRY_S = 5.0
MAX_RETRY_S = 300.0

log = logging.getLogger("replicator.cli")


def replicate(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) == 1:
        raise UsageError(f"must specify at least one replica URL for {arguments[0]}")
    if arguments:
        if "config" in flags:
            raise UsageError("cannot specify a replica URL and the -config flag")
        log_to(sys.stdout, flags.get("log-level", "info"))
        members = [_from_arguments(flags, arguments[0], arguments[1:])]
    else:
        for name in ("sync-interval", "meta-path", "format"):
            if name in flags:
                raise UsageError(f"-{name} goes with a database and URLs; the configuration file has its own key for it")
        members = _from_config(flags)
    _run(members, flags, retry=not arguments)
    failed = [member.error for member in members if member.error is not None]
    if failed and arguments:
        raise failed[0]
    return EXIT_FAILED if failed else 0


def _from_arguments(flags: dict[str, str], path: str, urls: Sequence[str]) -> _Member:
    from replicator.api import Replicator
    from replicator.levels import History
    from replicator.storage import open_client

    clients = [open_client(url) for url in urls]
    interval = duration_flag(flags, "sync-interval")
    force = flags.get("force-snapshot") == "true"
    history = None if flags.get("once") == "true" else History()
    engine = Replicator(
        path,
        *clients,
        meta_path=flags.get("meta-path"),
        sync_interval_s=interval,
        force_snapshot=force,
        history=history,
        format=cast("Format", flags.get("format", "ltx")),  # Replicator looks at it
    )
    return _Member(engine, Path(path), clients, restore_missing=flags.get("restore-if-db-not-exists") == "true")


def _from_config(flags: dict[str, str]) -> list[_Member]:
    config = load_config(flags)
    level = flags.get("log-level") or os.environ.get("LOG_LEVEL") or config.logging.level or "info"
    log_to(sys.stderr if config.logging.stderr else sys.stdout, level)
    log_warnings(config)
    if not config.databases:
        raise ConfigError("no databases specified in configuration", hint="list them under dbs, each with path and replica")
    return [_from_settings(flags, settings) for settings in config.databases]


def _from_settings(flags: dict[str, str], settings: DatabaseSettings) -> _Member:
    from replicator.api import Replicator
    from replicator.storage import open_replica

    clients = [open_replica(item) for item in settings.replicas]
    intervals = [item.sync_interval_s for item in settings.replicas if item.sync_interval_s is not None]
    said = {
        "poll_interval_s": settings.monitor_interval_s,
        "checkpoint_interval_s": settings.checkpoint_interval_s,
        "busy_timeout_s": settings.busy_timeout_s,
        "min_checkpoint_pages": settings.min_checkpoint_pages,
    }
    engine = Replicator(
        settings.path,
        *clients,
        meta_path=settings.meta_path,
        sync_interval_s=min(intervals, default=None),
        force_snapshot=flags.get("force-snapshot") == "true",
        history=None if flags.get("once") == "true" else [item.history for item in settings.replicas],
        verify_interval_s=settings.verify_interval_s,
        format=settings.format,
        **{name: value for name, value in said.items() if value is not None},  # type: ignore[arg-type]
    )
    wanted = settings.restore_if_db_not_exists or flags.get("restore-if-db-not-exists") == "true"
    return _Member(engine, settings.path, clients, restore_missing=wanted)


class _Member:
    """One of the databases. Its errors are kept and logged, so that they stop nobody else."""

    def __init__(self, engine: Replicator, path: Path, clients: Sequence[ReplicaClient], *, restore_missing: bool) -> None:
        self.engine, self.path = engine, path
        self.error: Exception | None = None
        self.started = False
        self.retry_at = 0.0
        self._clients = clients
        self._restore_missing = restore_missing
        self._failures = 0

    def start(self) -> None:
        try:
            self._restore()
            self.engine.start()
        except (ReplicatorError, OSError, sqlite3.Error) as error:
            if str(error) != str(self.error):
                log.error("cannot replicate db=%s error=%r", self.path, str(error))
            self.error = error
            if isinstance(error, (ReplicaStateError, LeaseError, ConfigError)):  # somebody has to look at it first
                self.retry_at = math.inf
            else:
                delay = NOT_READY_RETRY_S if isinstance(error, DatabaseStateError) else RETRY_S * 2**self._failures
                self.retry_at = time.monotonic() + min(delay, MAX_RETRY_S)
                self._failures = min(self._failures + 1, 10)
            return
        self.error, self.started = None, True
        log.info("initialized db path=%s", self.path)
        for replica in self.engine.status().replicas:
            if replica.position:
                log.info("replicating to type=%s url=%s position=%s", replica.kind, replica.url, replica.position)
            else:
                log.info("replicating to type=%s url=%s txid=%016x", replica.kind, replica.url, replica.txid)

    def _restore(self) -> None:
        """Restore a database that is missing. Only "nothing is stored" lets it begin anew: with an unreachable replica nobody knows."""
        if not self._restore_missing or self.path.exists():
            return
        from replicator.api import restore
        from replicator.v3restore import newest_first

        try:
            # Only when all have been asked: what is restored is written to all of them, and one that is away may be ahead.
            result = restore(newest_first(self._clients, all_must_answer=True), self.path)
            log.info("restored db path=%s txid=%016x", self.path, result.txid)
        except NoBackups:
            log.info("nothing to restore path=%s", self.path)
        self._restore_missing = False

    def store(self, timeout_s: float, *, snapshot: bool) -> None:
        """Store what is committed now."""
        if not self.started:
            return
        try:
            self.engine.wait(timeout_s=timeout_s)
            if snapshot:
                self.engine.snapshot()
        except (ReplicatorError, OSError, sqlite3.Error) as error:
            self._note(error)

    def close(self, timeout_s: float) -> None:
        if not self.started:
            return
        try:
            self.engine.close(timeout_s)
        except (ReplicatorError, OSError, sqlite3.Error) as error:
            self._note(error)
        status = self.engine.status()
        if status.position:
            log.info("replication stopped path=%s position=%s", self.path, status.position)
        else:
            log.info("replication stopped path=%s txid=%016x", self.path, status.txid)

    def _note(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            log.error("replication failed db=%s error=%r", self.path, str(error))

    @property
    def is_over(self) -> bool:
        """Whether nothing can come of it any more."""
        return self.engine.status().state == "failed" if self.started else self.retry_at == math.inf


class _Stop:
    """SIGINT and SIGTERM. Through a pipe: a handler that sets an event deadlocks when it interrupts that event's own wait."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"x")

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; True once a signal has come."""
        return bool(select.select([self._reader], [], [], seconds)[0])


def _run(members: Sequence[_Member], flags: dict[str, str], *, retry: bool) -> None:
    timeout_s = duration_flag(flags, "timeout", 30.0) or 0.0
    stopped = _Stop()
    with ThreadPoolExecutor(min(AT_ONCE, len(members)), "pyrepl start and stop") as pool:
        try:
            list(pool.map(_Member.start, members))
            if flags.get("once") == "true":
                snapshot = flags.get("force-snapshot") == "true"
                list(pool.map(lambda member: member.store(timeout_s, snapshot=snapshot), members))
                return
            if not retry and not members[0].started:
                return
            while not all(member.is_over for member in members) and not stopped.wait(LOOK_S):
                due = [member for member in members if not member.started and member.retry_at <= time.monotonic()]
                list(pool.map(_Member.start, due))
        finally:
            list(pool.map(lambda member: member.close(timeout_s), members))


COMMAND = Command(
    f"pyrepl replicate [-once] [-force-snapshot] [-restore-if-db-not-exists] [-log-level L] {CONFIG_FLAGS}\n"
    "       pyrepl replicate [...] [-sync-interval D] [-meta-path PATH] [-format v0.3] DB URL...",
    "Replicate databases until stopped: those of the configuration file, or one.\n\n-once: store what is committed now, then exit.\n"
    "-force-snapshot: with -once, store a full image; begin anew where a replica has lost its files.\n"
    "-restore-if-db-not-exists: restore a database that is missing before it is replicated.\n"
    "-format: ltx, or v0.3 for fleets that still restore with Litestream 0.3.\n"
    "-config: the file, instead of $LITESTREAM_CONFIG or /etc/litestream.yml.  -no-expand-env: leave $NAME in it alone.\n"
    "-lenient: keys that nobody knows, and durations without a unit, are warnings.",
    ("once", "force-snapshot", "restore-if-db-not-exists", *CONFIG_SWITCHES),
    ("sync-interval", "meta-path", "format", "log-level", "timeout", *CONFIG_OPTIONS),
    replicate,
)
