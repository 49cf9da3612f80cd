"""The history of all replicas of a process: one thread that sleeps until something is due, and a few jobs at once that do it.

A keeper (`keeper.py`) has something to do a few times in an hour, and those of all databases have it at the same boundaries. So they have no threads of
their own. `Keeping` knows when its keeper is due; it is visited then, and when something has come that may be due for merging before everything
else. A visit that hangs, because its store does not answer, holds up nobody: see `pool.py`.

Who tells that something has come holds the lock of a board, and takes that of `Upkeep` then; never the other way round.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

from replicator.board import Board
from replicator.gate import gate
from replicator.keeper import Keeper
from replicator.levels import History, next_boundary
from replicator.pool import Pool
from replicator.replica import Replica

__all__ = ["Keeping", "Upkeep", "upkeep"]

AT_ONCE, AT_ONCE_REMOTE = 2, 16
"""Visits side by side. Those of a directory are work for this machine; those of a store mostly wait for it."""
NO_THREAD_RETRY_S, DISMISS_S = 1.0, 1.0
SPARE = 64

log = logging.getLogger(__name__)


class Keeping:
    """Run one replica's keeper when something is due. `start` once; `join` at the end, when the board says so."""

    def __init__(self, make: Callable[[], Keeper], replica: Replica, history: History, board: Board, upkeep: Upkeep) -> None:
        """`make`: called once the engine is open and the replica was reached."""
        self._make, self._replica, self._board, self._upkeep = make, replica, board, upkeep
        self._interval_s = history.level_intervals_s[0]
        self._keeper: Keeper | None = None
        self._seen: object = None
        self._done_for: object = None
        self._due: float | None = None
        self._is_broken = False

    @property
    def name(self) -> str:
        """As a thread has one."""
        return f"history of {self._replica.url}"

    @property
    def is_up_to_date(self) -> bool:
        """Whether nothing is due of what the replica holds. What failed is due later, and among the keeper's `problems`."""
        return self._keeper is not None and self._done_for == self._keeper.progress

    @property
    def rests_until(self) -> float | None:
        """Until when nothing is due, at least, in seconds since 1970; None while something is, or before that is known.

        A file that has come since may make something due, but no sooner than what is due already; see `_is_early`.
        """
        keeper, done_for, due = self._keeper, self._done_for, self._due
        if keeper is None or done_for is None or (due is None and done_for != keeper.progress):
            return None
        return math.inf if due is None else due

    def start(self) -> None:
        """Begin. Raises `OSError`: the system has no more threads."""
        self._board.changed.told.append(self._tell)
        self._upkeep.add(self)

    def join(self, timeout_s: float | None = None) -> None:
        """Visit it no more, and wait for a visit that is under way."""
        told = self._board.changed.told
        if self._tell in told:
            told.remove(self._tell)  # else memory would wait for the garbage collector
        self._upkeep.remove(self, timeout_s)

    def is_alive(self) -> bool:
        """True while it may be visited, or is."""
        return self._upkeep.has(self)

    def visit(self) -> float | None:
        """Do one thing that is due; returns when to come again, in seconds since 1970, None for not before something has come."""
        try:
            return self._visit()
        except Exception as error:
            # Without its keeper a replica grows, but it stays right: replication goes on.
            log.error("the history is not kept any more, by a defect replica=%s", self._replica.url, exc_info=error)
            self._is_broken = True
            if self._keeper is not None:
                self._keeper.problems["keeper"] = f"internal error: {error!r}"
            return None

    def _visit(self) -> float | None:
        board, keeper = self._board, self._keeper
        if board.ends or self._is_broken:
            return None
        if keeper is None:
            if not self._can_begin():
                return None
            keeper = self._keeper = self._make()
        # A directory is work for this machine, and that of a thousand databases is due at the same time.
        with gate().first if self._replica.client.kind == "file" else nullcontext():
            seen, due = keeper.progress, keeper.due()
            if due is not None and due <= time.time():
                self._done_for = None
                keeper.step()
                return 0.0
        with board.changed:
            self._seen = self._done_for = seen
            self._due = due
            board.changed.notify_others()  # calls `_tell`, too: a file may have come since it looked
            return due

    def _can_begin(self) -> bool:
        return self._board.state != "starting" and self._replica.online  # the scratch folder is there once the engine is open

    def _is_early(self) -> bool:
        """Whether a file has come that may be due for merging before everything else. With the board's lock held."""
        keeper, due = self._keeper, self._due
        if keeper is None or self._is_broken:
            return keeper is None and self._can_begin()
        if keeper.progress == self._seen:
            return False
        return self._board.history_is_asked or due is None or due > next_boundary(time.time(), self._interval_s)

    def _tell(self) -> None:
        if not self._board.ends and self._is_early():
            self._upkeep.visit_soon(self)


