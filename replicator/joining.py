"""Bring page table, staged files and replicas together at the start, so that the next TXID is right on all of them.

What each of them says is weighed like this:

* A **replica** is right about what is stored: its position is the end of its contiguous chain. One that holds less than it is known to have
  held has lost files, and that is an error.
* The **page table** is right when its checksum is. Where the replica is further, the stored files are applied to it; where that does not
  lead to a proven state it is rebuilt from the replica. Where it is further than every replica that answers, its TXIDs have been given
  out: they are not given out again, and the replicas are filled with a full image.
* Replicas must **agree** where they overlap: the newest raw file of the shorter one must be the other's. Different files are two histories.
* A replica that does not answer is left out until it does, if the table says how far it can have come.
* The table is **of the replica's history** when this machine has seen the replica hold the TXID in question, or when the stored file of
  that TXID is the one that the table, or the staging folder, knows. Otherwise another writer may have given out the same TXID, and neither
  the table's pages nor the staged files may be added to what is stored there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from replicator.atomic import write_file
from replicator.chain import read_chain
from replicator.errors import AccessDenied, Diverged, FormatError, LineageMismatch, StorageUnavailable
from replicator.format.checksum import page_checksums
from replicator.format.ltx import TXID, Decoder, FileInfo, Header, decode_header
from replicator.format.sqlite import lock_pgno
from replicator.gate import gate
from replicator.outbox import EncodedPages, Entry, OutFile, Staging
from replicator.pagetable import PageTable
from replicator.replica import Replica, new_lineage
from replicator.tail import NO_WAL

__all__ = ["Joined", "Known", "join", "join_later"]

READ_BYTES = 1 << 18

log = logging.getLogger(__name__)


class Known:
    """How far each replica has come, as far as this machine has seen: `replicas.json`, TXIDs by URL. Never goes back by itself.

    May be used from several threads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._txids = {str(url): int(txid) for url, txid in json.loads(path.read_bytes()).items()}
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            self._txids = {}

    def __contains__(self, url: object) -> bool:
        return url in self._txids

    def get(self, url: str) -> TXID:
        return TXID(self._txids.get(url, 0))

    def note(self, replicas: Sequence[Replica], *, reset: bool = False) -> None:
        """Write down how far the replicas are; `reset`: also where that is less than before."""
        with self._lock:
            seen = {
                item.url: int(item.txid) if reset else max(int(item.txid), self._txids.get(item.url, 0)) for item in replicas if item.online
            }
            if {**self._txids, **seen} != self._txids:
                self._txids.update(seen)
                write_file(self._path, json.dumps(self._txids, indent=1).encode() + b"\n", waiting=gate().aside)


@dataclass(frozen=True, slots=True)
class Joined:
    """What the engine goes on with."""

    table: PageTable
    staged: list[Entry]
    lineage: bytes


