"""ENGINE: take over a host that is gone, and give its runs to those that live. Everything blocks.

Who holds the lease of the dead host does it, so that one host at a time does, and the dead one, should it only have slept, finds its lease lost:

1. restore its intake, and claim it with the next file of its chain: a late write of the dead host collides;
2. write into it who gets what, so that whoever must do this again gives the same runs to the same heirs, and wait until the replica has this;
3. store for each heir what it gets, index rows and requests (`Part`);
4. delete that from the intake, wait until the replica has this, and release the lease.

Killed in between, the next one does it again. Should an heir have died as well, a run may have two. That is no harm: an heir claims a run only from the host that it was
inherited from (`wf_instance.owner`), with the next file of the run's chain, which one of them creates; the other forgets it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.errors import ObjectNotFound
from workflow import intake as ik
from workflow.bucket import object_name, open_objects
from workflow.errors import BadId
from workflow.intake import Indexed, Request
from workflow.membership import HostRecord, Part, parts
from workflow.placement import ANY, Candidate, divide
from workflow.state import ENDED

if TYPE_CHECKING:
    from workflow.durability import Replication

__all__ = ["Handed", "HostRecords", "Inheritance", "hand_over"]

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
WAIT_S = 60.0
"""So long may it take to store that runs were given away; then it is done again."""


class HostRecords:
    """The records of a root's hosts (see `membership.py`)."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigError`."""
        self._store = open_objects(url, "_hosts")

    def versions(self) -> dict[str, object]:
        """Return when each record was rewritten, by name. One LIST."""
        return {item.name: (item.created_ns, item.size) for item in self._store.list_objects("generations/all")}

    def read(self, name: str) -> HostRecord | None:
        """Return a record; None when there is none, or nothing of ours."""
        try:
            with self._store.open_object(f"generations/all/{name}") as stream:
                return HostRecord.decode(name, stream.read(1 << 20))
        except ObjectNotFound:
            return None

    def write(self, record: HostRecord) -> None:
        """Store a record, in place of the one that is there."""
        self._store.put_object(f"generations/all/{object_name(record.host)}", record.encode())

    def delete(self, name: str) -> None:
        """Delete a record."""
        self._store.delete_objects([f"generations/all/{name}"])

    def close(self) -> None:
        """Release connections."""
        self._store.close()


class Handed:
    """What heirs were given and have not taken in yet."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigError`."""
        self._store = open_objects(url, "_handed")

    def heirs(self) -> list[str]:
        """Return who may have something to take in. One LIST."""
        return list(self._store.list_folders("generations"))

    def names(self, heir: str) -> list[str]:
        """Return what an heir has to take in. One LIST."""
        return sorted(item.name for item in self._store.list_objects(f"generations/{object_name(heir)}"))

    def put(self, heir: str, name: str, part: Part) -> None:
        """Store what an heir gets. Again is harmless."""
        self._store.put_object(f"generations/{object_name(heir)}/{name}", part.encode())

    def get(self, heir: str, name: str) -> Part | None:
        """Return what an heir gets; None when it is no longer there, or cannot be read, which the log says."""
        try:
            with self._store.open_object(f"generations/{object_name(heir)}/{name}") as stream:
                return Part.decode(stream.read(MAX_BYTES))
        except ObjectNotFound:
            return None
        except (ValueError, BadId) as error:
            log.error("inherited runs cannot be read heir=%s object=%s error=%r", heir, name, str(error))
            return None

    def look(self, id: str) -> Indexed | None:
        """Return a run that is on its way to an heir."""
        for heir in self.heirs():
            for name in self.names(heir):
                part = self.get(heir, name)
                found = next((row for row in part.rows if row.id == id), None) if part is not None else None
                if found is not None:
                    return found
        return None

    def delete(self, heir: str, names: Sequence[str]) -> None:
        """Forget what an heir has taken in."""
        self._store.delete_objects([f"generations/{object_name(heir)}/{name}" for name in names])

    def close(self) -> None:
        """Release connections."""
        self._store.close()


