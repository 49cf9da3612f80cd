"""The runs of a bucket, seen from a machine that owns none of them: reading restores into temporary files, asking stores requests in the inbox.

**Requests for a question.** A file that was restored before costs one LIST when nothing new is there. A run that has ended is known by its mark: one GET. The first
restore costs a LIST for each level and a GET for each file.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import tempfile
import threading
import weakref
from pathlib import Path

from replicator import open_client, restore
from replicator.errors import NoBackups
from replicator.format.ltx import TXID
from workflow import intake as ik
from workflow import journal
from workflow.bucket import Marks, ReplicaObjects
from workflow.errors import Refused, Unreadable
from workflow.handing import Handed
from workflow.inbox import Inbox
from workflow.intake import Indexed, Request
from workflow.objects import Reader
from workflow.ownership import below
from workflow.state import ENDED, Record, check_id

__all__ = ["BucketDesk", "Copies", "indexed_of"]

POLL_S = (0.25, 5.0)


class Copies:
    """Copies of a replica's files, as new as it is when they are asked for. May be used from several threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.folder = Path(tempfile.mkdtemp(prefix="pyrepl-wf-"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._txids: dict[str, int] = {}
        self._guard = threading.Lock()

    def path(self, name: str) -> Path:
        """Return where the copy of something is."""
        return self.folder / f"{name.replace('/', '-')}.db"

    def fetch(self, name: str) -> Path | None:
        """Return a copy of the newest state of a run, or of `_hosts/<host>`; None when nothing is stored.

        Raises:
            ReplicatorError: it cannot be read.
        """
        with self._guard, contextlib.closing(open_client(below(self.url, name))) as client:
            path, txid = self.path(name), self._txids.get(name)
            if txid is not None and next(iter(client.list(0, seek=TXID(txid + 1))), None) is None:
                return path
            try:
                self._txids[name] = restore(client, path, force=True).txid
            except NoBackups:
                return None
            return path

    def close(self) -> None:
        """Delete the copies."""
        self._cleanup()


class _CopyReader(Reader):
    """Reads artifacts from copies, which are fetched when they are asked for."""

    def __init__(self, copies: Copies, objects: ReplicaObjects) -> None:
        super().__init__(copies.folder, objects)
        self._copies = copies

    def read(self, home: str, sha256: str) -> bytes:
        if not self._copies.path(check_id(home, longest=200)).exists():
            self._copies.fetch(home)
        return super().read(home, sha256)


def indexed_of(path: Path) -> Indexed:
    """Return what a run's file says of it, as an index would. Raises `Unreadable`."""
    found = journal.read(path)
    instance = found.instance
    dues = [record.wake_at for record in found.records if record.wake_at is not None and record.status in ("waiting", "retrying")]
    return Indexed(
        instance.id, instance.flow, instance.status, min(dues, default=None), instance.priority, 0, instance.input_sha256, instance.parent_id,
        instance.error, instance.created_at, instance.finished_at,
    )  # fmt: skip


