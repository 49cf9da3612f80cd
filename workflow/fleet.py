"""A host among others on one root: says how it stands, watches some of the others, takes over those that are gone, and takes in what it is given.

One look, every `fleet_poll_s`: a LIST of the records, a LIST of heirs, and a GET of `lock.json` for each host that this one watches. Each host is watched by
`WATCHERS` others; a lease that stays as it is for its whole time, or was released, is acquired, and who acquires it divides the runs (`handing.py`). So an owner that has died
is followed within its lease's time, a look of its watchers, and a look of the heirs. When the store did not answer, or this process slept, watching begins anew: the
leases that stood still meanwhile may be of hosts that live.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
import shutil
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.errors import LeaseHeld, ReplicatorError
from workflow import intake as ik
from workflow.context import flows
from workflow.errors import NotOwner, WorkflowError
from workflow.intake import Indexed, Request
from workflow.membership import GONE, KEPT_TAKEOVERS, UP, HostRecord, Members, Part, Takeover
from workflow.placement import Candidate, first, shard_of
from workflow.post import Post
from workflow.values import loads

if TYPE_CHECKING:
    from workflow.durability import Replication
    from workflow.handing import Handed, HostRecords
    from workflow.ownership import Ownership

__all__ = ["Fleet"]

log = logging.getLogger(__name__)

RECORD_PART = 1 / 3
SLEPT_PART = 0.5
"""A look that comes later than this part of the lease's time begins anew."""
LEFT_RETRY_S = 60.0
PATIENCE = 10
GONE_KEPT_S = 86400.0


