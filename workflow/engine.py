"""`Engine`: the runs of one folder. Who runs when, requests in, endings out; how a run runs is in `worker.py`.

Runs are in one of these places:

    queue      rows of the index, `queued`; any number, none of them in memory
    ready      a heap of ids that can go on: new, woken, found interrupted at the start
    active     in memory, a file open, at most `concurrency`
    parked     one timer, or nothing but a name; the file is closed

Everything that must survive goes through the intake's group commit before it has an effect, and every effect can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import fcntl
import functools
import heapq
import logging
import os
import socket
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from workflow import intake as ik
from workflow import journal as jr
from workflow.client import Run, ending_of, who
from workflow.clock import Clock, Timer, Timers
from workflow.context import Flow, flows, number_tasks
from workflow.errors import Conflict, FolderInUse, ForkRefused, MissingObject, NeedsReplica, Parked, Refused, Unreadable, WorkflowError
from workflow.intake import Indexed, Intake, Request
from workflow.journal import Event, Faults, Instance, Journal, Loaded
from workflow.lanes import Lane, Lanes
from workflow.objects import LocalObjects, Objects, Reader
from workflow.recording import Idle, Services
from workflow.state import ENDED, MAX_RESUMES, Durability, Record, RunStatus, check_id, ulid
from workflow.values import digest, encode, iso, loads
from workflow.worker import Ending, Execution

if TYPE_CHECKING:
    from workflow.durability import Replication

__all__ = ["Engine"]

log = logging.getLogger(__name__)
T = TypeVar("T")

LANES = 8
SWEEP_S = 3600.0
BROKEN_RETRY_S = (1.0, 60.0)


class _Active:
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


class _Parked:
    """A run that waits."""

    __slots__ = ("flow", "is_paused", "timer")

    def __init__(self, flow: str, timer: Timer | None, is_paused: bool) -> None:
        self.flow = flow
        self.timer = timer
        self.is_paused = is_paused


class _Quarantine(Exception):
    pass


class Engine:
    """Run the flows of a folder: each run in a file of its own, all that were interrupted resumed. An async context manager.

    async with Engine("agents/") as engine:
        run = await engine.start(research, "otters", id="otters-1")
        print(await run.result())
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        replica: str | None = None,
        host: str = "main",
        sync_interval_s: float | None = None,
        concurrency: int = 100,
        threads: int = 32,
        park_after_s: float = 0.5,
        poll_s: float = 0.1,
        stop_timeout_s: float = 10.0,
        keep: timedelta | None = timedelta(days=30),
        only: str | None = None,
        clock: Clock | None = None,
        random: Random | None = None,
        max_crashes: int = MAX_RESUMES,
        synchronous: Literal["FULL", "NORMAL", "OFF"] = "FULL",
        faults: Callable[[str, str], None] | None = None,
    ) -> None:
        """Prepare; entering the context begins.

        Args:
            folder: made when missing. One engine owns it at a time.
            replica: URL of a root below which all files are replicated, and restored when they are missing or overtaken here.
            host: name of this engine's runs there. An engine elsewhere that uses the same replica and host takes them over.
            sync_interval_s: least time between uploads that nobody waits for; as in `Replicator`.
            concurrency: so many runs in memory at once; parked and queued ones do not count.
            threads: for plain functions, as steps; as flows they have `concurrency` more.
            park_after_s: a run that only waits leaves memory after so many seconds, or at once when others want its place.
            poll_s: how often to look for requests of other processes.
            stop_timeout_s: when leaving the context, how long bodies may take to end before they are cut short.
            keep: files and objects of runs that ended are deleted after this time, their ids stay taken; None keeps them for ever.
            only: take up this run alone, and its children; all others are left as they are.
            clock: for tests (`workflow.testing.VirtualClock`).
            random: for the jitter of retries.
            max_crashes: a run that takes its process down so often without finishing a step is quarantined.
            synchronous: SQLite's setting; less than FULL loses what a power cut takes, and is for tests and comparisons.
            faults: for tests: called with a run's id and "before" or "after" around each of its commits, in a thread.
        """
        self.folder = Path(folder)
        self.sender = who()
        self._concurrency = concurrency
        self._threads = threads
        self._park_after_s = park_after_s
        self._poll_s = poll_s
        self._stop_timeout_s = stop_timeout_s
        self._keep = keep
        self._only = only
        self._clock = clock or Clock()
        self._random = random or Random()
        self._max_crashes = max_crashes
        self._synchronous = synchronous
        self._faults = faults
        self._machine = socket.gethostname()
        self._objects: Objects = LocalObjects(self.folder / ".objects")
        self._replica, self._host, self._interval_s = replica, host, sync_interval_s
        self._replication: Replication | None = None
        self._active: dict[str, _Active] = {}
        self._parked: dict[str, _Parked] = {}
        self._ready: list[tuple[int, int, str, str]] = []
        self._ready_ids: set[str] = set()
        self._held: dict[str, list[tuple[int, int, str, str]]] = {}
        self._queued: dict[str, bool] = {}
        self._starts: dict[str, deque[float]] = {}
        self._waiters: dict[str, list[asyncio.Future[tuple[str, str | None, str | None]]]] = {}
        self._broken: dict[str, int] = {}
        self._arrival = 0
        self._count = 0
        self._reserved = 0
        self._pending = 0
        self._claiming = False
        self._is_open = self._is_closing = False
        self._helpers: set[asyncio.Task[Any]] = set()

    # -- life --------------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Take the folder, and go on with every run that was interrupted.

        Raises:
            FolderInUse: another engine has it.
            Unreadable: the intake is damaged, or from a newer version.
        """
        host = self.folder / ".host"
        host.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(host / "lock", self.folder)
        try:
            self._loop = asyncio.get_running_loop()
            self._context = contextvars.copy_context()
            if self._replica is not None:
                from workflow.durability import Replication

                self._replication = Replication(self.folder, self._replica, host=self._host, sync_interval_s=self._interval_s)
                self._objects = self._replication.objects
                await self._replication.take_over()
            self._intake = await Intake.open(host / "intake.db", synchronous=self._synchronous, faults=self._faults)
            if self._replication is not None:
                await self._replication.attach_intake()
            self._template = jr.template()
            self._lanes = Lanes(LANES)
            self.timers = Timers(self._clock, self._loop)
            self._bodies = ThreadPoolExecutor(self._threads, thread_name_prefix="workflow step")
            self._flow_threads = ThreadPoolExecutor(max(1, self._concurrency), thread_name_prefix="workflow flow")
            self.reader = Reader(self.folder, self._objects)
            self._services = Services(
                clock=self._clock,
                timers=self.timers,
                random=self._random,
                machine=self._machine,
                bodies=self._bodies,
                flow_threads=self._flow_threads,
                objects=self._objects,
                reader=self.reader,
                outside=self,
                barrier=self._replication.barrier if self._replication is not None else None,
                check_owner=_anybody,
                on_idle=self._on_idle,
            )
            self._undo = number_tasks(self._loop, _make_task)
        except BaseException:
            os.close(self._lock)
            raise
        self._is_open = True
        self._poller = self._loop.create_task(self._poll())
        try:
            await self._recover()
        except BaseException:
            await self.crash()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let bodies that run end, for a while; record, close, and free the folder. What is not finished goes on at the next start."""
        self._is_closing = True
        self._poller.cancel()
        await asyncio.wait({self._poller})
        self._ready.clear()
        end = self._loop.time() + self._stop_timeout_s
        for active in list(self._active.values()):
            if active.execution is not None:
                active.execution.stop()
        while self._active and (left := end - self._loop.time()) > 0:
            await asyncio.wait([active.task for active in self._active.values() if active.task], timeout=left)
        while self._active:
            for active in self._active.values():
                if active.execution is not None:
                    active.execution.abandon()
            await asyncio.wait([active.task for active in self._active.values() if active.task], timeout=1.0)
        await self._close()

    async def _close(self) -> None:
        while self._helpers:
            await asyncio.wait(self._helpers)
        self._undo()
        self.timers.close()
        await self._intake.close()
        if self._replication is not None:
            await self._replication.close()
        await self._lanes.close()
        self._bodies.shutdown(wait=False)
        self._flow_threads.shutdown(wait=False)
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.cancel()
        self._is_open = False
        os.close(self._lock)

    async def crash(self) -> None:
        """Stop as a killed process would: nothing is recorded from now on. For tests; bodies in threads run to their end, unheard."""
        if not self._is_open:
            return
        self._is_closing = True
        self._poller.cancel()
        await asyncio.wait({self._poller})
        self._ready.clear()
        for helper in self._helpers:
            helper.cancel()
        while self._active:
            for active in self._active.values():
                if active.execution is not None:
                    active.execution.crash()
            await asyncio.wait([active.task for active in self._active.values() if active.task], timeout=0.1)
        await self._close()

    async def _recover(self) -> None:
        now = self._now()
        for id, status, wake_at, since, flow in await self._intake.do(ik.live):
            # Before `since` the clock has gone back: let the run itself say how long it waits.
            if status == "running" or (status == "waiting" and since is not None and now < since):
                self._make_ready(id, flow)
            else:
                self._park(id, flow, None if status == "paused" else self._due(wake_at), status == "paused")
        for flow in await self._intake.do(ik.flows_queued) if self._only is None else ():
            self._queued[flow] = True
        if self._only is not None:
            found = await self.indexed(self._only)
            if found is not None and found.status == "queued":
                self._make_ready(found.id, found.flow)
        for request in await self._intake.do(ik.open_requests):
            await self._dispatch(request)
        for request in await self._intake.do(ik.fresh_requests):
            await self._dispatch(request)
        self._fill()
        if self._keep is not None:
            self._help(self._sweep())

    async def _sweep(self) -> None:
        if self._keep is not None and not self._is_closing:
            await self.sweep(self._keep)
            self.timers.at(self._clock.monotonic() + SWEEP_S, lambda: self._help(self._sweep()))

    async def sweep(self, keep: timedelta) -> list[str]:
        """Delete files and objects of runs that ended longer ago; returns their ids, which stay taken."""
        limit = iso(self._clock.now() - keep)
        gone: list[str] = []
        while found := await self._intake.do(functools.partial(ik.ended_before, at=limit, limit=100)):
            await asyncio.to_thread(self._delete, found)
            await self._intake.do(functools.partial(ik.set_gone, ids=found, at=self._now()))
            gone += found
        return gone

    def _delete(self, ids: list[str]) -> None:
        for id in ids:
            path = self._path(id)
            objects = list(jr.objects_of(path)) if path.exists() else []
            if self._replication is not None:
                self._replication.forget(id, objects)
            else:
                self._objects.delete(id, objects)
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)

    async def _poll(self) -> None:
        """Look for requests of other processes: one `stat` each time, a query when it has changed."""
        seen: object = None
        while True:
            await asyncio.sleep(self._poll_s)  # what is there at the start is seen by `_recover`
            now = self._intake.stat()
            if now == seen:
                continue
            seen = now
            for request in await self._intake.do(ik.fresh_requests):
                await self._dispatch(request)

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

    # -- what users call ---------------------------------------------------------------------------------------------------------

    async def start(
        self,
        flow: Callable[..., Any],
        *args: Any,
        id: str | None = None,
        priority: int | None = None,
        durability: Durability | None = None,
        **kwargs: Any,
    ) -> Run:
        """Accept a run; durable on return. The rest are the flow's arguments.

        Args:
            id: of the run. With an id that is taken, this is that run; if it has another flow or input, `Run.result` raises `Conflict`.
            priority: higher ones are taken from the queue first; the flow's when not given.
            durability: of all its steps; the flow's when not given.

        Raises:
            NotJSON: an argument cannot be recorded.
            NeedsReplica: it asks for "replicated" without a replica.
            BadId: the id is not a usable one.
        """
        if not isinstance(flow, Flow):
            raise TypeError(f"not a flow: {flow!r}; decorate it with @flow")
        id = check_id(id if id is not None else ulid(self._now_ms()).lower())
        text, _ = flow.signature.encode(args, kwargs)
        durability = durability or flow.durability
        if self._services.barrier is None and (durability == "replicated" or flow.replicated_steps()):
            raise NeedsReplica(f"flow {flow.name}" if durability == "replicated" else f"step {flow.replicated_steps()[0]}")
        return await self._start(flow, id, text, flow.priority if priority is None else priority, durability)

    async def _start(
        self, flow: Flow[..., Any], id: str, text: str, priority: int, durability: Durability, parent: tuple[str, str] | None = None
    ) -> Run:
        if not self._is_open or self._is_closing:
            raise RuntimeError("the engine is not running")
        now = self._now()
        runs_now = id not in self._active and not self._queued.get(flow.name) and self._has_place(flow) and self._take_rate(flow)
        if runs_now:
            self._reserved += 1
        self._arrive()
        run = Indexed(
            id,
            flow.name,
            "running" if runs_now else "queued",
            None,
            priority,
            self._arrival,
            digest(text),
            parent[0] if parent else None,
            None,
            now,
            None,
        )
        body = {"flow": flow.name, "input": text, "priority": priority, "durability": durability, "parent": parent}
        request = Request(f"start:{id}", id, "start", encode(body, "start")[0], self.sender, now)
        self._pending += 1
        try:
            found = await self._intake.do(functools.partial(ik.add_start, run=run, request=request))
        finally:
            self._pending -= 1
            if runs_now:
                self._reserved -= 1
        if durability == "replicated" and self._replication is not None:
            await self._replication.intake_barrier()
        is_new = found is run
        conflict = not is_new and (found.input_sha256 != run.input_sha256 or found.flow != flow.name or found.parent_id != run.parent_id)
        if is_new and runs_now:
            self._activate(id, flow.name, request)
        elif is_new:
            self._queued[flow.name] = True
            self._fill()
        return Run(self, id, flow=flow, is_conflict=conflict)

    def run(self, id: str) -> Run:
        """Return the handle of a run."""
        return Run(self, check_id(id, longest=200))

    async def runs(self) -> list[Indexed]:
        """Return all runs of the folder, oldest first."""
        return await self._intake.do(ik.indexed)

    # -- what handles ask (see `client.Desk`) --------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> None:
        """Accept a request."""
        await self._accept(request)

    async def _accept(self, request: Request) -> None:
        def add(db: sqlite3.Connection) -> str | None:
            ik.add_request(db, request)
            return ik.refusal(db, request.id)

        reason = await self._intake.do(add)
        if reason is not None:
            raise Refused(request.instance, reason)
        await self._dispatch(request)
        if request.kind == "event":
            reason = await self._intake.do(functools.partial(ik.refusal, request=request.id))
            if reason is not None:
                raise Refused(request.instance, reason)

    async def indexed(self, id: str) -> Indexed | None:
        """Return a run."""
        active = self._active.get(id)
        ended = active.ended if active is not None else None  # before asking: when it is gone, the index has its end
        found = await self._intake.do(functools.partial(ik.one, id=id))
        return replace(found, status=ended) if found is not None and ended is not None else found

    async def ending(self, id: str) -> tuple[str, str | None, str | None]:
        """Wait for a run's end."""
        waiter: asyncio.Future[tuple[str, str | None, str | None]] = self._loop.create_future()
        waiters = self._waiters.setdefault(id, [])
        waiters.append(waiter)
        try:
            if id not in self._active:
                found = await self.indexed(id)
                if found is None:
                    raise Refused(id, "there is no such run")
                if found.status == "quarantined":
                    return found.status, None, found.error
                if found.gone_at is not None:
                    raise Refused(id, f"the run ended {found.status}, and its file was deleted at {found.gone_at}")
                if found.status in ENDED:
                    return await asyncio.to_thread(ending_of, await self._local(id), self._objects)
            return await waiter
        finally:
            waiters.remove(waiter)
            if not waiters:
                self._waiters.pop(id, None)

    async def records(self, id: str) -> list[Record]:
        """Return the steps of a run."""
        return (await asyncio.to_thread(jr.read, await self._local(id))).records

    async def refusal(self, request: str) -> str | None:
        """Return why a request was refused."""
        return await self._intake.do(functools.partial(ik.refusal, request=request))

    # -- what runs ask (see `worker.Outside`) ----------------------------------------------------------------------------------------

    async def start_child(self, parent: str, key: str, id: str, flow: Flow[..., Any], input: str) -> None:
        """Accept the start of a child. Again is harmless."""
        run = await self._start(flow, id, input, flow.priority, flow.durability, (parent, key))
        if run._is_conflict:
            raise Conflict(id)
        found = await self.indexed(id)
        if found is not None and found.status in ENDED:  # its message may have been taken by a copy of the parent: tell again
            await self._tell_parent_of(id, found)

    async def send_event(self, id: str, run: str, type: str, payload: str, sender: str) -> None:
        """Accept an event for another run."""
        body = encode({"type": type, "payload": payload}, "event")[0]
        await self._put(Request(id, run, "event", body, sender, self._now()))

    async def cancel_run(self, id: str, run: str, sender: str) -> None:
        """Accept the cancellation of another run."""
        await self._put(Request(id, run, "cancel", "{}", sender, self._now()))

    async def _put(self, request: Request) -> None:
        await self._intake.do(functools.partial(ik.add_request, request=request))
        self._help(self._dispatch(request))

    async def until_rest(self, id: str) -> str:
        """Return when a run has ended, is paused, or waits for something that is not due yet; returns its state.

        Raises:
            Refused: there is no such run.
        """
        while True:
            found = await self.indexed(id)
            if found is None:
                raise Refused(id, "there is no such run")
            if found.status in ENDED or (id in self._parked and id not in self._active):
                return found.status
            await asyncio.sleep(0.01)

    async def adopt(self, id: str) -> None:
        """Take up a file that is in the folder and in no index: one that was copied there.

        Raises:
            Unreadable: it is not an instance file.
        """
        instance = (await asyncio.to_thread(jr.read, self._path(check_id(id, longest=200)))).instance
        self._arrive()
        status = instance.status if instance.status in ENDED else "running"
        run = Indexed(
            id, instance.flow, status, None, instance.priority, self._arrival, instance.input_sha256, instance.parent_id, instance.error,
            instance.created_at, instance.finished_at,
        )  # fmt: skip
        await self._intake.do(functools.partial(ik.add_run, run=run))
        if status == "running":
            self._make_ready(id, instance.flow)
            self._fill()

    # -- requests ----------------------------------------------------------------------------------------------------------------

    async def _dispatch(self, request: Request) -> None:
        """Take a request to where it belongs, or refuse it. It stays in the intake until it is there."""
        self._pending += 1
        try:
            if request.kind == "start":
                await self._start_for_others(request)
            elif request.kind == "fork":
                await self._fork(request)
            else:
                await self._for_instance(request)
        except (WorkflowError, ValueError, KeyError, TypeError) as error:
            await self._refuse(request, str(error))
        finally:
            self._pending -= 1

    async def _for_instance(self, request: Request, tries: int = 10) -> None:
        found = await self.indexed(request.instance)
        if found is None:
            raise Refused(request.instance, "there is no such run")
        if found.status in ENDED:
            if request.kind == "event" and not loads(request.body)["type"].startswith("child:"):
                raise Refused(request.instance, f"the run is {found.status}")
            await self._intake.do(functools.partial(ik.done, request=request.id))
            return
        active = self._active.get(request.instance)
        if active is not None:
            if active.is_leaving:
                active.is_missed = True
            elif active.is_open:
                await self._apply(request.instance, active, request)
            return
        parked = self._parked.get(request.instance)
        if parked is not None and parked.is_paused and request.kind not in ("resume", "cancel"):
            return  # it is read when the run comes back
        if parked is not None:
            self._wake(request.instance)
        elif found.status != "queued" and request.instance not in self._ready_ids and self._is_wanted(request.instance) and tries:
            await self._for_instance(request, tries - 1)  # it has ended since we asked

    async def _apply(self, id: str, active: _Active, request: Request) -> None:
        """Let a run in memory record a request; then the intake may forget it."""
        execution = active.execution
        assert execution is not None
        try:
            if request.kind == "event":
                body = loads(request.body)
                await execution.receive_event(Event(request.id, str(body["type"]), str(body["payload"]), request.sender, request.sent_at))
            else:
                await execution.control(request.id, request.kind, request.sender, request.sent_at)
        except Parked:
            active.is_missed = True
            return
        if active.is_leaving:  # the file has it, the flow had gone
            active.is_missed = True
        if self._replication is not None:
            self._help(self._forget_when_replicated(id, request.id))
        else:
            self._intake.later(functools.partial(ik.taken, id=id, requests=[request.id]))

    async def _forget_when_replicated(self, id: str, request: str) -> None:
        """The intake, which is replicated, too, keeps a request until the run's replica has it."""
        assert self._replication is not None
        with contextlib.suppress(Exception):  # it stays in the intake then, and taking it in again is harmless
            await self._replication.barrier(id)
            self._intake.later(functools.partial(ik.taken, id=id, requests=[request]))

    async def _refuse(self, request: Request, reason: str) -> None:
        log.warning("request refused id=%s kind=%s request=%s reason=%r", request.instance, request.kind, request.id, reason)
        if isinstance(reason, str) and reason.startswith("request for run"):
            reason = reason.partition(" refused: ")[2]
        await self._intake.do(functools.partial(ik.refuse, request=request, reason=reason, at=self._now()))

    async def _start_for_others(self, request: Request) -> None:
        body = loads(request.body)
        flow = flows.get(str(body["flow"]))
        if flow is None:
            raise Refused(request.instance, f"this engine knows no flow {body['flow']!r}")
        check_id(request.instance)
        flow.signature.decode(str(body["input"]), self.reader)
        run = await self._start(flow, request.instance, str(body["input"]), int(body["priority"]), flow.durability)
        if run._is_conflict:
            raise Conflict(request.instance)
        await self._intake.do(functools.partial(ik.done, request=request.id))

    # -- places ------------------------------------------------------------------------------------------------------------------

    def _has_place(self, flow: Flow[..., Any] | None) -> bool:
        if len(self._active) + self._reserved >= self._concurrency:
            return False
        if flow is None or flow.concurrency is None:
            return True
        return sum(active.flow == flow.name for active in self._active.values()) + self._reserved < flow.concurrency

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
        self._parked[id] = _Parked(flow, timer, is_paused)

    def _fill(self) -> None:
        """Take up what is ready, then what is queued, as far as there are places."""
        if self._is_closing:
            return
        held = []
        while self._ready and len(self._active) + self._reserved < self._concurrency:
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
                    self._reserved += 1
                if not wanted:
                    continue
                found: list[tuple[Indexed, Request]] = []
                try:
                    found = await self._intake.do(functools.partial(_claimed, flow=name, limit=wanted))
                finally:
                    self._reserved -= wanted
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
        return idle and not self._pending and not self._ready and not self._claiming and not self._helpers and not self._reserved

    # -- one run -----------------------------------------------------------------------------------------------------------------

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.db"

    async def _local(self, id: str) -> Path:
        """Return the path of a run's file, which is here or comes from the replica."""
        path = self._path(id)
        if self._replication is not None and not path.exists():
            await asyncio.to_thread(self._replication.restore_missing, id)
        return path

    def _activate(self, id: str, flow: str, start: Request | None) -> None:
        active = self._active[id] = _Active(flow)
        active.task = self._task(self._live(id, active, start))

    async def _live(self, id: str, active: _Active, start: Request | None) -> None:
        """Open a run, let it run, close it, and say what became of it."""
        try:
            ending = await self._opened(id, active, start)
            if ending is not None:
                await self._leave(id, active, ending)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if not self._is_closing:
                log.error("run is broken off id=%s error=%r", id, str(error), exc_info=error)
        finally:
            del self._active[id]
            if active.is_missed and id in self._parked:
                self._wake(id)
            elif active.is_missed and not self._is_closing:
                self._help(self._dispatch_rest(id))
            self._fill()

    async def _dispatch_rest(self, id: str) -> None:
        """What came when a run had ended is answered now."""
        for request in await self._intake.do(functools.partial(ik.requests_of, id=id)):
            await self._dispatch(request)

    async def _opened(self, id: str, active: _Active, start: Request | None) -> Ending | None:
        lane, journal = self._lanes.next(), None
        try:
            journal, loaded, large = await self._open(id, lane, start)
            flow, active.parent = flows.get(loaded.instance.flow), loaded.instance.parent_id
            if loaded.instance.status in ENDED:
                return await lane.submit(_ended, self._path(id), self._objects)
            if flow is None:
                raise _Quarantine(f"no code: this engine knows no flow {loaded.instance.flow!r}")
            if self._replication is not None:
                await self._replication.attach(id)
            active.execution = Execution(flow, loaded, journal, lane, self._services, large)
            await self._take_in(id, active)
            if self._is_closing:
                active.execution.stop()
            ending = await active.execution.run()
            if ending.kind == "ended":
                active.is_leaving = True
                active.ended = ending.status or None
                self._tell(id, ending)
            return ending
        except (Unreadable, _Quarantine, MissingObject) as error:
            await self._quarantine(id, str(error))
            return None
        except Exception as error:
            return Ending("broken", failure=error)
        finally:
            active.is_leaving = True
            if journal is not None:
                try:
                    await lane.submit(journal.close)
                except sqlite3.Error as error:
                    log.warning("close failed id=%s error=%r", id, str(error))
            if self._replication is not None:
                await self._replication.detach(id)

    async def _take_in(self, id: str, active: _Active) -> None:
        """Give a run what waits for it, in order. What comes meanwhile is found by the next look; afterwards `_for_instance` brings it."""
        applied: set[str] = set()
        while True:
            waiting = await self._intake.do(functools.partial(ik.requests_of, id=id))
            new = [request for request in waiting if request.kind in ("event", "cancel", "pause", "resume") and request.id not in applied]
            if not new:
                active.is_open = True
                return
            for request in new:
                await self._apply(id, active, request)
                applied.add(request.id)

    async def _open(self, id: str, lane: Lane, start: Request | None) -> tuple[Journal, Loaded, dict[str, str]]:
        is_known_here = start is not None and not (self._replication is not None and self._replication.is_successor)
        path = self._path(id) if is_known_here else await self._local(id)
        if start is None and not path.exists():
            requests = await self._intake.do(functools.partial(ik.requests_of, id=id))
            start = next((request for request in requests if request.kind == "start"), None)
            if start is None:
                raise _Quarantine(f"its file is missing: {path}")
        instance = None
        if start is not None:
            body = loads(start.body)
            parent = body.get("parent") or (None, None)
            now = self._now()
            instance = Instance(
                id, os.urandom(6).hex(), body["flow"], "running", body["input"], digest(body["input"]), now, now,
                parent_id=parent[0], parent_key=parent[1], durability=body["durability"], priority=body["priority"],
            )  # fmt: skip
        faults = functools.partial(self._faults, id) if self._faults is not None else None
        return await lane.submit(self._open_file, path, instance, faults)

    def _open_file(self, path: Path, instance: Instance | None, faults: Faults | None) -> tuple[Journal, Loaded, dict[str, str]]:
        """Make or open a file, in a lane. A file that says `running` was left by a crash: count that, and give up at some number."""
        is_new = instance is not None and jr.create(path, self._template, instance)
        journal = Journal(path, synchronous=self._synchronous, faults=faults)
        try:
            loaded = journal.load()
            if is_new or loaded.instance.status in ENDED:
                return journal, loaded, {}
            writes = []
            if loaded.instance.status == "running":
                loaded.instance.resumes += 1
                writes.append(jr.put_resumes(loaded.instance.resumes))
                if loaded.instance.resumes >= self._max_crashes:
                    now = self._now()
                    journal.commit([*writes, jr.put_status("quarantined", now)])
                    raise _Quarantine(f"it took its process down {loaded.instance.resumes} times without finishing a step")
            else:
                writes.append(jr.put_status("running", self._now()))
            journal.commit(writes)
            wanted = [record.output_sha256 for record in loaded.records if record.output_sha256]
            return journal, loaded, {sha256: self.reader.read(loaded.instance.id, sha256).decode() for sha256 in wanted}
        except sqlite3.DatabaseError as error:
            journal.close()
            raise Unreadable(str(path), str(error)) from error
        except BaseException:
            journal.close()
            raise

    async def _leave(self, id: str, active: _Active, ending: Ending) -> None:
        match ending.kind:
            case "ended":
                self._broken.pop(id, None)
                self._ended(id, active.parent, ending)
            case "parked" if not (ending.was_touched or active.is_missed):
                self._intake.later(functools.partial(ik.set_waiting, id=id, wake_at=self._wall(ending.wake_due), since=self._now()))
                self._park(id, active.flow, ending.wake_due, is_paused=False)
            case "paused":
                self._intake.later(functools.partial(ik.set_status, id=id, status="paused"))
                self._park(id, active.flow, None, is_paused=True)
                active.is_missed = active.is_missed or ending.was_touched
            case "broken":
                if isinstance(ending.failure, sqlite3.DatabaseError) and not isinstance(ending.failure, sqlite3.OperationalError):
                    await self._quarantine(id, str(ending.failure))
                elif not self._is_closing:
                    tries = self._broken[id] = self._broken.get(id, 0) + 1
                    delay = min(BROKEN_RETRY_S[0] * 2 ** (tries - 1), BROKEN_RETRY_S[1])
                    log.error("run is broken off id=%s error=%r retry_s=%s", id, str(ending.failure), delay, exc_info=ending.failure)
                    self._park(id, active.flow, self._clock.monotonic() + delay, is_paused=False)
            case _:  # parked, but something came meanwhile; or stopped: the index says running, which is right
                if not self._is_closing:
                    self._park(id, active.flow, None, is_paused=False)
                    active.is_missed = True

    def _ended(self, id: str, parent: str | None, ending: Ending) -> None:
        """Record an end in the index, in one transaction with what the parent is told."""
        message = self._message(id, parent, ending) if parent is not None else None

        def end(db: sqlite3.Connection) -> None:
            if message is not None:
                ik.add_request(db, message)
            ik.set_status(db, id, ending.status, error=ending.error, finished_at=self._now())

        if message is None:
            self._intake.later(end)
        else:
            self._help(self._end_and_tell(end, message))
        self._tell(id, ending)

    def _tell(self, id: str, ending: Ending) -> None:
        """Answer those in this process who wait for a run's end."""
        for waiter in self._waiters.get(id, ()):
            if not waiter.done():
                waiter.set_result((ending.status, ending.output, ending.error))

    async def _end_and_tell(self, end: Callable[[sqlite3.Connection], None], message: Request) -> None:
        await self._intake.do(end)
        await self._dispatch(message)

    def _message(self, id: str, parent: str, ending: Ending) -> Request:
        payload = encode({"status": ending.status, "output": ending.output, "error": ending.error}, "child")[0]
        body = encode({"type": f"child:{id}", "payload": payload}, "child")[0]
        return Request(f"child:{id}", parent, "event", body, id, self._now())

    async def _tell_parent_of(self, id: str, found: Indexed) -> None:
        if found.status == "quarantined":
            ending = Ending("ended", "quarantined", error=found.error)
        else:
            status, output, error = await asyncio.to_thread(ending_of, await self._local(id), self._objects)
            ending = Ending("ended", status, output=output, error=error)
        if found.parent_id is not None:
            await self._put(self._message(id, found.parent_id, ending))

    async def _quarantine(self, id: str, reason: str) -> None:
        """Leave a run alone from now on; the file stays as it is."""
        log.error("run quarantined id=%s reason=%r", id, reason)
        error = encode({"type": "Quarantined", "message": reason, "attempts": 0}, "error")[0]
        found = await self.indexed(id)
        self._ended(id, found.parent_id if found is not None else None, Ending("ended", "quarantined", error=error))

    # -- forks -------------------------------------------------------------------------------------------------------------------

    async def _fork(self, request: Request) -> None:
        body = loads(request.body)
        new = check_id(str(body["id"]))
        if await self.indexed(new) is not None:
            await self._intake.do(functools.partial(ik.done, request=request.id))
            return
        found = await self.indexed(request.instance)
        if self._replication is not None and request.instance in self._active:
            await self._replication.barrier(request.instance)
        if found is None or not self._path(request.instance).exists():
            raise ForkRefused(request.instance, "there is no such run, or it has not begun")
        temporary = self.folder / f".{new}.fork.tmp"
        lane = self._lanes.next()
        try:
            instance = await lane.submit(self._copy, request.instance, temporary, str(body["step"]), new)
        finally:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{temporary}{suffix}").unlink(missing_ok=True)
        self._arrive()
        run = Indexed(
            new,
            instance.flow,
            "running",
            None,
            instance.priority,
            self._arrival,
            instance.input_sha256,
            None,
            None,
            instance.created_at,
            None,
        )

        def add(db: sqlite3.Connection) -> None:
            ik.add_run(db, run)
            ik.done(db, request.id)

        await self._intake.do(add)
        self._make_ready(new, instance.flow)
        self._fill()

    def _copy(self, id: str, temporary: Path, step: str, new: str) -> Instance:
        """Make the file of a fork, in a lane: copy, cut, publish. Raises `ForkRefused`, `Unreadable`."""
        temporary.unlink(missing_ok=True)
        source = Journal(self._path(id))
        try:
            loaded = source.load()
            number = _cut_at(loaded, step)
            source.copy_to(temporary)
        finally:
            source.close()
        now = self._now()
        old = loaded.instance
        instance = Instance(
            new, os.urandom(6).hex(), old.flow, "waiting", old.input, old.input_sha256, now, now,
            forked_from=f"{id}/{step}", durability=old.durability, priority=old.priority,
        )  # fmt: skip
        jr.cut(temporary, instance, number)
        for sha256 in jr.objects_of(temporary):
            self._objects.copy(id, new, sha256)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        jr.publish(temporary, self._path(new))
        return instance

    # -- time --------------------------------------------------------------------------------------------------------------------

    def _now(self) -> str:
        return iso(self._clock.now())

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


