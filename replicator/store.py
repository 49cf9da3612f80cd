"""The databases of one process: each is a `Member` with a `Replicator` of its own, and none can hold up another.

| state | what it is |
|---|---|
| waiting | wanted, and not begun: the first try is due, or the last one failed and another comes |
| replicating | begun; whether it is healthy is what `Replicator.status` says |
| failed | a person has to look at it: it ended for good, or cannot begin until somebody changes something |
| stopped | nobody wants it now |

A database that cannot begin is tried again after a while, unless the reason is one that does not go away by itself: a replica that belongs to
another database, has lost its files, or has another writer. `start` tries those again, too.

One thread finds out what is due and starts it in threads of their own, eight at once at most: a store that does not answer delays only
those that come after eight of its kind. All of them are daemon threads, so that one that hangs does not keep the process from ending.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from replicator.api import ReplicaStatus, Replicator, restore
from replicator.errors import (
    ConfigError,
    DatabaseStateError,
    LeaseError,
    LeaseHeld,
    NoBackups,
    ReplicaStateError,
    ReplicatorError,
    WaitTimeout,
)
from replicator.format.ltx import TXID
from replicator.storage.base import ReplicaClient
from replicator.storage.measured import Measured
from replicator.v3restore import newest_first

__all__ = ["Member", "Prepared", "State", "Store", "at_once", "stop_all"]

AT_ONCE = 8
NOT_READY_RETRY_S = 2.0
RETRY_S = 5.0
MIN_LEASE_RETRY_S, LEASE_RETRY_S = 0.05, 1.0
MAX_RETRY_S = 300.0
GRACE_S = 5.0
FAILURES = (ReplicatorError, OSError, sqlite3.Error)

State = Literal["waiting", "replicating", "failed", "stopped"]

log = logging.getLogger(__name__)


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

    def __init__(
        self,
        path: Path,
        prepare: Callable[[], Prepared],
        *,
        restore_missing: bool = False,
        settings: object = None,
        urls: Sequence[str] = (),
    ) -> None:
        """
        Args:
            prepare: makes the replicator; once now, so that wrong settings are found at once, and again for each further start.
            restore_missing: restore the database before it is replicated, when it is missing.
            settings: what it was made of, for comparing; None for one that was registered while the process ran.
            urls: of the replicas, as they were given.

        Raises:
            ConfigError: the settings are wrong.
        """
        self.path, self.settings, self.urls = path, settings, tuple(urls)
        self.error: Exception | None = None
        self.retry_at = 0.0
        self.was_tried = False
        self.is_missing_restore = restore_missing
        self._prepare = prepare
        self._prepared: Prepared | None = prepare()
        self._begun = False
        self._wanted = True
        self._failures = 0
        self._txid = TXID(0)
        self._position = ""  # in format v0.3
        self._synced_at: datetime | None = None
        self._busy = threading.Lock()

    # -- asking ------------------------------------------------------------------------------------------------------------------

    @property
    def replicator(self) -> Replicator | None:
        """The replicator that was started; None before and afterwards."""
        prepared = self._prepared
        return prepared.replicator if prepared is not None and self._begun else None

    @property
    def state(self) -> State:
        replicator = self.replicator
        if not self._wanted:
            return "stopped"
        if replicator is None:
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
            if self.state == "replicating" or not (self._wanted or again):
                return False
            with contextlib.suppress(*FAILURES):  # of one that has failed for good; the log has it
                self._end(0.0)
            self._wanted = True
            try:
                if self._prepared is None:
                    self._prepared = self._prepare()
                self._restore(self._prepared.clients)
                self._prepared.replicator.start()
            except FAILURES as error:
                self._failed(error)
                return True
            finally:
                self.was_tried = True
            self.error, self._begun, self._failures = None, True, 0
            log.info("initialized db path=%s", self.path)
            for replica in self._prepared.replicator.status().replicas:
                log.info("replicating to type=%s url=%s %s", replica.kind, replica.url, _place(replica))
            return True

    def _failed(self, error: Exception) -> None:
        if str(error) != str(self.error):
            log.error("cannot replicate db=%s error=%r", self.path, str(error))
        self.error = error
        if isinstance(error, LeaseHeld):
            self.retry_at = time.monotonic() + min(max(error.wait_s, MIN_LEASE_RETRY_S), LEASE_RETRY_S)
        elif isinstance(error, (ReplicaStateError, LeaseError, ConfigError)):  # somebody has to look at it first
            self.retry_at = math.inf
        else:
            delay = NOT_READY_RETRY_S if isinstance(error, DatabaseStateError) else RETRY_S * 2**self._failures
            self.retry_at = time.monotonic() + min(delay, MAX_RETRY_S)
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

    def store(self, timeout_s: float, *, snapshot: bool = False, enforce_history: bool = False) -> None:
        """Store what is committed now. What fails is in `error`, and logged."""
        replicator = self.replicator
        if replicator is None:
            return
        try:
            replicator.wait(timeout_s=timeout_s)
            if snapshot:
                replicator.snapshot()
            if enforce_history:
                replicator.enforce_history()
        except FAILURES as error:
            self.error = error
            log.error("replication failed db=%s error=%r", self.path, str(error))

    def stop(self, timeout_s: float, *, retry_interval_s: float = 0.5) -> bool:
        """Store what is committed, and stop; False when it was not running.

        Raises:
            WaitTimeout: not everything was stored in time, or another call did not end. It is stopped in the first case.
            ReplicatorError, OSError: it ended with this error.
        """
        end = time.monotonic() + timeout_s
        with self._alone(timeout_s):
            was_wanted, self._wanted = self._wanted, False
            begun = self._begun
            try:
                self._end(max(0.0, end - time.monotonic()), retry_interval_s=retry_interval_s)
            except FAILURES as error:
                self.error = error
                log.error("not everything was stored db=%s error=%r", self.path, str(error))
                raise
            finally:
                self.retry_at = 0.0
                if begun:
                    log.info(
                        "replication stopped path=%s %s",
                        self.path,
                        f"position={self._position}" if self._position else f"txid={self._txid:016x}",
                    )
            return was_wanted

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
            status = prepared.replicator.status()
            self._txid, self._synced_at, self._begun = max(self._txid, status.txid), status.synced_at, False
            self._position = status.position

    @contextlib.contextmanager
    def _alone(self, timeout_s: float | None) -> Iterator[None]:
        if not self._busy.acquire(timeout=-1 if timeout_s is None else max(timeout_s, 0.0)):
            raise WaitTimeout(f"{self.path} is being started or stopped")
        try:
            yield
        finally:
            self._busy.release()


class Store:
    """The members, and the thread that starts them. `start` once, `close` at the end."""

    def __init__(self, members: Iterable[Member] = (), *, retry: bool = True, on_change: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            retry: False: each is tried once.
            on_change: called, by any thread, when a member was tried.
        """
        self._members = {_key(member.path): member for member in members}
        self._retry = retry
        self._on_change = on_change
        self._changed = threading.Condition()
        self._starting: set[Member] = set()
        self._thread: threading.Thread | None = None
        self._closing = False

    # -- asking ------------------------------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """Return all of them, in the order in which they came."""
        with self._changed:
            return list(self._members.values())

    def get(self, path: Path) -> Member | None:
        """Return the member with a database, under whatever name."""
        with self._changed:
            return self._members.get(_key(path))

    @property
    def is_over(self) -> bool:
        """Whether nothing can come of any member any more: each has failed for good."""
        return all(
            member.state == "failed" or (not self._retry and member.was_tried and member.state == "waiting") for member in self.members()
        )

    @property
    def is_closing(self) -> bool:
        return self._closing

    # -- life --------------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to start members, in the background."""
        self._thread = threading.Thread(target=self._run, name="pyrepl store", daemon=True)
        self._thread.start()

    def wait_until_tried(self, timeout_s: float | None = None) -> bool:
        """Return once each member was tried; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: all(member.was_tried for member in self._members.values()) or self._closing, timeout_s)

    def _run(self) -> None:
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                waiting = [member for member in self._members.values() if member not in self._starting and self._is_to_start(member)]
                for member in sorted(waiting, key=lambda member: member.retry_at):
                    if member.retry_at <= now and len(self._starting) < AT_ONCE:
                        self._starting.add(member)
                        threading.Thread(target=self._start, args=(member,), name=f"pyrepl start {member.path.name}", daemon=True).start()
                due = min((member.retry_at for member in waiting if member not in self._starting), default=math.inf)
                full = len(self._starting) >= AT_ONCE  # the next one that is done wakes us
                self._changed.wait(None if full or due == math.inf else max(0.0, due - time.monotonic()))

    def _is_to_start(self, member: Member) -> bool:
        return member.state == "waiting" and (self._retry or not member.was_tried)

    def _start(self, member: Member) -> None:
        try:
            member.start()
        except Exception as error:
            log.error("cannot replicate, by a defect db=%s", member.path, exc_info=error)
            member.error, member.retry_at, member.was_tried = error, math.inf, True
        finally:
            with self._changed:
                self._starting.discard(member)
                self._changed.notify_all()
        self._on_change()

    def try_waiting(self, timeout_s: float) -> None:
        """Try those that wait for their next try now, within the time."""

        def start(member: Member) -> None:
            member.start()

        at_once(start, [member for member in self.members() if member.state == "waiting"], timeout_s=timeout_s)

    def add(self, member: Member) -> bool:
        """Take a member that is started by its owner, or by us when that fails for now; False when its database is there already."""
        with self._changed:
            if self._closing:
                raise DatabaseStateError("the daemon is stopping")
            if _key(member.path) in self._members:
                return False
            self._members[_key(member.path)] = member
            self._starting.add(member)
        try:
            member.start()
        finally:
            with self._changed:
                self._starting.discard(member)
                self._changed.notify_all()
        return True

    def remove(self, path: Path, timeout_s: float) -> Member | None:
        """Stop the member with a database and forget it; None when there is none.

        Raises:
            ReplicatorError, OSError: not everything was stored. It is forgotten all the same.
        """
        with self._changed:
            member = self._members.pop(_key(path), None)
        if member is not None:
            member.stop(timeout_s)
        return member

    def exchange(self, gone: Sequence[Member], new: Sequence[Member], timeout_s: float) -> None:
        """Stop some members, then begin others. Errors are logged."""
        with self._changed:
            for member in gone:
                self._members.pop(_key(member.path), None)
        stop_all(gone, timeout_s)
        with self._changed:
            if not self._closing:
                for member in new:
                    self._members.setdefault(_key(member.path), member)
            self._changed.notify_all()

    def close(self, timeout_s: float, *, retry_interval_s: float = 0.5) -> dict[Path, Exception]:
        """Store everything and stop, within the time and a few seconds; returns what went wrong, by database."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        return stop_all(self.members(), timeout_s, retry_interval_s=retry_interval_s)