def join(
    replicas: Sequence[Replica],
    *,
    folder: Path,
    staging: Staging,
    known: Known,
    page_size: int,
    force_snapshot: bool,
    listed: Callable[[], None] = lambda: None,
) -> Joined:
    """Open the replicas and the page table in `folder`, and make sure that they tell one history.

    An empty replica may record a lineage: another writer is about to store its first file, or files were lost. With a lease TXID 1, which is created and
    never overwritten, decides between two that begin at once, so that the later one takes the lineage that is there; without one it begins a lineage of its own.

    Args:
        listed: called when the replicas are listed, and the table is as it was; what it raises ends this.

    Raises:
        LineageMismatch, ReplicaEmptied, ReplicaBroken, Diverged: they do not.
        StorageUnavailable: what is out of reach is needed to know.
    """
    table = PageTable.open(folder / "pages")
    try:
        recorded = _open_all(replicas, table, known, allow_gap=force_snapshot)
        listed()
        online = [replica for replica in replicas if replica.online]
        empty = len(online) == len(replicas) and all(replica.txid == 0 for replica in replicas)
        fresh = empty and (force_snapshot or not any(item.url in known for item in replicas))
        if fresh and table is not None:
            table.close()
            table = None
        if fresh:
            staging.clear()
            first = recorded[replicas[0].url]
            lineage = first if first is not None and replicas[0].lease is not None and not force_snapshot else new_lineage()
        else:
            lineage = _lineage(online, recorded, table)
        for replica in online:
            if fresh and recorded[replica.url] not in (None, lineage):
                replica.renew(lineage)
                recorded[replica.url] = lineage
            replica.join(lineage, recorded[replica.url], known_txid=TXID(0) if force_snapshot else known.get(replica.url))
        head = max(online, key=lambda replica: replica.txid)
        for replica in online:
            _check_agreement(replica, head, are_recorded=recorded[replica.url] is not None and recorded[head.url] is not None)
        seen = known.get(head.url) if recorded[head.url] is not None else TXID(0)
        if table is not None and not _is_of_one_history(table, head, seen, staging):
            log.warning("the newest file of the replica is not ours replica=%s txid=%016x", head.url, head.txid)
            staging.clear()
            if table.state.txid > head.txid:
                for replica in online:
                    replica.needs_image = True
            else:
                table.close()
                table = None
        staged = _staged_after(head.txid, staging, table)
        table = _bring_to(
            head, table, lineage, staged, folder=folder, staging=staging, page_size=page_size, all_online=len(online) == len(replicas)
        )
        if force_snapshot or any(replica.txid for replica in replicas):  # else there is nothing to lose before the first entry settles
            known.note(replicas, reset=force_snapshot)
    except BaseException:
        if table is not None:
            table.close()
        raise
    return Joined(table, staged, lineage)


def join_later(replica: Replica, *, lineage: bytes, known: Known, newest: TXID, head: Replica | None) -> None:
    """Open a replica that did not answer at the start.

    Args:
        newest: the newest TXID that this engine has given out; what is further is somebody else's.
        head: a replica to compare with, which is online.

    Raises:
        LineageMismatch, ReplicaEmptied, Diverged: it belongs to another history.
        StorageUnavailable: still no answer, or it cannot be compared yet.
    """
    recorded = replica.open()
    replica.join(lineage, recorded, known_txid=known.get(replica.url))
    if replica.txid > newest:
        raise Diverged(replica.url, head.url if head else "this database", replica.txid)
    if head is not None:
        if replica.txid > max(head.txid, known.get(replica.url)):
            # It may hold a TXID that an earlier run gave out, was killed, and that was given out again since.
            raise StorageUnavailable(f"{replica.url} has TXID {replica.txid:016x}, which cannot be compared before {head.url} has it")
        _check_agreement(replica, head, are_recorded=recorded is not None)
    replica.online = True
    known.note([replica])


def _open_all(replicas: Sequence[Replica], table: PageTable | None, known: Known, *, allow_gap: bool) -> dict[str, bytes | None]:
    """Open the replicas; returns the lineage that each of them records. Those that do not answer stay offline, if that can be afforded."""
    recorded: dict[str, bytes | None] = {}
    failed: StorageUnavailable | None = None
    for replica in replicas:
        try:
            recorded[replica.url] = replica.open(allow_gap=allow_gap)
            replica.online = True
        except AccessDenied as error:
            # A key that may only write: what this machine knows has to do. Creating never overwrites, should it be wrong.
            if table is None or not table.is_intact or not known.get(replica.url):
                raise
            log.warning("replica cannot be listed, its position is taken from the local state replica=%s error=%r", replica.url, str(error))
            replica.assume(known.get(replica.url))
            recorded[replica.url] = table.state.lineage
        except StorageUnavailable as error:
            replica.online = False
            replica.error = str(error)
            failed = failed or error
    if failed is not None and (not recorded or table is None or not table.is_intact):
        raise failed
    if failed is not None:
        away = [replica.url for replica in replicas if not replica.online]
        log.warning("replica does not answer, the others go on away=%s error=%r", ",".join(away), str(failed))
    return recorded


def _lineage(online: Sequence[Replica], recorded: dict[str, bytes | None], table: PageTable | None) -> bytes:
    """Return the one lineage of table and replicas. Where none is recorded, a new one begins."""
    stored = [found for found in recorded.values() if found is not None]
    if table is not None and stored and table.state.lineage not in stored:
        raise LineageMismatch(online[0].url, expected=table.state.lineage.hex(), got=stored[0].hex())
    return table.state.lineage if table is not None else (stored[0] if stored else new_lineage())