class Fleet(Post):
    """The part of an engine that belongs to a fleet."""

    _is_member: bool
    _fleet_poll_s: float
    _resources: Mapping[str, float]
    _machine: str
    _replica: str | None
    _records: HostRecords
    _handed: Handed
    _is_joined = False

    def _join(self) -> None:
        """Begin to be a member; before runs are recovered."""
        from workflow.handing import Handed, HostRecords

        assert self._replica is not None
        self._records, self._handed = HostRecords(self._replica), Handed(self._replica)
        self._members = Members()
        self._watched: dict[str, Ownership] = {}
        self._taking: set[str] = set()
        self._takeovers: collections.deque[Takeover] = collections.deque(maxlen=KEPT_TAKEOVERS)
        self._taken_over = 0
        self._tried: dict[str, float] = {}
        self._doubted = ""
        self._looked_at: float | None = None
        self._written_at: float | None = None
        self._parting = asyncio.Event()
        self._is_joined = True

    def _part_from_fleet(self) -> None:
        if not self._is_joined:
            return
        for ownership in self._watched.values():
            ownership.close(release=False)
        self._watched.clear()
        self._records.close()
        self._handed.close()

    async def _poll_fleet(self) -> None:
        """Look again and again. Never cancelled: a look that has taken a lease must say so."""
        while self._lost is None and not self._parting.is_set():
            try:
                await self.look_at_fleet()
            except (ReplicatorError, OSError) as error:
                log.warning("the fleet cannot be looked at host=%s error=%r", self._host, str(error))
                await asyncio.to_thread(self._watch_anew)
            except NotOwner:  # until the lease is renewed
                await asyncio.to_thread(self._watch_anew)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._parting.wait(), self._fleet_poll_s)

    async def look_at_fleet(self) -> None:
        """Say how this host stands, take in what it was given, and take over hosts that are gone.

        Raises:
            NotOwner: this host's lease is over.
            ReplicatorError: the replica cannot be read, or written.
        """
        assert self._replication is not None
        self._replication.check_owner()
        now = time.monotonic()
        if self._looked_at is not None and now - self._looked_at > max(self._lease_ttl_s * SLEPT_PART, 2 * self._fleet_poll_s):
            await asyncio.to_thread(self._watch_anew)
        self._looked_at = now
        if self._written_at is None or now - self._written_at >= self._lease_ttl_s * RECORD_PART:
            self._written_at = now
            record = await asyncio.to_thread(self.record)
            await asyncio.to_thread(self._records.write, record)
        heirs, free = await asyncio.to_thread(self._look_at_others, now)
        if self._host in heirs and not self._parting.is_set():
            await self._take_in_handed()
        await self._doubt_one()
        for host in free:
            self._taking.add(host)
            self._help(self._take_over_host(host))

    def record(self) -> HostRecord:
        """Return how this host stands; blocks."""
        counts, waiting = ik.sql_read(self._intake.path, ik.counts)
        shards: dict[str, tuple[int, str | None]] = {}
        for id, wake_at in waiting:
            shard = shard_of(id)
            count, before = shards.get(shard, (0, None))
            shards[shard] = (count + 1, min(filter(None, (before, wake_at)), default=None))
        assert self._replication is not None
        return HostRecord(
            self._host, UP, self.sender, self._now(), self._replication.ownership.lease.generation, self._lease_ttl_s, self._concurrency,
            len(self._active), tuple(sorted(self._able_flows())), dict(self._resources), counts, shards, tuple(self._takeovers), self._taken_over,
        )  # fmt: skip

    def _able_flows(self) -> list[str]:
        return [
            name
            for name, flow in flows.items()
            if all(self._resources.get(resource, 0.0) >= least for resource, least in flow.needs.items())
        ]

    # -- watching ----------------------------------------------------------------------------------------------------------------------

    def _look_at_others(self, now: float) -> tuple[list[str], list[str]]:
        """Return who may have something to take in, and the hosts whose leases are this host's now."""
        listed = self._records.versions()
        fresh = set(self._members.changed(listed, now))
        for name in fresh - {name for name, record in self._members.records.items() if record.state == UP}:
            self._read_record(name)
        heirs = self._handed.heirs()
        mine = self._members.watched(self._host, now)
        for name in mine:  # of the others only the versions are looked at
            if name in fresh or name not in self._watched:
                self._read_record(name)
        free = []
        for name, record in self._members.records.items():
            if name == self._host or name in self._taking:
                continue
            is_due = record.left > 0 and now - self._tried.get(name, -LEFT_RETRY_S) >= LEFT_RETRY_S
            if record.state == GONE and not is_due and not (record.at and name in heirs and self._handed.names(name)):
                self._stop_watching(name)
                if record.at and not record.left and self._members.age_s(name, now) > GONE_KEPT_S:
                    self._records.delete(name)
            elif name in mine:
                if self._is_free(name):
                    self._tried[name] = now
                    free.append(name)
            else:
                self._stop_watching(name)
        for name in [name for name in self._watched if name not in listed]:
            self._stop_watching(name)
        return heirs, free

    def _read_record(self, name: str) -> None:
        record = self._records.read(name)
        self._members.records[name] = record or HostRecord(name, GONE)  # of a host that joined no fleet: it is left alone

    def _is_free(self, host: str) -> bool:
        """Look at a lease, and take it if it is free. One GET, mostly."""
        from workflow.ownership import Ownership

        assert self._replica is not None
        ownership = self._watched.get(host)
        if ownership is None:
            ownership = self._watched[host] = Ownership(self._estate(host), self._replica, host, ttl_s=self._lease_ttl_s)
        try:
            ownership.lease.acquire()
        except LeaseHeld:
            return False
        return True

    def _stop_watching(self, host: str) -> None:
        ownership = self._watched.pop(host, None)
        if ownership is not None:
            ownership.close(release=False)

    def _watch_anew(self) -> None:
        for host in [host for host in self._watched if host not in self._taking]:
            self._stop_watching(host)

    def _estate(self, host: str) -> Path:
        return self.folder / ".host" / "estates" / host

    # -- taking over -------------------------------------------------------------------------------------------------------------------

    async def _take_over_host(self, host: str) -> None:
        """Divide the runs of a host whose lease was acquired."""
        began = time.monotonic()
        ownership = self._watched.pop(host)
        try:
            runs, left = await asyncio.to_thread(self._divide, host, ownership)
        except (ReplicatorError, OSError, sqlite3.Error) as error:
            log.error("host could not be taken over, it will be tried again host=%s error=%r", host, str(error))
        else:
            took_s = time.monotonic() - began
            log.warning(
                "host is gone, its runs are divided host=%s by=%s runs=%d left=%d took_s=%.2f", host, self._host, runs, left, took_s
            )
            self._takeovers.append(Takeover(host, self._now(), runs, round(took_s, 3)))
            self._taken_over += 1
            self._written_at = None
        finally:
            self._taking.discard(host)

    def _divide(self, host: str, ownership: Ownership) -> tuple[int, int]:
        from workflow.durability import Replication
        from workflow.handing import hand_over

        assert self._replica is not None
        folder = self._estate(host)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier time
        (folder / ".host").mkdir(parents=True)
        estate = Replication(folder, self._replica, host=host, lease_ttl_s=self._lease_ttl_s, ownership=ownership)
        done = False
        try:
            estate.take_over_now()
            others = [record.host for record in self._members.living(time.monotonic()) if record.host not in (host, self._host)]
            now = [record for record in map(self._records.read, others) if record is not None and record.state == UP]
            heirs = {record.host: record.candidate() for record in [*now, self.record()]}
            runs, left = hand_over(estate, folder, self._handed, list(heirs.values()))
            generation = ownership.lease.generation
            self._records.write(HostRecord(host, GONE, at=self._now(), generation=generation, by=self._host, left=left))
            done = True
        finally:
            estate.close_now(release=done)
            shutil.rmtree(folder, ignore_errors=True)
        return runs, left

    # -- being given something -----------------------------------------------------------------------------------------------------------

    async def _take_in_handed(self) -> None:
        for name in await asyncio.to_thread(self._handed.names, self._host):
            part = await asyncio.to_thread(self._handed.get, self._host, name)
            if part is None:
                continue
            try:
                await self._take_in_part(part)
            except (sqlite3.Error, WorkflowError, ValueError) as error:  # others are taken in all the same
                log.error("inherited runs cannot be taken in host=%s object=%s error=%r", self._host, name, str(error))
                continue
            await asyncio.to_thread(self._handed.delete, self._host, [name])

    async def _take_in_part(self, part: Part) -> None:
        """Make runs of a dead host this host's; durable, here and on the replica, on return. They are claimed when they come to memory."""
        assert self._replication is not None
        take = functools.partial(ik.inherit, rows=part.rows, requests=part.requests, owners=part.owners_of)
        rows, requests = await self._intake.do(take)
        self._replication.inherited |= await self._intake.do(ik.inherited)
        log.info("runs inherited host=%s from=%s runs=%d requests=%d", self._host, part.host, len(rows), len(requests))
        await self._replication.intake_barrier()
        for row in rows:
            self._place(row)
        for request in requests:
            if request.kind != "start":
                await self._dispatch(request)
        self._fill()

    async def _doubt_one(self) -> None:
        """Of the inherited runs that were not claimed yet, ask of one whether another heir has finished it: one GET a look, as long as there are some."""
        assert self._replication is not None
        ids = sorted(self._replication.inherited)
        if not ids:
            return
        id = self._doubted = next((id for id in ids if id > self._doubted), ids[0])
        owner = await asyncio.to_thread(self._replication.ended_elsewhere, id)
        if owner is not None and id not in self._active and id in self._parked:
            parked = self._parked.pop(id)
            if parked.timer is not None:
                parked.timer.cancel()
            await self._moved(id, owner)

    def _place(self, row: Indexed) -> None:
        if row.status == "running":
            self._make_ready(row.id, row.flow)
        elif row.status in ("waiting", "paused"):
            self._park(row.id, row.flow, self._due(row.wake_at) if row.status == "waiting" else None, row.status == "paused")
        elif row.status == "queued":
            self._queued[row.flow] = True

    def _on_claimed(self, id: str) -> None:
        """Called by any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._intake.later, functools.partial(ik.claimed, id=id))

    async def _recover_inherited(self, replication: Replication) -> None:
        replication.on_claimed = self._on_claimed
        replication.inherited = await self._intake.do(ik.inherited)

    # -- new runs ------------------------------------------------------------------------------------------------------------------------

    @property
    def _others_after_s(self) -> float:
        """Longer than in no fleet, where nobody knows whether the first one lives: it may be busy, and has taken the start in."""
        return self._lease_ttl_s * (PATIENCE if self._is_member else 1)

    def _first_of(self, host_names: list[str], request: Request) -> str:
        """Of the hosts that live and have the code, that with the highest score begins a run."""
        if not self._is_member:
            return super()._first_of(host_names, request)
        living: list[Candidate] = [record.candidate() for record in self._members.living(time.monotonic())]
        return first(request.instance, str(loads(request.body).get("flow")), living) or ""  # nobody at once: the others are not known yet
