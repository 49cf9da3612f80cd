"""The engine for the format of Litestream 0.3: what is read is the same, what is written are raw WAL segments and whole snapshots.

One entry is either a segment, the bytes of the WAL that were committed since the last one, or the beginning of a generation: a
snapshot at WAL index 0 and, when the WAL holds frames, one segment with all of them, since segments go on from there.

**Index.** It goes up when the first frames of a restarted WAL are encoded; by then all of the WAL before is, because a restart is only
followed when it is proven to have skipped nothing (`db.py`). A WAL without frames has no index: a restore wants at least one segment
for each.

**Snapshots.** 0.3.13's is some state between the end of the index before and now, and only right once all of the index was applied
again. Ours is the exact state at a position (copy on write, as for LTX), so that it is right with or without what follows; applying
the WAL from its start again rewrites the same pages.

**Where continuity is broken** a new generation begins. There is no page table: 0.3 has no file for the pages that differ.

**Crash safety.** What is stored, and what is staged, say where to go on (`v3chain.py`). The metadata folder names the generation that is ours; without
it nothing is continued.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Iterable, Iterator

from replicator.atomic import write_file
from replicator.db import Image
from replicator.engine import Engine, NotSynced
from replicator.errors import CorruptReplica, DatabaseStateError, FormatError, LineageMismatch, ObjectNotFound, StorageUnavailable
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID
from replicator.format.v3 import MAX_INDEX, Position, is_generation
from replicator.format.wal import WAL_HEADER_SIZE, WALHeader
from replicator.outbox import EncodedPages, Entry, OutFile, Staging
from replicator.replica import Replica, new_lineage
from replicator.snapshot import Snapshot
from replicator.tail import Continue
from replicator.v3chain import Tip, WALChain, content_of
from replicator.v3outbox import V3File, encode_v3, staged_entries
from replicator.v3replica import V3Replica
from replicator.walreader import Changes, WALFile

__all__ = ["V3Engine"]

MAX_OFFSET = 0xFFFFFFFF
"""0.3.13 does not see a segment that begins further on."""
READ_BYTES = 1 << 20

log = logging.getLogger(__name__)


class V3Engine(Engine):
    """As `Engine`. Its TXIDs count entries of this process."""

    _generation = ""
    _index = 0
    _begun = False
    _end = 0
    _header_of_wal: WALHeader | None = None
    _wanted = ""
    _keeps_frames = True

    @property
    def place(self) -> str:
        return str(Position(self._generation, self._index, self._end)) if self._generation else ""

    # -- opening -----------------------------------------------------------------------------------------------------------------

    def _join(self) -> list[Entry]:
        self._staging = Staging(self._folder / "staged-v3", limit_bytes=self._staging_limit, memory=self._memory)
        lineage, generation = self._read_state()
        recorded: dict[V3Replica, bytes | None] = {}
        failed: StorageUnavailable | None = None
        for replica in self._v3_replicas():
            try:
                recorded[replica] = replica.attach()
            except StorageUnavailable as error:
                replica.error, failed = str(error), failed or error
        if failed is not None and not recorded:
            raise failed
        self._lineage = lineage or next((found for found in recorded.values() if found), None) or new_lineage()
        for replica, found in recorded.items():
            if found is not None and found != self._lineage:
                raise LineageMismatch(replica.url, expected=self._lineage.hex(), got=found.hex())
        tips: dict[V3Replica, Tip] = {}
        self._resync_reason = "no generation is known here"
        for replica, found in recorded.items():
            try:
                replica.claim(self._lineage, found)
                if generation and not self._force_snapshot:
                    tips[replica] = replica.tip(generation)
            except (FormatError, CorruptReplica, ObjectNotFound) as error:
                self._resync_reason = f"{replica.url}: {error}"
            except StorageUnavailable as error:
                replica.error, failed, replica.online = str(error), error, False
        if failed is not None and not any(replica.online for replica in recorded):
            raise failed
        self._write_state(generation)
        return self._go_on(generation, tips)

    def _go_on(self, generation: str, tips: dict[V3Replica, Tip]) -> list[Entry]:
        """Find the place behind what is stored and staged; without a proven one the first sync begins a generation."""
        assert self._staging is not None
        if self._force_snapshot:
            self._resync_reason = "asked for"
            self._staging.clear()
        head = max(tips.values(), key=lambda tip: tip.position, default=None)
        entries, end = self._continuing(generation, head)
        first = entries[0].txid - 1 if entries else int(head is not None)
        self.txid = TXID(first + len(entries))
        for replica, tip in tips.items():
            replica.end = tip.position
            if tip == head:
                replica.txid = TXID(first)
        if end is not None:
            self._take_place(end)
            self._attach()
        return entries

    def _attach(self) -> None:
        """Prove at once that the WAL ends where the stored bytes do, when it does: its restart by the next writer is proven then, too."""
        if self._resync_reason is not None:
            return
        with self._database.wal() as wal:
            if wal is None or self._database.observe(self._position, wal) != Continue(self._position, restarted=False):
                return
            found = self._database.changes(self._position, wal, limit=1)
            if found is None and not self._database.is_end_doubtful and self._database.salts_are(self._position.salts):
                self._database.attached(self._position)

    def _take_place(self, tip: Tip) -> None:
        self._generation, self._index, self._begun = tip.generation, tip.index, tip.begun
        self._position, self._commit, self._end = tip.wal, tip.commit, tip.wal.offset
        if tip.header is None:
            self._resync_reason = "nothing but a snapshot is stored"
        elif tip.header.page_size != self._database.page_size:
            self._resync_reason = f"the page size changed from {tip.header.page_size} to {self._database.page_size}"
        else:
            self._resync_reason = None

    def _continuing(self, generation: str, head: Tip | None) -> tuple[list[Entry], Tip | None]:
        """Return the staged entries that go on where the replicas end, verified, and their end; remove the others."""
        assert self._staging is not None
        found: list[Entry] = []
        at = head
        for entry in staged_entries(self._staging):
            try:
                if _files(entry)[-1].generation != generation or (found and entry.txid != found[-1].txid + 1):
                    raise FormatError("it belongs elsewhere")
                at = _after(at, entry)
                found.append(entry)
            except FormatError as error:
                log.info("staged files are left out db=%s entry=%d reason=%r", self.path, entry.txid, str(error))
                self._staging.remove(entry)
        if at is None or at.header is None:  # a snapshot alone cannot be continued: another one follows at once
            for entry in found:
                self._staging.remove(entry)
            return [], head
        return found, at

    def join_later(self, replica: Replica) -> None:
        assert isinstance(replica, V3Replica)
        recorded = replica.attach()
        replica.txid = TXID(0)
        replica.claim(self._lineage, recorded)

    def _v3_replicas(self) -> list[V3Replica]:
        return [replica for replica in self.replicas if isinstance(replica, V3Replica)]

    def _read_state(self) -> tuple[bytes, str]:
        """Return the lineage and the generation that are ours; empty ones when nothing is known."""
        try:
            state = json.loads((self._folder / "v3.json").read_bytes())
            lineage, generation = bytes.fromhex(state["lineage"]), str(state["generation"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return b"", ""
        return lineage, generation if is_generation(generation) else ""

    def _write_state(self, generation: str) -> None:
        state = {"lineage": self._lineage.hex(), "generation": generation}
        write_file(self._folder / "v3.json", json.dumps(state).encode() + b"\n")

    # -- syncing -----------------------------------------------------------------------------------------------------------------

    def begin_generation(self, reason: str) -> None:
        """Let the next sync begin a generation. May be called from any thread."""
        with self.lock:
            self._wanted = reason

    def advance(self) -> Entry | None:
        with self.lock:
            if not self._tails and self._wanted:
                self._resync_reason, self._wanted = self._wanted, ""
            if not self._tails and self._resync_reason is None and self._is_too_far:
                # What is committed beyond has no name. It is copied to the database file, and a new generation begins there.
                self._damaged = True
                self._resync_reason = f"the WAL has grown to {self._position.offset} bytes, where names of format v0.3 end"
            if self._index >= MAX_INDEX:
                self._resync_reason = "the last index is used up"
            return super().advance()

    @property
    def _is_too_far(self) -> bool:
        return self._position.offset > MAX_OFFSET

    def _preserve(self, changes: Changes) -> None:
        super()._preserve(changes)
        if changes.start.offset == WAL_HEADER_SIZE:
            self._header_of_wal = self._database.wal_header()

    def _encode(self, changes: Changes, wal: WALFile | None) -> Entry:
        assert self._staging is not None
        txid = TXID(self.txid + 1)
        starts = changes.start.offset == WAL_HEADER_SIZE
        index = self._index + 1 if starts and self._begun else self._index
        offset = 0 if starts else changes.start.offset
        assert starts or (self._begun and offset == self._end), "frames are missing"
        header = self._header_of_wal
        if starts and (header is None or (header.salt1, header.salt2) != changes.start.salts):
            raise DatabaseStateError(f"the WAL was restarted while it was read: {self.path}")
        file = V3File(0, txid, txid, self._next_timestamp_ms(), b"", self._generation, index, offset, changes.end.offset)
        frames = _frames(changes, wal)
        out = encode_v3(self._staging, file, [header.encode(), *frames] if starts and header else frames)
        if changes.data is None and not self._database.salts_are(changes.end.salts):
            out.discard()
            raise DatabaseStateError(f"the WAL was restarted while it was read: {self.path}")  # read again at the next call
        if self._database.replaced():
            out.discard()
            raise DatabaseStateError(f"the database was replaced while it was read: {self.path}")
        self.txid, self._commit, self._position = txid, changes.commit, changes.end
        self._index, self._begun, self._end = index, True, changes.end.offset
        if wal is not None:
            self._note_frames()
        return Entry(txid, (out,), EncodedPages.none(), changes.page_size, changes.commit, out.timestamp_ms, changes.end)

    def settled(self, entry: Entry) -> None:
        """Nothing to move: what is stored and staged says where to go on."""

    def stage(self, entry: Entry) -> Entry | None:
        """As there; beyond the folder's bound, too, while a generation is wanted: whoever waits for that one makes room."""
        assert self._staging is not None
        return self._staging.stage(entry) if self._wanted else super().stage(entry)

    def forget(self, entry: Entry) -> None:
        if self._staging is not None:
            self._staging.remove(entry)

    # -- generations -------------------------------------------------------------------------------------------------------------

    def _resynchronise(self, reason: str) -> Entry | None:
        assert self._staging is not None
        for snapshot in self._snapshots:
            snapshot.cancel(reason)
        self._tails.clear()
        image = self._image()
        self._frames_since = time.monotonic() if image.overlay else None
        self._position, self._commit = image.position, image.commit
        if image.commit == 0:
            return None  # nothing to take a snapshot of; it stays so until there is
        generation, txid, timestamp_ms = secrets.token_hex(8), TXID(self.txid + 1), self._next_timestamp_ms()
        end = image.position.offset if image.position.offset > WAL_HEADER_SIZE else 0
        blank = V3File(SNAPSHOT_LEVEL, txid, txid, timestamp_ms, b"", generation, 0, 0, end)
        snapshot_file = encode_v3(self._staging, blank, (data for _, data in self._database.chunks(image)))
        files = [snapshot_file]
        try:
            if end:
                blank = V3File(0, txid, txid, timestamp_ms, b"", generation, 0, 0, end)
                files.append(encode_v3(self._staging, blank, self._whole_wal(image)))
            if self._database.replaced():
                raise DatabaseStateError(f"the database was replaced while it was read: {self.path}")
            self._write_state(generation)
        except BaseException:
            for file in files:
                file.discard()
            raise
        log.info("new generation db=%s generation=%s reason=%r pages=%d wal=%d", self.path, generation, reason, image.commit, end)
        self._generation, self._index, self._begun, self._end = generation, 0, bool(end), end
        self.txid, self._resync_reason = txid, None
        return Entry(txid, tuple(files), EncodedPages.none(), image.page_size, image.commit, timestamp_ms, image.position, whole=True)

    def _whole_wal(self, image: Image) -> Iterator[bytes]:
        """Yield the WAL from its header to the image's position, verified. Raises `DatabaseStateError` when it has changed meanwhile."""
        chain, offset = WALChain(), 0
        with self._database.wal() as wal:
            try:
                while wal is not None and offset < image.position.offset:
                    data = wal.read(offset, min(READ_BYTES, image.position.offset - offset))
                    if not data:
                        break
                    chain.feed(data)
                    offset += len(data)
                    yield data
            except FormatError as error:
                raise DatabaseStateError(f"the WAL was restarted while it was read: {self.path}") from error
        if chain.end != image.position:
            raise DatabaseStateError(f"the WAL was restarted while it was read: {self.path}")

    # -- checkpoints and snapshots -----------------------------------------------------------------------------------------------

    def settle_pin(self) -> None:
        if not self._is_too_far:
            super().settle_pin()

    def checkpoint(self) -> bool:
        return not self._is_too_far and super().checkpoint()

    @property
    def can_snapshot(self) -> bool:
        """As there; a generation that is wanted begins first."""
        return self.txid > 0 and self._resync_reason is None and not self._tails and not self._wanted

    def snapshot(self) -> OutFile:
        with self.lock:
            if not self.can_snapshot:
                raise NotSynced(f"no synced state to take a snapshot of: {self.path}", hint="call sync() first")
            snapshot = Snapshot(self._database, txid=self.txid, commit=self._commit, position=self._position, folder=self._folder)
            timestamp_ms = self._next_timestamp_ms()
            file = V3File(SNAPSHOT_LEVEL, self.txid, self.txid, timestamp_ms, b"", self._generation, self._index, 0, self._end)
            self._snapshots.append(snapshot)
        try:
            with snapshot:
                return encode_v3(self.scratch, file, _with_lock_page(snapshot.pages(lambda: self.lock), snapshot), unique=True)
        finally:
            with self.lock:
                self._snapshots.remove(snapshot)


