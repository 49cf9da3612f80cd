"""Requests: what users, other processes and other runs want of a run, on its way from the intake to the instance file."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sqlite3
from typing import Any

from replicator import ReplicatorError
from workflow import intake as ik
from workflow import journal as jr
from workflow.context import Flow, flows
from workflow.errors import Conflict, Parked, Refused, Unreadable, WorkflowError
from workflow.forks import Forks
from workflow.intake import Indexed, Request
from workflow.journal import Event
from workflow.places import Active
from workflow.state import ENDED, Durability, check_id
from workflow.tracing import checked
from workflow.values import digest, encode, loads

__all__ = ["Requests"]

log = logging.getLogger(__name__)

MAX_PRIORITY = 1 << 31

RETRY_S = 5.0
"""How long a request that could not be taken to its run, as a disk or a store failed, waits before it is tried again."""


class Requests(Forks):
    """Takes them in."""

    async def _start(
        self,
        flow: Flow[..., Any],
        id: str,
        text: str,
        priority: int,
        durability: Durability,
        parent: tuple[str, str] | None = None,
        *,
        is_chosen: bool = False,
        traceparent: str | None = None,
    ) -> bool:
        """Accept a run; durable on return. Returns whether the id is that of a run with another flow or input.

        Args:
            is_chosen: somebody chose the id, so that another host may have a run of it, too.
            traceparent: of what asked for it, where that is known.
        """
        self._check_open()
        now = self._now()
        runs_now = id not in self._active and not self._queued.get(flow.name) and self._has_place(flow) and self._take_rate(flow)
        if runs_now:
            self._reserved[flow.name] += 1
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
        body = {"flow": flow.name, "input": text, "priority": priority, "durability": durability, "parent": parent, "chosen": is_chosen}
        traceparent = traceparent or (self._services.tracing.start(flow.name, id) if self._services.tracing is not None else None)
        if traceparent:
            body["traceparent"] = traceparent
        request = Request(f"start:{id}", id, "start", encode(body, "start")[0], self.sender, now)
        self._pending += 1
        try:
            found = await self._intake.do(functools.partial(ik.add_start, run=run, request=request))
        finally:
            self._pending -= 1
            if runs_now:
                self._reserved[flow.name] -= 1
        if durability == "replicated" and self._replication is not None:
            await self._replication.intake_barrier()
        is_new = found is run
        conflict = not is_new and (found.input_sha256 != run.input_sha256 or found.flow != flow.name or found.parent_id != run.parent_id)
        if is_new and runs_now:
            self._activate(id, flow.name, request)
        elif is_new:
            self._queued[flow.name] = True
            self._fill()
        return conflict

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

    async def _dispatch(self, request: Request) -> None:
        """Take a request to where it belongs, or refuse it. It stays in the intake until it is there; where a disk or a store fails, it is tried again."""
        self._pending += 1
        try:
            if request.kind == "start":
                await self._start_for_others(request)
            elif request.kind == "fork":
                await self._fork(request)
            else:
                await self._for_instance(request)
        except (WorkflowError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            await self._refuse(request, str(error))
        except (sqlite3.Error, OSError, ReplicatorError) as error:
            self._check_open()
            log.error("request waits id=%s kind=%s request=%s error=%r", request.instance, request.kind, request.id, str(error))
            self.timers.at(self._clock.monotonic() + RETRY_S, functools.partial(self._again, request))
        finally:
            self._pending -= 1

    def _again(self, request: Request) -> None:
        if self._is_open and not self._is_closing and self._lost is None:
            self._help(self._dispatch(request))

    async def _for_instance(self, request: Request, tries: int = 10) -> None:
        found = await self._known(request.instance)
        if found is None:
            if self._remote is None or await self._remote.indexed(request.instance) is None:
                raise Refused(request.instance, "there is no such run")
            await asyncio.to_thread(self._remote.forward, request)
            await self._intake.do(functools.partial(ik.done, request=request.id))
            return
        if request.kind == "event":
            loads(str(loads(request.body)["payload"]))  # what is no JSON is refused now, not by the flow
        if found.status in ENDED:
            is_from_outside = request.kind == "event" and not str(loads(request.body)["type"]).startswith("child:")
            if is_from_outside and not await self._had(request):
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

    async def _had(self, request: Request) -> bool:
        """Say whether a run that has ended got a request, which comes again."""
        with contextlib.suppress(Unreadable):
            return request.id in (await asyncio.to_thread(jr.read, await self._local(request.instance))).seen
        return False

    async def _apply(self, id: str, active: Active, request: Request) -> None:
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
        if not -MAX_PRIORITY <= int(body["priority"]) <= MAX_PRIORITY:
            raise ValueError(f"not a priority: {body['priority']}")
        flow.signature.decode(str(body["input"]), self.reader)
        is_conflict = await self._start(
            flow,
            request.instance,
            str(body["input"]),
            int(body["priority"]),
            flow.durability,
            is_chosen=True,
            traceparent=checked(body.get("traceparent")),
        )
        if is_conflict:
            raise Conflict(request.instance)
        await self._intake.do(functools.partial(ik.done, request=request.id))

    async def _put(self, request: Request) -> None:
        await self._intake.do(functools.partial(ik.add_request, request=request))
        self._help(self._dispatch(request))

    # -- what runs ask (see `recording.Outside`) -----------------------------------------------------------------------------------

    async def start_child(self, parent: str, key: str, id: str, flow: Flow[..., Any], input: str, traceparent: str | None) -> None:
        """Accept the start of a child. Again is harmless."""
        is_conflict = await self._start(flow, id, input, flow.priority, flow.durability, (parent, key), traceparent=traceparent)
        if is_conflict:
            raise Conflict(id)
        found = await self._known(id)
        if found is not None and found.status in ENDED:  # its message may have been taken by a copy of the parent: tell again
            await self._tell_parent_of(id, found)

    async def send_event(self, id: str, run: str, type: str, payload: str, sender: str) -> None:
        """Accept an event for another run."""
        body = encode({"type": type, "payload": payload}, "event")[0]
        await self._put(Request(id, run, "event", body, sender, self._now()))

    async def cancel_run(self, id: str, run: str, sender: str) -> None:
        """Accept the cancellation of another run."""
        await self._put(Request(id, run, "cancel", "{}", sender, self._now()))
