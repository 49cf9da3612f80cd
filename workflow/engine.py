"""`Engine`: the runs of one folder. Its life, and what users call; its parts are `places`, `running`, `forks` and `requests`; how a run runs is in `worker.py`.

Everything that must survive goes through the intake's group commit before it has an effect, and every effect can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import fcntl
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from workflow import intake as ik
from workflow import journal as jr
from workflow.client import Run, ending_of, who
from workflow.clock import Clock, Timers
from workflow.context import Flow, number_tasks
from workflow.errors import (
    Elsewhere,
    FolderInUse,
    NeedsReplica,
    NotOwner,
    Refused,
)
from workflow.fleet import Fleet
from workflow.intake import Indexed, Intake, Request
from workflow.lanes import Lanes, Pool
from workflow.objects import LocalObjects, Objects, Reader
from workflow.post import Postman
from workflow.recording import Services
from workflow.state import ENDED, MAX_RESUMES, Durability, Record, check_id, ulid
from workflow.tracing import tracing_of
from workflow.values import digest, iso
from workflow.worker import Execution

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from replicator import ReplicatorError

__all__ = ["Engine"]

log = logging.getLogger(__name__)
T = TypeVar("T")

LANES = 8
SWEEP_S = 3600.0


class Engine(Fleet):
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
        lease_ttl_s: float = 30.0,
        concurrency: int = 100,
        threads: int = 32,
        park_after_s: float = 0.5,
        poll_s: float = 0.1,
        inbox_poll_s: float = 5.0,
        fleet: bool = False,
        fleet_poll_s: float = 5.0,
        resources: Mapping[str, float] | None = None,
        stop_timeout_s: float = 10.0,
        keep: timedelta | None = timedelta(days=30),
        only: str | None = None,
        clock: Clock | None = None,
        random: Random | None = None,
        max_crashes: int = MAX_RESUMES,
        tracer: Tracer | Literal[False] | None = None,
        synchronous: Literal["FULL", "NORMAL", "OFF"] = "FULL",
        faults: Callable[[str, str], None] | None = None,
    ) -> None:
        """Prepare; entering the context begins.

        Args:
            folder: made when missing. One engine owns it at a time.
            replica: URL of a root below which all files are replicated, and restored when they are missing or overtaken here.
            host: name of this engine's runs there: one engine at a time has it. When that one is gone, another one of the same name takes its runs over.
            sync_interval_s: least time between uploads that nobody waits for; as in `Replicator`.
            lease_ttl_s: an engine that gives no sign of life for so long may be taken over; 1 to 3600. One PUT each third of it.
            concurrency: so many runs in memory at once; parked and queued ones do not count.
            threads: for plain functions, as steps; as flows they have `concurrency` more.
            park_after_s: a run that only waits leaves memory after so many seconds, or at once when others want its place.
            poll_s: how often to look for requests of other processes.
            inbox_poll_s: how often to look for requests of other machines in the replica: one LIST, and less often (30 s) while nothing comes;
                0 for never, see `look_into_inbox`.
            fleet: with a replica: be one of several hosts, which take over from each other; see docs/fleets-of-hosts.md.
            fleet_poll_s: how often to look at the others: two LISTs, and a GET for each of some three hosts.
            resources: what this host has, for flows that need it (`@flow(needs=)`).
            stop_timeout_s: when leaving the context, how long bodies may take to end before they are cut short.
            keep: files and objects of runs that ended are deleted after this time, their ids stay taken; None keeps them for ever.
            only: take up this run alone, and its children; all others are left as they are.
            clock: for tests (`workflow.testing.VirtualClock`).
            random: for the jitter of retries.
            max_crashes: a run that takes its process down so often without finishing a step is quarantined.
            tracer: of OpenTelemetry. None: spans go to the provider that the application has set, and there are none when it has set none as this context
                is entered. False: none in any case.
            synchronous: SQLite's setting; less than FULL loses what a power cut takes, and is for tests and comparisons.
            faults: for tests: called with a run's id and "before" or "after" around each of its commits, in a thread, and
                around each wait for the replica.
        """
        super().__init__()
        self.poll_s = poll_s
        self.folder = Path(folder)
        self.sender = who()
        self._concurrency = concurrency
        self._threads = threads
        self._park_after_s = park_after_s
        self._inbox_poll_s = inbox_poll_s
        self._stop_timeout_s = stop_timeout_s
        self._keep = keep
        self._only = only
        self._clock = clock or Clock()
        self._random = random or Random()
        self._max_crashes = max_crashes
        self._tracer = tracer
        self._synchronous = synchronous
        self._faults = faults
        self._machine = socket.gethostname()
        self._objects: Objects = LocalObjects(self.folder / ".objects")
        self._replica, self._host, self._interval_s = replica, check_id(host), sync_interval_s
        self._lease_ttl_s = lease_ttl_s
        self._is_member, self._fleet_poll_s, self._resources = fleet, fleet_poll_s, dict(resources or {})
        if fleet and (replica is None or only is not None):
            raise ValueError("a host of a fleet needs replica=, and all of its runs")
        self._stopped = asyncio.Event()
        self._fleet_task: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Take the folder, and go on with every run that was interrupted.

        Raises:
            FolderInUse: another engine has it.
            HostInUse: an engine of the same host, with another folder, owns its runs and lives.
            Unreadable: the intake is damaged, or from a newer version.
        """
        host = self.folder / ".host"
        host.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(host / "lock", self.folder)
        try:
            self._loop = asyncio.get_running_loop()
            self._context = contextvars.copy_context()
            if self._replica is not None:
                from workflow.bucket import Marks
                from workflow.durability import Replication
                from workflow.inbox import Inbox
                from workflow.remote import BucketDesk

                self._replication = Replication(
                    self.folder, self._replica, host=self._host, sync_interval_s=self._interval_s, lease_ttl_s=self._lease_ttl_s
                )
                self._objects = self._replication.objects
                self._remote = BucketDesk(self._replica, self.sender)
                self._post = Postman(Inbox(self._replica), Marks(self._replica, "_refused"), Marks(self._replica, "_hosts", shard="all"))
                self._replication.on_lost = self._on_lost
                if self._is_member:
                    self._join()
                await self._replication.take_over()
            self._intake = await Intake.open(host / "intake.db", synchronous=self._synchronous, faults=self._faults)
            if self._replication is not None:
                await self._replication.attach_intake()
            self._template = jr.template()
            self._lanes = Lanes(LANES)
            self.timers = Timers(self._clock, self._loop)
            self._bodies = Pool(self._lanes.answer, self._loop, self._threads, "workflow step")
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
                barrier=self._barrier if self._replication is not None else None,
                check_owner=self._replication.check_owner if self._replication is not None else _anybody,
                on_idle=self._on_idle,
                tracing=tracing_of(self._tracer),
            )
            self._undo = number_tasks(self._loop, _make_task)
        except BaseException:
            if self._replication is not None:
                await self._replication.close(release=True)
            if self._remote is not None and self._post is not None:
                self._remote.close()
                self._post.close()
            if self._is_member:
                self._part_from_fleet()
            os.close(self._lock)
            raise
        self._is_open = True
        self._pollers = {self._loop.create_task(self._poll())}
        if self._post is not None and self._inbox_poll_s:
            self._pollers.add(self._loop.create_task(self._poll_inbox()))
        try:
            if self._replication is not None:
                await self._recover_inherited(self._replication)
            await self._recover()
        except BaseException:
            await self.crash()
            raise
        if self._is_member:
            self._fleet_task = self._loop.create_task(self._poll_fleet())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let bodies that run end, for a while; record, close, and free the folder. What is not finished goes on at the next start."""
        self._is_closing = True
        await self._stop_polling()
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

    async def _barrier(self, id: str) -> None:
        """Return when the replica has all that a run has committed. Raises `ReplicatorError`."""
        assert self._replication is not None
        if self._faults is not None:
            self._faults(id, "before")
        await self._replication.barrier(id)
        if self._faults is not None:
            self._faults(id, "after")

    async def _stop_polling(self) -> None:
        for poller in self._pollers:
            poller.cancel()
        await asyncio.wait(self._pollers)
        if self._fleet_task is not None:
            self._parting.set()
            await asyncio.wait({self._fleet_task})

    async def _close(self, *, release: bool = True) -> None:
        while self._helpers:
            await asyncio.wait(self._helpers)
        self._undo()
        self.timers.close()
        await self._intake.close()
        if self._replication is not None:
            await self._replication.close(release=release)
        if self._remote is not None and self._post is not None:
            await asyncio.to_thread(self._remote.close)
            await asyncio.to_thread(self._post.close)
        if self._is_member:
            await asyncio.to_thread(self._part_from_fleet)
        await self._lanes.close()
        self._bodies.close()
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
        await self._stop_polling()
        self._ready.clear()
        for helper in self._helpers:
            helper.cancel()
        while self._active:
            for active in self._active.values():
                if active.execution is not None:
                    active.execution.crash()
            await asyncio.wait([active.task for active in self._active.values() if active.task], timeout=0.1)
        await self._close(release=False)

    # -- ownership ---------------------------------------------------------------------------------------------------------------

    def _on_lost(self, id: str, error: ReplicatorError) -> None:
        """Somebody else owns a run, or this host; called by any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._stop_run if id else self._stop_host, id, error)

    def _stop_run(self, id: str, error: Exception) -> None:
        active = self._active.get(id)
        if active is not None and active.execution is not None:
            active.execution.lose(error)

    def _stop_host(self, _: str, error: Exception) -> None:
        """Run nothing any more: no body begins, nothing is recorded, whoever waits hears of it."""
        if self._lost is not None:
            return
        self._lost = NotOwner(f"host {self._host}", str(error))
        log.error("this engine has stopped host=%s folder=%s reason=%r", self._host, self.folder, str(error))
        self._stopped.set()
        for active in self._active.values():
            if active.execution is not None:
                active.execution.lose(self._lost)
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(self._lost)

    async def until_lost(self) -> None:
        """Wait until this host is another engine's, and raise that; else for ever. For processes that do nothing but run flows.

        Raises:
            NotOwner: somebody has taken this host over.
        """
        await self._stopped.wait()
        assert self._lost is not None
        raise self._lost

    async def advance(self, id: str) -> bool:
        """Look now for what waits for a run, rather than when the next look is due; returns whether it is this host's. Again is harmless.

        Raises:
            ReplicatorError: the replica cannot be read.
        """
        self._check_open()
        if await self._known(check_id(id, longest=200)) is None:
            return False
        await self.look_into_inbox()
        return True

    async def take(self, id: str) -> Run:
        """Go on here with a run of another host of the same replica, which is gone: that host's writes to it are refused from now on.

        Whether it is gone is the caller's to know (its lease, `<root>/_hosts/<host>/lock.json`, is over): of a living one, local bodies of the run that
        is taken may run on both for a moment.

        Raises:
            Refused: the replica has no such run.
            NotOwner: this host's lease is over.
            ReplicatorError: it could not be claimed.
        """
        self._check_open()
        if self._replication is None:
            raise NeedsReplica(f"taking over run {id}")
        if await self._known(check_id(id, longest=200)) is None:
            await self._replication.take(id)
            await self.adopt(id)
        return self.run(id)

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
            found = await self._known(self._only)
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
        """Delete runs that ended longer ago: replica, file, and objects, in this order; returns their ids, which stay taken.

        Each of the three can be done again, and the index says that a run is gone when all are. Refusals of that age go, too.
        """
        limit = iso(self._clock.now() - keep)
        gone: list[str] = []
        while found := await self._intake.do(functools.partial(ik.ended_before, at=limit, limit=100)):
            await asyncio.to_thread(self._delete, found)
            await self._intake.do(functools.partial(ik.set_gone, ids=found, at=self._now()))
            gone += found
        if self._post is not None:
            await asyncio.to_thread(self._post.refused.delete_before, int((self._clock.now() - keep).timestamp() * 1e9))
        return gone

    def _delete(self, ids: list[str]) -> None:
        for id in ids:
            if self._replication is not None:
                self._replication.forget(id)
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self._path(id)}{suffix}").unlink(missing_ok=True)
            self._objects.delete(id)

    async def _poll(self) -> None:
        """Look for requests of other processes: one `stat` each time, a query when it has changed."""
        seen: object = None
        while True:
            await asyncio.sleep(self.poll_s)  # what is there at the start is seen by `_recover`
            now = self._intake.stat()
            if now == seen:
                continue
            seen = now
            for request in await self._intake.do(ik.fresh_requests):
                await self._dispatch(request)

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
        is_chosen = id is not None
        id = check_id(id if id is not None else ulid(self._now_ms()).lower())
        text, _ = flow.signature.encode(args, kwargs)
        durability = durability or flow.durability
        if self._services.barrier is None and (durability == "replicated" or flow.replicated_steps()):
            raise NeedsReplica(f"flow {flow.name}" if durability == "replicated" else f"step {flow.replicated_steps()[0]}")
        wanted = flow.priority if priority is None else priority
        is_conflict = await self._start(flow, id, text, wanted, durability, is_chosen=is_chosen)
        return Run(self, id, flow=flow, is_conflict=is_conflict, wanted=(flow.name, digest(text)))

    def run(self, id: str) -> Run:
        """Return the handle of a run."""
        return Run(self, check_id(id, longest=200))

    async def runs(self) -> list[Indexed]:
        """Return all runs of the folder, oldest first."""
        return await self._intake.do(ik.indexed)

    # -- what handles ask (see `client.Desk`) --------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> None:
        """Accept a request; one for a run of another host goes to the replica's inbox."""
        self._check_open()
        if (
            self._remote is not None
            and await self._known(request.instance) is None
            and await self._remote.indexed(request.instance) is not None
        ):
            await self._remote.submit(request)
        else:
            await self._accept(request)

    async def indexed(self, id: str) -> Indexed | None:
        """Return a run, also one of another host of the same replica."""
        found = await self._known(id)
        return found if found is not None or self._remote is None else await self._remote.indexed(id)

    def winner(self, id: str) -> tuple[str, str] | None:
        """Return (flow, input digest) of the run that has an id which was also started here, where another host was first."""
        return self._winners.get(id)

    async def ending(self, id: str) -> tuple[str, str | None, str | None]:
        """Wait for a run's end."""
        waiter: asyncio.Future[tuple[str, str | None, str | None]] = self._loop.create_future()
        waiters = self._waiters.setdefault(id, [])
        waiters.append(waiter)
        try:
            if id not in self._active:
                found = await self._known(id)
                if found is None and self._remote is not None:
                    return await self._remote.ending(id)
                if found is None:
                    raise Refused(id, "there is no such run")
                if found.status == "quarantined":
                    return found.status, None, found.error
                if found.gone_at is not None:
                    raise Refused(id, f"the run ended {found.status}, and its file was deleted at {found.gone_at}")
                if self._replication is not None and id in self._replication.inherited:  # perhaps another heir's
                    assert self._remote is not None
                    return await self._remote.ending(id)
                if found.status in ENDED:
                    return await asyncio.to_thread(ending_of, await self._local(id), self._objects)
            return await waiter
        except Elsewhere:
            assert self._remote is not None
            return await self._remote.ending(id)
        finally:
            waiters.remove(waiter)
            if not waiters:
                self._waiters.pop(id, None)

    async def records(self, id: str) -> list[Record]:
        """Return the steps of a run; none of one that has not begun."""
        if self._remote is not None and await self._known(id) is None:
            return await self._remote.records(id)
        path = self._path(id)
        if not path.exists() and await self._intake.do(functools.partial(ik.is_to_begin, id=id)):
            return []
        return (await asyncio.to_thread(jr.read, await self._local(id))).records

    async def refusal(self, request: str) -> str | None:
        """Return why a request was refused."""
        reason = await self._intake.do(functools.partial(ik.refusal, request=request))
        return reason if reason is not None or self._remote is None else await self._remote.refusal(request)

    # -- what runs ask (see `worker.Outside`) ----------------------------------------------------------------------------------------

    async def until_rest(self, id: str) -> str:
        """Return when a run has ended, is paused, or waits for something that is not due yet; returns its state.

        Raises:
            Refused: there is no such run.
        """
        while True:
            found = await self._known(id)
            if found is None:
                raise Refused(id, "there is no such run")
            if found.status in ENDED:
                return found.status
            if id in self._parked and id not in self._active:
                found = await self._known(id)  # what the index was told when it parked
                assert found is not None
                return found.status
            await asyncio.sleep(0.01)

    async def adopt(self, id: str) -> None:
        """Take up a file that is in the folder and in no index: one that was copied there.

        Raises:
            Unreadable: it is not an instance file.
        """
        instance = await asyncio.to_thread(jr.read_instance, self._path(check_id(id, longest=200)))
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

    # -- places ------------------------------------------------------------------------------------------------------------------

    # -- one run -----------------------------------------------------------------------------------------------------------------

    # -- forks -------------------------------------------------------------------------------------------------------------------

    # -- time --------------------------------------------------------------------------------------------------------------------


def _make_task(coro: Any, scope: Any, context: Any) -> asyncio.Task[Any]:
    execution = scope.runner
    assert isinstance(execution, Execution)
    return execution.adopt(coro, scope, context)


def _anybody() -> None:
    """Without a replica the lock on the folder is all there is to own."""


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
