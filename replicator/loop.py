"""The engine's thread: look at the WAL when something happened, hand out what is new, checkpoint when that is due."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

from replicator.board import Board
from replicator.engine import Engine
from replicator.errors import DatabaseStateError, LeaseError, LeaseHeld, ReplicaStateError, ReplicatorError, StorageUnavailable
from replicator.gate import gate
from replicator.outbox import Entry
from replicator.watch import Watch

__all__ = ["EngineThread"]

ARM_S = 0.2
QUIET_S = 2.0
IDLE_POLL_S = 60.0
RETRY_S = (0.2, 0.5, 1.0, 2.0)
STAGE_AFTER_S = 1.0
MAX_STEPS = 10_000
BUSY_LOOKS = BUSY_EVENTS = 8
LATE_EVENT_S = 1.0
RESTART_LOOKS, RESTART_PAUSE_S = 10, 0.002
FREE_LOOKS, FIRST_PAUSE_S, LAST_PAUSE_S = 3, 0.001, 0.05
TEMPORARY = (ReplicatorError, OSError, sqlite3.Error)


class EngineThread:
    """Drives one engine. Wakes on questions, on file events, and by polling where there are none."""

    def __init__(self, engine: Engine, board: Board, path: Path, *, interval_s: float, poll_s: float, at_once: bool = False) -> None:
        """`at_once`: look at each file event, and again after each upload, instead of once in an interval."""
        self._engine, self._board = engine, board
        self._interval, self._poll, self._at_once = interval_s, poll_s, at_once
        self._wal = Path(f"{path}-wal")
        self._watch = Watch(path, self._wake)
        self._woken = False
        self._woken_at = 0.0
        self._events = 0  # how many came after the one that woke
        self._clear_at = time.monotonic()  # everything committed before is read
        self._unsettled: Entry | None = None
        self._full_looks = self._empty_looks = 0  # how many of the last ones, in a row, found something, and nothing
        self._restart_looks = 0  # a busy writer restarts the WAL soon after a checkpoint, and from then on the pin is in its way
        self._rested = False
        self.news_at = time.monotonic()
        """When something was found last, or may have happened."""

    def run(self) -> None:
        """Body of the thread."""
        try:
            self._run()
        except Exception as error:
            self._board.fail(error)
        finally:
            self._watch.disarm()

    def _run(self) -> None:
        board, failures = self._board, 0
        last_sync = last_news = last_found = time.monotonic()
        while True:
            with board.changed:
                while not board.ends and not board.is_asked:
                    now = time.monotonic()
                    due = self._next_due(now, last_sync, last_news)
                    if due <= now:
                        break
                    if self._is_told_enough and self._watch.armed:
                        self._clear_at = max(self._clear_at, self._woken_at)
                        self._watch.disarm()
                    board.engine.wait(due - now)
                if board.ends:
                    return
                # Before looking, never after: what happens from here on must wake us again.
                woken, self._woken = self._woken, False
                if woken and self._watch.armed:  # nothing happened before the first event
                    self._clear_at = max(self._clear_at, self._woken_at)
            if woken:
                if self._at_once and self._full_looks >= BUSY_LOOKS:
                    self._watch.disarm()
                last_news = self.news_at = time.monotonic()
            last_sync = time.monotonic()
            try:
                board.counts.syncs += 1
                news = self._sync()
            except TEMPORARY as error:
                if isinstance(error, (LeaseError, ReplicaStateError)) and not isinstance(error, LeaseHeld):
                    board.fail(error)
                    return
                board.report(error)
                board.counts.sync_errors += 1
                failures += 1
                with board.changed:
                    board.engine.wait_for(lambda: board.ends, RETRY_S[min(failures, len(RETRY_S)) - 1])
                continue
            failures = 0
            self._full_looks, self._empty_looks = (self._full_looks + 1, 0) if news else (0, self._empty_looks + 1)
            if news:
                last_news = self.news_at = time.monotonic()
                self._rested = False
                if not self._at_once and last_news - last_found <= max(ARM_S, 2 * self._interval):
                    self._watch.disarm()  # it is written to all the time: more events than are of use
                last_found = last_news
            elif (self._at_once or time.monotonic() - last_news > ARM_S) and not self._watch.armed and self._watch.arm():
                # Look once more: something may have happened before the watch was armed.
                with board.changed:
                    self._woken = False
                if not self._is_quiet():
                    last_news = self.news_at = time.monotonic()
                    self._rested = False
            if not self._rested and time.monotonic() - last_news > QUIET_S:
                self._engine.rest()
                self._rested = True

    def _is_quiet(self) -> bool:
        try:
            return not self._sync()
        except TEMPORARY:
            return False

    def _wake(self) -> None:
        with self._board.changed:
            if not self._woken:
                self._woken, self._woken_at, self._events = True, self._written_at(), 0
                self._board.engine.notify_all()
                return
            self._events += 1
            if self._events == BUSY_EVENTS and self._is_told_enough:
                self._board.engine.notify_all()

    @property
    def _is_told_enough(self) -> bool:
        """At a slow pace one event makes it look. Those that a busy writer causes until then wake a thread for nothing."""
        return self._woken and self._events >= BUSY_EVENTS and self._interval > ARM_S

    def _written_at(self) -> float:
        """Return when the commit was made that an event tells of: the event may come late, and the WAL has a time of its own."""
        try:
            age_s = time.time() - os.stat(self._wal).st_mtime
        except OSError:
            age_s = 0.0
        return time.monotonic() - (age_s if 0 < age_s < LATE_EVENT_S else 0.0)  # else the event was the database file's

    def _next_due(self, now: float, last_sync: float, last_news: float) -> float:
        if self._at_once and (self._woken or (self._full_looks and not self._watch.armed)):
            # A transaction that is not committed yet may write a lot, and so may a checkpoint: such events come ever more slowly.
            return last_sync + (min(FIRST_PAUSE_S * 2**excess, LAST_PAUSE_S) if (excess := self._empty_looks - FREE_LOOKS) >= 0 else 0.0)
        if self._woken:
            return last_sync + self._interval
        if self._engine.is_checkpointing and now - last_news <= QUIET_S:
            return last_sync + RESTART_PAUSE_S
        if self._watch.armed:
            return last_sync + IDLE_POLL_S if self._rested else max(last_news + QUIET_S, last_sync) + self._interval
        if self._engine.is_pin_low and self._restart_looks:
            return last_sync + RESTART_PAUSE_S
        return last_sync + (max(self._interval, 0.01) if now - last_news <= QUIET_S or self._watch.works else self._poll)

    def _sync(self) -> bool:
        """Hand out everything that is committed now. True when there was something."""
        board, engine = self._board, self._engine
        if board.state == "starting":
            board.begin(engine.open(), engine.txid)
        if self._unsettled is not None:
            self._settle(self._unsettled)
        news = False
        for _ in range(MAX_STEPS):
            question, looked_at = board.question(), time.monotonic()
            self._restart_looks = max(0, self._restart_looks - 1)
            self._wait_for_room()
            with gate():
                began = time.monotonic()
                entry = engine.advance()
                self._settle_pin()
                board.counts.sync_s += time.monotonic() - began
                if engine.at_end:
                    board.read(question, engine.txid)
                if entry is None and self._is_done(question, looked_at):
                    return news
            if entry is None:
                continue
            news = True
            board.counts.wal_bytes += sum(file.size for file in entry.files)
            entry = self._deliver(entry, self._clear_at)
            with gate().first:
                self._settle(entry)
                if self._is_done(question, looked_at):
                    return news
        return news

    def _is_done(self, question: int, looked_at: float) -> bool:
        """Answer at the end of the WAL, and checkpoint where that is due. False when there is more to encode."""
        board, engine = self._board, self._engine
        if engine.at_end:
            self._clear_at = looked_at
            board.answer(question, engine.txid)
        if engine.is_behind or engine.has_tail:
            return False
        if engine.checkpoint_due() and not self._is_full():  # it may take the end of the WAL with it, which is staged then
            self._checkpoint()
        return engine.at_end and not engine.has_tail

    def _settle_pin(self) -> None:
        """Let others copy again, before the upload: until then an application that checkpoints by itself tries in vain after each commit, and sorts the WAL for it.

        What fails is tried again at the next look. It must not keep the entry that was just made from its replicas.
        """
        try:
            self._engine.settle_pin()
        except TEMPORARY as error:
            self._board.report(error)

    def _checkpoint(self) -> None:
        counts, began = self._board.counts, time.monotonic()
        counts.checkpoint_tries += 1
        if self._engine.checkpoint():
            self._restart_looks = RESTART_LOOKS
        else:
            counts.checkpoint_failures += 1
        counts.checkpoint_s += time.monotonic() - began

    def _wait_for_room(self) -> None:
        """While no replica takes anything and the staging folder is full, the WAL is the queue.

        Not while there is no state to take an image of: a replica that lacks files, and would make room, waits for that image.
        """
        board = self._board
        while self._engine.can_snapshot and self._is_full():
            board.report(StorageUnavailable(f"no replica reachable and the staging folder is full: {board.path}"))
            with board.changed:
                board.engine.wait_for(lambda: board.ends or not board.has_unstored(), STAGE_AFTER_S)
            self._raise_if_ended()

    def _is_full(self) -> bool:
        return self._board.has_unstored() and self._engine.staging_is_full()

    def _deliver(self, entry: Entry, since: float) -> Entry:
        """Hand an entry to the replicas; returns it when one has it, or its staged form. The page table must know it next: `_settle`.

        From here on the entry may be stored at any moment. So it is never given up: what fails is tried again with this very entry.
        """
        board, engine, txid = self._board, self._engine, entry.txid
        board.put(entry, since)
        while not entry.is_staged:
            with board.changed:
                board.engine.wait_for(lambda: board.is_stored(txid) or board.ends, STAGE_AFTER_S)
                if board.is_stored(txid):
                    break
            self._raise_if_ended()
            try:
                staged = engine.stage(entry)
            except OSError as error:
                board.report(error)
                continue
            if staged is None:
                board.report(StorageUnavailable(f"no replica reachable and the staging folder is full: {board.path}"))
                continue
            if not board.exchange(entry, staged):
                engine.forget(staged)  # every replica has it by now
            entry = staged
        return entry

    def _settle(self, entry: Entry) -> None:
        self._unsettled = entry
        self._engine.settled(entry)
        self._unsettled = None

    def _raise_if_ended(self) -> None:
        if self._board.fatal is not None:
            raise self._board.fatal
        if self._board.stop:
            raise DatabaseStateError("stopped before the last changes were stored")
