"""`Replicator`, which runs the engine in a thread of the application's own process, and `restore`.

One thread drives the engine, and one for each replica stores its files, so that a slow replica holds nobody up. All of them share one condition
variable. What crosses between them are `Entry` values in `_outbox`, which is bounded: until an entry is stored on one replica, or
staged, the engine encodes nothing more, and the WAL is the queue.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from replicator.chain import Progress, read_file
from replicator.checkpoint import CheckpointPolicy
from replicator.engine import Engine
from replicator.errors import (
    ConfigError,
    DatabaseNotFound,
    DatabaseStateError,
    LeaseError,
    ReplicaStateError,
    ReplicatorError,
    StorageUnavailable,
    WaitTimeout,
)
from replicator.format.ltx import TXID, parse_txid
from replicator.outbox import Entry, OutFile
from replicator.replica import Replica
from replicator.restorer import IntegrityCheck, RestoreResult, restore_database, restore_from_any
from replicator.storage import open_client
from replicator.storage.base import ReplicaClient
from replicator.watch import Watch

__all__ = ["ReplicaStatus", "Replicator", "Status", "restore"]

State = Literal["starting", "replicating", "degraded", "failed", "stopped"]

log = logging.getLogger(__name__)

LOCAL_INTERVAL_S = 0.05
REMOTE_INTERVAL_S = 1.0
QUIET_S = 2.0
IDLE_POLL_S = 15.0
RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STAGE_AFTER_S = 1.0
OUTBOX_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica: newest TXID stored, seconds since the oldest commit that it lacks was read, and its last error."""

    url: str
    kind: str
    txid: TXID
    last_stored_at: datetime | None
    lag_s: float
    error: str | None
    files_sent: int
    bytes_sent: int


@dataclass(frozen=True, slots=True)
class Status:
    """A database and its replicas. `txid`: newest TXID that was read; `wal_size_bytes`: logical size of the WAL."""

    path: Path
    state: State
    txid: TXID
    wal_size_bytes: int
    checkpoints: int
    max_lock_s: float
    error: str | None
    replicas: tuple[ReplicaStatus, ...]


