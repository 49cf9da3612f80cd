"""What the threads of one `Replicator` share, under one lock.

Who sleeps is woken by `changed.notify_all()`: everybody. What happens for each commit wakes only who has something to do then, because a thread that
wakes for nothing costs as much as a page that is encoded: the engine's thread waits on `engine`, those of the replicas on `uploads`, all others
on `changed` itself.

Entries go from the engine's thread to those of the replicas through `_outbox`, in order of TXID. It is bounded: until an entry is stored on one
replica, or staged, the engine encodes nothing more, and the WAL is the queue.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from replicator.errors import DatabaseNotFound, DatabaseStateError, ReplicatorError, WaitTimeout
from replicator.format.ltx import TXID
from replicator.losses import LossWindow, Windows
from replicator.outbox import Entry
from replicator.replica import Replica
from replicator.waiters import Waiter

__all__ = ["Board", "Counts", "State"]

State = Literal["starting", "replicating", "degraded", "failed", "stopped"]

OUTBOX_BYTES = 32 << 20
MAX_TIMES = 4096

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What the engine's thread has done since the start."""

    syncs: int = 0
    sync_errors: int = 0
    sync_s: float = 0.0
    wal_bytes: int = 0
    checkpoint_tries: int = 0
    checkpoint_failures: int = 0
    checkpoint_s: float = 0.0


class Changed(threading.Condition):
    """The condition of a board. `notify_all` wakes those who wait on the narrower ones, too.

    `told`: called, with the lock held, whenever those who wait on this condition itself are woken: for who has no thread that could wait. Must be quick.
    """

    def __init__(self, narrower: Sequence[threading.Condition], lock: threading.RLock) -> None:
        super().__init__(lock)
        self.told: list[Callable[[], None]] = []
        self._narrower = narrower

    def notify_all(self) -> None:
        """Wake everybody."""
        self.notify_others()
        for condition in self._narrower:
            condition.notify_all()

    def notify_others(self) -> None:
        """Wake those who wait on this condition itself."""
        super().notify_all()
        for tell in self.told:
            tell()


