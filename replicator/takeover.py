"""Become the owner of a replica: find out whether it went on without us, keep what only we have, restore, and claim.

The steps, each of which may be cut short and begun again:

1. **Acquire** the lease. (The metadata folder is locked by then: an earlier process of ours is dead, and its lease is free. One that guards many databases may
   live although this one was closed; see `anchor.py`.)
2. **Look** at the newest raw file. Its header says who wrote it. A number that is none of ours is another owner's claim, or what it wrote afterwards: the local
   database lacks that, unless the page table says that it is in that very state. A number without a fencing token is Litestream's, or of a pyrepl
   without a lease; with takeover it counts as another owner's, too, or what it stored would be undone.
3. **Salvage.** What was committed here and never stored is written to `<db>-salvage-<first TXID>-<last>-<checksum>.ltx` beside the database: all pages that
   differ from the newest state that is known to be stored. It is never merged into what the other owner wrote; a person decides.
4. **Restore** the newest state over the database, and write a page table of it, so that nothing is downloaded twice.
5. **Reassure**: where another owner wrote what is to be continued, renew the lease, whatever the clock says: an owner that has taken it meanwhile, and whose claim was
   among what was just seen, is found now. One that takes it later finds our claim, or is faster than it.
6. **Claim**: append the next TXID. Where nothing differs, that is page 1 as it is. From then on every late write of the old owner finds its slot taken.
   If one of them was faster than the claim, begin again at 2.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import randbits
from typing import TypeVar

from replicator import livefile
from replicator.anchor import is_gone
from replicator.atomic import AtomicFile, write_file
from replicator.db import Database, Image
from replicator.errors import Fenced, FormatError, StorageError
from replicator.format.checksum import page_checksum
from replicator.format.lock import token_of, writer_number
from replicator.format.ltx import LTX_HEADER_SIZE, TXID, Decoder, FileInfo, Header, decode_header, format_txid
from replicator.format.sqlite import lock_pgno
from replicator.joining import Known
from replicator.lease import Lease
from replicator.outbox import Staging, encode
from replicator.pagetable import PageTable
from replicator.replica import read_lineage
from replicator.restorer import restore_database
from replicator.storage.base import ReplicaClient
from replicator.tail import NO_WAL

__all__ = [
    "Foreign",
    "Overtaken",
    "Tenant",
    "has_pages",
    "newest_raw",
    "reassure",
    "restore_newest",
    "salvage",
    "seed_table",
    "until_claimed",
]

KEPT_WRITERS = 64
CLAIM_TRIES = 8
READ_BYTES = 1 << 20
NO_ANCHOR: Mapping[str, object] = {"path": ""}

T = TypeVar("T")

log = logging.getLogger(__name__)


class Overtaken(Exception):
    """Another writer appended between the look at the replica and the claim. `error` says where."""

    def __init__(self, error: Fenced) -> None:
        super().__init__(str(error))
        self.error = error


def until_claimed(attempt: Callable[[], T], undo: Callable[[], None]) -> T:
    """Carry out an attempt to become the owner, steps 1 to 6. When somebody was faster than the claim the lease is still ours: look again.

    Raises:
        Fenced: somebody was faster each time.
    """
    for left in reversed(range(CLAIM_TRIES)):
        try:
            return attempt()
        except Overtaken as overtaken:
            undo()
            log.warning("another writer was faster than the claim, looking again error=%r", str(overtaken))
            if not left:
                raise overtaken.error from None
    raise AssertionError("unreachable")


def reassure(lease: Lease) -> None:
    """Make sure, after a look at the replica, that nobody has taken the lease before it. Raises what `Lease.renew` raises."""
    lease.renew()


@dataclass(frozen=True, slots=True)
class Foreign:
    """The newest raw file of a replica, which another owner wrote.

    Attributes:
        owner: as it calls itself, where the store tells.
        is_doubtful: it was written without a lease and follows the local state, so that it may be what this machine stored last before it was killed.
    """

    info: FileInfo
    header: Header
    owner: str
    is_doubtful: bool = False

    @property
    def who(self) -> str:
        """Who wrote it, in words."""
        token = token_of(self.header.node_id)
        return f"{self.owner or 'another owner'} ({f'generation {token}' if token else 'without a lease'})"


class Tenant:
    """What a database needs of a lease: the lease, whether it may be taken over from others, and the numbers that are its own."""

    def __init__(self, lease: Lease, *, takeover: bool, is_shared: bool = False) -> None:
        """`is_shared`: the lease guards other databases, too, and outlives the use of this one."""
        self.lease, self.takeover, self._is_shared = lease, takeover, is_shared
        self.salvaged: Path | None = None
        """Where what only this machine had was written, when that was found to be necessary."""
        self.has_claimed = False
        """The newest raw file was written under the very term that is in force: no other claim can have followed."""
        self.follows_another = False
        """The newest raw file was written under a lease, and by somebody else."""
        self.looked_at = TXID(0)
        """The newest raw file that the local state leads to."""
        self.is_new = False
        """Nobody has ever stored anything in the replica: there is nothing to look at. Creating the first file finds out when that is wrong."""
        self._token = 0
        self._numbers: list[int] = []
        self._instances: dict[str, Mapping[str, object]] = {}  # where their anchors are; nothing for leases of this database alone

    def acquire(self, folder: Path) -> int:
        """Take the lease and return the number to write with. `folder`: the database's own, which this process has locked.

        Raises:
            LeaseHeld, LeaseError, StorageError: see `Lease.acquire`.
        """
        self.remember(folder)
        token = self.lease.acquire(predecessors=[item for item in self._instances if self._is_dead(item)])
        number = writer_number(token, randbits(40))
        self._token = token_of(number)
        # Before anything is written with it: what is stored under it must be known as ours, whatever happens.
        self._numbers = [*self._numbers, number][-KEPT_WRITERS:]
        self._instances.pop(self.lease.instance, None)
        self._instances[self.lease.instance] = (self.lease.anchor(folder) or NO_ANCHOR) if self._is_shared else {}
        self._instances = dict(list(self._instances.items())[-KEPT_WRITERS:])
        text = json.dumps({"writers": [f"{item:016x}" for item in self._numbers], "instances": self._instances}, indent=1)
        write_file(folder / "writers.json", text.encode() + b"\n")
        return number

    def _is_dead(self, instance: str) -> bool:
        """Say whether an instance that this database was written under is certainly gone. Of one that was this database's own the lock on the folder,
        which is ours, says so. One that is shared may live although the database was closed: by its process, which parked it, say.
        """
        place = self._instances[instance]
        return instance != self.lease.instance and (not place or is_gone(place))

    def remember(self, folder: Path) -> None:
        """Read which numbers and instances are our own."""
        try:
            found = json.loads((folder / "writers.json").read_bytes())
            self._numbers = [int(item, 16) for item in found["writers"]]
            self._instances = {str(item): dict(place) for item, place in found["instances"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            self._numbers, self._instances = [], {}

    def foreign(self, client: ReplicaClient, folder: Path) -> Foreign | None:
        """Return the newest raw file if another owner wrote it and the page table in `folder` is not of that very state; else None. Two small requests.

        What was written without a lease is another owner's with takeover only: else it may be of an earlier run here, whose number nobody knows.

        Raises:
            StorageError: the replica cannot be read.
        """
        self.has_claimed = self.follows_another = False
        self.looked_at = TXID(0)
        if self.is_new:
            self.is_new = False
            return None
        found = newest_raw(client)
        if found is None:
            return None
        info, header = found
        token = token_of(header.node_id)
        self.looked_at, self.follows_another = info.max_txid, bool(token) and header.node_id not in self._numbers
        if header.node_id in self._numbers or (not token and not self.takeover):
            self.has_claimed = bool(token) and token == self._token
            return None
        table, is_doubtful = PageTable.open(folder / "pages"), False
        if table is not None:
            try:
                if _is_at(table, client, info, header):
                    return None
                if (
                    not token
                    and table.is_intact
                    and min(table.state.txid, Known(folder / "replicas.json").get(client.url)) >= info.max_txid
                ):
                    return None  # this machine has seen it there: what is newer is staged here
                is_doubtful = not token and table.is_intact and table.state.txid in (info.max_txid, info.max_txid - 1)
            finally:
                table.close()
        return Foreign(info, header, client.metadata(info).get("pyrepl-owner", ""), is_doubtful)


def newest_raw(client: ReplicaClient) -> tuple[FileInfo, Header] | None:
    """Return the newest raw file and its header; None when there is none. Raises `StorageError`."""
    info = max(client.list(0), key=lambda info: info.max_txid, default=None)
    if info is None:
        return None
    with client.open(info, size=LTX_HEADER_SIZE) as stream:
        data = stream.read()
    try:
        return info, decode_header(data)
    except FormatError as error:
        raise StorageError(
            f"newest raw file cannot be read: {client.url} {info.name}: {error}", hint="`pyrepl verify` tells more"
        ) from error


def _is_at(table: PageTable, client: ReplicaClient, info: FileInfo, header: Header) -> bool:
    """Say whether a table describes the state after a stored file."""
    state = table.state
    if (state.txid, state.page_size, state.commit) != (info.max_txid, header.page_size, header.commit) or not table.is_intact:
        return False
    if state.timestamp_ms != header.timestamp_ms:
        return False
    known = table.get(1, state.commit)
    decoder = Decoder()
    with client.open(info) as stream:
        while data := stream.read(READ_BYTES):
            for pgno, page, _ in decoder.feed(data):
                # Page 1 of a table that was seeded is not known, see there.
                if pgno > state.commit or (int(known[pgno - 1]) != page_checksum(pgno, page) and (pgno, int(known[0])) != (1, 0)):
                    return False
    decoder.close()
    return True


def has_pages(database: Database, client: ReplicaClient, info: FileInfo) -> bool:
    """Say whether a database holds each page of a stored file as it is there: going on from it, nothing of that file is undone."""
    stored: dict[int, int] = {}
    decoder = Decoder()
    with client.open(info) as stream:
        while data := stream.read(READ_BYTES):
            stored.update((pgno, page_checksum(pgno, page)) for pgno, page, _ in decoder.feed(data))
    decoder.close()
    assert decoder.header is not None
    image = database.image()
    if image.page_size != decoder.header.page_size:
        return False
    for first, chunk in database.chunks(image):
        view, size = memoryview(chunk), image.page_size
        for index in range(len(chunk) // size):
            if stored.pop(first + index, checksum := page_checksum(first + index, view[index * size : (index + 1) * size])) != checksum:
                return False
    return not stored


def restore_newest(client: ReplicaClient, path: Path, folder: Path) -> TXID:
    """Restore the newest state over a database that nobody has open, and seed the page table of it; returns its TXID."""
    for name in ("pages", "replicas.json"):
        (folder / name).unlink(missing_ok=True)
    Staging(folder / "staged", limit_bytes=1 << 30).clear()
    result = restore_database(client, path, force=True)
    seed_table(client, path, folder, result.txid)
    log.info("restored db to take over path=%s txid=%016x replica=%s", path, result.txid, client.url)
    return result.txid


def seed_table(client: ReplicaClient, path: Path, folder: Path, txid: TXID, *, newest: tuple[FileInfo, Header] | None = None) -> None:
    """Write a page table for a database file that is in the state of a TXID, without a WAL, and that nobody writes to.

    Page 1 is left out: a copy that was kept up to date in place has a change counter of its own. So it will be part of the next file.
    Where the newest raw file is not of that TXID nothing is written: then the table is made of the replica.

    Args:
        newest: the newest raw file, where the caller has just looked.
    """
    import numpy as np

    found, lineage = newest or newest_raw(client), read_lineage(client)
    if found is None or found[0].max_txid != txid or lineage is None:
        return
    _, header = found
    size, lock = header.page_size, lock_pgno(header.page_size)
    file = livefile.descriptor(path)  # closing one of our own would drop the locks that this process has on it
    if os.fstat(file).st_size != header.commit * size:
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    table = PageTable.create(folder / "pages", lineage=lineage, page_size=size)
    try:
        sums = np.zeros(header.commit, dtype=np.uint64)
        batch = max(1, READ_BYTES // size)
        for first in range(1, header.commit + 1, batch):
            data = memoryview(os.pread(file, batch * size, (first - 1) * size))
            for index in range(len(data) // size):
                sums[first + index - 1] = page_checksum(first + index, data[index * size : (index + 1) * size])
        sums[0] = 0
        pgnos = np.array([pgno for pgno in range(1, header.commit + 1) if pgno != lock], dtype=np.uint32)
        table.apply(txid, pgnos, sums[pgnos - 1], commit=header.commit, timestamp_ms=header.timestamp_ms, position=NO_WAL)
    finally:
        table.close()
    write_file(folder / "replicas.json", json.dumps({client.url: int(txid)}).encode() + b"\n")


# -- salvage ---------------------------------------------------------------------------------------------------------------------


def salvage(database: Database, folder: Path) -> Path | None:
    """Write what only this machine has to a file beside the database; returns its path, None when there is nothing.

    It is an LTX file that follows the newest TXID which is known to be stored, or a full image where that is not known. `database` is open; what
    is committed during the call is not in the file.

    Raises:
        OSError: it cannot be written; nothing may be restored over the database then.
    """
    image = database.image()
    if not image.commit:
        return None
    staging = Staging(folder / "staged", limit_bytes=1 << 30)
    staged = [(txid, path) for level, txid, _, path in staging.files() if level == 0]
    table = PageTable.open(folder / "pages")
    try:
        if table is not None and table.state.txid and table.is_intact and table.state.page_size == image.page_size:
            known: PageTable | None = table
            first = TXID(min([txid for txid, _ in staged], default=TXID(table.state.txid + 1)))
            last = TXID(max(table.state.txid + 1, first))
        else:
            known, first, last = None, TXID(1), TXID(table.state.txid + 1 if table is not None else 1)
        header = Header(image.page_size, image.commit, first, last, time.time_ns() // 1_000_000)
        unsent = _pages_in([path for _, path in staged]) if known is not None else set()
        pages: Iterator[tuple[int, bytes | memoryview]] = _tail(database, image, known, unsent)
        one = next(pages, None)
        if one is not None and one[0] == 1 and known is not None and not int(known.get(1, 1)[0]):
            # A table that was seeded does not know page 1; alone it is no news.
            two = next(pages, None)
            pages, one = (itertools.chain([two], pages), one) if two is not None else (pages, None)
        if one is None and (known is None or known.state.commit == image.commit):
            return None
        out, encoded = encode(staging, 0, header, itertools.chain([one] if one is not None else [], pages), unique=True)
    finally:
        if table is not None:
            table.close()
    name = f"{database.path.name}-salvage-{format_txid(first)}-{format_txid(last)}-{encoded.xor():016x}.ltx"
    path = database.path.with_name(name)
    try:
        if path.exists():  # an earlier start wrote the same
            return path
        with AtomicFile(path) as file:
            for piece in out.pieces(READ_BYTES):
                file.write(piece)
    finally:
        out.discard()
    log.warning(
        "what was never stored is kept beside the database, and not merged db=%s file=%s after_txid=%016x pages=%d",
        database.path, path, first - 1, len(encoded.pgnos),
    )  # fmt: skip
    return path


def _tail(database: Database, image: Image, table: PageTable | None, unsent: set[int]) -> Iterator[tuple[int, bytes | memoryview]]:
    """Yield the pages of a state that are not those of the table, and those of `unsent`, which the table has and no replica."""
    size, skip = image.page_size, lock_pgno(image.page_size)
    for first, data in database.chunks(image):
        view = memoryview(data)
        count = len(data) // size
        known = table.get(first, count).tolist() if table is not None else [-1] * count
        for index, checksum in enumerate(known):
            pgno, page = first + index, view[index * size : (index + 1) * size]
            if pgno != skip and (pgno in unsent or checksum != page_checksum(pgno, page)):
                yield pgno, page


def _pages_in(paths: Sequence[Path]) -> set[int]:
    """Return the page numbers in staged files."""
    found: set[int] = set()
    for path in paths:
        decoder = Decoder()
        with path.open("rb") as file:
            while data := file.read(READ_BYTES):
                found.update(pgno for pgno, _, _ in decoder.feed(data))
    return found