def _frames(changes: Changes, wal: WALFile | None) -> Iterable[bytes | memoryview]:
    """Return the bytes of all frames of a stretch."""
    start, end = changes.start.offset, changes.end.offset
    if changes.data is not None:
        return [memoryview(changes.data)[: end - start]]
    assert wal is not None
    return _read(wal, start, end)


def _read(wal: WALFile, start: int, end: int) -> Iterator[bytes]:
    for offset in range(start, end, READ_BYTES):
        size = min(READ_BYTES, end - offset)
        data = wal.read(offset, size)
        if len(data) < size:
            raise DatabaseStateError("the WAL became shorter while it was read")
        yield data


def _with_lock_page(pages: Iterator[tuple[int, bytes | memoryview]], snapshot: Snapshot) -> Iterator[bytes | memoryview]:
    """Yield all pages: a snapshot has the lock page, too, as zeros."""
    expected = 1
    for pgno, page in pages:
        if pgno > expected:
            yield bytes(snapshot.page_size)
        yield page
        expected = pgno + 1
    if expected <= snapshot.commit:
        yield bytes(snapshot.page_size)


def _files(entry: Entry) -> list[V3File]:
    return [file for file in entry.files if isinstance(file, V3File)]


def _after(tip: Tip | None, entry: Entry) -> Tip:
    """Return the end of a staged entry that goes on at `tip`. Its files are read. Raises `FormatError` when it does not, or is damaged."""
    for file in _files(entry):
        if file.is_snapshot:
            if tip is not None and tip.begun:
                raise FormatError("it is stored")
            for _ in content_of(file.body):
                pass
            tip = Tip(file.generation, 0)
            continue
        at = tip.position if tip else None
        if at is None or tip is None or (file.index, file.offset) not in ((at.index, at.offset), (at.index + tip.begun, 0)):
            raise FormatError("it does not go on where the replica ends")
        chain = WALChain(tip if file.offset else None)
        for piece in content_of(file.body):
            chain.feed(piece)
        chain.end_segment()
        if not chain.commit or chain.end.offset != file.end:
            raise FormatError(f"{file.staged_name} does not end where it should")
        tip = Tip(file.generation, file.index, True, chain.end, chain.commit, chain.header)
    assert tip is not None
    return tip
