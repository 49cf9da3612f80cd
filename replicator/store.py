"""The databases of one process: each is a `Member` (`member.py`), and none can hold up another.

One thread keeps a heap of what is due, and gives it to a pool (`pool.py`) with eight jobs at once. A job that takes long, because a store does not
answer, does not count any more after two seconds, so that it delays nobody. All threads are daemon threads: one that hangs does not keep
the process from ending.

What a parked database costs is a watch, and three `stat` calls in `SWEEP_S`: in case an event is lost. Where there are no events to be had it is looked at
as often as `POLLS_PER_S` allows. When more databases are written to than may be open, they take turns: those that wait stand in a queue, and
are not tried again before there is a place, or time for another look at who could leave.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from replicator import memory
from replicator.errors import DatabaseStateError, WaitTimeout
from replicator.member import BUSY_RETRY_S, FAILURES, Limits, Member, Prepared, State, key_of
from replicator.pool import Pool

__all__ = ["FAILURES", "Limits", "Member", "Prepared", "State", "Store", "at_once", "stop_all"]

AT_ONCE = 8
GRACE_S = 5.0
SWEEP_S = 60.0
POLL_S = 1.0
POLLS_PER_S = 2000
SLICE_S, LONG_SLICE_S = 0.5, 2.0
ASK_AGAIN_S = 0.5
TRIM_FROM = 100
TRIM_EVERY_S = 30.0

log = logging.getLogger(__name__)


class Store:
    """The members, and the thread that looks after them. `start` once, `close` at the end."""

    def __init__(
        self,
        members: Iterable[Member] = (),
        *,
        retry: bool = True,
        on_change: Callable[[], None] = lambda: None,
        limits: Limits = Limits(),  # noqa: B008  frozen
    ) -> None:
        """
        Args:
            retry: False: each is tried once.
            on_change: called, by any thread, when a member was tried.
        """
        self._members: dict[str, Member] = {}
        self._retry = retry
        self._on_change = on_change
        self._limits = limits
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Member]] = []
        self._ready: dict[Member, None] = {}
        self._order = itertools.count()
        self._untried = 0
        self._pool = Pool("pyrepl store", at_once=AT_ONCE)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._opened: set[Member] = set()
        self._opening = 0
        self._waiting: dict[Member, None] = {}
        self._asked: dict[Member, float] = {}  # to leave, and when; those that did not want to stay in it for a while
        self._leaving: set[Member] = set()  # asked, and not visited since
        self._make_room_at = math.inf
        self._trim_at = 0.0
        self._sweeping: Iterator[Member] = iter(())
        self._slice, self._slice_s = 1, SLICE_S
        self._is_sweeping = False
        for member in members:
            self._take(member)

    def _take(self, member: Member) -> bool:
        key = member.key
        if key in self._members:
            return False
        self._members[key] = member
        member.limits, member.touched = self._limits, self._touched
        self._untried += not member.was_tried
        return True

    # -- asking ------------------------------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """Return all of them, in the order in which they came."""
        with self._changed:
            return list(self._members.values())

    def get(self, path: Path) -> Member | None:
        """Return the member with a database, under whatever name."""
        with self._changed:
            return self._members.get(key_of(path))

    @property
    def is_over(self) -> bool:
        """Whether nothing can come of any member any more: each has failed for good."""
        return all(
            member.state == "failed" or (not self._retry and member.was_tried and member.state == "waiting") for member in self.members()
        )

    @property
    def is_started(self) -> bool:
        """Whether what there is at the start is known, directories included."""
        return self._thread is not None

    @property
    def is_closing(self) -> bool:
        return self._closing

    # -- life --------------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to start members, in the background."""
        with self._changed:
            for member in self._members.values():
                self._schedule(member, 0.0)
        self._thread = threading.Thread(target=self._run, name="pyrepl store", daemon=True)
        self._thread.start()

    def wait_until_tried(self, timeout_s: float | None = None) -> bool:
        """Return once each member was tried; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._untried or self._closing, timeout_s)

    def _schedule(self, member: Member, due: float) -> None:
        member.due = due
        if due < math.inf and self._members.get(member.key) is member:
            heapq.heappush(self._heap, (due, next(self._order), member))
            if self._heap[0][2] is member:
                self._changed.notify_all()

    def _touched(self, member: Member) -> None:
        with self._changed:
            if member in self._waiting:
                if not member.is_hot:
                    return
                del self._waiting[member]  # somebody who asks has opened it
            if not member.working and member not in self._ready and member.due > time.monotonic():
                self._schedule(member, 0.0)

    def look_at(self, path: Path) -> None:
        """Look at a member's database soon, because something happened to its files."""
        with self._changed:
            member = self._members.get(key_of(path))
            if member is not None and member.state == "waiting" and not member.working and member.retry_at < math.inf:
                member.retry_at = 0.0
                self._schedule(member, 0.0)

    def _run(self) -> None:
        next_sweep = time.monotonic() + SLICE_S
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                while self._heap and self._heap[0][0] <= now:
                    due, _, member = heapq.heappop(self._heap)
                    if due == member.due and not member.working and self._members.get(member.key) is member:
                        self._ready[member] = None
                if now >= self._make_room_at:
                    self._make_room()
                room = self._pool.room()
                while self._ready and room > 0:
                    member = next(iter(self._ready))
                    del self._ready[member]
                    member.working = True
                    self._pool.submit(lambda member=member: self._work(member))  # type: ignore[misc]
                    room -= 1
                if now >= next_sweep:
                    next_sweep = now + self._slice_s
                    if not self._is_sweeping and self._limits.park_after_s is not None:
                        self._is_sweeping = True
                        self._pool.submit(self._sweep)
                due = min(next_sweep, self._make_room_at, self._heap[0][0] if self._heap else math.inf)
                if self._ready:
                    due = min(due, now + self._pool.recheck_s())
                self._changed.wait(None if due == math.inf else max(0.0, due - time.monotonic()))

    def _work(self, member: Member) -> None:
        was_tried, due = member.was_tried, math.inf
        reserved, refused = 0, False

        def may_open() -> bool:
            nonlocal reserved, refused
            found = self._reserve()
            reserved, refused = reserved + found, not found
            return found

        try:
            if member.is_parked or member.is_hot:
                due = member.visit(must_leave=self._must_leave(member), may_open=may_open)
            elif member.state == "waiting" and (self._retry or not member.was_tried) and may_open():
                member.start()
                due = member.next_due() if self._retry or member.is_hot or member.is_parked else math.inf
        except Exception as error:
            log.error("cannot replicate, by a defect db=%s", member.path, exc_info=error)
            member.error, member.retry_at, member.was_tried = error, math.inf, True
        finally:
            with self._changed:
                member.working = False
                self._opening -= reserved
                left = member in self._opened and not member.is_hot
                self._note_whether_open(member)
                self._leaving.discard(member)
                if refused:
                    self._wait_for_room(member)
                else:
                    self._schedule(member, 0.0 if member.is_parked and member.poked and due > time.monotonic() + BUSY_RETRY_S else due)
                if (left or reserved) and self._waiting:
                    self._make_room()
                self._untried -= member.was_tried and not was_tried
                self._changed.notify_all()
        if not member.is_parked:
            self._on_change()

    # -- the number of open databases; all with the lock held ----------------------------------------------------------------------

    def _note_whether_open(self, member: Member) -> None:
        if member.is_hot:
            self._opened.add(member)
        else:
            self._opened.discard(member)

    def _places(self) -> int:
        """Return how many databases more may be open."""
        free = self._limits.hot - len(self._opened) - self._opening
        if free <= 0:  # one that was stopped by others has left a place
            self._opened = {member for member in self._opened if member.is_hot}
            free = self._limits.hot - len(self._opened) - self._opening
        return free

    def _reserve(self) -> bool:
        """Take the place of one more open database."""
        with self._changed:
            if self._places() <= 0:
                return False
            self._opening += 1
            return True

    def _must_leave(self, member: Member) -> bool:
        with self._changed:
            return bool(self._waiting) and member.is_hot and self._places() <= 0

    def _wait_for_room(self, member: Member) -> None:
        if self._members.get(member.key) is member:
            member.due = math.inf
            self._waiting[member] = None
            if self._make_room_at == math.inf:
                self._make_room_at = 0.0

    def _make_room(self) -> None:
        """Let those who wait have the places that are free, and ask others to leave, as many as the pool can close in a while."""
        free = self._places() - len(self._ready)
        for member in list(itertools.islice(self._waiting, max(0, free))):
            del self._waiting[member]
            self._ready[member] = None
        if not self._waiting:
            self._make_room_at = math.inf
            return
        now = time.monotonic()
        wanted = min(2 * AT_ONCE, len(self._waiting)) - len(self._leaving)
        if now < self._make_room_at and len(self._leaving) > AT_ONCE // 2:
            return  # looking at all that are open costs something
        self._make_room_at = now + BUSY_RETRY_S
        self._asked = {member: when for member, when in self._asked.items() if member.is_hot and when > now - ASK_AGAIN_S}
        others = (member for member in self._opened if member.is_hot and not member.working and member not in self._asked)
        for member in heapq.nsmallest(max(0, wanted), others, key=lambda member: member.rank):
            self._asked[member] = now
            self._leaving.add(member)
            self._schedule(member, 0.0)

    # -- the safety net ----------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Look at some of the parked databases from outside.

        Those whose changes file events tell of are looked at once in `SWEEP_S`, in case an event is lost without a word; where there are no
        events, at the pace that `POLLS_PER_S` allows.
        """
        try:
            members = list(itertools.islice(self._sweeping, self._slice))
            if not members:
                self._begin_sweep()
            for member in members:
                if member.is_parked and not member.working and not member.is_quiet():
                    member.poked = True
                    self._touched(member)
        finally:
            self._is_sweeping = False

    def _begin_sweep(self) -> None:
        self._give_memory_back()
        members = self.members()
        polled = sum(member.is_parked and not member.is_watched for member in members)
        period = max(POLL_S, polled / POLLS_PER_S) if polled else SWEEP_S
        self._slice_s = SLICE_S if polled else LONG_SLICE_S
        self._sweeping, self._slice = iter(members), max(1, math.ceil(len(members) * self._slice_s / period))

    def _give_memory_back(self) -> None:
        """Once in a while: after many were open, and after somebody asked for the metrics of all, much of it is free."""
        now = time.monotonic()
        if len(self._members) >= TRIM_FROM and now >= self._trim_at:
            self._trim_at = now + TRIM_EVERY_S
            memory.trim()

    # -- changing what there is --------------------------------------------------------------------------------------------------

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
            if not self._take(member):
                return False
            member.working = True
        try:
            member.start()
        finally:
            with self._changed:
                member.working = False
                self._note_whether_open(member)
                self._untried -= member.was_tried
                self._schedule(member, member.next_due())
                self._changed.notify_all()
        return True

    def add_all(self, members: Iterable[Member]) -> list[Member]:
        """Take members that are started in the background; returns those whose database was not there yet."""
        with self._changed:
            taken = [member for member in members if not self._closing and self._take(member)]
            for member in taken:
                self._schedule(member, 0.0)
            self._changed.notify_all()
        return taken

    def remove(self, path: Path, timeout_s: float) -> Member | None:
        """Stop the member with a database and forget it; None when there is none.

        Raises:
            ReplicatorError, OSError: not everything was stored. It is forgotten all the same.
        """
        member = self.forget(path)
        if member is not None:
            member.stop(timeout_s)
        return member

    def forget(self, path: Path) -> Member | None:
        """Forget the member with a database; None when there is none. The caller stops it."""
        with self._changed:
            return self._pop(key_of(path))

    def _pop(self, key: str) -> Member | None:
        member = self._members.pop(key, None)
        if member is not None:
            self._untried -= not member.was_tried
            self._ready.pop(member, None)
            self._waiting.pop(member, None)
            self._leaving.discard(member)
            self._opened.discard(member)
            self._changed.notify_all()
        return member

    def exchange(self, gone: Sequence[Member], new: Sequence[Member], timeout_s: float) -> None:
        """Stop some members, then begin others. Errors are logged."""
        with self._changed:
            for member in gone:
                self._pop(member.key)
        stop_all(gone, timeout_s)
        self.add_all(new)

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
    queue, done, changed = deque(members), set[Member](), threading.Condition()

    def work() -> None:
        while True:
            with changed:
                if not queue:
                    return
                member = queue.popleft()
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
