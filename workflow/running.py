"""One run of an engine: its file, its way through memory, and what becomes of it.

Everything that must survive goes through the intake's group commit before it has an effect, and every effect can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from workflow import intake as ik
from workflow import journal as jr
from workflow.client import ending_of
from workflow.context import flows
from workflow.errors import Elsewhere, MissingObject, Unreadable
from workflow.intake import Indexed, Request
from workflow.journal import Instance, Journal, Loaded
from workflow.lanes import Lane
from workflow.objects import Objects
from workflow.places import Active, Places
from workflow.state import ENDED
from workflow.values import digest, encode, loads
from workflow.worker import Ending, Execution

__all__ = ["BROKEN_RETRY_S", "Running"]

log = logging.getLogger(__name__)

BROKEN_RETRY_S = (1.0, 60.0)
"""How long a run that was broken off (a disk, a store, a lease) waits before it is tried again, and at most."""


class Quarantine(Exception):
    pass


class Running(Places):
    """Runs in memory."""

    async def _live(self, id: str, active: Active, start: Request | None) -> None:
        """Open a run, let it run, close it, and say what became of it."""
        try:
            ending = await self._opened(id, active, start)
            if ending is not None and ending.kind == "ended" and self._replication is not None:
                ending = await self._published(id, ending)
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

    async def _opened(self, id: str, active: Active, start: Request | None) -> Ending | None:
        lane, journal = self._lanes.next(), None
        try:
            path, is_new, is_contested = await self._file(id, lane, start)
            if self._replication is not None:
                await self._replication.attach(id, is_new=is_new, is_contested=is_contested)
            journal, loaded, large = await lane.submit(self._open_file, id, path, is_new)
            flow, active.parent = flows.get(loaded.instance.flow), loaded.instance.parent_id
            if loaded.instance.status in ENDED:
                return await lane.submit(_ended, self._path(id), self._objects)
            if flow is None:
                raise Quarantine(f"no code: this engine knows no flow {loaded.instance.flow!r}")
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
        except (Unreadable, Quarantine, MissingObject) as error:
            await self._quarantine(id, str(error))
            return None
        except Elsewhere as error:
            await self._moved(id, error)
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

    async def _take_in(self, id: str, active: Active) -> None:
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

    async def _file(self, id: str, lane: Lane, start: Request | None) -> tuple[Path, bool, bool]:
        """Return the path of a run's file, whether it was made now, and whether another host may have begun the same run."""
        path = self._path(id)
        if start is None and not path.exists():
            requests = await self._intake.do(functools.partial(ik.requests_of, id=id))
            start = next((request for request in requests if request.kind == "start"), None)
            if start is None and self._replication is None:
                raise Quarantine(f"its file is missing: {path}")
        if start is None:  # where it is missing, it comes from the replica when it is claimed
            return path, False, False
        body = loads(start.body)
        parent = body.get("parent") or (None, None)
        now = self._now()
        instance = Instance(
            id, os.urandom(6).hex(), body["flow"], "running", body["input"], digest(body["input"]), now, now,
            parent_id=parent[0], parent_key=parent[1], durability=body["durability"], priority=body["priority"],
            owner=self._host if self._replication is not None else None, traceparent=body.get("traceparent"),
        )  # fmt: skip
        return path, await lane.submit(jr.create, path, self._template, instance), bool(body.get("chosen", True))

    def _open_file(self, id: str, path: Path, is_new: bool) -> tuple[Journal, Loaded, dict[str, str]]:
        """Open a file, in a lane. One that says `running` was left by a crash: count that, and give up at some number."""
        faults = functools.partial(self._faults, id) if self._faults is not None else None
        journal = Journal(path, synchronous=self._synchronous, faults=faults)
        try:
            loaded = journal.load()
            if is_new or loaded.instance.status in ENDED:
                return journal, loaded, {}
            writes = []
            if loaded.instance.status == "running" and id not in self._broken:
                loaded.instance.resumes += 1
                writes.append(jr.put_resumes(loaded.instance.resumes))
                if loaded.instance.resumes >= self._max_crashes:
                    now = self._now()
                    journal.commit([*writes, jr.put_status("quarantined", now)])
                    raise Quarantine(f"it took its process down {loaded.instance.resumes} times without finishing a step")
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

    async def _published(self, id: str, ending: Ending) -> Ending:
        """Mark a run as ended for other machines, when its replica has its end; until then it counts as broken off here, and is tried again."""
        assert self._replication is not None
        try:
            await self._mark_done(id, ending.status, ending.error)
        except Exception as error:
            return Ending("broken", failure=error)
        return ending

    async def _mark_done(self, id: str, status: str, error: str | None) -> None:
        found = await self._known(id)
        assert self._replication is not None
        what = (found.flow, found.input_sha256) if found is not None else ("", "")
        await self._replication.mark_done(id, status, error, self._now(), what)

    async def _leave(self, id: str, active: Active, ending: Ending) -> None:
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

    # -- ends ----------------------------------------------------------------------------------------------------------------------

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
        if self._replication is not None:
            with contextlib.suppress(Exception):  # the index has it, which is replicated, too
                await self._mark_done(id, "quarantined", error)
        found = await self._known(id)
        self._ended(id, found.parent_id if found is not None else None, Ending("ended", "quarantined", error=error))

    async def _moved(self, id: str, error: Elsewhere) -> None:
        """A run is another host's: this one forgets it."""
        found = await self._known(id)
        if not await self._intake.do(functools.partial(ik.drop, id=id, owner="" if error.is_over else error.owner)):
            assert found is not None
            self._park(id, found.flow, self._clock.monotonic() + BROKEN_RETRY_S[0], is_paused=False)  # it may be claimed now
            return
        log.warning("run is another host's id=%s owner=%s", id, error.owner)
        self._winners[id] = error.winner
        for waiter in self._waiters.get(id, ()):
            if not waiter.done():
                waiter.set_exception(error)


def _ended(path: Path, objects: Objects) -> Ending:
    status, output, error = ending_of(path, objects)
    return Ending("ended", status, output=output, error=error)
