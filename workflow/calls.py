"""What a call of a flow does when it is not in the record: steps with their attempts, timers, events, children.

Each kind ends in `_finish`, which makes the record final; a wait on the way may end in parking, and begins anew, with what is recorded, when the run comes back.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from sqlite3 import Connection
from typing import Any

from workflow import journal as jr
from workflow.context import Attempt, Failure, Step, here
from workflow.errors import (
    Fatal,
    NeedsReplica,
    NotJSON,
    Parked,
)
from workflow.journal import Event, Write
from workflow.lanes import settle
from workflow.objects import INLINE_BYTES
from workflow.recording import BY_CANCEL, Entry, FlowTask, Recording, Slot, error_text, failure_text, go_on, is_small
from workflow.state import Record, after_failure, child_id, remaining_wait_s
from workflow.values import decode, encode, is_same, iso, loads

__all__ = ["LIVE", "Calls"]

log = logging.getLogger(__name__)

LONGEST_S = 3.15e9
"""A century: longer waits are that long."""


class _Timeout(Exception):
    pass


class Calls(Recording):
    """The kinds of calls."""

    # -- waiting -----------------------------------------------------------------------------------------------------------------

    async def _wait(self, entry: Entry, due: float | None) -> str:
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

    async def _begin_wait(self, entry: Entry) -> None:
        if entry.record.status != "waiting":
            entry.record.status = "waiting"
            self._records[entry.record.key] = entry.record
            await self._commit([jr.put_step(entry.record)])

    async def _live_sleep(self, entry: Entry) -> None:
        due = self._due(entry.record, entry.call.timeout_s or 0.0)
        await self._begin_wait(entry)
        if await self._wait(entry, due) == "cancelled":
            self._finish(entry, "cancelled", error=BY_CANCEL)
        else:
            self._finish(entry, "done", output="null")

    async def _live_receive(self, entry: Entry) -> None:
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
                self._finish(entry, "cancelled", error=BY_CANCEL)
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

    # -- other runs --------------------------------------------------------------------------------------------------------------

    async def _live_child(self, entry: Entry) -> None:
        call, record = entry.call, entry.record
        assert call.flow is not None
        child = child_id(self.id, call.key)
        call.event = f"child:{child}"
        event = self._take(call.event)
        if event is None:
            await self._begin_wait(entry)
            await self._replicate()
            try:
                await self._services.outside.start_child(self.id, call.key, child, call.flow, call.input, self._traceparent())
            except Exception as error:
                entry.cause = error
                self._finish(entry, "failed", error=failure_text(error, 1))
                return
            while (event := self._take(call.event)) is None:
                if await self._wait(entry, None) == "cancelled":
                    self._finish(entry, "cancelled", error=BY_CANCEL)
                    return
        answer = loads(event.payload)
        writes = [jr.consume(event.id, record.seq, self._now())]
        if answer["status"] == "done":
            output, sha256, more = await self._keep(answer["output"], [], record.seq)
            self._finish(entry, "done", output=output, output_sha256=sha256, writes=[*writes, *more])
        else:
            facts = loads(answer["error"] or "{}")
            text = error_text(facts.get("type") or answer["status"], facts.get("message") or f"child {child} {answer['status']}", 1)
            self._finish(entry, "failed", error=text, writes=writes)

    async def _live_send(self, entry: Entry) -> None:
        call = entry.call
        if self._services.barrier is not None:
            self._records[call.key] = entry.record
            await self._commit([jr.put_step(entry.record)])
            await self._replicate()
        payload, _ = encode(loads(call.input)["payload"], "event")
        await self._services.outside.send_event(call.event_id or self._key(call.key), call.target, call.event, payload, self.id)
        self._check()
        self._finish(entry, "done", output="null")

    async def _live_barrier(self, entry: Entry) -> None:
        if self._services.barrier is None:
            raise self._refuse(entry, NeedsReplica("barrier()"))
        entry.record.durability = "replicated"
        self._finish(entry, "done", output="null")

    def _refuse(self, entry: Entry, error: Exception) -> Exception:
        self._gone.add(entry.call.key)
        return error

    # -- steps -------------------------------------------------------------------------------------------------------------------

    async def _live_step(self, entry: Entry) -> None:
        call, record = entry.call, entry.record
        step = call.step
        assert step is not None
        record.repeat = step.repeat
        if step.durability == "replicated" and self._services.barrier is None:
            raise self._refuse(entry, NeedsReplica(f"step {step.name}"))
        replicated = self._is_replicated(step)
        record.durability = "replicated" if replicated else "local"
        if record.status == "retrying" and await self._wait(entry, self._due(record, step.retry.cap)) == "cancelled":
            self._finish(entry, "cancelled", error=BY_CANCEL)
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

    def _is_replicated(self, step: Step[..., Any]) -> bool:
        wanted = step.durability == "replicated" or self.instance.durability == "replicated" or not step.repeat
        return wanted and self._services.barrier is not None

    async def _retry(self, entry: Entry, step: Step[..., Any], failure: Failure) -> bool:
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
        text = failure_text(error, record.attempts)
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
                unknown = error_text("OutcomeUnknown", f"no answer in {step.timeout_s} s", record.attempts)
                self._finish(entry, "unknown", error=unknown, writes=[row])
            else:
                self._finish(entry, "failed", error=text, writes=[row])
            return False
        due = self._services.clock.monotonic() + delay
        record.status = "retrying"
        self._records[record.key] = record
        await self._commit([jr.put_step(record), row])
        if await self._wait(entry, due) == "cancelled":
            self._finish(entry, "cancelled", error=BY_CANCEL)
            return False
        return True

    def _attempt(self, entry: Entry, step: Step[..., Any]) -> Awaitable[Failure | None]:
        """Run the body once. On success the record is final, and there is no `Failure`."""
        info = Attempt(self._key(entry.call.key), self)
        work = self._try(entry, step, info)
        return work if self._stay is None else self._stay.attempt(work, entry.record, info)

    async def _try(self, entry: Entry, step: Step[..., Any], info: Attempt) -> Failure | None:
        call, record = entry.call, entry.record
        began = self._now()
        self._running += 1
        try:
            args, kwargs = (call.given, {}) if call.given is not None else step.signature.decode(call.input, self.reader)
            if step.tx:
                await self._in_transaction(entry, step, info, began, args, kwargs)
                return None
            if step.is_async:
                value = await self._in_task(step, info, args, kwargs)
            else:
                value = await self._in_thread(entry, step, info, args, kwargs)
            self._check()
            text, artifacts = encode(value, f"result of {step.name}", self.id)
            output, sha256, writes = (text, None, []) if is_small(text, artifacts) else await self._keep(text, artifacts, record.seq)
            entry.value = value if is_same(call.result, value) else decode(call.result, text, f"result of {step.name}", self.reader)
            entry.has_value = True
        except _Timeout:
            return "timeout", TimeoutError(f"no answer in {step.timeout_s} s"), began, info.usage
        except NotJSON as error:
            fatal = Fatal(str(error))
            fatal.__cause__ = error
            return "error", _named("NotJSON", fatal), began, info.usage
        except Exception as error:
            return "error", error, began, info.usage
        finally:
            self._running -= 1
        self._check_broken()
        self._finish(
            entry, "done", output=output, output_sha256=sha256, writes=[*writes, *self._extras(record, self._number + 1, info, began)]
        )
        return None

    def _extras(self, record: Record, number: int, info: Attempt, began: str) -> list[Write]:
        """Return what is committed with a successful attempt, which has or gets a number: the state that it wrote, and what it used."""
        if record.kind == "step" and not info.state and not info.usage:
            return []
        writes = [jr.put_state(record.seq, name, value) for name, value in info.state.items()]
        if info.state:
            self._state[number] = list(info.state.items())
        if info.usage or record.kind in ("llm", "tool", "http"):
            usage = encode(info.usage, "usage")[0] if info.usage else None
            writes.append(
                jr.put_attempt(
                    record.seq,
                    record.attempts,
                    machine=self._services.machine,
                    started_at=began,
                    finished_at=self._now(),
                    outcome="done",
                    usage=usage,
                )
            )
        return writes

    async def _in_task(self, step: Step[..., Any], info: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token, task = here.set(info), asyncio.current_task(self._loop)
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

    async def _in_thread(self, entry: Entry, step: Step[..., Any], info: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = contextvars.copy_context()
        context.run(here.set, info)
        future: asyncio.Future[Any] = self._loop.create_future()
        is_over = False

        def end(value: Any, error: BaseException | None) -> None:
            if is_over or future.cancelled():
                self._on_late(record.seq, attempt, error)
            if error is None and not future.done():
                go_on(future, value)
            else:
                settle(future, value, error)

        record, attempt = entry.record, entry.record.attempts
        self._services.bodies.give(end, context.run, partial(step.function, *args, **kwargs))
        if step.timeout_s is None:
            return await future
        try:
            await asyncio.wait({future}, timeout=step.timeout_s)
        except asyncio.CancelledError:
            is_over = True
            raise
        if future.done():
            return future.result()
        is_over = True
        if not step.overlap and step.retry.attempts > attempt:
            await asyncio.wait({future})  # it keeps its place until its thread ends
        raise _Timeout

    def _on_late(self, seq: int, attempt: int, error: BaseException | None) -> None:
        """A plain function ended after its time: note it, discard what it returned."""
        log.warning("late result discarded id=%s seq=%d attempt=%d error=%r", self.id, seq, attempt, error)
        if not self._unwinding and self._root is not None:
            text = f"{self._now()} {'returned' if error is None else f'raised {type(error).__name__}'}"
            self._late.append(jr.put_late(seq, attempt, text))

    async def _in_transaction(
        self, entry: Entry, step: Step[..., Any], info: Attempt, began: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run a body with the instance's own connection; what it writes and the record are one transaction."""
        context = contextvars.copy_context()
        context.run(here.set, info)
        record = entry.record
        before = (record.status, record.number)
        slot = Slot(record.key, 0)

        def body(connection: Connection) -> Sequence[Write]:
            value = context.run(step.function, connection, *args, **kwargs)
            text, artifacts = encode(value, f"result of {step.name}", self.id)
            if artifacts or len(text.encode()) > INLINE_BYTES:
                raise NotJSON(f"result of {step.name}", "a transaction step returns no artifacts, and at most a mebibyte")
            entry.value = decode(entry.call.result, text, f"result of {step.name}", self.reader)
            entry.has_value = True
            record.output = text
            return [jr.put_step(record), *self._extras(record, slot.number, info, began), *progress]

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

    def _on_transaction_left(self, entry: Entry, slot: Slot, unwritten: list[Write], future: asyncio.Future[None]) -> None:
        if future.cancelled() or future.exception() is not None:
            slot.is_void = True
            self._unwritten = [*unwritten, *self._unwritten]
        else:
            self._records[entry.record.key] = entry.record
            self._ready(slot)
        self._schedule()


LIVE: dict[str, Callable[[Calls, Entry], Awaitable[None]]] = {
    "step": Calls._live_step,
    "llm": Calls._live_step,
    "tool": Calls._live_step,
    "http": Calls._live_step,
    "tx": Calls._live_step,
    "sleep": Calls._live_sleep,
    "receive": Calls._live_receive,
    "child": Calls._live_child,
    "send": Calls._live_send,
    "barrier": Calls._live_barrier,
}


def _named(name: str, error: Exception) -> Exception:
    error._recorded_name = name  # type: ignore[attr-defined]
    return error