class Inheritance:
    """What a host leaves."""

    def __init__(self, rows: Iterable[Indexed], requests: Iterable[Request], owners: Mapping[str, Collection[str]]) -> None:
        self.rows = {row.id: row for row in rows}
        self.owners = {id: tuple(sorted(hosts)) for id, hosts in owners.items()}
        self.requests: dict[str, list[Request]] = {}
        for request in requests:
            if request.kind == "start":  # another host may begin it, too: creating its first file decides
                request = replace(request, body=json.dumps(json.loads(request.body) | {"chosen": True}))
            self.requests.setdefault(request.instance, []).append(request)

    @property
    def unfinished(self) -> int:
        """How many runs are to be finished."""
        return sum(row.status not in ENDED for row in self.rows.values())

    def divided(self, heirs: Sequence[Candidate], chosen: Mapping[str, str]) -> tuple[dict[str, str], set[str]]:
        """Return the heir of each id, and the ids that no heir can run.

        What has ended, and requests for runs of other hosts, go to anybody.

        Args:
            chosen: heirs of an earlier try, which stay where they live.
        """
        names = {heir.name for heir in heirs}
        found = {id: heir for id, heir in chosen.items() if heir in names}
        wanted = [(id, row.flow) for id, row in self.rows.items() if row.status not in ENDED and id not in found]
        rest = [(id, ANY) for id, row in self.rows.items() if row.status in ENDED and id not in found]
        rest += [(id, ANY) for id in self.requests if id not in self.rows and id not in found]
        left: set[str] = set()
        for some, among in ((wanted, heirs), (rest, [replace(heir, load=0) for heir in heirs])):
            for name, ids in divide(some, among).items():
                if name is None:
                    left |= set(ids)
                else:
                    found |= dict.fromkeys(ids, name)
        return found, left

    def parts(self, host: str, heir_of: Mapping[str, str]) -> Iterator[tuple[str, Part]]:
        """Yield (heir, what it gets)."""
        shares: dict[str, list[str]] = {}
        for id in sorted(heir_of):
            shares.setdefault(heir_of[id], []).append(id)
        for heir, ids in shares.items():
            rows = [self.rows[id] for id in ids if id in self.rows]
            requests = {id: self.requests[id] for id in ids if id in self.requests}
            for part in parts(host, rows, requests, self.owners):
                yield heir, part


def hand_over(replication: Replication, folder: Path, handed: Handed, heirs: Sequence[Candidate]) -> tuple[int, int]:
    """Give what a host leaves to its heirs; returns how many unfinished runs, and how many of them are left, because no heir can run them.

    Args:
        replication: of that host, whose lease it holds; its intake is restored. Not closed.
        folder: where that is.

    Raises:
        ReplicatorError: not all was done; what was is harmless when it is done again.
    """
    host, path = replication.host, folder / ".host" / "intake.db"
    numbers = itertools.count(1)
    prefix = f"{object_name(host)[:80]}.{replication.ownership.lease.generation}"

    def give(leaves: Inheritance, owner: str, heir_of: Mapping[str, str]) -> None:
        for heir, part in leaves.parts(owner, heir_of):
            handed.put(heir, f"{prefix}.{next(numbers)}", part)

    count, left = 0, set[str]()
    if path.exists():
        with contextlib.closing(ik.connect(path)) as db:
            leaves = Inheritance(ik.indexed(db), ik.all_requests(db), ik.inherited(db))
            heir_of, left = leaves.divided(heirs, ik.shares(db))
            _write(db, functools.partial(ik.set_shares, chosen=heir_of))
            replication.wait_intake(WAIT_S)
            give(leaves, host, heir_of)
            count = leaves.unfinished
            _write(db, functools.partial(ik.keep_only, ids=left))
            replication.wait_intake(WAIT_S)
    for name in handed.names(host):  # what it had been given itself, and not taken in
        part = handed.get(host, name)
        if part is None:
            continue
        leaves = Inheritance(part.rows, part.requests, part.owners)
        count += leaves.unfinished
        heir_of, unplaced = leaves.divided(heirs, {})
        give(leaves, part.host, heir_of)
        if unplaced:
            left |= unplaced  # the rest of it is given again the next time, which is harmless
        else:
            handed.delete(host, [name])
    return count, len(left)


def _write(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], None]) -> None:
    db.execute("BEGIN IMMEDIATE")
    work(db)
    db.execute("COMMIT")
