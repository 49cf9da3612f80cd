"""One run while it is in memory: replay what is recorded, perform what is not, record it, park when there is nothing left but waiting.

A call of the flow becomes an `_Entry`. If its record is final the entry waits for its turn; otherwise it is performed, which ends in `_finish`:
a number in the order of finishing is taken, one transaction is given to the lane, and a `_Slot` joins the queue. The **pump** takes slots
from the head of that queue, one at a time: it delivers a result, lets the flow come to rest, delivers the next. On replay the queue is simply
full from the start, and no body begins before it is empty. So the order in which a flow sees results is the recorded one, always.

**At rest** means: each task of the flow waits for something that is not done, twice in a row with one turn of the event loop between, because what
one task does for another (`gather`, `TaskGroup`) takes a turn.

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
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from random import Random
from sqlite3 import Connection
from typing import Any, Literal, Protocol

from workflow import journal as jr
from workflow.clock import Clock, Timer, Timers
from workflow.context import Attempt, Call, Flow, Scope, Step, here
from workflow.errors import (
    Cancelled,
    Diverged,
    Fatal,
    MissingObject,
    NeedsReplica,
    NotJSON,
    OutcomeUnknown,
    Parked,
    StepFailed,
)
from workflow.journal import Event, Journal, Loaded, Write
from workflow.lanes import Lane
from workflow.objects import INLINE_BYTES, ROW_BYTES, Objects, Reader
from workflow.state import Record, RunStatus, StepStatus, after_failure, child_id, idempotency_key, remaining_wait_s, replay
from workflow.values import Artifact, ObjectReader, decode, digest, encode, iso, loads

__all__ = ["Ending", "Execution", "Outside", "Services"]

log = logging.getLogger(__name__)

CANCEL = "cancel#1"
"""Key of the record that says where a run was cancelled; `cancel` is not a name for a step."""

LONGEST_S = 3.15e9
"""A century: longer waits are that long."""

UNWIND_S = 1.0
"""So long may a flow take to leave memory before what it waits for beside its steps is cancelled."""

STARVED_S = 2.0
"""So long may a recorded result wait for a call that does not come, while other calls wait for it."""


class Outside(Protocol):
    """What a run asks of the engine, all of it harmless to repeat."""

    async def start_child(self, parent: str, key: str, id: str, flow: Flow[..., Any], input: str) -> None:
        """Accept the start of a child. Raises `Conflict`."""

    async def send_event(self, id: str, run: str, type: str, payload: str, sender: str) -> None:
        """Accept an event for another run."""

    async def cancel_run(self, id: str, run: str, sender: str) -> None:
        """Accept the cancellation of another run."""


@dataclass(frozen=True, slots=True)
class Services:
    """What runs share. `barrier`: returns when the replica has all that a run has committed; None without a replica."""

    clock: Clock
    timers: Timers
    random: Random
    machine: str
    bodies: ThreadPoolExecutor
    flow_threads: ThreadPoolExecutor
    objects: Objects
    reader: Reader
    outside: Outside
    barrier: Callable[[str], Awaitable[None]] | None
    check_owner: Callable[[], None]
    """Raises when this host may not run bodies (any more)."""
    on_idle: Callable[[Execution], None]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run left memory.

    `kind`: ended (its status is final), parked, paused, stopped (it has work to do), broken (its file could not be written).
    `wake_due`: for parked ones, the monotonic time when the first timer is due. `was_touched`: something arrived while it was leaving.
    """

    kind: Literal["ended", "parked", "paused", "stopped", "broken"]
    status: RunStatus | Literal[""] = ""
    output: str | None = None
    error: str | None = None
    wake_due: float | None = None
    was_touched: bool = False
    failure: BaseException | None = None


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


@dataclass(slots=True, eq=False)
class _Entry:
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
class _Slot:
    """A place in the order of finishing."""

    key: str
    number: int
    is_ready: bool = False
    is_void: bool = False


class _Timeout(Exception):
    pass


