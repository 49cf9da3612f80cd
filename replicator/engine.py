"""Replicate one database: turn what happens in its WAL into the next LTX file, and keep the page table in step with the replicas.

The engine has no thread and never waits; `api.py` drives it:

    open -> [advance -> entry -> (stored or staged) -> settled(entry)] ... -> checkpoint when due -> ... -> close

* `advance` returns the next `Entry`, or None when nothing is new. One entry is outstanding at a time; the WAL is the queue.
* `settled` is called once the entry is stored on a replica, or staged: only then do the page table and the durable position move.
* `checkpoint` may take the end of the WAL with it; that becomes the next entry.

**Crash safety.** Nothing but the stored files counts. After a crash the page table is rolled forward to the end of the replica's chain
and the next sync either continues in the WAL at a proven position, or uploads the pages that differ. A checkpoint while
an entry is outstanding loses nothing either: the pages are in the database file, and differ from the table.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.chain import read_chain
from replicator.checkpoint import CheckpointPolicy, is_due
from replicator.db import Checkpoint, Database, Image
from replicator.errors import DatabaseNotFound, DatabaseStateError, EngineRunning, FormatError, LineageMismatch
from replicator.format.checksum import page_checksum
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, Decoder, Header
from replicator.format.sqlite import lock_pgno
from replicator.outbox import EncodedPages, Entry, OutFile, Staging, encode
from replicator.pagetable import PageTable, TableState
from replicator.replica import Replica, new_lineage
from replicator.snapshot import Snapshot
from replicator.tail import NO_WAL, Continue, Resynchronise, WALPosition
from replicator.walreader import Changes, WALFile

if TYPE_CHECKING:
    from replicator.format.ltx import FileInfo

__all__ = ["Engine"]

MAX_SYNC_BYTES = 64 << 20
READ_BYTES = 1 << 20

log = logging.getLogger(__name__)


class Engine:
    """One database and its replicas. All methods but `snapshot` are called by one thread."""

    def __init__(
        self,
        path: Path,
        replicas: Sequence[Replica],
        *,
        meta_path: Path,
        policy: CheckpointPolicy,
        busy_timeout_s: float,
        staging_limit_bytes: int,
        force_snapshot: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.replicas = replicas
        self.lock = threading.RLock()
        self.txid = TXID(0)  # newest TXID that was encoded
        self.checkpoints = 0
        self.max_locked_s = 0.0
        self._folder = meta_path / "pyrepl"
        self._meta_path = meta_path
        self._policy = policy
        self._busy_timeout_s = busy_timeout_s
        self._staging_limit = staging_limit_bytes
        self._force_snapshot = force_snapshot
        self._clock = clock
        self._database = Database(path, busy_timeout_s=busy_timeout_s)
        self._table: PageTable | None = None
        self._staging: Staging | None = None
        self._lock_file = -1
        self._position: WALPosition = NO_WAL  # end of what was read for encoding
        self._commit = 0
        self._timestamp_ms = 0
        self._resync_reason: str | None = None
        self._tails: list[Changes] = []
        self._snapshots: list[Snapshot] = []
        self._frames_since: float | None = None
        self._failures = 0
        self._contended = False
        self._last_attempt = 0.0

    # -- opening -----------------------------------------------------------------------------------------------------------------

    def open(self) -> list[Entry]:
        """Lock, connect, find the position; returns entries that an earlier run staged and did not store.

        Raises:
            EngineRunning: another engine holds the metadata directory.
            DatabaseStateError, ReplicaStateError, RestoreError, StorageError: see there. Everything is released again.
        """
        try:
            return self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> list[Entry]:
        if not self.path.exists():
            raise DatabaseNotFound(self.path)
        self._database.open()
        self._take_lock()
        self._staging = Staging(self._folder / "staged", limit_bytes=self._staging_limit)
        known = self._read_known()
        recorded = [replica.open() for replica in self.replicas]
        self._table = PageTable.open(self._folder / "pages")
        lineage = self._choose_lineage(recorded, known)
        for replica, found in zip(self.replicas, recorded, strict=True):
            replica.join(lineage, found, known_txid=0 if self._force_snapshot else known.get(replica.url, 0))
        head = max(self.replicas, key=lambda replica: replica.txid)
        staged = self._staged_after(head.txid)
        self._table = self._bring_to(head, lineage, staged)
        self._salvage_litestream()
        state = self._table.state
        self.txid, self._commit, self._timestamp_ms = state.txid, state.commit, state.timestamp_ms
        self._position = state.position
        self._resync_reason = "first sync" if not state.txid else None
        self._write_known()
        return staged

    def _take_lock(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            self._lock_file = -1
            raise EngineRunning(self.path) from None

    def _choose_lineage(self, recorded: Sequence[bytes | None], known: dict[str, int]) -> bytes:
        """One lineage for the table and all replicas. Empty, unknown replicas begin a new one."""
        table = self._table.state.lineage if self._table else None
        stored = [found for found in recorded if found is not None]
        empty = all(replica.txid == 0 for replica in self.replicas)
        if empty and (self._force_snapshot or not any(replica.url in known for replica in self.replicas)):
            # Nothing is stored, and nothing is known to have been: TXID 1 of a new history, unless a replica already names one.
            if self._table is not None:
                self._table.close()
                self._table = None
            assert self._staging is not None
            self._staging.clear()
            return stored[0] if stored else new_lineage()
        if table is not None and stored and table not in stored:
            raise LineageMismatch(self.replicas[0].url, expected=table.hex(), got=stored[0].hex())
        return table or (stored[0] if stored else new_lineage())

    def _staged_after(self, txid: TXID) -> list[Entry]:
        """Return the staged entries that continue the replica's chain; remove the others."""
        assert self._staging is not None
        table_txid = self._table.state.txid if self._table else TXID(0)
        nothing = _no_pages()
        entries: dict[TXID, list[OutFile]] = {}
        for level, min_txid, max_txid, path in self._staging.files():
            if txid < max_txid <= table_txid:
                with contextlib.suppress(FormatError):
                    header = _verify(path)
                    entries.setdefault(max_txid, []).append(OutFile(level, min_txid, max_txid, header.timestamp_ms, path))
                    continue
            path.unlink(missing_ok=True)
        found = []
        for expected in range(txid + 1, table_txid + 1):
            files = entries.get(TXID(expected))
            if files is None:
                break
            found.append(Entry(TXID(expected), tuple(files), nothing, 0, 0, files[-1].timestamp_ms, NO_WAL))
        return found

    def _bring_to(self, head: Replica, lineage: bytes, staged: Sequence[Entry]) -> PageTable:
        """Return a table that describes the end of the chain (with what is staged), by the cheapest way that is proven."""
        table = self._table
        if table is not None and table.state.lineage == lineage:
            if table.state.txid > head.txid:
                if table.is_intact and staged and staged[-1].txid == table.state.txid:
                    return table
            elif self._roll_forward(table, head):
                return table
        if table is not None:
            log.info("page table is rebuilt from the replica db=%s replica=%s txid=%016x", self.path, head.url, head.txid)
            table.close()
            self._table = None
        assert self._staging is not None
        self._staging.clear()
        if isinstance(staged, list):
            staged.clear()
        return self._rebuild(head, lineage)

    def _roll_forward(self, table: PageTable, head: Replica) -> bool:
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

    def _rebuild(self, head: Replica, lineage: bytes) -> PageTable:
        import numpy as np

        path = self._folder / "pages"
        plan = head.plan()
        if not plan:
            return PageTable.create(path, lineage=lineage, page_size=self._database.page_size)
        sums: dict[int, list[int]] = {}
        guard = threading.Lock()

        page_size = 0

        def note(first: int, run: bytes | bytearray | memoryview) -> None:
            view = memoryview(run)
            found = [page_checksum(first + i, view[i * page_size : (i + 1) * page_size]) for i in range(len(view) // page_size)]
            with guard:
                sums[first] = found

        with head.client.open(plan[-1], size=100) as stream:
            page_size = _page_size(stream.read())
        header = read_chain(head.client, plan, note)
        starts = sorted(sums)
        pgnos = np.concatenate([np.arange(first, first + len(sums[first]), dtype=np.uint32) for first in starts])
        checksums = np.concatenate([np.array(sums[first], dtype=np.uint64) for first in starts])
        table = PageTable.create(path, lineage=lineage, page_size=page_size)
        table.apply(head.txid, pgnos, checksums, commit=header.commit, timestamp_ms=header.timestamp_ms, position=NO_WAL)
        return table

    def _salvage_litestream(self) -> None:
        """Move Litestream's own local files aside: when it comes back it would append stale pages after ours."""
        theirs = self._meta_path / "ltx"
        if theirs.is_dir():
            aside = self._folder / f"salvaged-ltx-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
            theirs.rename(aside)
            log.warning("moved Litestream's local files aside db=%s to=%s", self.path, aside)

    def _read_known(self) -> dict[str, int]:
        try:
            known = json.loads((self._folder / "replicas.json").read_bytes())
            return {str(url): int(txid) for url, txid in known.items()}
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            return {}

    def _write_known(self) -> None:
        known = self._read_known()
        known.update({replica.url: int(replica.txid) for replica in self.replicas})
        temporary = self._folder / "replicas.tmp"
        temporary.write_text(json.dumps(known, indent=1) + "\n")
        temporary.replace(self._folder / "replicas.json")

    def close(self) -> None:
        """Release everything; the WAL and the staged files stay. Closing twice does nothing."""
        with self.lock:
            for snapshot in self._snapshots:
                snapshot.cancel("the engine was closed")
            self._database.close()
            if self._table is not None:
                self._table.close()
                self._table = None
                self._write_known()
            if self._lock_file >= 0:
                os.close(self._lock_file)
                self._lock_file = -1

    # -- syncing -----------------------------------------------------------------------------------------------------------------

    def wal_size(self) -> int:
        """Logical size in bytes of the WAL that is read."""
        return self._position.offset

    def advance(self) -> Entry | None:
        """Read what was committed and encode it as the next TXID; None when nothing is new.

        Raises:
            DatabaseStateError: the database cannot be read now.
            OSError: the staging folder cannot take a large file.
        """
        with self.lock:
            if self._database.replaced():
                self._reopen()
            if self._tails:
                entry = self._encode(self._tails[0], None)
                self._tails.pop(0)
                return entry
            if self._resync_reason is None:
                with self._database.wal() as wal:
                    decision = self._database.observe(self._position, wal)
                    if isinstance(decision, Continue) and wal is not None:
                        if not self._database.is_attached:
                            self._database.attached(decision.position)
                        return self._read(decision.position, wal)
                    if not isinstance(decision, Resynchronise):
                        if self._database.is_attached:
                            return None
                        decision = Resynchronise("there is no WAL to continue in")
                self._resync_reason = decision.reason
            return self._resynchronise(self._resync_reason)

    def _read(self, position: WALPosition, wal: WALFile) -> Entry | None:
        changes = self._database.changes(position, wal, limit=MAX_SYNC_BYTES)
        if changes is None:
            self._position = position
            return None
        self._preserve(changes)
        entry = self._encode(changes, wal)
        if changes.data is None and not self._database.salts_are(changes.end.salts):
            raise DatabaseStateError(f"the WAL was restarted while it was read: {self.path}")  # read again at the next call
        return entry

    def _preserve(self, changes: Changes) -> None:
        for snapshot in self._snapshots:
            snapshot.preserve(changes)

    def _encode(self, changes: Changes, wal: WALFile | None) -> Entry:
        assert self._staging is not None
        txid = TXID(self.txid + 1)
        header = self._header(txid, txid, changes.commit, changes.end)
        images = changes.pages(wal) if wal is not None else changes.kept_pages()
        out, encoded = encode(self._staging, 0, header, self._with_growth(images, changes))
        self.txid, self._commit, self._position = txid, changes.commit, changes.end
        if self._frames_since is None:
            self._frames_since = time.monotonic()
        return Entry(txid, (out,), encoded, changes.page_size, changes.commit, header.timestamp_ms, changes.end)

    def _with_growth(self, images: Iterator[tuple[int, bytes]], changes: Changes) -> Iterator[tuple[int, bytes | memoryview]]:
        """Add the pages by which the database grew without a frame, and drop the lock page."""
        lock = lock_pgno(changes.page_size)
        grown = range(self._commit + 1, changes.commit + 1)
        if not len(grown) or len(grown) == int((changes.pgnos > self._commit).sum()):
            for pgno, image in images:
                if pgno != lock:
                    yield pgno, image
            return
        overlay = self._database.overlay(changes.start)
        expected = self._commit + 1
        for pgno, image in images:
            for missing in range(expected, pgno):
                if missing != lock:
                    yield missing, bytes(self._database.pages(missing, 1, overlay, changes.start.salts))
            if pgno > self._commit:
                expected = pgno + 1
            if pgno != lock:
                yield pgno, image
        for missing in range(expected, changes.commit + 1):
            if missing != lock:
                yield missing, bytes(self._database.pages(missing, 1, overlay, changes.start.salts))

    def _header(self, min_txid: TXID, max_txid: TXID, commit: int, position: WALPosition) -> Header:
        """WAL fields are (32, 0, current salts): whoever takes over reads this WAL from its start, and misses nothing of it."""
        self._timestamp_ms = max(self._timestamp_ms, int(self._clock() * 1000))
        return Header(
            page_size=self._database.page_size,
            commit=commit,
            min_txid=min_txid,
            max_txid=max_txid,
            timestamp_ms=self._timestamp_ms,
            wal_offset=32,
            wal_size=0,
            wal_salt1=position.salts[0],
            wal_salt2=position.salts[1],
            node_id=self.replicas[0].writer,
        )

    def settled(self, entry: Entry) -> None:
        """Move the table to an entry that is stored on a replica, or staged."""
        with self.lock:
            assert self._table is not None
            if entry.page_size != self._table.state.page_size:
                lineage = self._table.state.lineage
                self._table.close()
                self._table = PageTable.create(self._folder / "pages", lineage=lineage, page_size=entry.page_size)
            self._table.apply(
                entry.txid,
                entry.encoded.pgnos,
                entry.encoded.checksums,
                commit=entry.commit,
                timestamp_ms=entry.timestamp_ms,
                position=entry.position,
            )

    def stage(self, entry: Entry) -> Entry | None:
        """Make an entry survive this process; None when the staging folder is full."""
        assert self._staging is not None
        return None if self._staging.is_full() else self._staging.stage(entry)

    def forget(self, entry: Entry) -> None:
        """Remove the staged files of an entry that every replica holds."""
        if self._staging is not None:
            self._staging.remove(entry)

    # -- resynchronising ---------------------------------------------------------------------------------------------------------

    def _reopen(self) -> None:
        """Another file stands at the path, or none."""
        if not self.path.exists():
            raise DatabaseNotFound(self.path)
        self._database.close()
        database = Database(self.path, busy_timeout_s=self._busy_timeout_s)
        database.open()
        self._database = database
        self._tails.clear()
        self._resync_reason = "the database file was replaced"

    def _resynchronise(self, reason: str) -> Entry | None:
        """Upload exactly the pages that differ from the replicated state."""
        assert self._table is not None
        assert self._staging is not None
        for snapshot in self._snapshots:
            snapshot.cancel(reason)
        self._tails.clear()
        self._database.pin()
        self._database.refresh()
        image = self._database.image()
        self._database.attached(image.position)
        state = self._table.state
        self._frames_since = time.monotonic() if image.overlay else None
        if image.commit == 0:
            self._position, self._resync_reason = image.position, None
            return None
        if state.txid and state.page_size != image.page_size:
            entry: Entry | None = self._page_size_changed(image)
        else:
            entry = self._difference(image, state)
        log.info(
            "resynchronised db=%s reason=%r txid=%016x pages=%d of=%d",
            self.path, reason, self.txid, len(entry.encoded.pgnos) if entry else 0, image.commit,
        )  # fmt: skip
        self._position, self._commit, self._resync_reason = image.position, image.commit, None
        if entry is None:
            self._table.move(image.position)
        return entry

    def _difference(self, image: Image, state: TableState) -> Entry | None:
        assert self._staging is not None
        pages = self._differing(image)
        first = next(pages, None)
        if first is None and image.commit == state.commit:
            return None
        txid = TXID(state.txid + 1)
        header = self._header(txid, txid, image.commit, image.position)
        out, encoded = encode(self._staging, 0, header, _chain(first, pages))
        self.txid = txid
        return Entry(txid, (out,), encoded, image.page_size, image.commit, header.timestamp_ms, image.position)

    def _differing(self, image: Image) -> Iterator[tuple[int, bytes | memoryview]]:
        assert self._table is not None
        size, skip = image.page_size, lock_pgno(image.page_size)
        for first, data in self._database.chunks(image):
            view = memoryview(data)
            known = self._table.get(first, len(data) // size).tolist()
            for index, checksum in enumerate(known):
                page = view[index * size : (index + 1) * size]
                if first + index != skip and checksum != page_checksum(first + index, page):
                    yield first + index, page

    def _page_size_changed(self, image: Image) -> Entry:
        """A chain may not mix page sizes: a snapshot that ends at the new TXID comes first."""
        assert self._staging is not None
        txid = TXID(self.txid + 1)
        header = self._header(TXID(1), txid, image.commit, image.position)
        snapshot, encoded = encode(self._staging, SNAPSHOT_LEVEL, header, self._all_pages(image))
        header = self._header(txid, txid, image.commit, image.position)
        raw, _ = encode(self._staging, 0, header, self._all_pages(image))
        self.txid = txid
        return Entry(txid, (snapshot, raw), encoded, image.page_size, image.commit, header.timestamp_ms, image.position)

    def _all_pages(self, image: Image) -> Iterator[tuple[int, bytes | memoryview]]:
        size, skip = image.page_size, lock_pgno(image.page_size)
        for first, data in self._database.chunks(image):
            view = memoryview(data)
            for index in range(len(data) // size):
                if first + index != skip:
                    yield first + index, view[index * size : (index + 1) * size]

    # -- checkpoints and snapshots -----------------------------------------------------------------------------------------------

    def settle_pin(self) -> None:
        """Let others copy again after a restart of the WAL; cheap when there is nothing to do."""
        with self.lock:
            if self._resync_reason is None and not self._tails and self._database.is_attached:
                self._take(self._database.settle(self._position, self._preserve))

    def checkpoint_due(self) -> bool:
        return self._resync_reason is None and is_due(
            self._policy,
            wal_end=self._position.offset,
            page_size=self._database.page_size,
            frames_since=self._frames_since,
            failures=self._failures,
            last_attempt=self._last_attempt,
            now=time.monotonic(),
        )

    def checkpoint(self) -> bool:
        """Try to copy the whole WAL into the database file. True when the next writer restarts it. Never blocks for long."""
        with self.lock:
            if self._tails or self._resync_reason is not None or not self._database.is_attached:
                return False
            self._last_attempt = time.monotonic()
            result = self._database.checkpoint(self._position, self._preserve, copy_first=not self._contended)
            self._take(result)
            self._contended = result.contended
            if result.complete:
                self._failures = 0
                self._frames_since = None
                self.checkpoints += 1
            elif not result.moved or result.contended:
                self._failures += 1
            return result.complete

    def _take(self, result: Checkpoint) -> None:
        if result.tail is not None:
            self._tails.append(result.tail)
        self._position = result.position
        self.max_locked_s = max(self.max_locked_s, result.locked_s)

    @property
    def has_tail(self) -> bool:
        """True when `advance` has something to encode that a checkpoint read."""
        return bool(self._tails)

    def snapshot(self) -> OutFile:
        """Encode a level-9 file of the newest TXID while commits, syncs and checkpoints go on. May run in any thread.

        Raises:
            DatabaseStateError: there is nothing to take it of yet, or continuity was lost meanwhile.
        """
        assert self._staging is not None
        with self.lock:
            if not self.txid or self._resync_reason is not None or self._tails:
                raise DatabaseStateError(f"no synced state to take a snapshot of: {self.path}", hint="call sync() first")
            snapshot = Snapshot(self._database, txid=self.txid, commit=self._commit, position=self._position, folder=self._folder)
            header = self._header(TXID(1), self.txid, self._commit, self._position)
            self._snapshots.append(snapshot)
        try:
            with snapshot:
                out, _ = encode(self._staging, SNAPSHOT_LEVEL, header, snapshot.pages(lambda: self.lock))
            return out
        finally:
            with self.lock:
                self._snapshots.remove(snapshot)


def _chain(
    first: tuple[int, bytes | memoryview] | None, rest: Iterator[tuple[int, bytes | memoryview]]
) -> Iterator[tuple[int, bytes | memoryview]]:
    if first is not None:
        yield first
        yield from rest


def _no_pages() -> EncodedPages:
    import numpy as np

    return EncodedPages(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.uint64))


def _page_size(header: bytes) -> int:
    from replicator.format.ltx import decode_header

    return decode_header(header).page_size


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
            for pgno, page, _ in decoder.feed(data):
                pgnos.append(pgno)
                sums.append(page_checksum(pgno, page))
    decoder.close()
    assert decoder.header is not None
    return decoder.header, EncodedPages(np.array(pgnos, dtype=np.uint32), np.array(sums, dtype=np.uint64))
