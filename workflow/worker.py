"""One run while it is in memory: replay what is recorded, perform what is not, record it, park when there is nothing left but waiting.

A call of the flow becomes an `Entry`. If its record is final the entry waits for its turn; otherwise it is performed, which ends in `_finish`:
a number in the order of finishing is taken, one transaction is given to the lane, and a `Slot` joins the queue. The **pump** takes slots
from the head of that queue, one at a time: it delivers a result, lets the flow come to rest, delivers the next. On replay the queue is simply
full from the start, and no body begins before it is empty. So the order in which a flow sees results is the recorded one, always.

**At rest** means: each task of the flow waits for something that is not done, twice in a row with one turn of the event loop between, because what
one task does for another (`gather`, `TaskGroup`) takes a turn.

What a call does is in `calls.py`; how records become durable, and how a run leaves memory, in `recording.py`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from workflow import journal as jr
from workflow.calls import LIVE, Calls
from workflow.context import Call, Scope, here
from workflow.errors import (
    Cancelled,
    Fatal,
    MissingObject,
    NotJSON,
    OutcomeUnknown,
    Parked,
    StepFailed,
)
from workflow.journal import Event
from workflow.objects import ROW_BYTES
from workflow.recording import BY_CANCEL, BY_TASK, Entry, FlowTask, Slot, error_text, failure_text
from workflow.state import Record, RunStatus, StepStatus, child_id, replay
from workflow.values import decode, encode, loads

__all__ = ["Ending", "Execution"]

log = logging.getLogger(__name__)

STARVED_S = 2.0
"""So long may a recorded result wait for a call that does not come, while other calls wait for it."""
CANCEL = "cancel#1"
"""Key of the record that says where a run was cancelled; `cancel` is not a name for a step."""


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


class Execution(Calls):
    """A run in memory."""

    # -- life --------------------------------------------------------------------------------------------------------------------

    async def run(self) -> Ending:
        """Run until the flow ends, or leaves memory. Nothing of the run is left in memory afterwards; the file is still open."""
        if self._services.tracing is None:
            return await self._run()
        with self._services.tracing.stay(self.instance) as self._stay:
            ending = await self._run()
            error = ending.error or (str(ending.failure) if ending.failure is not None else None)
            self._stay.ends(ending.status if ending.kind == "ended" else ending.kind, error)
            return ending

    async def _run(self) -> Ending:
        if self._services.barrier is not None and any(record.durability == "replicated" for record in self._records.values()):
            await self._services.barrier(self.id)
        scope = Scope(self, "")
        context = self._outside.copy()
        context.run(here.set, scope)
        if self._stay is not None:
            self._stay.enter(context)
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
        if self._committing:
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
                    error = error_text("Diverged", self._reason, 0)
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
                error = error_text("Cancelled", "the run was cancelled", 0)
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
            error = failure_text(failure)
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

    def lose(self, error: BaseException) -> None:
        """Record nothing from now on, and leave memory: the run is somebody else's. Bodies that run are cut short."""
        self._break(error)
        for task in [*self._tasks, *self._helpers]:
            task.cancel()

    def crash(self) -> None:
        """Record nothing from now on, and leave memory: what a killed process would do. For tests."""
        self.lose(RuntimeError("crashed"))

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

    def _deliver(self, slot: Slot) -> bool:
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
        self._go_on(entry)
        return True

    def _on_starved(self, slot: Slot) -> None:
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
        entry = self._entries[call.key] = Entry(call, record)
        try:
            if verdict != "deliver":
                if not self._may_begin():
                    await self._begin_later(entry)
                if entry.is_cancelled and call.key not in self._records:
                    self._gone.add(call.key)
                    raise Cancelled
                entry.has_begun = True
                if entry.is_cancelled:
                    self._finish(entry, "cancelled", error=BY_CANCEL)
                elif verdict == "unknown":
                    self._finish(
                        entry, "unknown", error=error_text("OutcomeUnknown", "the process ended in the middle of it", record.attempts)
                    )
                else:
                    await LIVE[call.kind](self, entry)
            if verdict == "deliver" or not self._committing:  # otherwise the pump comes with the answer of the lane
                self._schedule()
            while not entry.is_delivered:
                await self._block(entry)
        except asyncio.CancelledError:
            self._on_cancelled(entry)
            raise
        finally:
            del self._entries[call.key]
            entry.future = None
            if self._entries or self._is_paused or self._is_stopping:  # others may now be all that there is
                self._schedule()
        if entry.is_cancelled:
            raise Cancelled
        return self._outcome(entry)

    def _may_begin(self) -> bool:
        """Say whether all recorded results are delivered: on replay nothing runs that a recorded failure would have cancelled."""
        return not (self._queue or self._is_paused or self._is_stopping or (self._is_dirty and len(self._tasks) > 1))

    async def _begin_later(self, entry: Entry) -> None:
        self._starting.append(entry)
        self._schedule()
        await self._block(entry)
        self._check()

    def _on_cancelled(self, entry: Entry) -> None:
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
            self._finish(entry, status, error=BY_TASK if status == "cancelled" else error_text("OutcomeUnknown", "it was cancelled", 1))

    def _is_raced(self) -> bool:
        current = asyncio.current_task()
        return any(task.is_raced and (task is current or not task.in_body) for task in self._tasks)

    def _outcome(self, entry: Entry) -> Any:
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


def _holds(error: BaseException | None, kind: type[BaseException]) -> bool:
    return isinstance(error, kind) or (isinstance(error, BaseExceptionGroup) and error.subgroup(kind) is not None)