class Execution:
    """A run in memory."""

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
        self._large = large
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._outside = contextvars.copy_context()
        self._records = {record.key: record for record in loaded.records}
        self._seq = max((record.seq for record in loaded.records), default=0)
        final = sorted((record for record in loaded.records if record.is_final), key=lambda record: record.number or 0)
        self._queue = deque(_Slot(record.key, record.number or 0, is_ready=True) for record in final if record.kind != "patch")
        self._number = max((record.number or 0 for record in final), default=0)
        self._newest = self._number
        self._state, self._view = loaded.state, dict[str, str]()
        self._events, self._seen = loaded.events, loaded.seen
        self._entries: dict[str, _Entry] = {}
        self._starting: list[_Entry] = []
        self._called: set[str] = set()
        self._gone: set[str] = set()
        self._scopes: dict[str, Scope] = {}
        self._tasks: set[FlowTask] = set()
        self._helpers: set[asyncio.Task[None]] = set()
        self._unwritten: list[Write] = []
        self._committing = 0
        self._running = 0
        self._resumes = loaded.instance.resumes
        self._is_pumping = self._is_dirty = False
        self._calm = 0
        self._starved: asyncio.TimerHandle | None = None
        self._unwinding: Literal["", "park", "pause", "stop", "break", "diverge", "cancel", "end"] = ""
        self._is_paused = False
        self._is_stopping = False
        self._cancel_next = False
        self._failure: BaseException | None = None
        self._reason = ""
        self._was_touched = False
        self._root: FlowTask | None = None
        self._grace: Timer | None = None

    # -- life --------------------------------------------------------------------------------------------------------------------

    async def run(self) -> Ending:
        """Run until the flow ends, or leaves memory. Nothing of the run is left in memory afterwards; the file is still open."""
        if self._services.barrier is not None and any(record.durability == "replicated" for record in self._records.values()):
            await self._services.barrier(self.id)
        scope = Scope(self, "")
        context = self._outside.copy()
        context.run(here.set, scope)
        self._root = self.adopt(self._body(), scope, context)
        self._schedule()
        await asyncio.wait({self._root})
        self._unwind("end")
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
        while self._helpers:
            await asyncio.wait(self._helpers)
        if self._starved is not None:
            self._starved.cancel()
        if self._grace is not None:
            self._grace.cancel()
        ending = await self._ending(self._root)
        await self._lane.submit(lambda: None)  # what was asked for meanwhile is recorded now
        self._root = None
        return replace(ending, was_touched=self._was_touched)

    async def _body(self) -> Any:
        args, kwargs = self.flow.signature.decode(self.instance.input, self.reader)
        if self.flow.is_async:
            return await self.flow.function(*args, **kwargs)
        context = contextvars.copy_context()
        return await self._loop.run_in_executor(self._services.flow_threads, partial(context.run, self.flow.function, *args, **kwargs))

    async def _ending(self, root: FlowTask) -> Ending:
        failure = None if root.cancelled() else root.exception()
        now = self._now()
        try:
            match self._unwinding:
                case "break":
                    return Ending("broken", failure=self._failure)
                case "diverge":
                    error = _error_text("Diverged", self._reason, 0)
                    await self._commit([jr.put_end("diverged", None, None, error, now)])
                    return Ending("ended", "diverged", error=error)
                case "park" | "pause" | "stop":
                    paused = self._unwinding == "pause"
                    await self._commit([jr.put_status("paused" if paused else "waiting", now)])
                    due = min((entry_due for entry_due in self._dues if entry_due is not None), default=None)
                    kind: Literal["parked", "paused", "stopped"] = (
                        "paused" if paused else "parked" if self._unwinding == "park" else "stopped"
                    )
                    return Ending(kind, "paused" if paused else "waiting", wake_due=due)
            if self._unwinding == "cancel" or root.cancelled() or _holds(failure, Cancelled):
                error = _error_text("Cancelled", "the run was cancelled", 0)
                await self._commit([jr.put_end("cancelled", None, None, error, now)])
                return Ending("ended", "cancelled", error=error)
            if failure is None:
                try:
                    text, artifacts = encode(root.result(), f"result of flow {self.flow.name}", self.id)
                    output, sha256, writes = await self._keep(text, artifacts, 0)
                except (NotJSON, MissingObject, OSError) as unfit:
                    failure = unfit
                else:
                    await self._commit([*writes, jr.put_end("done", output, sha256, None, now)])
                    return Ending("ended", "done", output=text)
            log.info(
                "run failed id=%s error=%r",
                self.id,
                str(failure),
                exc_info=failure if not isinstance(failure, (Fatal, StepFailed)) else None,
            )
            error = _failure_text(failure)
            await self._commit([jr.put_end("failed", None, None, error, now)])
            return Ending("ended", "failed", error=error)
        except Parked:
            return Ending("broken", failure=self._failure)

    def park(self) -> None:
        """Leave memory, if there is still nothing to do but wait."""
        if self.is_idle and not self._unwinding:
            self._unwind("park")

    def stop(self) -> None:
        """Leave memory as soon as no body runs; none begins any more."""
        self._is_stopping = True
        self._schedule()

    def abandon(self) -> None:
        """Leave memory now. Bodies that run are cut short, as in a crash; plain functions end in their threads and count for nothing."""
        self._unwind("stop")
        for task in [*self._tasks, *self._helpers]:
            task.cancel()

    def crash(self) -> None:
        """Record nothing from now on, and leave memory: what a killed process would do. For tests."""
        self._break(RuntimeError("crashed"))
        for task in [*self._tasks, *self._helpers]:
            task.cancel()

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

    _dues: Sequence[float | None] = ()

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

    # -- what others ask ---------------------------------------------------------------------------------------------------------

    async def receive_event(self, event: Event) -> bool:
        """Record an event; False when it was there already."""
        if event.id in self._seen:
            return False
        self._seen.add(event.id)
        await self._commit([jr.put_event(event.id, event.type, event.payload, event.sender, event.sent_at)], check=False)
        self._events.append(event)
        self._was_touched = self._was_touched or bool(self._unwinding)
        for entry in self._entries.values():
            if entry.waits and entry.call.event == event.type and entry.future is not None and not entry.future.done():
                self._wake(entry, "event")
                break
        return True

    async def control(self, id: str, kind: str, sender: str | None, sent_at: str) -> None:
        """Record a request to cancel, pause or resume, and obey."""
        if id in self._seen:
            return
        self._seen.add(id)
        now = self._now()
        writes = [jr.put_control(id, kind, sender, sent_at, now)]
        if kind == "cancel" and CANCEL not in self._records:
            self._seq += 1
            record = Record(CANCEL, self._seq, "cancel", "cancel", "done", input_sha256="", output="null", started_at=now, finished_at=now)
            slot = self._reserve(record)
            self._records[record.key] = record
            await self._commit([*writes, jr.put_step(record)], check=False)
            self._ready(slot)
        else:
            await self._commit(writes, check=False)
        self._is_paused = kind == "pause" if kind in ("pause", "resume") else False
        self._was_touched = self._was_touched or bool(self._unwinding)
        self._schedule()

    # -- the pump ----------------------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._is_pumping:
            self._is_pumping = True
            self._loop.call_soon(self._pump, context=self._outside)

    def _pump(self) -> None:
        self._is_pumping = False
        while self._root is not None and not self._unwinding:
            is_cancel = bool(self._queue) and self._queue[0].key == CANCEL  # what is cancelled must not depend on who is quicker
            if is_cancel or (self._is_dirty and len(self._tasks) > 1):
                self._calm = self._calm + 1 if self._is_at_rest() else 0
                if self._calm < 2:
                    self._schedule()
                    return
            self._is_dirty, self._calm = False, 0
            if self._queue:
                if not self._deliver(self._queue[0]):
                    return
                continue
            if self._is_paused or self._is_stopping:
                if not self._running and not self._committing:
                    self._unwind("pause" if self._is_paused else "stop")
                return
            if self._starting:
                starting, self._starting = self._starting, []
                for entry in starting:
                    self._wake(entry, "start")
                return
            self._rest()
            return

    def _is_at_rest(self) -> bool:
        for task in self._tasks:
            waiter = task._fut_waiter  # type: ignore[attr-defined]
            if waiter is None or waiter.done():
                return False
        return True

    def _deliver(self, slot: _Slot) -> bool:
        """Take the head of the queue to the flow; False when that has to wait."""
        if slot.is_void or slot.key in self._gone:
            self._queue.popleft()
            return True
        if not slot.is_ready:
            return False
        record = self._records[slot.key]
        if record.kind == "cancel":
            self._queue.popleft()
            self._cancel()
            return True
        entry = self._entries.get(slot.key)
        if entry is None:
            scope = self._scopes.get(record.path)
            if scope is not None and scope.is_over():
                self._queue.popleft()
                return True
            if self._entries and self._starved is None:
                self._starved = self._loop.call_later(STARVED_S, self._on_starved, slot)
            return False
        if self._starved is not None:
            self._starved.cancel()
            self._starved = None
        if record.status == "cancelled" and not entry.is_cancelled and loads(record.error or "{}").get("by") != "cancel":
            self._diverge(f"step {slot.key} was cancelled by something that is not recorded, such as a clock")
            return False
        self._queue.popleft()
        self._is_dirty = True
        for name, value in self._state.get(slot.number, ()):
            if value is None:
                self._view.pop(name, None)
            else:
                self._view[name] = value
        entry.is_delivered = True
        self._wake(entry, "turn")
        return True

    def _on_starved(self, slot: _Slot) -> None:
        self._starved = None
        if not self._unwinding and self._queue and self._queue[0] is slot and slot.key not in self._entries and self._entries:
            self._diverge(f"step {slot.key} is recorded here, but the flow calls {', '.join(sorted(self._entries))}")

    def _rest(self) -> None:
        """Notice when all that is left is waiting."""
        only_waits = self._entries and not self._running and not self._committing and all(entry.waits for entry in self._entries.values())
        if only_waits and not self.is_idle:
            self.is_idle = True
            self.idle_count += 1
            self._services.on_idle(self)

    def _wake(self, entry: _Entry, why: str) -> None:
        self.is_idle = False
        if entry.future is not None and not entry.future.done():
            entry.future.set_result(why)

    def _cancel(self) -> None:
        """The run is cancelled here: what is in flight ends with `Cancelled`, or the next call does."""
        in_flight = [entry for entry in self._entries.values() if not entry.is_delivered]
        starting, self._starting = self._starting, []
        for entry in in_flight:
            entry.is_cancelled = True
            if entry.waits or entry in starting:
                self._wake(entry, "cancelled")
        for record in self._records.values():
            if record.kind == "child" and not record.is_final:
                self._help(self._cancel_child(record.key))
        self._is_dirty = True
        self._cancel_next = not in_flight
        self._grace = self._services.timers.at(self._services.clock.monotonic() + self.flow.grace_s, self._on_grace_over)

    async def _cancel_child(self, key: str) -> None:
        if self._services.barrier is not None:
            await self._services.barrier(self.id)
        child = child_id(self.id, key)
        await self._services.outside.cancel_run(f"{self._key(CANCEL)}:{child}", child, self.id)

    def _on_grace_over(self) -> None:
        if not self._unwinding and self._root is not None and not self._root.done():
            log.warning("grace is over id=%s seconds=%s", self.id, self.flow.grace_s)
            self._unwind("cancel")
            for task in list(self._tasks):
                task.cancel()

    # -- calls of the flow -------------------------------------------------------------------------------------------------------

    def is_own_thread(self) -> bool:
        """Say whether this is the event loop's thread."""
        return threading.get_ident() == self._thread

    def wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Let the event loop run something for a flow that has a thread."""
        return self._outside.copy().run(asyncio.run_coroutine_threadsafe, coroutine, self._loop).result()

    def value(self, name: str) -> str | None:
        """Return a value of `state`, as of the last step that was delivered."""
        return self._view.get(name)

    def names(self) -> list[str]:
        """Return the names in `state`."""
        return list(self._view)

    def patched(self, scope: Scope, key: str) -> bool:
        """Answer `patched`: true, and recorded with the next transaction, unless this task has recorded steps ahead."""
        if not self.is_own_thread():
            return bool(self.wait_for(self._patched(scope, key)))
        self._check()
        record = self._records.get(key)
        if record is not None:
            return True
        prefix = f"{scope.path}/" if scope.path else ""
        if any(
            other.key not in self._called and other.key.startswith(prefix) and other.kind not in ("patch", "cancel")
            for other in self._records.values()
        ):
            return False
        self._seq += 1
        self._number += 1
        now = self._now()
        record = Record(
            key,
            self._seq,
            key.rpartition("/")[2].partition("#")[0],
            "patch",
            "done",
            input_sha256="",
            output="true",
            number=self._number,
            started_at=now,
            finished_at=now,
        )
        record.after = self._newest
        self._records[key] = record
        self._unwritten.append(jr.put_step(record))
        return True

    async def _patched(self, scope: Scope, key: str) -> bool:
        return self.patched(scope, key)

    async def perform(self, call: Call) -> Any:
        """Do what the flow calls for, or take it from the record."""
        self._check()
        if self._cancel_next:
            self._cancel_next = False
            self._gone.add(call.key)
            raise Cancelled
        record = self._records.get(call.key)
        verdict = replay(record, call.input_sha256)
        if verdict == "diverged" or (record is not None and record.kind != call.kind):
            raise self._diverge(f"step {call.key} is recorded with other input") from None
        if record is None:
            self._seq += 1
            text = call.input if len(call.input) <= ROW_BYTES // 4 or len(call.input.encode()) <= ROW_BYTES else None
            record = Record(call.key, self._seq, call.name, call.kind, "started", text, call.input_sha256, after=self._newest)
            record.started_at = self._now()
        self._called.add(call.key)
        self.is_idle = False
        entry = self._entries[call.key] = _Entry(call, record)
        try:
            if verdict != "deliver":
                await self._may_begin(entry)
                if entry.is_cancelled and call.key not in self._records:
                    self._gone.add(call.key)
                    raise Cancelled
                entry.has_begun = True
                if entry.is_cancelled:
                    self._finish(entry, "cancelled", error=_BY_CANCEL)
                elif verdict == "unknown":
                    self._finish(
                        entry, "unknown", error=_error_text("OutcomeUnknown", "the process ended in the middle of it", record.attempts)
                    )
                else:
                    await _LIVE[call.kind](self, entry)
            self._schedule()
            while not entry.is_delivered:
                await self._block(entry)
        except asyncio.CancelledError:
            self._on_cancelled(entry)
            raise
        finally:
            del self._entries[call.key]
            self._schedule()
        if entry.is_cancelled:
            raise Cancelled
        return self._outcome(entry)

    def _check(self) -> None:
        if self._unwinding:
            raise Parked

    async def _block(self, entry: _Entry) -> str:
        self._check()
        entry.future = self._loop.create_future()
        try:
            return await entry.future
        finally:
            entry.future = None

    async def _may_begin(self, entry: _Entry) -> None:
        """Wait until all recorded results are delivered: on replay nothing runs that a recorded failure would have cancelled."""
        if self._queue or self._is_paused or self._is_stopping or (self._is_dirty and len(self._tasks) > 1):
            self._starting.append(entry)
            self._schedule()
            await self._block(entry)
        self._check()

    def _on_cancelled(self, entry: _Entry) -> None:
        """The task that waits for a call was cancelled: by its siblings' failure, or by a clock, which nobody could replay."""
        if self._unwinding:
            return
        if self._is_raced():
            self._diverge(
                f"a clock cancelled step {entry.call.key}: asyncio.timeout and wait_for around steps cannot be replayed;"
                " use @step(timeout=...), receive(timeout=...) or sleep() in a branch of its own"
            )
            return
        self._gone.add(entry.call.key)
        if entry.has_begun and not entry.record.is_final:
            status: StepStatus = "cancelled" if entry.record.repeat or entry.record.status != "started" else "unknown"
            self._finish(entry, status, error=_BY_TASK if status == "cancelled" else _error_text("OutcomeUnknown", "it was cancelled", 1))

    def _is_raced(self) -> bool:
        current = asyncio.current_task()
        return any(task.is_raced and (task is current or not task.in_body) for task in self._tasks)

    def _outcome(self, entry: _Entry) -> Any:
        """Return or raise what the record says, alike live and on replay."""
        record, call = entry.record, entry.call
        if record.status == "done":
            if entry.has_value:
                return entry.value
            if record.kind == "receive" and record.output is None and record.output_sha256 is None:
                return None
            try:
                return decode(call.result, self._text(record), f"result of {call.name}", self.reader)
            except (NotJSON, MissingObject) as error:
                raise self._diverge(f"what step {call.key} recorded cannot be read: {error}") from error
        if record.status == "cancelled":
            raise Cancelled
        facts = loads(record.error or "{}")
        if record.status == "unknown":
            raise OutcomeUnknown(call.key, facts["message"])
        raise StepFailed(call.key, facts["type"], facts["message"], facts["attempts"]) from entry.cause

    def _text(self, record: Record) -> str:
        if record.output is not None:
            return record.output
        return self._large[record.output_sha256 or ""]

    # -- recording ---------------------------------------------------------------------------------------------------------------

    def _now(self) -> str:
        return iso(self._services.clock.now())

    def _key(self, key: str) -> str:
        return idempotency_key(self.id, self.instance.incarnation, key)

    def _reserve(self, record: Record) -> _Slot:
        self._number += 1
        record.number = self._number
        slot = _Slot(record.key, self._number)
        self._queue.append(slot)
        return slot

    def _ready(self, slot: _Slot) -> None:
        slot.is_ready = True
        self._newest = max(self._newest, slot.number)
        self._schedule()

    def _write(self, writes: Sequence[Write]) -> asyncio.Future[None]:
        all_writes = [*self._unwritten, *writes]
        self._unwritten = []
        self._committing += 1
        future = self._lane.submit(self._journal.commit, all_writes)
        future.add_done_callback(self._on_written, context=self._outside)
        return future

    def _on_written(self, future: asyncio.Future[None]) -> None:
        self._committing -= 1
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self._break(error)
        self._schedule()

    async def _commit(self, writes: Sequence[Write], *, check: bool = True) -> None:
        """Run a transaction. Raises `Parked` when it failed: the run is broken then."""
        self._check_broken()
        try:
            await self._write(writes)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._break(error)
            raise Parked from error
        if check:
            self._check_broken()

    def _is_replicated(self, step: Step[..., Any]) -> bool:
        wanted = step.durability == "replicated" or self.instance.durability == "replicated" or not step.repeat
        return wanted and self._services.barrier is not None

    def _finish(
        self,
        entry: _Entry,
        status: StepStatus,
        *,
        output: str | None = None,
        output_sha256: str | None = None,
        error: str | None = None,
        writes: Sequence[Write] = (),
    ) -> None:
        """Make a record final: take a number and commit. The pump delivers it when that is done, and where asked for, replicated."""
        slot = self._finalise(entry, status, output, output_sha256, error)
        if self._unwinding == "break":
            return
        future = self._write([jr.put_step(entry.record), *writes, *self._progress()])
        if entry.record.durability == "replicated" and self._services.barrier is not None:
            self._help(self._ready_when_replicated(slot, future))
        else:
            future.add_done_callback(partial(self._on_finished, slot), context=self._outside)

    def _finalise(self, entry: _Entry, status: StepStatus, output: str | None, output_sha256: str | None, error: str | None) -> _Slot:
        record = entry.record
        record.status, record.output, record.output_sha256, record.error = status, output, output_sha256, error
        record.wake_at, record.finished_at = None, self._now()
        self._records[record.key] = record
        return self._reserve(record)

    def _progress(self) -> list[Write]:
        if not self._resumes:
            return []
        self._resumes = 0
        return [jr.put_resumes(0)]

    def _on_finished(self, slot: _Slot, future: asyncio.Future[None]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._ready(slot)

    async def _ready_when_replicated(self, slot: _Slot, future: asyncio.Future[None]) -> None:
        try:
            await future
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
        if len(text) <= ROW_BYTES // 4 and not artifacts:
            return text, None, []
        writes: list[Write] = []
        for artifact in artifacts:
            data = await self._loop.run_in_executor(self._services.bodies, artifact.read)
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
            await self._loop.run_in_executor(self._services.bodies, self._services.objects.put, self.id, sha256, data)
        row = jr.put_object(sha256, len(data), media_type, data if inline else None, self._now())
        return [row, jr.put_reference(seq, sha256)] if seq else [row]

    # -- kinds of calls ----------------------------------------------------------------------------------------------------------

    async def _wait(self, entry: _Entry, due: float | None) -> str:
        """Wait for a time, an event or the cancellation; the flow may park meanwhile."""
        if entry.is_cancelled:
            return "cancelled"
        if due is not None and due <= self._services.clock.monotonic():
            return "due"
        timer = self._services.timers.at(due, partial(self._wake, entry, "due")) if due is not None else None
        entry.waits, entry.due = True, due
        self._schedule()
        try:
            return await self._block(entry)
        finally:
            entry.waits = False
            self.is_idle = False
            if timer is not None:
                timer.cancel()

    def _due(self, record: Record, duration_s: float) -> float:
        """Return the monotonic time of a recorded wake time, or record one. After a clock went back it is recorded anew."""
        clock = self._services.clock
        now = clock.now()
        if record.wake_at is None:
            remaining = min(duration_s, LONGEST_S)
            record.wake_at = iso(now + timedelta(seconds=remaining))
        else:
            by_clock = (datetime.fromisoformat(record.wake_at) - now).total_seconds()
            remaining = remaining_wait_s(by_clock, duration_s)
            if remaining < by_clock:
                record.wake_at = iso(now + timedelta(seconds=remaining))
                self._unwritten.append(jr.put_step(record))
        return clock.monotonic() + remaining

    async def _begin_wait(self, entry: _Entry) -> None:
        if entry.record.status != "waiting":
            entry.record.status = "waiting"
            self._records[entry.record.key] = entry.record
            await self._commit([jr.put_step(entry.record)])

    async def _live_sleep(self, entry: _Entry) -> None:
        due = self._due(entry.record, entry.call.timeout_s or 0.0)
        await self._begin_wait(entry)
        if await self._wait(entry, due) == "cancelled":
            self._finish(entry, "cancelled", error=_BY_CANCEL)
        else:
            self._finish(entry, "done", output="null")

    async def _live_receive(self, entry: _Entry) -> None:
        call, record = entry.call, entry.record
        due = None
        why = ""
        while True:
            event = self._take(call.event)
            if event is not None:
                try:
                    entry.value = decode(call.result, event.payload, f"event {call.event}", self.reader)
                except NotJSON as error:
                    log.warning("event refused id=%s event=%s reason=%r", self.id, event.id, str(error))
                    await self._commit([jr.refuse(event.id, str(error))])
                    continue
                entry.has_value = True
                self._finish(entry, "done", output=event.payload, writes=[jr.consume(event.id, record.seq, self._now())])
                return
            if why == "cancelled":
                self._finish(entry, "cancelled", error=_BY_CANCEL)
                return
            if why == "due":
                self._finish(entry, "done")
                return
            if due is None and call.timeout_s is not None:
                due = self._due(record, call.timeout_s)
            if record.status != "waiting":
                await self._begin_wait(entry)
                continue  # something may have come meanwhile
            why = await self._wait(entry, due)

    def _take(self, type: str) -> Event | None:
        for index, event in enumerate(self._events):
            if event.type == type:
                return self._events.pop(index)
        return None

    async def _live_child(self, entry: _Entry) -> None:
        call, record = entry.call, entry.record
        assert call.flow is not None
        child = child_id(self.id, call.key)
        call.event = f"child:{child}"
        event = self._take(call.event)
        if event is None:
            await self._begin_wait(entry)
            await self._replicate()
            try:
                await self._services.outside.start_child(self.id, call.key, child, call.flow, call.input)
            except Exception as error:
                entry.cause = error
                self._finish(entry, "failed", error=_failure_text(error, 1))
                return
            while (event := self._take(call.event)) is None:
                if await self._wait(entry, None) == "cancelled":
                    self._finish(entry, "cancelled", error=_BY_CANCEL)
                    return
        answer = loads(event.payload)
        writes = [jr.consume(event.id, record.seq, self._now())]
        if answer["status"] == "done":
            output, sha256, more = await self._keep(answer["output"], [], record.seq)
            self._finish(entry, "done", output=output, output_sha256=sha256, writes=[*writes, *more])
        else:
            facts = loads(answer["error"] or "{}")
            text = _error_text(facts.get("type") or answer["status"], facts.get("message") or f"child {child} {answer['status']}", 1)
            self._finish(entry, "failed", error=text, writes=writes)

    async def _live_send(self, entry: _Entry) -> None:
        call = entry.call
        if self._services.barrier is not None:
            self._records[call.key] = entry.record
            await self._commit([jr.put_step(entry.record)])
            await self._replicate()
        payload, _ = encode(loads(call.input)["payload"], "event")
        await self._services.outside.send_event(call.event_id or self._key(call.key), call.target, call.event, payload, self.id)
        self._check()
        self._finish(entry, "done", output="null")

    async def _live_barrier(self, entry: _Entry) -> None:
        if self._services.barrier is None:
            raise self._refuse(entry, NeedsReplica("barrier()"))
        entry.record.durability = "replicated"
        self._finish(entry, "done", output="null")

    def _refuse(self, entry: _Entry, error: Exception) -> Exception:
        self._gone.add(entry.call.key)
        return error

    async def _live_step(self, entry: _Entry) -> None:
        call, record = entry.call, entry.record
        step = call.step
        assert step is not None
        record.repeat = step.repeat
        if step.durability == "replicated" and self._services.barrier is None:
            raise self._refuse(entry, NeedsReplica(f"step {step.name}"))
        replicated = self._is_replicated(step)
        record.durability = "replicated" if replicated else "local"
        if record.status == "retrying" and await self._wait(entry, self._due(record, step.retry.cap)) == "cancelled":
            self._finish(entry, "cancelled", error=_BY_CANCEL)
            return
        while True:
            record.attempts += 1
            if replicated or not step.repeat:
                record.status, record.wake_at = "started", None
                self._records[record.key] = record
                await self._commit([jr.put_step(record)])
                if replicated:
                    await self._replicate()
            try:
                self._services.check_owner()
            except Exception as error:
                self._break(error)
                raise Parked from error
            failure = await self._attempt(entry, step)
            if failure is None:
                return
            if not await self._retry(entry, step, failure):
                return

    async def _retry(self, entry: _Entry, step: Step[..., Any], failure: tuple[str, Exception, str, dict[str, Any]]) -> bool:
        """Record a failed attempt and wait for the next; False when there is none."""
        record = entry.record
        outcome, error, started_at, usage = failure
        delay = after_failure(step.retry, record.attempts, error, self._services.random)
        if entry.is_cancelled:
            delay = None
        next_try_at = None
        record.wake_at = None
        if delay is not None:
            self._due(record, delay)
            next_try_at = record.wake_at
        text = _failure_text(error, record.attempts)
        row = jr.put_attempt(
            record.seq,
            record.attempts,
            machine=self._services.machine,
            started_at=started_at,
            finished_at=self._now(),
            outcome=outcome,
            error=text,
            next_try_at=next_try_at,
            usage=encode(usage, "usage")[0] if usage else None,
        )
        if delay is None:
            entry.cause = error
            if outcome == "timeout" and not step.repeat:
                unknown = _error_text("OutcomeUnknown", f"no answer in {step.timeout_s} s", record.attempts)
                self._finish(entry, "unknown", error=unknown, writes=[row])
            else:
                self._finish(entry, "failed", error=text, writes=[row])
            return False
        due = self._services.clock.monotonic() + delay
        record.status = "retrying"
        self._records[record.key] = record
        await self._commit([jr.put_step(record), row])
        if await self._wait(entry, due) == "cancelled":
            self._finish(entry, "cancelled", error=_BY_CANCEL)
            return False
        return True

    async def _attempt(self, entry: _Entry, step: Step[..., Any]) -> tuple[str, Exception, str, dict[str, Any]] | None:
        """Run the body once. On success the record is final; otherwise returns (outcome, error, started_at, usage)."""
        call, record = entry.call, entry.record
        info = Attempt(self._key(call.key), self)
        started_at = self._now()
        self._running += 1
        try:
            assert call.signature is not None
            args, kwargs = call.signature.decode(call.input, self.reader)
            if step.tx:
                await self._in_transaction(entry, step, info, args, kwargs, started_at)
                return None
            if step.is_async:
                value = await self._in_task(step, info, args, kwargs)
            else:
                value = await self._in_thread(entry, step, info, args, kwargs)
            self._check()
            text, artifacts = encode(value, f"result of {step.name}", self.id)
            output, sha256, writes = await self._keep(text, artifacts, record.seq)
            entry.value = decode(call.result, text, f"result of {step.name}", self.reader)
            entry.has_value = True
        except _Timeout:
            return "timeout", TimeoutError(f"no answer in {step.timeout_s} s"), started_at, info.usage
        except NotJSON as error:
            fatal = Fatal(str(error))
            fatal.__cause__ = error
            return "error", _named("NotJSON", fatal), started_at, info.usage
        except Exception as error:
            return "error", error, started_at, info.usage
        finally:
            self._running -= 1
        self._check_broken()
        self._finish(entry, "done", output=output, output_sha256=sha256, writes=[*writes, *self._extras(record, info, started_at)])
        return None

    def _check_broken(self) -> None:
        if self._unwinding == "break":
            raise Parked

    def _extras(self, record: Record, info: Attempt, started_at: str) -> list[Write]:
        """Return what is committed with a successful attempt: the state that it wrote, and what it used."""
        writes = [jr.put_state(record.seq, name, value) for name, value in info.state.items()]
        if info.state:
            self._state[self._number + 1] = list(info.state.items())
        if info.usage or record.kind in ("llm", "tool", "http"):
            usage = encode(info.usage, "usage")[0] if info.usage else None
            writes.append(
                jr.put_attempt(
                    record.seq,
                    record.attempts,
                    machine=self._services.machine,
                    started_at=started_at,
                    finished_at=self._now(),
                    outcome="done",
                    usage=usage,
                )
            )
        return writes

    async def _in_task(self, step: Step[..., Any], info: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token, task = here.set(info), asyncio.current_task()
        flow_task = task if isinstance(task, FlowTask) else None
        if flow_task is not None:
            flow_task.in_body += 1
        try:
            if step.timeout_s is None:
                return await step.function(*args, **kwargs)
            try:
                async with asyncio.timeout(step.timeout_s) as limit:
                    return await step.function(*args, **kwargs)
            except TimeoutError:
                if limit.expired():
                    raise _Timeout from None
                raise
        finally:
            if flow_task is not None:
                flow_task.in_body -= 1
                if not isinstance(sys.exc_info()[1], asyncio.CancelledError):
                    flow_task.is_raced = False  # the clock was the step's, or its body's
            here.reset(token)

    async def _in_thread(self, entry: _Entry, step: Step[..., Any], info: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = contextvars.copy_context()
        context.run(here.set, info)
        future = self._loop.run_in_executor(self._services.bodies, partial(context.run, step.function, *args, **kwargs))
        try:
            done, _ = await asyncio.wait({future}, timeout=step.timeout_s)
        except asyncio.CancelledError:
            future.add_done_callback(partial(self._on_late, entry.record.seq, entry.record.attempts), context=self._outside)
            raise
        if done:
            return future.result()
        future.add_done_callback(partial(self._on_late, entry.record.seq, entry.record.attempts), context=self._outside)
        if not step.overlap and step.retry.attempts > entry.record.attempts:
            await asyncio.wait({future})  # it keeps its place until its thread ends
        raise _Timeout

    def _on_late(self, seq: int, attempt: int, future: asyncio.Future[Any]) -> None:
        """A plain function ended after its time: note it, discard what it returned."""
        if future.cancelled():
            return
        error = future.exception()
        log.warning("late result discarded id=%s seq=%d attempt=%d error=%r", self.id, seq, attempt, error)
        if not self._unwinding and self._root is not None:
            text = f"{self._now()} {'returned' if error is None else f'raised {type(error).__name__}'}"
            self._unwritten.append(jr.put_late(seq, attempt, text))

    async def _in_transaction(
        self, entry: _Entry, step: Step[..., Any], info: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any], started_at: str
    ) -> None:
        """Run a body with the instance's own connection; what it writes and the record are one transaction."""
        context = contextvars.copy_context()
        context.run(here.set, info)
        record = entry.record
        before = (record.status, record.number)
        slot = _Slot(record.key, 0)

        def body(connection: Connection) -> Sequence[Write]:
            value = context.run(step.function, connection, *args, **kwargs)
            text, artifacts = encode(value, f"result of {step.name}", self.id)
            if artifacts or len(text.encode()) > INLINE_BYTES:
                raise NotJSON(f"result of {step.name}", "a transaction step returns no artifacts, and at most a mebibyte")
            entry.value = decode(entry.call.result, text, f"result of {step.name}", self.reader)
            entry.has_value = True
            record.output = text
            return [jr.put_step(record), *extras()]

        def extras() -> list[Write]:
            writes = [jr.put_state(record.seq, name, value) for name, value in info.state.items()]
            if info.state:
                self._state[slot.number] = list(info.state.items())
            return [*writes, *progress]

        progress, self._unwritten = [*self._unwritten, *self._progress()], []
        slot = self._reserve(record)
        record.status, record.finished_at, record.wake_at = "done", self._now(), None
        self._committing += 1
        future = self._lane.submit(self._journal.transact, body)
        try:
            done, _ = await asyncio.wait({future}, timeout=step.timeout_s)
            timed_out = not done
            if timed_out:
                self._journal.interrupt()
                await asyncio.wait({future})
            error = future.exception()
        except asyncio.CancelledError:
            # It is committed or rolled back in the lane; which of the two is known when it ends, not now.
            self._journal.interrupt()
            future.add_done_callback(partial(self._on_transaction_left, entry, slot, progress), context=self._outside)
            raise
        finally:
            self._committing -= 1
        if error is None:
            self._records[record.key] = record
            if record.durability == "replicated":
                await self._replicate()
            self._ready(slot)
            return
        slot.is_void = True
        self._unwritten = [*progress, *self._unwritten]
        record.status, record.number = before
        record.output, record.finished_at = None, None
        entry.has_value = False
        self._schedule()
        if not isinstance(error, Exception):
            self._break(error)
            raise Parked from error
        raise _Timeout if timed_out else error

    def _on_transaction_left(self, entry: _Entry, slot: _Slot, unwritten: list[Write], future: asyncio.Future[None]) -> None:
        if future.cancelled() or future.exception() is not None:
            slot.is_void = True
            self._unwritten = [*unwritten, *self._unwritten]
        else:
            self._records[entry.record.key] = entry.record
            self._ready(slot)
        self._schedule()


_BY_CANCEL = '{"by":"cancel"}'
_BY_TASK = '{"by":"task"}'

_LIVE: dict[str, Callable[[Execution, _Entry], Awaitable[None]]] = {
    "step": Execution._live_step,
    "llm": Execution._live_step,
    "tool": Execution._live_step,
    "http": Execution._live_step,
    "tx": Execution._live_step,
    "sleep": Execution._live_sleep,
    "receive": Execution._live_receive,
    "child": Execution._live_child,
    "send": Execution._live_send,
    "barrier": Execution._live_barrier,
}


def _error_text(type_name: str, message: str, attempts: int) -> str:
    return encode({"type": type_name, "message": message[:10_000], "attempts": attempts}, "error")[0]


def _failure_text(error: BaseException | None, attempts: int = 0) -> str:
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return _error_text(getattr(error, "_recorded_name", type(error).__name__), str(error), attempts)


def _named(name: str, error: Exception) -> Exception:
    error._recorded_name = name  # type: ignore[attr-defined]
    return error


def _holds(error: BaseException | None, kind: type[BaseException]) -> bool:
    return isinstance(error, kind) or (isinstance(error, BaseExceptionGroup) and error.subgroup(kind) is not None)
