"""One database of a process: begun, parked, woken, stopped.

| state | what it is |
|---|---|
| waiting | wanted, and not begun: the first try is due, or the last one failed and another comes |
| replicating | begun: it has a `Replicator`; whether it is healthy is what `Replicator.status` says |
| parked | stored on all replicas and closed; one small record, and a watch on its files that begins it again |
| failed | a person has to look at it: it ended for good, or cannot begin until somebody changes something |
| stopped | nobody wants it now |

A database that cannot begin is tried again after a while, unless the reason is one that does not go away by itself: a replica that belongs to
another database, has lost its files, or has another writer. `start` tries those again, too.

**Parking** needs a process that has no connections to the database but those of its engines, as the daemon is. When the files change, when something of the
history is due, or when somebody asks, it begins again with what is remembered of its replicas. How its record proves, also after a restart of the
process, that nothing has changed: see `parking.py`. After a restart the replicas are asked once each, in the background, whether they still end
where the record says.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from replicator import parked
from replicator.api import Disturbed, ReplicaStatus, Replicator, Rest
from replicator.errors import (
    AccessDenied,
    ConfigError,
    DatabaseNotFound,
    DatabaseStateError,
    LeaseError,
    LeaseHeld,
    NoBackups,
    ReplicaStateError,
    ReplicatorError,
    StorageError,
    WaitTimeout,
)
from replicator.format.ltx import TXID
from replicator.parking import RACY_NS, Kept, Parked, changed, is_settled, wal_moved
from replicator.recover import restore
from replicator.storage.base import ReplicaClient
from replicator.storage.measured import Measured
from replicator.v3restore import newest_first
from replicator.watch import Subscription, watcher

__all__ = ["BUSY_RETRY_S", "FAILURES", "Limits", "Member", "Prepared", "State", "key_of"]

NOT_READY_RETRY_S = 2.0
RETRY_S = 5.0
MIN_LEASE_RETRY_S, LEASE_RETRY_S = 0.05, 1.0
MAX_RETRY_S = 300.0
MAX_NOT_READY_RETRY_S = 30.0
BUSY_RETRY_S = 0.25
SLOWEST_BYTES_S = 1 << 20
FAILURES = (ReplicatorError, OSError, sqlite3.Error)

State = Literal["waiting", "replicating", "parked", "failed", "stopped"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds for all databases of a store together.

    Attributes:
        park_after_s: a database with nothing to do for so long is closed; None for never.
        park_max_bytes: not one that is larger: after a wake-up it may have to be read once.
        hot: databases that are open at once, at most.
        turn_s: while others wait for their turn, an open one that had so long must let them.
    """

    park_after_s: float | None = None
    park_max_bytes: int = 64 << 20
    hot: int = 1_000_000
    turn_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A replicator that was not started yet, and its clients."""

    replicator: Replicator
    clients: Sequence[ReplicaClient]


def _place(replica: ReplicaStatus) -> str:
    """Where a replica is, for the log: a position in format v0.3, where TXIDs only count within this process."""
    return f"position={replica.position}" if replica.position else f"txid={replica.txid:016x}"


class Member:
    """One of the databases. Its methods may be called from any thread, and those that take time exclude each other."""

    __slots__ = (
        "_begun", "_busy", "_failures", "_folder", "_hot_at", "_position", "_prepare", "_prepared", "_record", "_remembered", "_rest", "_synced_at",
        "_txid", "_users", "_wanted", "_watch", "checked", "due", "error", "is_missing_restore", "key", "limits", "path", "poked", "retry_at", "settings",
        "touched", "urls", "was_tried", "working",
    )  # fmt: skip

    def __init__(
        self,
        path: Path,
        prepare: Callable[[], Prepared],
        *,
        restore_missing: bool = False,
        settings: object = None,
        urls: Sequence[str] = (),
        folder: Path | None = None,
        checked: bool = False,
    ) -> None:
        """
        Args:
            prepare: makes the replicator; once now, so that wrong settings are found at once, and again for each further start.
            restore_missing: restore the database before it is replicated, when it is missing.
            settings: what it was made of, for comparing; None for one that was registered while the process ran.
            urls: of the replicas, as they were given.
            folder: for local state (`<meta>/pyrepl`), of a database that may be parked; None for one that may not.
            checked: the settings are known to be right: `prepare` is not called before the start.

        Raises:
            ConfigError: the settings are wrong.
        """
        self.path, self.settings, self.urls = path, settings, tuple(urls)
        self.key = key_of(path)
        self.error: Exception | None = None
        self.retry_at = 0.0
        self.was_tried = False
        self.is_missing_restore = restore_missing
        self.limits = Limits()
        self.due = 0.0
        """When to look at it next, on the monotonic clock. This and `working` belong to the store."""
        self.working = False
        self.poked = False
        self.touched: Callable[[Member], None] | None = None
        """Called, by the watcher's thread, when the files of a parked database have changed."""
        self.checked = True
        """Whether the replicas were asked since the process began; only of one that was found parked they were not."""
        self._folder = None if folder is None else os.fspath(folder)  # a text takes a third of the memory
        self._prepare = prepare
        self._prepared: Prepared | None = None if checked else prepare()
        self._begun = False
        self._wanted = True
        self._failures = 0
        self._users = 0
        self._hot_at = 0.0
        self._txid = TXID(0)
        self._position = ""  # in format v0.3
        self._synced_at: datetime | None = None
        self._rest: Rest | None = None
        self._record: Kept | None = None
        self._remembered: tuple[bytes | None, ...] | None = None  # of its replicas, of one that was parked by this process
        self._watch: Subscription | None = None
        self._busy = threading.Lock()

    # -- asking ------------------------------------------------------------------------------------------------------------------

    @property
    def replicator(self) -> Replicator | None:
        """The replicator that was started; None before and afterwards."""
        prepared = self._prepared
        return prepared.replicator if prepared is not None and self._begun else None

    @property
    def is_parked(self) -> bool:
        return self._rest is not None or self._record is not None

    @property
    def is_watched(self) -> bool:
        """Whether file events tell of changes to a parked database."""
        return self._watch is not None

    @property
    def state(self) -> State:
        replicator = self.replicator
        if not self._wanted:
            return "stopped"
        if replicator is None:
            if self.is_parked:
                return "parked"
            return "failed" if self.retry_at == math.inf else "waiting"
        return "failed" if replicator.status().state == "failed" else "replicating"

    @property
    def txid(self) -> TXID:
        """Newest TXID that was read in this process."""
        replicator = self.replicator
        return max(self._txid, replicator.status().txid) if replicator is not None else self._txid

    @property
    def synced_at(self) -> datetime | None:
        """All that was committed before is on every replica, as far as this process knows."""
        replicator = self.replicator
        return replicator.status().synced_at if replicator is not None else self._synced_at

    @property
    def requests(self) -> int:
        """Operations on its replicas since it last began, where its clients count them."""
        prepared = self._prepared
        return sum(client.requests for client in prepared.clients if isinstance(client, Measured)) if prepared is not None else 0

    @property
    def problem(self) -> str | None:
        """What keeps it from being replicated now; None when nothing does."""
        replicator = self.replicator
        if replicator is None:
            return str(self.error) if self.error is not None and self._wanted else None
        status = replicator.status()
        return status.error or next((f"{item.url}: {item.error}" for item in status.replicas if item.error), None)

    @property
    def history_problems(self) -> tuple[str, ...]:
        """What could not be done of a parked database's history when it was parked."""
        record = self._record or self._rest
        return record.problems if record is not None else ()

    # -- life --------------------------------------------------------------------------------------------------------------------

    def start(self, *, again: bool = False, timeout_s: float | None = None) -> bool:
        """Try to begin; False when it is replicating already. What fails is in `error`, logged, and due again at `retry_at`.

        Args:
            again: also when it was stopped, or has failed for good.
            timeout_s: how long to wait for another call that is under way.

        Raises:
            WaitTimeout: the other call did not end.
        """
        with self._alone(timeout_s):
            if self.state in ("replicating", "parked") or not (self._wanted or again):
                return False
            with contextlib.suppress(*FAILURES):  # of one that has failed for good; the log has it
                self._end(0.0)
            self._wanted = True
            try:
                if self._park_unchanged():
                    self._discard_prepared()
                    return True
                self._begin(None)
            except FAILURES as error:
                self._failed(error)
            finally:
                self.was_tried = True
            return True

    def _discard_prepared(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            for client in prepared.clients:
                client.close()

    def _begin(self, remembered: Sequence[bytes | None] | None) -> None:
        if self._prepared is None:
            self._prepared = self._prepare()
        self._restore(self._prepared.clients)
        if remembered is not None:
            self._prepared.replicator.recall(remembered)
        if self._folder is not None:
            parked.forget(Path(self._folder))
        self._prepared.replicator.start()
        self.error, self._begun, self._failures, self._hot_at = None, True, 0, time.monotonic()
        self.checked = True
        level = logging.DEBUG if remembered is not None else logging.INFO
        log.log(level, "initialized db path=%s", self.path)
        for replica in self._prepared.replicator.status().replicas:
            log.log(level, "replicating to type=%s url=%s %s", replica.kind, replica.url, _place(replica))

    def _failed(self, error: Exception) -> None:
        if str(error) != str(self.error):
            log.error("cannot replicate db=%s error=%r", self.path, str(error))
        self.error = error
        if isinstance(error, LeaseHeld):
            self.retry_at = time.monotonic() + min(max(error.wait_s, MIN_LEASE_RETRY_S), LEASE_RETRY_S)
        elif isinstance(error, (ReplicaStateError, LeaseError, ConfigError)):  # somebody has to look at it first
            self.retry_at = math.inf
        else:
            not_ready = isinstance(error, DatabaseStateError)
            delay, most = (
                (NOT_READY_RETRY_S * 2 ** max(0, self._failures - 5), MAX_NOT_READY_RETRY_S)
                if not_ready
                else (RETRY_S * 2**self._failures, MAX_RETRY_S)
            )
            self.retry_at = time.monotonic() + min(delay, most)
            self._failures = min(self._failures + 1, 10)

    def _restore(self, clients: Sequence[ReplicaClient]) -> None:
        """Restore a database that is missing. Only "nothing is stored" lets it begin anew: with an unreachable replica nobody knows."""
        if self.is_missing_restore and not self.path.exists():
            try:
                # Only when all have been asked: what is restored is written to all of them, and one that is away may be ahead.
                result = restore(newest_first(clients, all_must_answer=True), self.path)
                if self._prepared is not None:
                    self._prepared.replicator.adopt(result.txid)
                log.info("restored db path=%s txid=%016x", self.path, result.txid)
            except NoBackups:
                log.info("nothing to restore path=%s", self.path)
        self.is_missing_restore = False

    def store(self, timeout_s: float, *, patient: bool = False, snapshot: bool = False, enforce_history: bool = False) -> None:
        """Store what is committed now. What fails is in `error`, and logged.

        Args:
            patient: what is only large, and fails nowhere, has longer: another second for each mebibyte of the database.
        """
        replicator = self.replicator
        if replicator is None:
            return
        try:
            self._wait(replicator, timeout_s, longer_s=self._size_bytes() / SLOWEST_BYTES_S if patient else 0.0)
            if snapshot:
                replicator.snapshot()
            if enforce_history:
                replicator.enforce_history()
        except FAILURES as error:
            self.error = error
            log.error("replication failed db=%s error=%r", self.path, str(error))

    def _wait(self, replicator: Replicator, timeout_s: float, *, longer_s: float) -> None:
        """Wait until all that is committed is stored: `timeout_s`, and `longer_s` more for as long as nothing reports an error."""
        end = time.monotonic() + timeout_s + longer_s
        while True:
            try:
                replicator.wait(timeout_s=min(timeout_s, max(0.0, end - time.monotonic())))
                return
            except WaitTimeout:
                found = replicator.status()
                if time.monotonic() >= end or found.error is not None or any(replica.error is not None for replica in found.replicas):
                    raise
                log.info("not stored yet, and nothing fails db=%s", self.path)

    def _size_bytes(self) -> int:
        size = 0
        for suffix in ("", "-wal"):
            with contextlib.suppress(OSError):
                size += os.stat(f"{self.path}{suffix}").st_size
        return size

    def stop(self, timeout_s: float, *, retry_interval_s: float = 0.5, gone: bool = False) -> bool:
        """Store what is committed, and stop; False when it was not running.

        Args:
            gone: the database was deleted on purpose: that nothing more can be read of it is no error.

        Raises:
            WaitTimeout: not everything was stored in time, or another call did not end. It is stopped in the first case.
            ReplicatorError, OSError: it ended with this error.
        """
        end = time.monotonic() + timeout_s
        with self._alone(timeout_s):
            was_wanted, self._wanted = self._wanted, False
            begun = self._begun or self.is_parked
            try:
                if self.is_parked and not gone:
                    self._store_parked()
                elif self._begun and was_wanted and not gone:
                    self._park_at_end()
                self._end(max(0.0, end - time.monotonic()), retry_interval_s=retry_interval_s)
            except DatabaseNotFound as error:
                if not gone:
                    self._not_stored(error)
                    raise
            except FAILURES as error:
                self._not_stored(error)
                raise
            finally:
                self._unpark()
                self.retry_at = 0.0
                if begun:
                    log.log(
                        logging.INFO if self._folder is None or was_wanted else logging.DEBUG,
                        "replication stopped path=%s %s",
                        self.path,
                        f"position={self._position}" if self._position else f"txid={self._txid:016x}",
                    )
            return was_wanted

    def _not_stored(self, error: Exception) -> None:
        self.error = error
        log.error("not everything was stored db=%s error=%r", self.path, str(error))

    def _store_parked(self) -> None:
        """At the end: what is parked is stored, unless its files say that something came a moment ago."""
        if self._record is None or self._why_awake():
            self._begin(self._remembered)
            self._unpark()

    def _park_at_end(self) -> None:
        """Leave a record, so that the next start need not open it, where that takes no waiting."""
        if not self._park(RACY_NS / 1e9):
            return
        if not self.is_parked:  # something came at this moment, and is not stored yet
            self._begin(None)
        elif why := self._settle():
            log.debug("no record is left path=%s reason=%s", self.path, why)
            self._store_parked()

    def _end(self, timeout_s: float, *, retry_interval_s: float = 0.5) -> None:
        prepared, self._prepared = self._prepared, None if self._begun or not self._wanted else self._prepared
        if prepared is None:
            return
        if not self._begun:
            if not self._wanted:
                for client in prepared.clients:
                    client.close()
            return
        try:
            prepared.replicator.close(timeout_s, retry_interval_s=retry_interval_s)
        finally:
            self._take_status(prepared.replicator)
            self._begun = False

    def _take_status(self, replicator: Replicator) -> None:
        status = replicator.status()
        self._txid, self._synced_at = max(self._txid, status.txid), status.synced_at
        self._position = status.position

    @contextlib.contextmanager
    def _alone(self, timeout_s: float | None) -> Iterator[None]:
        if not self._busy.acquire(timeout=-1 if timeout_s is None else max(timeout_s, 0.0)):
            raise WaitTimeout(f"{self.path} is being started or stopped")
        try:
            yield
        finally:
            self._busy.release()

    # -- parking -----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def awake(self, timeout_s: float) -> Iterator[Replicator | None]:
        """Give the replicator, of a parked database after waking it; it is not parked meanwhile. None when it is not replicating.

        Raises:
            WaitTimeout: another call did not end in time.
        """
        with self._alone(timeout_s):
            if self.is_parked and self._wanted:
                self._wake("somebody asks")
            self._users += 1
        try:
            yield self.replicator
        finally:
            with self._alone(None):
                self._users -= 1
            if self.touched is not None:
                self.touched(self)

    def _may_park(self) -> bool:
        return self._folder is not None and self.limits.park_after_s is not None

    def _park_unchanged(self) -> bool:
        """Park without opening it, when a record proves that nothing has changed since it was parked in an earlier process."""
        if not self._may_park() or self.is_missing_restore:
            return False
        assert self._folder is not None
        record = parked.read_record(Path(self._folder))
        if record is None or record.urls != self.urls:
            return False
        self._subscribe()  # before looking: what happens from here on is told
        end = parked.wal_end(self.path, record.position, record.page_size)
        if changed(record, parked.look(self.path), end, boot=parked.boot_id()):
            self._unsubscribe()
            return False
        self._record, self._rest, self._remembered, self.checked = record.kept(), None, None, False
        self._txid, self._synced_at, self.error, self._failures = record.txid, datetime.now(UTC), None, 0
        return True

    def _park(self, quiet_s: float) -> bool:
        """Close it, if nothing is left to do."""
        replicator = self.replicator
        if replicator is None or self._users or not self._may_park() or replicator.size_bytes() > self.limits.park_max_bytes:
            return False
        if not replicator.is_at_rest(quiet_s):  # before anything is watched: most that are asked are not
            return False
        self.poked = False
        self._subscribe()
        try:
            rest = replicator.rest(quiet_s=quiet_s)
        except Disturbed as error:
            self._let_go(replicator)
            self._unsubscribe()
            log.debug("not parked path=%s reason=%s", self.path, error)
            self.retry_at = 0.0
            return True
        if rest is None:
            self._unsubscribe()
            return False
        self._rest, self._record, self._remembered = rest, None, rest.remembered  # first: at no moment does it look as if it were waiting
        self._let_go(replicator)
        log.debug("parked path=%s txid=%016x", self.path, rest.txid)
        return True

    def _let_go(self, replicator: Replicator) -> None:
        self._take_status(replicator)
        self._prepared, self._begun = None, False

    def _settle(self) -> str:
        """Write the record of a database that was parked a moment ago, when its files are old enough to be compared.

        Returns why it must begin again; an empty string when nothing has changed.
        """
        rest = self._rest
        assert rest is not None
        assert self._folder is not None
        now, now_ns, sight = datetime.now(UTC), time.time_ns(), parked.look(self.path)
        if sight != rest.after:
            return "its files were touched"
        if not is_settled(sight, now_ns):
            return ""
        if rest.position.has_wal:
            why = wal_moved(rest.position, parked.wal_end(self.path, rest.position, rest.page_size))
        else:
            why = "" if rest.before == sight else "its files had been touched a moment before"
        if why:
            return why
        record = Parked(
            rest.txid, sight, rest.position, rest.page_size, now_ns, parked.boot_id(), self.urls, rest.history_due, rest.problems
        )
        try:
            parked.write_record(Path(self._folder), record)
        except OSError as error:  # it stays parked; only the next start must open it
            log.warning("cannot write the record of a parked database path=%s error=%r", self.path, str(error))
        self._record, self._rest, self._synced_at = record.kept(), None, now
        return ""

    def _why_awake(self) -> str:
        """Return why a parked database with a record must begin again; an empty string when nothing has changed."""
        assert self._record is not None
        return "" if self.is_quiet() else "its files were touched"

    def is_quiet(self) -> bool:
        """Say whether the files of a parked database look as they did: three `stat` calls, from any thread."""
        rest, record, now = self._rest, self._record, datetime.now(UTC)  # in this order: the one becomes the other
        known = record.sight if record is not None else rest.after.packed() if rest is not None else b""
        if known != parked.glance(self.path):
            return False
        if record is not None:  # it proves that nothing has changed; without one that will be seen later
            self._synced_at = now
        return True

    def _wake(self, why: str) -> None:
        log.debug("wakes up path=%s reason=%s", self.path, why)
        try:
            self._begin(self._remembered)
        except FAILURES as error:
            self._failed(error)
        finally:
            self._unpark()

    def _unpark(self) -> None:
        self._rest = self._record = self._remembered = None
        self.poked = False
        self._unsubscribe()

    def _subscribe(self) -> None:
        if self._watch is None:
            real = Path(os.path.realpath(self.path))
            name = os.fsencode(real.name)
            self._watch = watcher().subscribe(real.parent, (name, name + b"-wal", name + b"-journal"), self._seen)

    def _unsubscribe(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def _seen(self, name: bytes, mask: int) -> None:
        self.poked = True
        if self.touched is not None:
            self.touched(self)

    # -- what is due -------------------------------------------------------------------------------------------------------------

    def visit(self, *, must_leave: bool, may_open: Callable[[], bool]) -> float:
        """Do what is due; returns when to come again, on the monotonic clock.

        Args:
            must_leave: others wait to be opened: close it, if it had its turn.
            may_open: takes a place among the open ones, if there is one.
        """
        if not self._busy.acquire(blocking=False):
            return time.monotonic() + BUSY_RETRY_S
        try:
            if not self._wanted:
                return math.inf
            if self.is_parked:
                self._visit_parked(may_open)
            elif self._begun and self.state != "failed":
                quiet_s = self.limits.park_after_s or 0.0
                if not self._park(min(quiet_s, BUSY_RETRY_S) if must_leave else quiet_s) and must_leave:
                    self._give_way()
            return self.next_due()
        finally:
            self._busy.release()

    def _visit_parked(self, may_open: Callable[[], bool]) -> None:
        poked, self.poked = self.poked, False  # before looking: what happens from here on is told again
        record = self._record
        if record is None:
            why = self._settle()
        elif poked and (why := self._why_awake()):
            pass
        elif not self.checked:
            why = self._check_replicas(self._txid) if self.retry_at <= time.monotonic() else ""
        else:
            why = "something of its history is due" if self._is_history_due() else ""
        if why and may_open():
            self._wake(why)
        elif why:
            self.poked = True

    def _check_replicas(self, txid: TXID) -> str:
        """Ask each replica once whether it still ends where the record says."""
        prepared = self._prepare()
        try:
            for client in prepared.clients:
                newest = max((info.max_txid for info in client.list(0, seek=txid)), default=0)
                if newest != txid:
                    return f"{client.url} ends at TXID {newest:016x}"
        except AccessDenied:
            pass  # what may only be written is taken on trust, as at every start
        except (StorageError, OSError) as error:
            if str(error) != str(self.error):
                log.warning("replica cannot be asked, the database stays parked path=%s error=%r", self.path, str(error))
            self.error = error
            self.retry_at = time.monotonic() + min(RETRY_S * 2**self._failures, MAX_RETRY_S)
            self._failures = min(self._failures + 1, 10)
            return ""
        finally:
            for client in prepared.clients:
                client.close()
        self.checked, self.error, self._failures = True, None, 0
        return ""

    def _give_way(self) -> None:
        """Close one that is busy, so that others have their turn. It begins again when it is its turn."""
        replicator = self.replicator
        if replicator is None or self._users or self._folder is None or time.monotonic() - self._hot_at < self.limits.turn_s:
            return
        try:
            replicator.close(5.0)
        except FAILURES as error:
            log.debug("closed with something left to store path=%s error=%r", self.path, str(error))
        self._let_go(replicator)
        self.retry_at = time.monotonic() + BUSY_RETRY_S

    def next_due(self) -> float:
        """Return when something is due next, on the monotonic clock."""
        now = time.monotonic()
        if not self._wanted:
            return math.inf
        if self.is_parked:
            if self.poked:
                return now + BUSY_RETRY_S
            if not self.checked:
                return max(now, self.retry_at if self.error is not None else 0.0)
            if self._record is None:
                assert self._rest is not None
                return now + max(0.1, (self._rest.after.newest_ns + RACY_NS - time.time_ns()) / 1e9)
            history_due = self._record.history_due
            return math.inf if history_due is None else now + max(0.0, history_due - time.time())
        if self._begun:
            return now + max(1.0, self.limits.park_after_s or 0.0) if self._may_park() else math.inf
        return self.retry_at

    @property
    def is_hot(self) -> bool:
        return self._begun

    @property
    def rank(self) -> tuple[bool, float]:
        """The lowest one leaves first: what is quiet, for the longest time; then what has been open for the longest time."""
        replicator = self.replicator
        idle_s = replicator.idle_s() if replicator is not None else 0.0
        return (idle_s < BUSY_RETRY_S, -idle_s if idle_s >= BUSY_RETRY_S else self._hot_at)

    def _is_history_due(self) -> bool:
        due = self._record.history_due if self._record is not None else None
        return due is not None and due <= time.time()


def key_of(path: Path) -> str:
    """Return what names a database whatever path leads to it. Mostly it is the path's own text, which is not kept twice then."""
    text, real = os.fspath(path), os.path.realpath(path)
    return text if text == real else real