class Upkeep:
    """Visits each `Keeping` when it is due. May be used from any thread."""

    def __init__(self, *, at_once: int = AT_ONCE) -> None:
        self._changed = threading.Condition()
        self._known: dict[Keeping, float] = {}
        """When to come, on the monotonic clock."""
        self._heap: list[tuple[float, int, Keeping]] = []
        self._ready: dict[Keeping, None] = {}
        self._working: dict[Keeping, bool] = {}
        """Those that are visited now, and whether to come again at once."""
        self._order = itertools.count()
        self._pool = Pool("pyrepl history", at_once=at_once)
        self._thread: threading.Thread | None = None

    def add(self, keeping: Keeping) -> None:
        """Visit it now, and whenever it is due. Raises `OSError`: the system has no more threads."""
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="pyrepl upkeep", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise OSError(f"cannot start a thread: {error}") from error
                self._thread = thread
            self._known[keeping] = 0.0
            self._ready[keeping] = None
            self._changed.notify_all()

    def has(self, keeping: Keeping) -> bool:
        """Whether it is visited now, or will be."""
        with self._changed:
            return keeping in self._known or keeping in self._working

    def remove(self, keeping: Keeping, timeout_s: float | None) -> None:
        """Visit it no more; returns when no visit is under way, or the time is over. With the last one the threads end."""
        with self._changed:
            self._known.pop(keeping, None)
            self._ready.pop(keeping, None)
            self._sweep()
            self._changed.notify_all()
            self._changed.wait_for(lambda: keeping not in self._working, timeout_s)
            thread = self._thread
            is_last = not self._known and not self._working
            if is_last and thread is not None:
                self._changed.wait_for(lambda: self._thread is not thread or self._known, DISMISS_S)
                is_last = self._thread is None
        if is_last:
            if thread is not None:
                thread.join(DISMISS_S)
            self._pool.dismiss(DISMISS_S)

    def visit_soon(self, keeping: Keeping) -> None:
        """Something has come."""
        with self._changed:
            if keeping in self._working:
                self._working[keeping] = True
            elif keeping in self._known and keeping not in self._ready:
                self._ready[keeping] = None
                self._changed.notify_all()

    def _run(self) -> None:
        with self._changed:
            while self._known:
                now = time.monotonic()
                while self._heap and self._heap[0][0] <= now:
                    due, _, keeping = heapq.heappop(self._heap)
                    if self._known.get(keeping) == due:
                        self._ready[keeping] = None
                room, wait_s = self._pool.room(), math.inf
                while self._ready and room > 0:
                    keeping = next(iter(self._ready))
                    del self._ready[keeping]
                    self._known[keeping], self._working[keeping] = math.inf, False
                    room -= 1
                    try:
                        self._pool.submit(lambda keeping=keeping: self._visit(keeping))  # type: ignore[misc]
                    except RuntimeError as error:
                        log.warning("history has to wait, no thread can be started error=%s", error)
                        del self._working[keeping]
                        self._schedule(keeping, now + NO_THREAD_RETRY_S)
                        break
                if self._ready:
                    wait_s = self._pool.recheck_s()
                if self._heap:
                    wait_s = min(wait_s, max(0.0, self._heap[0][0] - time.monotonic()))
                self._changed.wait(None if wait_s == math.inf else wait_s)
            self._thread = None
            self._heap.clear()
            self._changed.notify_all()

    def _schedule(self, keeping: Keeping, due: float) -> None:
        if keeping in self._known:
            self._known[keeping] = due
            heapq.heappush(self._heap, (due, next(self._order), keeping))
            self._sweep()

    def _sweep(self) -> None:
        """Forget due times that do not count any more: they may lie far ahead, and hold on to what is closed."""
        if len(self._heap) > 2 * len(self._known) + SPARE:
            self._heap = [item for item in self._heap if self._known.get(item[2]) == item[0]]
            heapq.heapify(self._heap)

    def _visit(self, keeping: Keeping) -> None:
        due: float | None = None
        try:
            due = keeping.visit()
        finally:
            with self._changed:
                again = self._working.pop(keeping, False)
                if again:
                    self._schedule(keeping, 0.0)
                elif due is not None:
                    self._schedule(keeping, time.monotonic() + max(0.0, due - time.time()))
                self._changed.notify_all()


_shared: dict[bool, Upkeep] = {}
_shared_lock = threading.Lock()


def upkeep(*, remote: bool) -> Upkeep:
    """Return the one of this process for its directories, or for its stores elsewhere."""
    with _shared_lock:
        if remote not in _shared:
            _shared[remote] = Upkeep(at_once=AT_ONCE_REMOTE if remote else AT_ONCE)
        return _shared[remote]


def _in_child() -> None:
    global _shared_lock
    _shared.clear()  # their threads are the parent's
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_in_child)