def _check_agreement(replica: Replica, head: Replica, *, are_recorded: bool) -> None:
    """Find out whether two replicas tell one history, by the newest raw file of the shorter one.

    Where the other has none of that TXID any more, the shorter one gets a full image before it goes on, if the lineages of both
    are recorded; others are refused.
    """
    if replica is head or not replica.txid or not (replica.listed and head.listed):
        return
    same = replica.shares_newest_file_with(head)
    if same is False and are_recorded:
        same = _lead_to_the_same_state(replica, head)
    if same is False or (same is None and not are_recorded):
        raise Diverged(replica.url, head.url, replica.txid)
    if same is None:
        replica.needs_image = True


def _lead_to_the_same_state(replica: Replica, head: Replica) -> bool:
    """Compare the newest raw file of a replica with the other's where one of the two was made of a full image, so that its bytes differ."""
    import numpy as np

    (first, ours), (second, theirs) = (_read_pages(item, _raw_file(item, replica.txid)) for item in (replica, head))
    if (first.page_size, first.commit) != (second.page_size, second.commit):
        return False
    few, all_pages = sorted((ours, theirs), key=lambda encoded: len(encoded.pgnos))
    if len(all_pages.pgnos) != first.commit - (lock_pgno(first.page_size) <= first.commit):
        return False
    at = np.searchsorted(all_pages.pgnos, few.pgnos)
    return bool((all_pages.checksums[at] == few.checksums).all())


def _is_of_one_history(table: PageTable, head: Replica, seen: TXID, staging: Staging) -> bool:
    """Find out whether what the replica holds leads to the table's state, or on from there. At most one file is read.

    Args:
        seen: how far this machine has seen the replica come.
    """
    state = table.state
    at = min(state.txid, head.txid)
    if seen >= at or (head.txid >= state.txid and not table.is_intact):  # then the repair tells
        return True
    try:
        info = _raw_file(head, at)
    except StopIteration:
        return False
    if at < state.txid:
        staged = [path for level, _, max_txid, path in staging.files() if level == 0 and max_txid == at]
        with head.client.open(info) as stream:
            return bool(staged) and staged[0].stat().st_size == info.size and stream.read() == staged[0].read_bytes()
    header, encoded = _read_pages(head, info)
    if (header.page_size, header.commit, header.timestamp_ms) != (state.page_size, state.commit, state.timestamp_ms):
        return False
    return bool((table.get(1, state.commit)[encoded.pgnos.astype("int64") - 1] == encoded.checksums).all())


def _raw_file(replica: Replica, txid: TXID) -> FileInfo:
    """Return the raw file that ends at a TXID. Raises `StopIteration` when it is not there."""
    return next(info for info in replica.listing().get(0, ()) if info.max_txid == txid)


def _staged_after(txid: TXID, staging: Staging, table: PageTable | None) -> list[Entry]:
    """Return the staged entries that continue the replica's chain up to the table's state; remove the others."""
    newest = table.state.txid if table else TXID(0)
    found: dict[TXID, list[OutFile]] = {}
    for level, min_txid, max_txid, path in staging.files():
        if txid < max_txid <= newest:
            with contextlib.suppress(FormatError):
                found.setdefault(max_txid, []).append(OutFile(level, min_txid, max_txid, _verify(path).timestamp_ms, path))
                continue
        path.unlink(missing_ok=True)
    entries: list[Entry] = []
    for expected in range(txid + 1, newest + 1):
        files = found.get(TXID(expected))
        if files is None:
            break
        entries.append(Entry(TXID(expected), tuple(files), EncodedPages.none(), 0, 0, files[-1].timestamp_ms, NO_WAL))
    return entries