class Replicator:
    """Replicate a live database to one or more replicas until closed. A context manager.

    The application goes on using its own `sqlite3` connections, in this process and in others.

        with Replicator("app.db", "s3://bucket/app") as replicator:
            connection.execute("INSERT ..."); connection.commit()
            replicator.wait()        # now the row is in the bucket
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *replicas: str | ReplicaClient,
        meta_path: str | os.PathLike[str] | None = None,
        sync_interval_s: float | None = None,
        checkpoint_interval_s: float = 60.0,
        min_checkpoint_pages: int = 1000,
        busy_timeout_s: float = 1.0,
        poll_interval_s: float = 1.0,
        staging_limit_bytes: int = 1 << 30,
        force_snapshot: bool = False,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            path: of the database. It is switched to WAL mode.
            replicas: URLs, or clients.
            meta_path: folder for local state; `.<name>-litestream` beside the database when not given.
            sync_interval_s: least time between two uploads that nobody waits for; 0.05 for directories, 1 for S3 when not given.
            checkpoint_interval_s: age of WAL frames that makes a checkpoint due; 0 for never.
            min_checkpoint_pages: size of the WAL in pages that makes one due.
            busy_timeout_s: how long to wait for SQLite's locks when opening.
            poll_interval_s: how often to look for changes where there are no file events.
            staging_limit_bytes: bound for files that wait on the local disk while no replica can be reached.
            force_snapshot: begin a new history where a replica has lost its files, instead of an error.

        Raises:
            ConfigError: no replica, or a malformed URL.
        """
        if not replicas:
            raise ConfigError(f"must specify at least one replica URL for {path}")
        self._path = Path(os.path.abspath(path))
        self._clients = [open_client(item) if isinstance(item, str) else item for item in replicas]
        writer = secrets.randbits(63) | 1
        self._replicas = [Replica(client, writer=writer) for client in self._clients]
        remote = any(client.kind not in ("file", "memory") for client in self._clients)
        self._interval = sync_interval_s if sync_interval_s is not None else (REMOTE_INTERVAL_S if remote else LOCAL_INTERVAL_S)
        self._poll = poll_interval_s
        self._meta = Path(meta_path) if meta_path is not None else self._path.with_name(f".{self._path.name}-litestream")
        policy = CheckpointPolicy(min_checkpoint_pages, checkpoint_interval_s)
        self._engine = Engine(
            self._path,
            self._replicas,
            meta_path=self._meta,
            policy=policy,
            busy_timeout_s=busy_timeout_s,
            staging_limit_bytes=staging_limit_bytes,
            force_snapshot=force_snapshot,
        )
        self._changed = threading.Condition()
        self._outbox: deque[Entry] = deque()
        self._threads: list[threading.Thread] = []
        self._state: State = "stopped"
        self._error: str | None = None
        self._fatal: ReplicatorError | None = None
        self._gone: DatabaseNotFound | None = None
        self._stop = False
        self._woken = False
        self._asked = self._answered = 0
        self._answered_txid = TXID(0)
        self._pid = 0
        self._since: dict[TXID, float] = {}
        self._watch = Watch(self._path, self._wake)

    # -- life --------------------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Attach to the database and the replicas, and begin.

        Raises:
            DatabaseStateError, ReplicaStateError, RestoreError, StorageError: it cannot begin. A store that is only unavailable is no
                error: it is tried again in the background, and `status` says so.
        """
        if self._threads:
            raise RuntimeError("already started")
        self._pid = os.getpid()
        self._stop = False
        self._state = "starting"
        try:
            self._outbox.extend(self._engine.open())
        except StorageUnavailable as error:
            self._report(error)
        except BaseException:
            self._state = "stopped"
            raise
        else:
            self._state = "replicating"
        self._threads = [threading.Thread(target=self._run, name=f"pyrepl {self._path.name}", daemon=True)]
        for replica in self._replicas:
            name = f"pyrepl {self._path.name} {replica.client.kind}"
            self._threads.append(threading.Thread(target=self._store_all, args=(replica,), name=name, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def close(self, timeout_s: float = 30.0) -> None:
        """Sync once more, wait until all is stored, and stop. Closing twice does nothing.

        Raises:
            WaitTimeout: something was not stored in time. It is staged or in the database; the next start stores it.
            ReplicatorError: replication had failed before.
        """
        if not self._threads:
            return
        if os.getpid() != self._pid:  # a forked child: the threads are the parent's, and so are the descriptors
            self._threads = []
            return
        failure: ReplicatorError | None = None
        try:
            if self._fatal is None:
                self.wait(timeout_s=timeout_s)
        except ReplicatorError as error:
            failure = error
        finally:
            with self._changed:
                self._stop = True
                self._changed.notify_all()
            for thread in self._threads:
                thread.join()
            self._threads = []
            self._watch.disarm()
            self._engine.close()
            for client in self._clients:
                client.close()
            self._state = "failed" if self._fatal else "stopped"
        if failure is not None or self._fatal is not None:
            raise failure or self._fatal  # type: ignore[misc]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except ReplicatorError as error:
            if kind is None:
                raise
            log.error("close failed db=%s error=%r", self._path, str(error))  # what is being raised already counts more

    # -- asking ------------------------------------------------------------------------------------------------------------------

    def sync(self) -> TXID:
        """Upload now what is committed, and return when every replica has it. The same as `wait()` without a limit."""
        return self.wait()

    def wait(
        self, txid: int | None = None, *, replicas: Literal["all", "any"] | Collection[str] = "all", timeout_s: float | None = None
    ) -> TXID:
        """Return when everything that was committed before the call is stored.

        Args:
            txid: wait for this TXID instead.
            replicas: "all", "any", or the URLs of those that must have it.
            timeout_s: give up after so many seconds.

        Returns:
            The TXID that is stored; 0 for a database that is still empty.

        Raises:
            WaitTimeout: not stored in time; it may be stored later.
            ReplicatorError: replication has failed, for the reason that it names.
        """
        self._check_process()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        asked = [replica for replica in self._replicas if replicas in ("all", "any") or replica.url in replicas]
        if not asked:
            raise ConfigError(f"no such replica: {replicas}")
        enough = any if replicas == "any" else all
        with self._changed:
            goal = txid
            if goal is None:
                self._asked += 1
                mine = self._asked
                self._changed.notify_all()
                self._until(lambda: self._answered >= mine, end, asked)
                goal = self._answered_txid
            self._until(lambda: enough(replica.txid >= goal for replica in asked), end, asked)
            return TXID(goal)

    def _until(self, holds: Callable[[], bool], end: float | None, asked: Collection[Replica]) -> None:
        while not holds():
            if self._fatal is not None:
                raise self._fatal
            if self._gone is not None:
                raise self._gone
            if self._stop or not self._threads:
                raise DatabaseStateError(f"replication of {self._path} is stopped")
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                states = [f"{item.url} has TXID {item.txid:016x}" + (f", {item.error}" if item.error else "") for item in asked]
                raise WaitTimeout("; ".join([*([self._error] if self._error else []), *states]))
            self._changed.wait(left)

    def snapshot(self, *, timeout_s: float | None = None) -> TXID:
        """Store a full image (level 9) of the newest state on every replica while replication goes on; returns its TXID.

        Raises:
            DatabaseStateError: the database is empty, or changed by other means than its WAL meanwhile; try again.
            StorageError: a replica could not take it.
        """
        self.wait(timeout_s=timeout_s)
        out = self._engine.snapshot()
        try:
            for replica in self._replicas:
                replica.store_snapshot(out)
        finally:
            if isinstance(out.body, Path):
                out.body.unlink(missing_ok=True)
        return out.max_txid

    def status(self) -> Status:
        """Return what is going on, without waiting for anything."""
        with self._changed:
            now = time.monotonic()
            replicas = []
            for replica in self._replicas:
                waiting = [since for txid, since in self._since.items() if txid > replica.txid]
                lag = now - min(waiting) if waiting else 0.0
                replicas.append(
                    ReplicaStatus(
                        replica.url,
                        replica.client.kind,
                        replica.txid,
                        replica.last_stored_at,
                        lag,
                        replica.error,
                        replica.files_sent,
                        replica.bytes_sent,
                    )
                )
            state = self._state
            if state == "replicating" and (self._error or any(replica.error for replica in self._replicas)):
                state = "degraded"
            engine = self._engine
            return Status(
                self._path, state, engine.txid, engine.wal_size(), engine.checkpoints, engine.max_locked_s, self._error, tuple(replicas)
            )

    def _check_process(self) -> None:
        if not self._threads:
            raise DatabaseStateError(f"replication of {self._path} is not running", hint="call start(), or use it as a context manager")
        if os.getpid() != self._pid:
            raise DatabaseStateError(
                "this process was forked from the one that replicates", hint="create the Replicator after fork(), in one process"
            )

    # -- the engine's thread -----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def _run(self) -> None:
        failures = 0
        last_sync = last_news = time.monotonic()
        while True:
            with self._changed:
                while not self._stop and self._asked == self._answered:
                    now = time.monotonic()
                    due = self._next_due(now, last_sync, last_news, failures)
                    if due <= now:
                        break
                    self._changed.wait(due - now)
                if self._stop:
                    return
                asked, self._woken = self._asked, False
            if self._watch.armed:
                self._watch.disarm()
                last_news = time.monotonic()
            last_sync = time.monotonic()
            try:
                news = self._sync()
            except (LeaseError, ReplicaStateError) as error:
                self._fail(error)
                return
            except (ReplicatorError, OSError, sqlite3.Error) as error:
                self._report(error)
                failures += 1
                with self._changed:
                    if isinstance(error, DatabaseNotFound):  # what was committed and not read is gone with it: waiters must know
                        self._gone = error
                        self._changed.notify_all()
                    self._changed.wait(min(RETRY_S[min(failures, len(RETRY_S)) - 1], 2.0))
                continue
            failures = 0
            with self._changed:
                if self._state == "starting":
                    self._state = "replicating"
                self._error = self._gone = None
                self._answered, self._answered_txid = asked, self._engine.txid
                self._changed.notify_all()
            if news:
                last_news = time.monotonic()
            elif time.monotonic() - last_news > QUIET_S and not self._watch.armed and self._watch.arm():
                self._woken = True  # look once more: something may have happened before the watch was armed
                last_news = time.monotonic() - QUIET_S - 1 if self._peek_quiet() else time.monotonic()

    def _peek_quiet(self) -> bool:
        try:
            quiet = not self._sync()
        except (ReplicatorError, OSError, sqlite3.Error):
            quiet = False
        if quiet:
            with self._changed:
                self._woken = False
        return quiet

    def _next_due(self, now: float, last_sync: float, last_news: float, failures: int) -> float:
        if failures:
            return last_sync + RETRY_S[min(failures, len(RETRY_S)) - 1]
        if self._woken:
            return last_sync + self._interval
        if self._watch.armed:
            return last_sync + IDLE_POLL_S
        return last_sync + (max(self._interval, 0.01) if now - last_news <= QUIET_S or self._watch.works else self._poll)

    def _sync(self) -> bool:
        """Store everything that is committed now. True when there was something."""
        if self._state == "starting":
            staged = self._engine.open()
            with self._changed:
                self._outbox.extend(staged)
                self._changed.notify_all()
        news = False
        for _ in range(10_000):
            entry = self._engine.advance()
            if entry is not None:
                news = True
                self._deliver(entry)
            self._engine.settle_pin()
            if self._engine.checkpoint_due():
                self._engine.checkpoint()
            if entry is None and not self._engine.has_tail:
                return news
        return news

    def _deliver(self, entry: Entry) -> None:
        """Hand an entry to the replicas; returns when one has it, or when it is staged."""
        if entry.is_staged:
            self._engine.settled(entry)
        started = time.monotonic()
        with self._changed:
            self._since[entry.txid] = started
            self._outbox.append(entry)
            self._changed.notify_all()
        if entry.is_staged:
            return
        txid = entry.txid

        def settled() -> bool:
            return self._is_stored(txid) or self._stop or self._fatal is not None

        while True:
            with self._changed:
                self._changed.wait_for(settled, STAGE_AFTER_S)
                if self._is_stored(txid):
                    break
                if self._fatal is not None:
                    raise self._fatal
                if self._stop:
                    raise DatabaseStateError("stopped before the last changes were stored")
            staged = self._engine.stage(entry)
            if staged is not None:
                with self._changed:
                    if entry in self._outbox:
                        self._outbox[self._outbox.index(entry)] = staged
                entry = staged
                break
            self._report(StorageUnavailable(f"no replica reachable and the staging folder is full: {self._meta}"))
        self._engine.settled(entry)

    def _is_stored(self, txid: TXID) -> bool:
        return any(replica.txid >= txid for replica in self._replicas)

    def _report(self, error: BaseException) -> None:
        with self._changed:
            text = str(error)
            if text != self._error:
                log.warning("sync failed db=%s error=%r", self._path, text)
            self._error = text

    def _fail(self, error: ReplicatorError) -> None:
        with self._changed:
            log.error("replication stopped db=%s error=%r", self._path, str(error))
            self._error, self._fatal, self._state = str(error), error, "failed"
            self._changed.notify_all()

    # -- the replicas' threads ---------------------------------------------------------------------------------------------------

    def _store_all(self, replica: Replica) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or self._fatal is not None or self._work_for(replica) is not None)
                if self._stop or self._fatal is not None:
                    return
                source, entry = self._work_for(replica) or (None, None)
            try:
                if entry is not None:
                    replica.store(entry.files, entry.txid)
                elif source is not None:
                    self._copy(source, replica)
            except LeaseError as error:
                replica.error = str(error)
                self._fail(error)
                return
            except (ReplicatorError, OSError) as error:
                failures += 1
                with self._changed:
                    if replica.error != str(error):
                        log.warning("upload failed replica=%s error=%r", replica.url, str(error))
                    replica.error = str(error)
                    self._changed.wait_for(lambda: self._stop, RETRY_S[min(failures, len(RETRY_S)) - 1])
                continue
            failures = 0
            with self._changed:
                replica.error = None
                self._tidy()
                self._changed.notify_all()

    def _work_for(self, replica: Replica) -> tuple[Replica | None, Entry | None] | None:
        """Return (None, entry) to store next, (other replica, None) to copy from, or None when there is nothing to do."""
        if self._state == "starting":
            return None
        for entry in self._outbox:
            if entry.txid == replica.txid + 1:
                return None, entry
        ahead = max(self._replicas, key=lambda other: other.txid)
        if ahead.txid > replica.txid:
            return ahead, None
        return None

    def _copy(self, source: Replica, target: Replica) -> None:
        """Fill a replica that lacks files from another one."""
        reader = Replica(source.client, writer=source.writer)
        reader.open()
        files = reader.files_after(target.txid) or reader.plan()
        for info in files:
            data = b"".join(read_file(source.client, info))
            stamp = int.from_bytes(data[32:40], "big")
            target.store([OutFile(info.level, info.min_txid, info.max_txid, stamp, data)], info.max_txid)

    def _tidy(self) -> None:
        """Drop entries that every replica has, and those in memory that one has when they become many."""
        least = min(replica.txid for replica in self._replicas)
        most = max(replica.txid for replica in self._replicas)
        while self._outbox:
            entry = self._outbox[0]
            held = sum(item.memory_bytes for item in self._outbox)
            if entry.txid <= least or (entry.txid <= most and held > OUTBOX_BYTES):
                self._outbox.popleft()
                self._engine.forget(entry)
            else:
                break
        for txid in [txid for txid in self._since if txid <= least]:
            del self._since[txid]


def restore(
    url: str | ReplicaClient | Sequence[str | ReplicaClient],
    output: str | os.PathLike[str],
    *,
    txid: int | str | None = None,
    timestamp: datetime | str | None = None,
    force: bool = False,
    integrity_check: IntegrityCheck = "none",
    parallelism: int = 8,
    progress: Callable[[Progress], None] | None = None,
) -> RestoreResult:
    """Restore a database from a replica.

    Args:
        url: of the replica, or a client; or several, of which the first is used that is reachable, not empty and not damaged.
        output: path of the database to write.
        txid: restore this state (a number, or 16 hex digits).
        timestamp: restore the last state before this time (aware, or RFC 3339).
        force: replace an existing output.
        integrity_check: "quick" or "full": let SQLite check the file before it is published.
        parallelism: files that are read at once.
        progress: called now and then.

    Raises:
        RestoreError, StorageError, ConfigError: nothing is left at the output then. Of several replicas it is the first one's error.
    """
    if txid is not None and timestamp is not None:
        raise ConfigError("cannot specify txid and timestamp to restore")
    if isinstance(txid, str):
        txid = parse_txid(txid)
    if isinstance(timestamp, str):
        timestamp = parse_timestamp(timestamp)
    if timestamp is not None and timestamp.tzinfo is None:
        raise ConfigError("timestamp has no time zone", hint="give an aware datetime, or RFC 3339 text with Z or an offset")
    replicas = [url] if isinstance(url, str) or not isinstance(url, Sequence) else list(url)
    with contextlib.ExitStack() as stack:
        clients: list[ReplicaClient] = []
        for replica in replicas:
            if isinstance(replica, str):
                replica = open_client(replica)
                stack.callback(replica.close)
            clients.append(replica)

        def from_one(client: ReplicaClient) -> RestoreResult:
            return restore_database(
                client,
                Path(os.path.abspath(output)),
                txid=None if txid is None else TXID(txid),
                timestamp=timestamp,
                force=force,
                integrity_check=integrity_check,
                parallelism=parallelism,
                progress=progress,
            )

        return restore_from_any(clients, from_one)


def parse_timestamp(text: str) -> datetime:
    """Read RFC 3339. Raises `ConfigError`."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise ConfigError("invalid -timestamp, must specify in ISO 8601 format (e.g. 2000-01-01T00:00:00Z)")
    return when.astimezone(UTC)