def stop_all(members: Sequence[Member], timeout_s: float, *, retry_interval_s: float = 0.5) -> dict[Path, Exception]:
    """Stop members side by side, within the time and a few seconds; returns what went wrong."""
    end = time.monotonic() + timeout_s
    errors: dict[Path, Exception] = {}

    def stop(member: Member) -> None:
        try:
            member.stop(max(0.0, end - time.monotonic()), retry_interval_s=retry_interval_s)
        except FAILURES as error:
            errors[member.path] = error

    done = at_once(stop, members, timeout_s=timeout_s + GRACE_S)
    for member in members:
        if member not in done and member.path not in errors:
            errors[member.path] = WaitTimeout(f"{member.path} did not stop in time")
            log.error("not everything was stored db=%s error=%r", member.path, "it did not stop in time")
    return errors


def at_once(function: Callable[[Member], None], members: Sequence[Member], *, timeout_s: float | None = None) -> set[Member]:
    """Call a function for each member, several at a time; returns those that were done within the time."""
    queue, done, changed = list(members), set[Member](), threading.Condition()

    def work() -> None:
        while True:
            with changed:
                if not queue:
                    return
                member = queue.pop(0)
            try:
                function(member)
            except Exception as error:
                log.error("defect db=%s", member.path, exc_info=error)
            with changed:
                done.add(member)
                changed.notify_all()

    for _ in range(min(AT_ONCE, len(queue))):
        threading.Thread(target=work, name="pyrepl members", daemon=True).start()
    with changed:
        changed.wait_for(lambda: len(done) == len(members), timeout_s)
        return set(done)


def _key(path: Path) -> str:
    return os.path.realpath(path)
