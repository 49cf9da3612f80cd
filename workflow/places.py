"""Where the runs of an engine are, and who gets the next place in memory.

    queue      rows of the index, `queued`; any number, none of them in memory
    ready      a heap of ids that can go on: new, woken, found interrupted at the start
    active     in memory, a file open, at most `concurrency`
    parked     one timer, or nothing but a name; the file is closed

The parts of an engine are built on each other: `places.py`, `running.py` (one run), `forks.py`, `requests.py`, `engine.py` (life, and what users call).
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import heapq
import logging
import sqlite3
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workflow import intake as ik
from workflow.clock import Clock, Timer, Timers
from workflow.context import Flow, flows
from workflow.errors import NotOwner
from workflow.intake import Indexed, Intake, Request
from workflow.lanes import Lanes
from workflow.objects import Objects, Reader
from workflow.recording import Idle, Services
from workflow.state import RunStatus
from workflow.values import iso
from workflow.worker import Execution

if TYPE_CHECKING:
    from workflow.durability import Replication
    from workflow.remote import BucketDesk

__all__ = ["Active", "ParkedRun", "Places"]

log = logging.getLogger(__name__)
T = TypeVar("T")


class Active:
    """A run that is in memory, or about to be."""

    __slots__ = ("ended", "execution", "flow", "is_leaving", "is_missed", "is_open", "parent", "task")

    def __init__(self, flow: str) -> None:
        self.flow = flow
        self.execution: Execution | None = None
        self.parent: str | None = None
        self.task: asyncio.Task[None] | None = None
        self.ended: RunStatus | None = None
        """Its final state, before the index has it."""
        self.is_open = False
        """It has taken in what waited for it in the intake."""
        self.is_leaving = False
        self.is_missed = False
        """Something came when it was too late to take it in: go on at once."""


class ParkedRun:
    """A run that waits."""

    __slots__ = ("flow", "is_paused", "timer")

    def __init__(self, flow: str, timer: Timer | None, is_paused: bool) -> None:
        self.flow = flow
        self.timer = timer
        self.is_paused = is_paused


class Places:
    """The places, and what all parts of an engine share; `Engine` fills in the rest when it begins."""

    folder: Path
    sender: str
    reader: Reader
    timers: Timers
    _concurrency: int
    _park_after_s: float
    _only: str | None
    _clock: Clock
    _objects: Objects
    _host: str
    _loop: asyncio.AbstractEventLoop
    _context: contextvars.Context
    _intake: Intake
    _lanes: Lanes
    _services: Services
    _template: bytes
    _max_crashes: int
    _synchronous: str
    _faults: Callable[[str, str], None] | None

    def __init__(self) -> None:
        self._lost: NotOwner | None = None
        self._remote: BucketDesk | None = None
        self._replication: Replication | None = None
        self._winners: dict[str, tuple[str, str]] = {}
        self._active: dict[str, Active] = {}
        self._parked: dict[str, ParkedRun] = {}
        self._ready: list[tuple[int, int, str, str]] = []
        self._ready_ids: set[str] = set()
        self._queued: dict[str, bool] = {}
        self._starts: dict[str, deque[float]] = {}
        self._waiters: dict[str, list[asyncio.Future[tuple[str, str | None, str | None]]]] = {}
        self._broken: dict[str, int] = {}
        self._arrival = 0
        self._count = 0
        self._reserved: Counter[str] = Counter()
        """Places that are as good as taken, by flow."""
        self._pending = 0
        self._claiming = False
        self._forking = asyncio.Lock()
        self._is_open = self._is_closing = False
        self._helpers: set[asyncio.Task[Any]] = set()

    async def _live(self, id: str, active: Active, start: Request | None) -> None:
        """Run a run (see `running.py`)."""
        raise NotImplementedError

    async def _dispatch(self, request: Request) -> None:
        """Take a request to where it belongs (see `requests.py`)."""
        raise NotImplementedError

    async def _apply(self, id: str, active: Active, request: Request) -> None:
        """Let a run in memory record a request (see `requests.py`)."""
        raise NotImplementedError

    async def _put(self, request: Request) -> None:
        """Accept a request of a run's (see `requests.py`)."""
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._lost is not None:
            raise self._lost
        if not self._is_open or self._is_closing:
            raise RuntimeError("the engine is not running")

    # -- tasks ---------------------------------------------------------------------------------------------------------------------

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Make a task of the engine's own: callers may be in the middle of a flow, whose tasks are numbered and end with it."""
        return self._context.copy().run(self._loop.create_task, work)

    def _help(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helped)

    def _helped(self, task: asyncio.Task[Any]) -> None:
        self._helpers.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._is_closing:
            log.error("internal task failed error=%r", str(error), exc_info=error)

    # -- places --------------------------------------------------------------------------------------------------------------------

    def _has_place(self, flow: Flow[..., Any] | None) -> bool:
        if self._taken() >= self._concurrency:
            return False
        if flow is None or flow.concurrency is None:
            return True
        return sum(active.flow == flow.name for active in self._active.values()) + self._reserved[flow.name] < flow.concurrency

    def _taken(self) -> int:
        return len(self._active) + self._reserved.total()

    def _take_rate(self, flow: Flow[..., Any]) -> bool:
        """Count a start against the flow's rate; False when there is none left now."""
        if flow.rate is None:
            return True
        recent, now = self._starts.setdefault(flow.name, deque()), self._clock.monotonic()
        while recent and recent[0] <= now - flow.rate.per_s:
            recent.popleft()
        if len(recent) >= flow.rate.count:
            self.timers.at(recent[0] + flow.rate.per_s, self._fill)
            return False
        recent.append(now)
        return True

    def _is_wanted(self, id: str) -> bool:
        return self._only is None or id == self._only or id.startswith(f"{self._only}.")

    def _make_ready(self, id: str, flow: str) -> None:
        if not self._is_wanted(id) or id in self._ready_ids or id in self._active:
            return
        known = flows.get(flow)
        self._ready_ids.add(id)
        self._count += 1
        heapq.heappush(self._ready, (-(known.priority if known else 0), self._count, id, flow))

    def _wake(self, id: str) -> None:
        parked = self._parked.pop(id, None)
        if parked is None:
            return
        if parked.timer is not None:
            parked.timer.cancel()
        self._make_ready(id, parked.flow)
        self._fill()

    def _park(self, id: str, flow: str, due: float | None, is_paused: bool) -> None:
        timer = self.timers.at(due, functools.partial(self._wake, id)) if due is not None else None
        self._parked[id] = ParkedRun(flow, timer, is_paused)

    def _fill(self) -> None:
        """Take up what is ready, then what is queued, as far as there are places."""
        if self._is_closing or self._lost is not None:
            return
        held = []
        while self._ready and self._taken() < self._concurrency:
            item = heapq.heappop(self._ready)
            _, _, id, name = item
            if not self._has_place(flows.get(name)):
                held.append(item)
                continue
            self._ready_ids.discard(id)
            self._activate(id, name, None)
        for item in held:
            heapq.heappush(self._ready, item)
        if self._ready or any(self._queued.values()):
            for active in list(self._active.values()):
                if active.execution is not None and active.execution.is_idle and len(self._active) >= self._concurrency:
                    active.execution.park()
        if any(self._queued.values()) and not self._claiming:
            self._claiming = True
            self._help(self._claim())

    async def _claim(self) -> None:
        try:
            for name in [name for name, there in self._queued.items() if there]:
                flow = flows.get(name)
                if flow is None:
                    self._queued[name] = False
                    log.warning("runs of an unknown flow are queued flow=%s", name)
                    continue
                wanted = 0
                while self._has_place(flow) and wanted < 200 and self._take_rate(flow):
                    wanted += 1
                    self._reserved[name] += 1
                if not wanted:
                    continue
                found: list[tuple[Indexed, Request]] = []
                try:
                    found = await self._intake.do(functools.partial(_claimed, flow=name, limit=wanted))
                finally:
                    self._reserved[name] -= wanted
                if len(found) < wanted:
                    self._queued[name] = False
                for run, request in found:
                    self._activate(run.id, run.flow, request)
        finally:
            self._claiming = False

    def _on_idle(self, execution: Idle) -> None:
        if self._ready or any(self._queued.values()):
            self._loop.call_soon(execution.park)
        else:
            self._loop.call_later(self._park_after_s, self._park_if_still, execution, execution.idle_count)

    def _park_if_still(self, execution: Idle, count: int) -> None:
        if execution.is_idle and execution.idle_count == count:
            execution.park()

    @property
    def parked(self) -> int:
        """How many runs wait outside memory."""
        return len(self._parked)

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing happens before the next timer or request."""
        idle = all(active.execution is not None and active.execution.is_idle for active in self._active.values())
        return idle and not self._pending and not self._ready and not self._claiming and not self._helpers and not self._reserved.total()

    def _activate(self, id: str, flow: str, start: Request | None) -> None:
        active = self._active[id] = Active(flow)
        active.task = self._task(self._live(id, active, start))

    # -- files and the index -------------------------------------------------------------------------------------------------------

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.db"

    async def _local(self, id: str) -> Path:
        """Return the path of a run's file, which is here or comes from the replica."""
        path = self._path(id)
        if self._replication is not None and not path.exists():
            await asyncio.to_thread(self._replication.restore_missing, id)
        return path

    async def _known(self, id: str) -> Indexed | None:
        """Return a run of this host."""
        active = self._active.get(id)
        ended = active.ended if active is not None else None  # before asking: when it is gone, the index has its end
        found = await self._intake.do(functools.partial(ik.one, id=id))
        return replace(found, status=ended) if found is not None and ended is not None else found

    # -- time ----------------------------------------------------------------------------------------------------------------------

    def _now(self) -> str:
        return self._clock.stamp()

    def _arrive(self) -> None:
        """Take the next place in the queue: by time, so that it need not be looked for after a restart."""
        self._arrival = max(self._arrival + 1, self._now_ms() * 1000)

    def _wall(self, due: float | None) -> str | None:
        """Return a monotonic time as the wall clock will have it."""
        return None if due is None else iso(self._clock.now() + timedelta(seconds=due - self._clock.monotonic()))

    def _due(self, wake_at: str | None) -> float | None:
        """Return a wall clock time as the monotonic clock will have it."""
        if wake_at is None:
            return None
        return self._clock.monotonic() + max(0.0, (datetime.fromisoformat(wake_at) - self._clock.now()).total_seconds())

    def _now_ms(self) -> int:
        return int(self._clock.now().timestamp() * 1000)


def _claimed(db: sqlite3.Connection, flow: str, limit: int) -> list[tuple[Indexed, Request]]:
    found = []
    for run in ik.claim(db, flow, limit):
        starts = [request for request in ik.requests_of(db, run.id) if request.kind == "start"]
        found.append((run, starts[0]))
    return found