class Board:
    """All methods may be called from any thread. `changed` is the condition: hold it to read several attributes together."""

    def __init__(
        self,
        path: Path,
        replicas: Sequence[Replica],
        *,
        staging_limit_bytes: int,
        on_failure: Callable[[ReplicatorError], None] | None = None,
    ) -> None:
        """`on_failure` is called once, by the thread that fails, when replication ends for good."""
        lock = threading.RLock()
        self.engine, self.uploads = threading.Condition(lock), threading.Condition(lock)
        self.changed = Changed((self.engine, self.uploads), lock)
        self.path = path
        self.replicas = replicas
        self.state: State = "stopped"
        self.error: str | None = None
        self.fatal: ReplicatorError | None = None
        self.gone: DatabaseNotFound | None = None
        self.stop = False
        self.given_out = TXID(0)
        """Newest TXID that was handed to the replicas, or that the page table had at the start."""
        self.counts = Counts()
        self.synced_at: datetime | None = None
        """All that was committed before is on every replica."""
        self.retry_s = math.inf
        """Longest time between two tries of an upload."""
        self.history_is_asked = False
        """Somebody waits for what is due of the history."""
        self._asked_at: datetime | None = None
        self._looked_at: datetime | None = None
        self._on_failure = on_failure
        self._windows = {replica: Windows() for replica in replicas}
        self._counted = dict.fromkeys(replicas, TXID(0))
        self._asked = self._answered = self._read = 0
        self._answered_txid = self._read_txid = TXID(0)
        self._waiters: dict[Waiter, None] = {}  # in the order in which they came
        self._outbox: deque[Entry] = deque()
        self._since: dict[TXID, float] = {}
        self._staging_limit = staging_limit_bytes

    @property
    def ends(self) -> bool:
        """True when the threads must end."""
        return self.stop or self.fatal is not None

    # -- entries -----------------------------------------------------------------------------------------------------------------

    def begin(self, staged: Iterable[Entry], txid: TXID) -> None:
        """The engine is open: entries that an earlier run left, and the newest TXID."""
        with self.changed:
            self._outbox.extend(staged)
            self.given_out = txid
            self._counted = dict.fromkeys(self.replicas, txid)
            self.state = "replicating"
            self.changed.notify_all()

    def put(self, entry: Entry, since: float | None = None) -> None:
        """Hand an entry to the replicas. `since`: when its first commit was made, at the earliest, on the monotonic clock."""
        with self.changed:
            if len(self._since) >= MAX_TIMES:  # a replica is away for long: every second one will do
                self._since = dict(list(self._since.items())[::2])
            self._since[entry.txid] = time.monotonic() if since is None else since
            self._outbox.append(entry)
            self.given_out = entry.txid
            self.uploads.notify_all()
            self.changed.notify_others()

    def exchange(self, entry: Entry, staged: Entry) -> bool:
        """Put the staged form in the place of an entry; False when the entry is not needed any more."""
        with self.changed:
            for at, item in enumerate(self._outbox):
                if item.txid == entry.txid:
                    self._outbox[at] = staged
                    return True
            return False

    def next_for(self, replica: Replica) -> Entry | None:
        """Return the entry that a replica must store next; None when it is not here."""
        with self.changed:
            following = [entry for entry in self._outbox if entry.txid == replica.txid + 1 or (entry.whole and entry.txid > replica.txid)]
            return following[0] if following else None

    def ahead_of(self, replica: Replica) -> Replica | None:
        """Return the replica that has come furthest, when that is further than the given one."""
        with self.changed:
            best = max((other for other in self.replicas if other.online), key=lambda other: other.txid, default=None)
            return best if best is not None and best.txid > replica.txid else None

    def is_stored(self, txid: TXID) -> bool:
        """True when one replica holds a TXID."""
        return any(replica.txid >= txid for replica in self.replicas if replica.online)

    def has_unstored(self) -> bool:
        """True while an entry is on no replica."""
        with self.changed:
            return bool(self._outbox) and not self.is_stored(self._outbox[-1].txid)

    def tidy(self) -> list[Entry]:
        """Drop entries that every replica has, and those that one has when they become many; returns them, for their staged files."""
        dropped: list[Entry] = []
        with self.changed:
            least = min(replica.txid for replica in self.replicas)
            most = max((replica.txid for replica in self.replicas if replica.online), default=TXID(0))
            while self._outbox and self._outbox[0].txid <= least:
                dropped.append(self._outbox.popleft())
            memory = sum(entry.memory_bytes for entry in self._outbox)
            staged = sum(entry.staged_bytes for entry in self._outbox)
            while self._outbox and self._outbox[0].txid <= most and (memory > OUTBOX_BYTES or staged > self._staging_limit // 2):
                entry = self._outbox.popleft()
                memory, staged = memory - entry.memory_bytes, staged - entry.staged_bytes
                dropped.append(entry)
            for txid in [txid for txid in self._since if txid <= least]:
                del self._since[txid]
            self.engine.notify_all()
            if len(self.replicas) > 1:  # else it is the only one who calls
                self.uploads.notify_all()
            self.changed.notify_others()
        return dropped

    def note_stored(self, replica: Replica) -> None:
        """A replica has taken something: note how long that was on this machine alone."""
        with self.changed:
            windows, counted, now = self._windows[replica], self._counted[replica], time.monotonic()
            self._release()
            for txid, since in self._since.items():
                if counted < txid <= replica.txid:
                    windows.add(now - since)
            self._counted[replica] = max(counted, replica.txid)
            self._note_synced()

    def _note_synced(self) -> None:
        if self._looked_at is not None and all(item.online and item.txid >= self._read_txid for item in self.replicas):
            self.synced_at = self._looked_at

    def loss_window(self, replica: Replica) -> LossWindow:
        """Return how long what a replica holds was on this machine alone."""
        with self.changed:
            return self._windows[replica].value()

    def waiting(self) -> tuple[int, int, int]:
        """Return what waits for a replica: entries, and their bytes in memory and on the disk."""
        with self.changed:
            return (
                len(self._outbox),
                sum(entry.memory_bytes for entry in self._outbox),
                sum(entry.staged_bytes for entry in self._outbox),
            )

    def lag_s(self, replica: Replica) -> float:
        """Seconds since the oldest commit that a replica lacks was made, at the earliest; 0 when it lacks none."""
        with self.changed:
            waiting = min((since for txid, since in self._since.items() if txid > replica.txid), default=None)
            return time.monotonic() - waiting if waiting is not None else 0.0

    # -- asking the engine to look ------------------------------------------------------------------------------------------------

    @property
    def is_asked(self) -> bool:
        return self._asked != self._answered

    def question(self) -> int:
        """Return what `read` and `answer` take: all that was asked before this call."""
        with self.changed:
            self._asked_at = datetime.now(UTC)
            return self._asked

    def read(self, question: int, txid: TXID) -> None:
        """Everything that was committed before the last `question` is in TXIDs up to `txid`. They may not be handed out yet."""
        with self.changed:
            if self.error is not None:
                self.error = self.gone = None
                self.changed.notify_all()
            self._read, self._read_txid, self._looked_at = question, txid, self._asked_at
            self._release()
            self._note_synced()

    def answer(self, question: int, txid: TXID) -> None:
        """What was `read` is on a replica now, or staged."""
        with self.changed:
            is_news = self.error is not None or (question, txid) != (self._answered, self._answered_txid)
            self.error = self.gone = None
            self._answered, self._answered_txid = question, txid
            if is_news:  # a look at a database at rest wakes nobody
                self.changed.notify_others()

    def ask(self, end: float | None, pending: Callable[[], str], *, enough: Callable[[], bool] = lambda: False) -> TXID:
        """Let the engine look at the WAL now; returns the TXID that holds everything committed before the call.

        `enough`: what ends the waiting before that; the TXID then says nothing.
        """
        with self.changed:
            self._asked += 1
            mine = self._asked
            self.engine.notify_all()
            self.until(lambda: self._answered >= mine or enough(), end, pending)
            return self._answered_txid

    # -- waiting -----------------------------------------------------------------------------------------------------------------

    def wait_for(self, replicas: Sequence[Replica], *, any_of_them: bool, txid: TXID | None) -> Waiter:
        """Return a waiter for a TXID, or for everything that was committed before the call. Its owner must `forget` it in the end."""
        waiter = Waiter(replicas, any_of_them=any_of_them, goal=txid)
        with self.changed:
            if txid is None:
                self._asked += 1
                waiter.question = self._asked
                self.engine.notify_all()
            self._waiters[waiter] = None
            self._release_one(waiter)
        return waiter

    def forget(self, waiter: Waiter) -> None:
        """Nobody waits any more."""
        with self.changed:
            self._waiters.pop(waiter, None)

    def missing(self, waiter: Waiter) -> str:
        """Say what a waiter waits for, and why it is not there."""
        with self.changed:
            return "; ".join(filter(None, [self.error, waiter.missing()]))

    def _release(self) -> None:
        for waiter in list(self._waiters):
            self._release_one(waiter)

    def _release_one(self, waiter: Waiter) -> None:
        if waiter.goal is None and 0 < waiter.question <= self._read:
            waiter.goal = self._read_txid
        failure = None if waiter.is_stored() else self._failure()
        if failure is not None or waiter.is_stored():
            del self._waiters[waiter]
            waiter.complete(failure)

    def _failure(self) -> ReplicatorError | None:
        """Return why waiting is of no use."""
        if self.fatal is not None:
            return self.fatal
        if self.gone is not None:
            return self.gone
        if self.stop or self.state == "stopped":
            return DatabaseStateError(f"replication of {self.path} is stopped")
        return None

    def end(self) -> None:
        """Let all threads end, and all waiters."""
        with self.changed:
            self.stop = True
            self._release()
            self.changed.notify_all()

    def until(self, holds: Callable[[], bool], end: float | None, pending: Callable[[], str]) -> None:
        """Wait for a condition.

        Args:
            end: on the monotonic clock; None for no limit.
            pending: says what is missing.

        Raises:
            WaitTimeout: the time is over.
            ReplicatorError: replication has failed or was stopped.
        """
        with self.changed:
            while not holds():
                if (failure := self._failure()) is not None:
                    raise failure
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise WaitTimeout(pending())
                self.changed.wait(left)

    # -- errors ------------------------------------------------------------------------------------------------------------------

    def report(self, error: BaseException) -> None:
        """Show an error that is tried again."""
        with self.changed:
            if str(error) != self.error:
                log.warning("sync failed db=%s error=%r", self.path, str(error))
            self.error = str(error)
            if isinstance(error, DatabaseNotFound):  # what was committed and not read is gone with it: waiters must know
                self.gone = error
                self._release()
            self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Stop everything for good. What is no error of ours is a bug: it is logged with its traceback."""
        with self.changed:
            first = self.fatal is None  # each thread finds that the lease is lost: it is said once
            if isinstance(error, ReplicatorError):
                level = logging.ERROR if first else logging.DEBUG
                log.log(level, "replication stopped db=%s error=%r hint=%r", self.path, str(error), error.hint)
                failure = error
            else:
                log.error("replication stopped by a defect db=%s", self.path, exc_info=error)
                failure = ReplicatorError(f"internal error, replication of {self.path} stopped: {error!r}")
                failure.__cause__ = error
            if first:
                self.error, self.fatal, self.state = str(failure), failure, "failed"
                self._release()
            self.changed.notify_all()
        if first and self._on_failure is not None:
            self._on_failure(failure)
