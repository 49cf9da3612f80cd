"""The base of a run in memory: what it holds, how records become durable, and how it leaves.

A record that becomes final takes a number in the order of finishing and a slot in the queue; one transaction is given to the lane, and the slot is ready
when that is on the disk, and where asked for, on the replica. `worker.py` says when slots are delivered, `calls.py` what is recorded.

**Leaving memory** (parking, pausing, stopping, a disk error) is one mechanism: `_unwind` makes every wait of the flow, and every call from then on,
raise `Parked`; what the flow makes of it does not count.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Literal, Protocol, TypeVar

from workflow import journal as jr
from workflow.clock import Clock, Timer, Timers
from workflow.context import Call, Flow, Scope
from workflow.errors import (
    Cancelled,
    Diverged,
    Parked,
)
from workflow.journal import Journal, Loaded, Write
from workflow.lanes import Lane, Pool, Then, settle
from workflow.objects import INLINE_BYTES, ROW_BYTES, Objects, Reader
from workflow.state import Record, StepStatus, idempotency_key
from workflow.tracing import Stay, Tracing
from workflow.values import Artifact, ObjectReader, digest, encode

__all__ = [
    "BY_CANCEL",
    "BY_TASK",
    "Entry",
    "FlowTask",
    "Idle",
    "Outside",
    "Recording",
    "Services",
    "Slot",
    "error_text",
    "failure_text",
    "go_on",
    "is_small",
]

log = logging.getLogger(__name__)
T = TypeVar("T")

UNWIND_S = 1.0
"""So long may a flow take to leave memory before what it waits for beside its steps is cancelled."""


class Outside(Protocol):
    """What a run asks of the engine, all of it harmless to repeat."""

    async def start_child(self, parent: str, key: str, id: str, flow: Flow[..., Any], input: str, traceparent: str | None) -> None:
        """Accept the start of a child. Raises `Conflict`."""

    async def send_event(self, id: str, run: str, type: str, payload: str, sender: str) -> None:
        """Accept an event for another run."""

    async def cancel_run(self, id: str, run: str, sender: str) -> None:
        """Accept the cancellation of another run."""


class Idle(Protocol):
    """A run that only waits, to the one who decides whether it keeps its place in memory."""

    is_idle: bool
    idle_count: int

    def park(self) -> None:
        """Leave memory, if there is still nothing to do but wait."""


@dataclass(frozen=True, slots=True)
class Services:
    """What runs share. `barrier`: returns when the replica has all that a run has committed; None without a replica."""

    clock: Clock
    timers: Timers
    random: Random
    machine: str
    bodies: Pool
    flow_threads: ThreadPoolExecutor
    objects: Objects
    reader: Reader
    outside: Outside
    barrier: Callable[[str], Awaitable[None]] | None
    check_owner: Callable[[], None]
    """Raises when this host may not run bodies (any more)."""
    on_idle: Callable[[Idle], None]
    tracing: Tracing | None = None


class FlowTask(asyncio.Task[Any]):
    """A task of a flow. It notices when a clock cancels it, because that cannot be replayed."""

    is_raced = False
    in_body = 0

    def cancel(self, msg: Any = None) -> bool:
        caller = sys._getframe(1)
        if (caller.f_globals.get("__name__"), caller.f_code.co_name) in _CLOCKS:
            self.is_raced = True
        return super().cancel(msg)


_CLOCKS = {("asyncio.timeouts", "_on_timeout"), ("asyncio.tasks", "_cancel_and_wait")}
"""Where `asyncio.timeout` and (in 3.11) `wait_for` cancel; `TaskGroup` and `gather` cancel from elsewhere."""


def go_on(future: asyncio.Future[T], value: T) -> None:
    """Answer what a task of a flow waits for, and let it run at once, rather than in the next turn of the event loop: at every step that is half of the turns.

    Call where no task runs: in a callback of the event loop.
    """
    waiting: Sequence[tuple[Callable[[Any], object], contextvars.Context]] = future._callbacks or ()  # (None where nobody waits)
    if len(waiting) != 1 or not isinstance(getattr(waiting[0][0], "__self__", None), asyncio.Task):
        future.set_result(value)
        return
    wake, context = waiting[0]
    future.remove_done_callback(wake)
    future.set_result(value)
    context.run(wake, future)


@dataclass(slots=True, eq=False)
class Entry:
    """A call that has not returned to the flow."""

    call: Call
    record: Record
    future: asyncio.Future[str] | None = None
    is_delivered: bool = False
    is_cancelled: bool = False
    """`Cancelled` is raised when it is delivered."""
    has_begun: bool = False
    waits: bool = False
    due: float | None = None
    value: Any = None
    has_value: bool = False
    cause: BaseException | None = None


@dataclass(slots=True, eq=False)
class Slot:
    """A place in the order of finishing."""

    key: str
    number: int
    is_ready: bool = False
    is_void: bool = False


class Recording:
    """What the parts of a run share."""

    def __init__(
        self, flow: Flow[..., Any], loaded: Loaded, journal: Journal, lane: Lane, services: Services, large: dict[str, str]
    ) -> None:
        """Prepare; `run` goes.

        Args:
            large: texts of recorded values that do not stand in their rows, by SHA-256.
        """
        self.flow = flow
        self.instance = loaded.instance
        self.id = loaded.instance.id
        self.reader: ObjectReader = services.reader
        self.idle_count = 0
        self.is_idle = False
        self._journal = journal
        self._lane = lane
        self._services = services
        self._now = services.clock.stamp
        self._large = large
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._outside = contextvars.copy_context()
        self._records = {record.key: record for record in loaded.records}
        self._seq = max((record.seq for record in loaded.records), default=0)
        final = sorted((record for record in loaded.records if record.is_final), key=lambda record: record.number or 0)
        self._queue = deque(Slot(record.key, record.number or 0, is_ready=True) for record in final if record.kind != "patch")
        self._number = max((record.number or 0 for record in final), default=0)
        self._newest = self._number
        self._state, self._view = loaded.state, dict[str, str]()
        self._events, self._seen = loaded.events, loaded.seen
        self._entries: dict[str, Entry] = {}
        self._starting: list[Entry] = []
        self._called: set[str] = set()
        self._gone: set[str] = set()
        self._scopes: dict[str, Scope] = {}
        self._tasks: set[FlowTask] = set()
        self._helpers: set[asyncio.Task[None]] = set()
        self._unwritten: list[Write] = []
        self._late: list[Write] = []
        """Notes on attempts, whose rows may be in the same transaction: they come last."""
        self._committing = 0
        self._running = 0
        self._resumes = loaded.instance.resumes
        self._is_pumping = self._is_dirty = False
        self._calm = 0
        self._starved: asyncio.TimerHandle | None = None
        self._unwinding: Literal["", "park", "pause", "stop", "break", "diverge", "cancel", "end"] = ""
        self._is_paused = loaded.paused
        self._is_stopping = False
        self._cancel_next = False
        self._failure: BaseException | None = None
        self._reason = ""
        self._was_touched = False
        self._root: FlowTask | None = None
        self._grace: Timer | None = None
        self._stay: Stay | None = None

    def _pump(self) -> None:
        """Deliver what is ready (see `worker.py`)."""
        raise NotImplementedError

    def perform(self, call: Call) -> Coroutine[Any, Any, Any]:
        """Do what the flow calls for (see `worker.py`)."""
        raise NotImplementedError

    def patched(self, scope: Scope, key: str) -> bool:
        """Answer `patched` (see `worker.py`)."""
        raise NotImplementedError

    # -- leaving -----------------------------------------------------------------------------------------------------------------

    _dues: Sequence[float | None] = ()

    def _unwind(self, why: Literal["park", "pause", "stop", "break", "diverge", "cancel", "end"]) -> None:
        if self._unwinding:
            return
        self._dues = [entry.due for entry in self._entries.values() if entry.waits]
        self._unwinding = why
        self.is_idle = False
        for entry in self._entries.values():
            if entry.future is not None and not entry.future.done():
                entry.future.set_exception(Parked())
        self._loop.call_later(UNWIND_S, self._cut_short)

    def _cut_short(self) -> None:
        """A flow that waits for something else than its steps would never leave."""
        if self._unwinding != "end" and self._root is not None and not self._running:
            for task in self._tasks:
                task.cancel()

    def _break(self, error: BaseException) -> None:
        if self._unwinding != "break":
            self._failure = error
            if self._unwinding:
                self._unwinding = "break"
            else:
                self._unwind("break")

    def _diverge(self, reason: str) -> Diverged:
        if not self._unwinding:
            self._reason = reason
            log.error("run diverged id=%s reason=%r", self.id, reason)
            self._unwind("diverge")
            if self._root is not None and not self.flow.is_async:
                self._schedule()
        return Diverged(self.id, reason)

    def _check(self) -> None:
        if self._unwinding:
            raise Parked

    def _check_broken(self) -> None:
        if self._unwinding == "break":
            raise Parked

    # -- tasks -------------------------------------------------------------------------------------------------------------------

    def adopt(self, coro: Coroutine[Any, Any, Any], scope: Scope, context: contextvars.Context) -> FlowTask:
        """Make a task of this run."""
        task = FlowTask(coro, loop=self._loop, context=context)
        scope.is_over = task.done
        self._scopes[scope.path] = scope
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done, context=self._outside)
        return task

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        assert isinstance(task, FlowTask)
        self._tasks.discard(task)
        if task is not self._root and not task.cancelled() and isinstance(task.exception(), (Parked, Cancelled)):
            pass  # asking for the exception keeps asyncio from logging it
        self._schedule()

    def _help(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run something of ours beside the flow."""
        task = self._outside.copy().run(self._loop.create_task, coro)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    def is_own_thread(self) -> bool:
        """Say whether this is the event loop's thread."""
        return threading.get_ident() == self._thread

    def wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Let the event loop run something for a flow that has a thread."""
        return self._outside.copy().run(asyncio.run_coroutine_threadsafe, coroutine, self._loop).result()

    def _block(self, entry: Entry) -> asyncio.Future[str]:
        """Return what the call's task waits for now."""
        self._check()
        entry.future = self._loop.create_future()
        return entry.future

    def _wake(self, entry: Entry, why: str) -> None:
        self.is_idle = False
        if entry.future is not None and not entry.future.done():
            entry.future.set_result(why)

    def _go_on(self, entry: Entry) -> None:
        """Deliver a result to the task that waits for it, which runs until it waits again. Call from the pump alone, where no task runs."""
        self.is_idle = False
        entry.is_delivered = True
        if entry.future is not None and not entry.future.done():
            go_on(entry.future, "turn")

    def _schedule(self) -> None:
        if not self._is_pumping:
            self._is_pumping = True
            self._loop.call_soon(self._pump, context=self._outside)

    # -- state -------------------------------------------------------------------------------------------------------------------

    def value(self, name: str) -> str | None:
        """Return a value of `state`, as of the last step that was delivered."""
        return self._view.get(name)

    def names(self) -> list[str]:
        """Return the names in `state`."""
        return list(self._view)

    # -- recording ---------------------------------------------------------------------------------------------------------------

    def _traceparent(self) -> str | None:
        return self._stay.traceparent if self._stay is not None else self.instance.traceparent

    def _key(self, key: str) -> str:
        return idempotency_key(self.id, self.instance.incarnation, key)

    def _reserve(self, record: Record) -> Slot:
        self._number += 1
        record.number = self._number
        slot = Slot(record.key, self._number)
        self._queue.append(slot)
        return slot

    def _ready(self, slot: Slot) -> None:
        slot.is_ready = True
        self._newest = max(self._newest, slot.number)
        self._schedule()

    def _write(self, writes: Sequence[Write], then: Then) -> None:
        """Give a transaction to the lane; `then` is called when it is on the disk, or has failed, and the pump after it."""
        if self._unwritten or self._late:
            writes = [*self._unwritten, *writes, *self._late]
            self._unwritten, self._late = [], []
        self._committing += 1
        self._lane.give(partial(self._on_written, then), self._journal.commit, writes)

    def _on_written(self, then: Then, value: None, error: BaseException | None) -> None:
        self._committing -= 1
        if error is not None:
            self._break(error)
        then(value, error)
        if not self._is_pumping:
            self._pump()

    async def _commit(self, writes: Sequence[Write], *, check: bool = True) -> None:
        """Run a transaction. Raises `Parked` when it failed: the run is broken then."""
        self._check_broken()
        future: asyncio.Future[None] = self._loop.create_future()
        self._write(writes, partial(settle, future))
        try:
            await future
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._break(error)
            raise Parked from error
        if check:
            self._check_broken()

    def _finish(
        self,
        entry: Entry,
        status: StepStatus,
        *,
        output: str | None = None,
        output_sha256: str | None = None,
        error: str | None = None,
        writes: Sequence[Write] = (),
    ) -> None:
        """Make a record final: take a number and commit. The pump delivers it when that is done, and where asked for, replicated."""
        record = entry.record
        record.status, record.output, record.output_sha256, record.error = status, output, output_sha256, error
        record.wake_at, record.finished_at = None, self._now()
        self._records[record.key] = record
        slot = self._reserve(record)
        if self._unwinding == "break":
            return
        is_replicated = record.durability == "replicated" and self._services.barrier is not None
        self._write([jr.put_step(record), *writes, *self._progress()], partial(self._on_finished, slot, is_replicated))

    def _progress(self) -> list[Write]:
        if not self._resumes:
            return []
        self._resumes = 0
        return [jr.put_resumes(0)]

    def _on_finished(self, slot: Slot, is_replicated: bool, _: None, error: BaseException | None) -> None:
        if error is not None:
            return
        if is_replicated:
            self._help(self._ready_when_replicated(slot))
        else:
            slot.is_ready = True  # the pump comes next
            self._newest = max(self._newest, slot.number)

    async def _ready_when_replicated(self, slot: Slot) -> None:
        try:
            assert self._services.barrier is not None
            await self._services.barrier(self.id)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._break(error)
            return
        self._ready(slot)

    async def _replicate(self) -> None:
        """Return when the replica has all that this run has committed. Raises `Parked` when that failed."""
        if self._services.barrier is None:
            return
        try:
            await self._services.barrier(self.id)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._break(error)
            raise Parked from error
        self._check()

    async def _keep(self, text: str, artifacts: list[Artifact], seq: int) -> tuple[str | None, str | None, list[Write]]:
        """Store what does not belong into a row; returns (output, output_sha256, writes for the row's transaction)."""
        if is_small(text, artifacts):
            return text, None, []
        writes: list[Write] = []
        for artifact in artifacts:
            data = await self._services.bodies.submit(artifact.read)
            writes += await self._store(artifact.sha256, data, artifact.media_type, seq)
        data = text.encode()
        if len(data) <= ROW_BYTES:
            return text, None, writes
        sha256 = digest(text)
        writes += await self._store(sha256, data, "application/json", seq)
        self._large[sha256] = text
        return None, sha256, writes

    async def _store(self, sha256: str, data: bytes, media_type: str, seq: int) -> list[Write]:
        inline = len(data) <= INLINE_BYTES
        if not inline:
            await self._services.bodies.submit(self._services.objects.put, self.id, sha256, data)
        row = jr.put_object(sha256, len(data), media_type, data if inline else None, self._now())
        return [row, jr.put_reference(seq, sha256)] if seq else [row]


def is_small(text: str, artifacts: list[Artifact]) -> bool:
    """Say whether there is nothing to store but the row."""
    return len(text) <= ROW_BYTES // 4 and not artifacts


BY_CANCEL = '{"by":"cancel"}'
BY_TASK = '{"by":"task"}'


def error_text(type_name: str, message: str, attempts: int) -> str:
    return encode({"type": type_name, "message": message[:10_000], "attempts": attempts}, "error")[0]


def failure_text(error: BaseException | None, attempts: int = 0) -> str:
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error_text(getattr(error, "_recorded_name", type(error).__name__), str(error), attempts)