def _make_task(coro: Any, scope: Any, context: Any) -> asyncio.Task[Any]:
    execution = scope.runner
    assert isinstance(execution, Execution)
    return execution.adopt(coro, scope, context)


def _anybody() -> None:
    """Without a replica the lock on the folder is all there is to own."""


def _claimed(db: sqlite3.Connection, flow: str, limit: int) -> list[tuple[Indexed, Request]]:
    found = []
    for run in ik.claim(db, flow, limit):
        starts = [request for request in ik.requests_of(db, run.id) if request.kind == "start"]
        found.append((run, starts[0]))
    return found


def _ended(path: Path, objects: Objects) -> Ending:
    status, output, error = ending_of(path, objects)
    return Ending("ended", status, output=output, error=error)


def _cut_at(loaded: Loaded, step: str) -> int:
    """Return the number up to which a fork at a step keeps records. Raises `ForkRefused`."""
    id = loaded.instance.id
    named = [record for record in loaded.records if step in (record.key, record.name, record.key.rpartition("#")[0])]
    if not named:
        raise ForkRefused(id, f"it has called no step {step!r}")
    number = named[0].after
    later = [record for record in loaded.records if record.kind == "tx" and record.status == "done" and (record.number or 0) > number]
    if later:
        last = max(record.number or 0 for record in later)
        after = [record.key for record in loaded.records if record.after >= last and record.kind not in ("patch", "cancel")]
        nearest = f"; the first step after the last of them is {after[0]}" if after else ""
        raise ForkRefused(id, f"transaction step {later[0].key} changed tables after {named[0].key} was called{nearest}")
    return number


def _take_lock(path: Path, folder: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + 0.2
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(file)
                raise FolderInUse(str(folder)) from None
            time.sleep(0.02)
        else:
            return file
