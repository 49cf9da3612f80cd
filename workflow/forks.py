"""Forks: a run made from a copy of another one's file, cut where a step was first called.

Records, events, state and objects can be taken back; what transaction steps did to the user's own tables cannot. Where one of them came after the cut, the copy is made
from the replica instead, at a TXID at which the run stood exactly there. Several commits may share one upload, so that there need not be one: then the
fork is refused, with the nearest step at which it would be possible.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
from pathlib import Path

from workflow import intake as ik
from workflow import journal as jr
from workflow.errors import ForkRefused
from workflow.intake import Indexed, Request
from workflow.journal import Instance, Journal, Loaded
from workflow.running import Running
from workflow.state import check_id
from workflow.values import loads

__all__ = ["Forks"]


class Forks(Running):
    """Makes them."""

    async def _fork(self, request: Request) -> None:
        """Make a fork, once: a request may be found by several at a start (intake, inbox, other processes), and all of them wait for the one copy."""
        body = loads(request.body)
        new = check_id(str(body["id"]))
        async with self._forking:
            if await self._known(new) is None:
                await self._make_fork(request, new, str(body["step"]))
            else:
                await self._intake.do(functools.partial(ik.done, request=request.id))

    async def _make_fork(self, request: Request, new: str, step: str) -> None:
        found = await self._known(request.instance)
        active = self._active.get(request.instance)
        if active is not None and active.is_leaving and active.task is not None:
            await asyncio.wait({active.task})
        elif active is not None and self._replication is not None:
            await self._replication.barrier(request.instance)
        if found is None or not (await self._local(request.instance)).exists():
            raise ForkRefused(request.instance, "there is no such run, or it has not begun")
        temporary = self.folder / f".{new}.fork.tmp"
        lane = self._lanes.next()
        try:
            instance = await lane.submit(self._copy, request.instance, temporary, step, new)
            await asyncio.to_thread(self._copy_objects, request.instance, temporary, new)
            await lane.submit(jr.publish, temporary, self._path(new))
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
        """Make the file of a fork, in a lane: copy and cut. Raises `ForkRefused`, `Unreadable`."""
        temporary.unlink(missing_ok=True)
        source = Journal(self._path(id))
        try:
            loaded = source.load()
            number, refusal = _cut_at(loaded, step)
            if refusal is None:
                source.copy_to(temporary)
        finally:
            source.close()
        count = sum(record.is_final and (record.number or 0) <= number for record in loaded.records)
        if refusal is not None and (self._replication is None or not self._replication.restore_boundary(id, temporary, number, count)):
            raise refusal
        if refusal is not None:
            jr.add_events(temporary, self._path(id))
        now = self._now()
        old = loaded.instance
        instance = Instance(
            new, os.urandom(6).hex(), old.flow, "waiting", old.input, old.input_sha256, now, now,
            forked_from=f"{id}/{step}", durability=old.durability, priority=old.priority,
            owner=self._host if self._replication is not None else None, traceparent=old.traceparent,
        )  # fmt: skip
        jr.cut(temporary, instance, number)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        return instance

    def _copy_objects(self, id: str, temporary: Path, new: str) -> None:
        for sha256 in jr.objects_of(temporary):
            self._objects.copy(id, new, sha256)


def _cut_at(loaded: Loaded, step: str) -> tuple[int, ForkRefused | None]:
    """Return the number up to which a fork at a step keeps records, and why the newest file cannot be cut there. Raises `ForkRefused`."""
    id = loaded.instance.id
    named = [record for record in loaded.records if step in (record.key, record.name, record.key.rpartition("#")[0])]
    if not named:
        raise ForkRefused(id, f"it has called no step {step!r}")
    number = named[0].after
    later = [record for record in loaded.records if record.kind == "tx" and record.status == "done" and (record.number or 0) > number]
    refusal = None
    if later:
        last = max(record.number or 0 for record in later)
        after = [record.key for record in loaded.records if record.after >= last and record.kind not in ("patch", "cancel")]
        nearest = f"; the first step after the last of them is {after[0]}" if after else ""
        refusal = ForkRefused(id, f"transaction step {later[0].key} changed tables after {named[0].key} was called{nearest}")
    return number, refusal