class BucketDesk:
    """Where requests go and answers come from, for runs that are only known by their replica (see `client.Desk`)."""

    poll_s = POLL_S[0]

    def __init__(self, url: str, sender: str) -> None:
        """Nothing is contacted yet. Raises `ConfigError`: a malformed URL."""
        self.url = url
        self.sender = sender
        self.copies = Copies(url)
        self._objects = ReplicaObjects(url)
        self._inbox = Inbox(url)
        self._done, self._refused, self._hosts = Marks(url, "_done"), Marks(url, "_refused"), Marks(url, "_hosts", shard="all")
        self._handed = Handed(url)
        self._reader = _CopyReader(self.copies, self._objects)

    @property
    def reader(self) -> Reader:
        """Where artifacts are read from."""
        return self._reader

    async def submit(self, request: Request) -> None:
        """Store a request in the inbox; durable on return. Raises `Refused`: it was refused before."""
        await asyncio.to_thread(self._submit, request)

    def _submit(self, request: Request) -> None:
        reason = self._reason(request.id)
        if reason is not None:
            raise Refused(request.instance, reason)
        self._inbox.submit(request)

    def forward(self, request: Request) -> None:
        """Store a request for another host's run; blocks."""
        self._inbox.submit(request)

    async def indexed(self, id: str) -> Indexed | None:
        """Return a run; None when the replica has none, and no host has it in its queue."""
        return await asyncio.to_thread(self.look, id)

    def look(self, id: str) -> Indexed | None:
        """Do what `indexed` does; blocks."""
        path = self.copies.fetch(check_id(id, longest=200))
        if path is None:
            return self._in_hosts(id)
        found = indexed_of(path)
        return found if found.status in ENDED else (self._quarantined(id) or found)

    def _quarantined(self, id: str) -> Indexed | None:
        """Only the owner's index knows that a run is left alone."""
        mark = self._done.get(id)
        if mark is None or mark.get("status") != "quarantined":
            return None
        return self._in_hosts(id)

    def _in_hosts(self, id: str) -> Indexed | None:
        for host in self.hosts():
            path = self.copies.fetch(f"_hosts/{host}")
            found = ik.sql_read(path, functools.partial(ik.one, id=id)) if path is not None else None
            if found is not None:
                return found
        return self._handed.look(id)

    def hosts(self) -> list[str]:
        """Return the names of the hosts that have runs here. One request."""
        return self._hosts.names("all")

    async def runs(self) -> list[Indexed]:
        """Return the runs of all hosts as their indexes have them on the replica, oldest first."""
        return await asyncio.to_thread(self._runs)

    def _runs(self) -> list[Indexed]:
        found: list[Indexed] = []
        for host in self.hosts():
            path = self.copies.fetch(f"_hosts/{host}")
            if path is not None:
                found += ik.sql_read(path, ik.indexed)
        return sorted(found, key=lambda run: (run.created_at, run.id))

    async def ending(self, id: str) -> tuple[str, str | None, str | None]:
        """Wait for a run's end. One GET each time, every few seconds."""
        delay = POLL_S[0]
        found = await self.indexed(id)
        if found is None:
            raise Refused(id, "there is no such run")
        while found.status not in ENDED:
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, POLL_S[1])
            if await asyncio.to_thread(self._done.get, id) is not None:
                found = await self.indexed(id) or found
        if found.gone_at is not None:
            raise Refused(id, f"the run ended {found.status}, and its file was deleted at {found.gone_at}")
        if found.status == "quarantined":
            return found.status, None, found.error
        return await asyncio.to_thread(self._ending_of, id)

    def _ending_of(self, id: str) -> tuple[str, str | None, str | None]:
        from workflow.client import ending_of

        return ending_of(self.copies.path(id), self._objects)

    async def records(self, id: str) -> list[Record]:
        """Return the steps of a run; none of one that has not begun."""
        return await asyncio.to_thread(self._records, id)

    def _records(self, id: str) -> list[Record]:
        try:
            path = self.path(id)
        except Unreadable:
            if (found := self._in_hosts(id)) is not None and found.status == "queued":
                return []
            raise
        return journal.read(path).records

    def path(self, id: str) -> Path:
        """Return a copy of a run's newest state; blocks. Raises `Unreadable`: the replica has none."""
        path = self.copies.fetch(check_id(id, longest=200))
        if path is None:
            raise Unreadable(below(self.url, id), "there is no such run, or it has not begun")
        return path

    async def refusal(self, request: str) -> str | None:
        """Return why a request was refused."""
        return await asyncio.to_thread(self._reason, request)

    def _reason(self, request: str) -> str | None:
        found = self._refused.get(request)
        return None if found is None else str(found.get("reason"))

    def winner(self, id: str) -> tuple[str, str] | None:
        """No run is started here (see `client.Desk`)."""
        return None

    def close(self) -> None:
        """Release connections, and delete the copies."""
        for part in (self._inbox, self._done, self._refused, self._hosts, self._handed, self._objects, self.copies):
            part.close()