def _bring_to(
    head: Replica,
    table: PageTable | None,
    lineage: bytes,
    staged: list[Entry],
    *,
    folder: Path,
    staging: Staging,
    page_size: int,
    all_online: bool,
) -> PageTable:
    """Return a table that describes the newest state that was given out, by the cheapest way that is proven."""
    if table is not None and table.state.lineage == lineage:
        if table.state.txid > head.txid:
            if table.is_intact:
                if not staged or staged[-1].txid != table.state.txid:
                    # Another replica has had them, or has them: they are not given out again.
                    log.warning("no replica that answers has the newest files txid=%016x have=%016x", table.state.txid, head.txid)
                return table
        elif not head.needs_image and _roll_forward(table, head):
            return table
        if not all_online:
            raise StorageUnavailable(f"the page table must be rebuilt, and not all replicas answer: {folder}")
    if table is not None:
        log.info("page table is rebuilt from the replica replica=%s txid=%016x", head.url, head.txid)
        table.close()
    staging.clear()
    staged.clear()
    if head.needs_image:  # a gap: nobody knows the state at its end, so everything differs from the table
        table = PageTable.create(folder / "pages", lineage=lineage, page_size=page_size)
        nothing = EncodedPages.none()
        table.apply(head.txid, nothing.pgnos, nothing.checksums, commit=0, timestamp_ms=0, position=NO_WAL)
        return table
    return _rebuild(head, lineage, folder / "pages", page_size)


def _roll_forward(table: PageTable, head: Replica) -> bool:
    """Apply the stored files that the table lacks. False when that does not lead to a proven state."""
    files = head.files_after(table.state.txid)
    if files is None:
        return False
    if not table.is_intact:
        if not files or table.state.next_txid == table.state.txid:
            return False
        header, encoded = _read_pages(head, files[0])
        if header.page_size != table.state.page_size:
            return False
        if not table.repair(files[0].max_txid, encoded.pgnos, encoded.checksums, header.commit, header.timestamp_ms):
            return False
        files = files[1:]
    for info in files:
        header, encoded = _read_pages(head, info)
        if header.page_size != table.state.page_size:
            return False
        table.apply(
            info.max_txid, encoded.pgnos, encoded.checksums, commit=header.commit, timestamp_ms=header.timestamp_ms, position=NO_WAL
        )
    return True


def _rebuild(head: Replica, lineage: bytes, path: Path, page_size: int) -> PageTable:
    """Make a table by reading the replica."""
    import numpy as np

    plan = head.plan()
    if not plan:
        return PageTable.create(path, lineage=lineage, page_size=page_size)
    with head.client.open(plan[-1], size=100) as stream:
        page_size = decode_header(stream.read()).page_size
    sums: dict[int, list[int]] = {}
    guard = threading.Lock()

    def note(first: int, run: Sequence[bytes]) -> None:
        found = page_checksums(enumerate(run, start=first))
        with guard:
            sums[first] = found

    header = read_chain(head.client, plan, note)
    starts = sorted(sums)
    pgnos = np.concatenate([np.arange(first, first + len(sums[first]), dtype=np.uint32) for first in starts])
    checksums = np.concatenate([np.array(sums[first], dtype=np.uint64) for first in starts])
    table = PageTable.create(path, lineage=lineage, page_size=page_size)
    try:
        table.apply(head.txid, pgnos, checksums, commit=header.commit, timestamp_ms=header.timestamp_ms, position=NO_WAL)
    except BaseException:
        table.close()
        raise
    return table


def _verify(path: Path) -> Header:
    """Read a staged file to its end. Raises `FormatError`."""
    decoder = Decoder()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            decoder.feed(data)
    decoder.close()
    assert decoder.header is not None
    return decoder.header


def _read_pages(replica: Replica, info: FileInfo) -> tuple[Header, EncodedPages]:
    """Read a stored file to its end and return the checksums of its pages."""
    import numpy as np

    decoder = Decoder()
    pgnos: list[int] = []
    sums: list[int] = []
    with replica.client.open(info) as stream:
        while data := stream.read(READ_BYTES):
            pages = [(pgno, page) for pgno, page, _ in decoder.feed(data)]
            pgnos += [pgno for pgno, _ in pages]
            sums += page_checksums(pages)
    decoder.close()
    assert decoder.header is not None
    return decoder.header, EncodedPages(np.array(pgnos, dtype=np.uint32), np.array(sums, dtype=np.uint64))
